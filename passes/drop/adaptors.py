"""PRACTISE's recoverability: 1x1 adaptors around a dropped region, trained by feature mimicking. For comparison with
the closed form.

The paper (Wang & Wu, CVPR 2023, arXiv 2202.07861, section 3.2) drops a block, puts linear 1x1 adaptors, started at
identity, after the last convolution of each block before it and in front of the first convolutions behind it, trains
the adaptors alone, and takes the error left as the block's recoverability. An adaptor next to a convolution is linear
and so is the convolution: here the pair is trained as one weight,

    W' = A W  (after),      W' = W B  (in front),

so merging the adaptors is exact and no node is inserted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.func import functional_call

from ...compiler.analysis.regions import Region
from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.ir.edit import expose, set_tensors, signature
from ...compiler.ir.execute import device_of, placed
from ...compiler.ir.program import Program, as_arguments
from ...compiler.support.setting_checks import Allowed, check_number, check_whole, settled
from ..solve.features import head_features
from ..solve.joins import is_join
from ..solve.layers import Layer, find_layers
from ..solve.targets import trace_target
from .drop_blocks import standing_for


@dataclass(frozen=True, kw_only=True)
class AdaptorSettings:
    """The paper's: SGD 0.02 with momentum 0.9 and weight decay 1e-4, batch 64, x 0.1 at 40 % and 80 % of 1,000
    iterations or more."""

    iterations: int = 1000
    learning_rate: float = 0.02
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_whole("iterations", self.iterations, Allowed(least=1))
        check_number("learning_rate", self.learning_rate, Allowed(above=0))
        check_whole("batch_size", self.batch_size, Allowed(least=1))
        settled(self)


@dataclass(frozen=True, kw_only=True)
class Around:
    """Where adaptors stand: the `entry` of the region that was bypassed last, and all that were dropped."""

    entry: str
    drops: tuple[Region, ...]


def train_adaptors(
    teacher: Program,
    student: Program,
    calibration: CalibrationSet,
    around: Around,
    *,
    settings: AdaptorSettings | None = None,
    seed: int = 0,
) -> Program:
    """Train adaptors around a region that was bypassed and merge them into the student's weights.

    The graph stays as it is; layers without an adaptor keep their weights. Deterministic for a seed.
    """
    settings, entry, drops = settings or AdaptorSettings(), around.entry, around.drops
    features = head_features(teacher)
    wanted = expose(teacher, features)
    module = expose(student, [standing_for(name, drops) for name in features])
    after, before = adapted_layers(student, entry)
    factors = {
        layer.weight: _identity(student, layer, side)
        for side, group in (("out", after), ("in", before))
        for layer in group
    }
    if not factors:
        return student
    optimiser = torch.optim.SGD(factors.values(), lr=settings.learning_rate, momentum=0.9, weight_decay=1e-4)
    steps = [int(0.4 * settings.iterations), int(0.8 * settings.iterations)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    inner = {layer.weight for layer in before}
    finite = torch.ones((), dtype=torch.bool, device=device_of(student))
    for _ in range(settings.iterations):
        chosen = torch.randint(0, len(calibration), (min(settings.batch_size, len(calibration)),), generator=generator)
        args, kwargs = as_arguments(placed(student, calibration.batch(chosen)))
        with torch.no_grad():
            theirs = wanted(*args, **kwargs)
        ours = functional_call(module, _merged(student, factors, inner), args, kwargs)
        loss = torch.stack([torch.nn.functional.mse_loss(a, b) for a, b in zip(ours, theirs, strict=True)]).sum()
        finite = finite & loss.detach().isfinite()  # read once, in the end
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    if not bool(finite):
        return student
    merged = {name: tensor.detach() for name, tensor in _merged(student, factors, inner).items()}
    return set_tensors(student, merged, note=f"merge {len(merged)} adaptors")


def adapted_layers(student: Program, entry: str) -> tuple[list[Layer], list[Layer]]:
    """(layers that get an adaptor after them, layers that get one in front) for a region bypassed at `entry`.

    After: layers before the entry that end a branch of the entry's stream. In front: layers behind it that read this
    stream.
    """
    layers, _ = find_layers(student)
    stream = signature(student.nodes[entry])
    after, before = [], []
    for name, layer in layers.items():
        if layer.groups != 1:
            continue
        source = student.nodes[layer.input]
        if student.order[name] < student.order[entry]:
            anchor = trace_target(student, layer, {}).anchor
            if is_join(student, anchor) and signature(student.nodes[anchor]) == stream:
                after.append(layer)
        elif signature(source) == stream and len(source.users) > 1:
            before.append(layer)
    return after, before


def _identity(student: Program, layer: Layer, side: str) -> torch.Tensor:
    weight = student.module.get_parameter(layer.weight)
    size = weight.shape[0 if side == "out" else 1]
    return torch.eye(size, dtype=weight.dtype, device=weight.device).requires_grad_()


def _merged(student: Program, factors: dict[str, torch.Tensor], inner: set[str]) -> dict[str, torch.Tensor]:
    result = {}
    for name, factor in factors.items():
        weight = student.module.get_parameter(name).detach()
        flat = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        product = (
            torch.einsum("oik,ij->ojk", flat, factor) if name in inner else torch.einsum("po,oik->pik", factor, flat)
        )
        result[name] = product.reshape(weight.shape)
    return result
