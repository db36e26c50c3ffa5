"""How far calibration samples are from the data that a network was trained on.

A batch norm keeps the mean and the variance of what it was given in training, channel by channel. What it is given by
the calibration samples is compared with that: with m, s the mean and standard deviation of a channel on the samples and
M, S those that the norm keeps,

    d = sqrt(mean over channels of ((m - M)^2 + (s - S)^2) / (S^2 + eps)),

the 2-Wasserstein distance of two normal distributions in standard deviations of the channel, each at most `MOST`. A
network without batch norms, or one whose norms were folded into its layers or never trained, says nothing of its data
by itself. A second set, of data that it was trained on or meets in use, can stand for them: then what the norms are
given, or what the layers compute, is compared between both.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..devices.precision import WideSum, totals, widest
from ..ir.cost import node_macs
from ..ir.execute import bind, run_until
from ..ir.norms import batch_norm_of
from ..ir.program import Program, is_call, is_constant, is_tensor
from ..processes.sharing import in_batches, own
from ..support.memory import samples_at_once
from .calibration_set import CalibrationSet
from .live_bytes import live_bytes

aten = torch.ops.aten

_CONVOLUTIONS = (
    *(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
)

#: Samples that are looked at: the statistics of a channel are those of all its places.
SAMPLES = 64
#: No channel counts for more standard deviations than these.
MOST = 10.0
#: A channel that varies less than this share of its layer's median says little, and dividing by it would say much.
LEAST_SHARE = 0.05
#: From such a distance on, as the median over layers, samples are unlike the data of the network: a ResNet-56 finds its
#: own images at 0.11, other photographs of the same size at 0.14, images of half the contrast at 0.32, white noise at
#: 0.72. Fewer samples than `FEWEST` say too little.
FAR, FEWEST = 0.3, 8


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Mean and standard deviation of each channel of one value, in float64."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def untrained(self) -> bool:
        """Whether these are what a batch norm begins with: means of 0 and deviations of 1 (and eps)."""
        return not bool(self.mean.any()) and bool(((self.deviation - 1).abs() < 1e-3).all())

    @property
    def at_least(self) -> torch.Tensor:
        """The deviations; what varies less than `LEAST_SHARE` of what the median channel does counts as if it did
        that."""
        return self.deviation.clamp(min=LEAST_SHARE * float(self.deviation.median()))

    def distance_to(self, known: Channels) -> float:
        """In standard deviations of the known ones, `at_least`."""
        deviation = known.at_least
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        squares = ((self.mean - known.mean) / deviation).square()
        squares = squares + ((self.deviation - known.deviation) / deviation).square()
        return float(squares.nan_to_num(nan=MOST**2, posinf=MOST**2).clamp(max=MOST**2).mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class DataDistance:
    """How far samples are from a network's data, in standard deviations: by layer, with the node that the values are
    of. `known_from` is ``batch norms`` or ``reference``."""

    by_layer: Mapping[str, float]
    known_from: str

    @property
    def median(self) -> float:
        """Over the layers."""
        return float(torch.tensor(list(self.by_layer.values()), dtype=torch.float64).quantile(0.5))

    @property
    def far(self) -> bool:
        return self.median >= FAR

    def to_dict(self) -> dict[str, Any]:
        return {
            "known_from": self.known_from,
            "median": self.median,
            "largest": max(self.by_layer.values()),
            "by_layer": dict(self.by_layer),
        }

    def __str__(self) -> str:
        whose = whose_statistics(self.known_from)
        low, high = min(self.by_layer.values()), max(self.by_layer.values())
        return f"{self.median:.2f} standard deviations from what {whose} ({low:.2f} to {high:.2f} by layer)"


def whose_statistics(known_from: str) -> str:
    """What `DataDistance.known_from` says, in words behind "from what"."""
    return "its batch norms keep" if known_from == "batch norms" else "the reference gives"


def warn_if_far(distance: DataDistance | None, samples: int) -> None:
    """Warn where the samples are unlike the data of the network, and are not so few that chance makes them so."""
    if distance is not None and distance.far and samples >= FEWEST:
        warnings.warn(
            f"the samples are {distance}: what is fitted to them may not hold for the data that the network is for. "
            "Are they scaled as the network expects (range, mean, order of channels)?",
            stacklevel=4,
        )


def data_distance(
    program: Program, samples: CalibrationSet, reference: CalibrationSet | None = None
) -> DataDistance | None:
    """How far samples are from what a network knows of its data, or from a reference; None where nothing is known.

    Arguments:
        program: The network as it was captured.
        samples: Up to `SAMPLES` of them are looked at.
        reference: Samples of the data that the network was trained on or meets in use. Without, the statistics of batch
            norms stand for them.
    """
    kept = kept_by_norms(program)
    if reference is not None:
        names = list(kept) or _contracted(program)
        known, whose = channel_statistics(program, names, reference), "reference"
    else:
        known, whose = {name: channels for name, channels in kept.items() if not channels.untrained}, "batch norms"
    if not known:
        return None
    seen = channel_statistics(program, list(known), samples)
    return DataDistance(by_layer={name: seen[name].distance_to(known[name]) for name in known}, known_from=whose)


def channel_statistics(program: Program, names: Sequence[str], samples: CalibrationSet) -> dict[str, Channels]:
    """Of values by their node, over `SAMPLES` of the samples, taken evenly. Dim 1 holds the channels of what a batch
    norm reads or a convolution computes, the last dimension those of other values. Sums in float64."""
    few = samples.take(torch.arange(min(SAMPLES, len(samples))) * len(samples) // min(SAMPLES, len(samples)))
    sums = {name: (WideSum(), WideSum(), WideSum()) for name in names}
    dims = {name: _channel_dim(program, program.nodes[name]) for name in names}
    for _, batch in own(few.batches(samples_at_once(live_bytes(program).most, in_batches(len(few), 32)))):
        with torch.no_grad():
            values = run_until(program, names, bind(program, batch))
        for name, (total, squares, count) in sums.items():
            rows = values[name].movedim(dims[name], 0).flatten(1)
            rows = rows.to(widest(rows.device))
            total.add(rows.sum(1))
            squares.add(rows.square().sum(1))
            count.add(torch.tensor(float(rows.shape[1]), dtype=torch.float64, device="cpu"))
    whole = iter(totals([part for parts in sums.values() for part in parts]))
    found = {}
    for name, added, square, number in zip(sums, whole, whole, whole, strict=True):
        assert added is not None and square is not None and number is not None  # there is a sample
        mean = added / number
        found[name] = Channels(mean=mean, deviation=(square / number - mean.square()).clamp(min=0).sqrt())
    return found


def _channel_dim(program: Program, node: fx.Node) -> int:
    """Where the channels of a value are: (N, C, L) of one-dimensional signals is told from (N, L, C) of tokens by what
    makes it and what reads it."""
    if is_call(node, *_CONVOLUTIONS):
        return 1
    norms = [batch_norm_of(program, user) for user in node.users if user.op == "call_function"]
    return 1 if any(norm is not None and norm.node != node.name for norm in norms) else -1


def kept_by_norms(program: Program) -> dict[str, Channels]:
    """What the batch norms in eval mode keep of their inputs, by the nodes that compute these, in topological
    order."""
    found = {}
    for name, node in program.nodes.items():
        norm = batch_norm_of(program, node) if node.op == "call_function" else None
        if norm is not None and norm.node == name:
            found[str(node.args[0])] = Channels(mean=norm.mean, deviation=norm.deviation)
    return found


def _contracted(program: Program) -> list[str]:
    """Results of the layers, in order."""
    return [
        name
        for name, node in program.nodes.items()
        if is_tensor(node) and node_macs(program, node) and node.meta["val"].is_floating_point()
        if node.meta["val"].dim() >= 2 and any(map(is_constant, node.all_input_nodes))
    ]
