"""The channel lattice of a backend: the multiples at which its latency steps, found by measuring small networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.ir.cost import node_macs
from ...compiler.ir.program import Program, is_constant
from ...compiler.support.progress import Progress, silent
from ..measure.backend import Backend
from ..measure.bootstrap import ratio_interval
from ..measure.conditions import Conditions
from ..measure.environment import lasting
from ..measure.inputs import draw_inputs, model_specs
from ..measure.loading import loaded
from ..measure.measure import measure_savings
from ..measure.measurement_cache import MeasurementCache
from ..measure.timing import Timing
from .layered_model import Layer, layered_model

if TYPE_CHECKING:
    from .integer_kernels import IntegerKernels

MULTIPLES = (2, 4, 8, 16, 32)
#: Raising channels is next to free when it costs at most this share of what time in proportion to them would.
COST = 0.25
#: Counts between two multiples of 32: odd ones, even ones, and near either end.
COUNTS = (33, 35, 38, 44, 49, 51, 54, 60)
_OUTER = 64  # channels at both ends of a probe
_ROUNDS = 16
_DEVIATION = 0.05  # of the probes' weights
_SHARE = 0.05  # of a network's MACs, for a kind of layer to have a say
_FORMAT = 2
#: The kinds of layers that have a lattice of their own.
KINDS = ("conv", "depthwise", "linear")
#: An operator, its layers in a row, and the shape of one sample that they are run on.
_Probe = tuple[str, list[Layer], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """`steps` gives for each kind of layer (``conv``, ``depthwise``, ``linear``) the largest multiple to which channel
    counts can be raised at next to no cost; 1 where every channel counts. `times` are the probes' latencies by kind and
    channel count, over that of `_OUTER` channels."""

    steps: Mapping[str, int]
    times: Mapping[str, Mapping[int, float]]

    def step_of(self, program: Program, name: str) -> int:
        """The step of a node's kind of layer; 1 where that is none of these."""
        return self.steps.get(_kind(program, program.nodes[name]) or "", 1)

    def multiple_for(self, program: Program) -> int:
        """The multiple for a network: the largest step of a kind of layer that does at least 5 % of its
        multiply-accumulates; 1 for a network without such layers."""
        macs = dict.fromkeys(self.steps, 0)
        for node in program.graph.nodes:
            count = node_macs(program, node)
            kind = _kind(program, node) if count else None
            if kind in macs:
                macs[kind] += count
        total = sum(macs.values())
        return max([1, *(self.steps[kind] for kind, count in macs.items() if count and count >= _SHARE * total)])


def probe_lattice(
    backend: Backend,
    *,
    conditions: Conditions | None = None,
    cache: MeasurementCache | None = None,
    kinds: Collection[str] = KINDS,
    integers: IntegerKernels | None = None,
    progress: Progress = silent,
) -> Lattice:
    """Find the lattice of a backend for some kinds of layers, with `integers` of such that compute in these; kept in
    `cache` under its environment (versions, device) and the batch and threads of `conditions`.

    Two layers of each kind with 33 to 64 channels between them are timed side by side; `lattice_step` reads the step
    off the times. Takes some seconds the first time. Raises BackendError.
    """
    cache, how = cache if cache is not None else MeasurementCache(None), conditions or Conditions()
    basis = f"lattice {_FORMAT} | batch {how.batch} | threads {how.threads} | {lasting(backend.environment())}"
    basis += f" | {integers}" if integers is not None else ""
    keys = {kind: f"{basis} | {kind}" for kind in _PROBES if kind in kinds}
    known = cache.get([*keys.values()])
    missing = [kind for kind, key in keys.items() if key not in known]
    for place, kind in enumerate(missing):

        def show(done: int, total: int, place: int = place) -> None:
            progress("probe the channel lattice", place * total + done, len(missing) * total)

        models = {count: _model(_PROBES[kind](count), how.batch, integers) for count in _PROBED}
        samples = _timed(backend, models, how, show)
        full = float(np.median(samples[_OUTER]))
        times = {count: round(float(np.median(s)) / full, 4) for count, s in samples.items()}
        cache.put({keys[kind]: {"step": lattice_step(samples), "times": times}})
    known = cache.get([*keys.values()])
    return Lattice(
        steps={kind: int(known[key]["step"]) for kind, key in keys.items()},
        times={kind: {int(c): float(t) for c, t in known[key]["times"].items()} for kind, key in keys.items()},
    )


def lattice_step(samples: Mapping[int, Sequence[float]]) -> int:
    """The largest of `MULTIPLES` to which channel counts can be raised at next to no cost; 1 where there is none.

    `samples` holds each channel count's times, paired by position. Raising the counts that lie on the step found so
    far to a multiple of m has cost sum log(t(raised) / t(count)); time that grew with the channels would have cost
    sum log(raised / count). m is a step when the first is at most a quarter of the second.
    """
    step = 1
    for multiple in MULTIPLES:
        between = [c for c in samples if c % step == 0 and c % multiple and _raised(c, multiple) in samples]
        cost = sum(math.log(ratio_interval(samples[c], samples[_raised(c, multiple)]).estimate) for c in between)
        growth = sum(math.log(_raised(c, multiple) / c) for c in between)
        if between and cost <= COST * growth:
            step = multiple
    return step


def _raised(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _timed(
    backend: Backend,
    models: Mapping[int, bytes],
    how: Conditions,
    show: Callable[[int, int], None],
) -> dict[int, list[float]]:
    """Times of the models of each channel count, in ms, paired by rounds."""
    first, *others = models
    inputs = draw_inputs(model_specs(models[first]), how.batch, how.seed)
    timing = Timing(warmup_ms=50.0, seed=how.seed, min_block_ms=5.0)
    with loaded(backend, [(model, inputs) for model in models.values()], threads=how.threads) as runners:
        measured = measure_savings(runners[0], runners[1:], timing, pairs=_ROUNDS, environment={}, progress=show)
    times = {first: [before for before, _ in measured[0].samples]}
    return times | {count: [after for _, after in m.samples] for count, m in zip(others, measured, strict=True)}


def _model(probe: _Probe, batch: int, integers: IntegerKernels | None) -> bytes:
    operator, layers, shape = probe
    model = layered_model(operator, layers, [batch, *shape], deviation=_DEVIATION, last_relu=False, integers=integers)
    return bytes(model.SerializeToString())


def kinds_in(program: Program, names: Iterable[str]) -> set[str]:
    """The kinds of layers among some nodes."""
    return {kind for name in names if (kind := _kind(program, program.nodes[name])) is not None}


def _kind(program: Program, node: Any) -> str | None:
    weights = [program.constant(n) for n in node.all_input_nodes if is_constant(n)]
    weight = next((w for w in weights if w.dim() > 1), None)
    if weight is None:
        return None
    if weight.dim() == 2:
        return "linear"
    return "depthwise" if weight.shape[1] == 1 and weight.shape[0] > 1 else "conv"


def _conv(channels: int) -> _Probe:
    return "Conv", _convolutions([_OUTER, channels, _OUTER], 3), (_OUTER, 14, 14)


def _depthwise(channels: int) -> _Probe:
    return "Conv", _convolutions([_OUTER, channels, channels, _OUTER], 1, grouped=1), (_OUTER, 14, 14)


def _linear(channels: int) -> _Probe:
    return "MatMul", [([_OUTER, channels], {}), ([channels, _OUTER], {})], (196, _OUTER)


def _convolutions(widths: list[int], kernel: int, grouped: int = -1) -> list[Layer]:
    """Convolutions that keep the size of their values; the one at position `grouped` is depthwise, 3x3."""
    layers: list[Layer] = []
    for place, (before, after) in enumerate(pairwise(widths)):
        groups, size = (before, 3) if place == grouped else (1, kernel)
        layers.append(([after, before // groups, size, size], {"pads": [size // 2] * 4, "group": groups}))
    return layers


_PROBES: dict[str, Callable[[int], _Probe]] = dict(zip(KINDS, (_conv, _depthwise, _linear), strict=True))
#: The channel counts that are timed, `_OUTER` first.
_PROBED = sorted({_OUTER, *COUNTS, *(_raised(c, m) for c in COUNTS for m in MULTIPLES)}, reverse=True)
