"""How much two networks differ on samples: what makes samples show where one is not yet as the other.

For classifiers the Jensen-Shannon divergence of the classes' probabilities, in bits, between 0 and 1 (Adaptive
DeepInversion, Yin et al., CVPR 2020, arXiv 1912.08795, section 3.3, whose loss is R = 1 - JS). For other outputs
d / (1 + d), with d the relative squared distance of the outputs, which is between 0 and 1 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional

from ..data.synthetic import SyntheticSet
from ..export.edit_types import in_stored_types, widened
from ..frontend.capture import Model, capture, opened
from ..ir.edit_folds import fold_parameters
from ..ir.program import Program, is_call, is_tensor, output_nodes
from ..support.errors import CalibrationError, CaptureError
from .input_kinds import InputKind

aten = torch.ops.aten

_SOFTMAX = (aten.softmax, aten._softmax)
#: No probability counts for less, or its logarithm would be infinite.
_LEAST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another network that takes what a network takes and gives what it gives. `outputs` are the floating-point ones by
    their nodes: of the network, and of the other one. `classes` says that they are numbers for classes, `certain` of
    which of the two they are probabilities already."""

    program: Program
    outputs: tuple[tuple[str, str], ...]
    classes: bool
    certain: tuple[bool, bool] = (False, False)

    def disagreement(self, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Between 0 (they say the same) and 1, averaged over samples; differentiable."""
        if not self.classes:
            return outputs_apart(ours, theirs)
        return classes_apart(*map(_logarithms, (ours[0], theirs[0]), self.certain))


def classes_apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The Jensen-Shannon divergence of rows of logarithms of probabilities, in bits, averaged over the rows."""
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    each = [(side.exp() * (side - middle)).sum(1) for side in (ours, theirs)]
    return (each[0] + each[1]).mean() / (2 * math.log(2))


def outputs_apart(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> torch.Tensor:
    """d / (1 + d), with d the squared distance of all outputs of a sample relative to their squared size, averaged over
    samples."""
    apart = torch.stack([_squares(t.float() - s.float()) for t, s in zip(ours, theirs, strict=True)]).sum(0)
    size = torch.stack([_squares(value.float()) for value in ours]).sum(0)
    return (apart / (apart + size + _LEAST)).mean()


def rival_of(program: Program, kinds: Sequence[InputKind], against: Model, classes: bool) -> Rival:
    """Another network beside a program, in any form that `compile` takes. Raises CaptureError where it cannot be
    captured, CalibrationError where it takes or gives something else."""
    drawn = [kind.drawn(2, torch.Generator().manual_seed(0)) for kind in kinds]
    args, kwargs = program.structure(in_stored_types(program, drawn))
    try:
        other = widened(fold_parameters(capture(opened(against), kwargs or args)))
        SyntheticSet.from_leaves(kwargs or args, {}).aligned(other).check(other)
    except (CalibrationError, CaptureError) as cause:
        raise cause.about("against") from cause
    ours, theirs = _numbers(program), _numbers(other)
    shapes = [[side.shape(node, 2) for node in nodes] for side, nodes in ((program, ours), (other, theirs))]
    if shapes[0] != shapes[1] or not ours:
        raise CalibrationError(
            "against: a network that gives something else cannot disagree",
            expected=", ".join(map(str, program.outputs)),
            actual=", ".join(map(str, other.outputs)),
            hint="pass a network with the outputs of the first, such as the result of a compile",
        )
    return Rival(
        program=other,
        outputs=tuple((one.name, two.name) for one, two in zip(ours, theirs, strict=True)),
        classes=classes,
        certain=(is_call(ours[0], *_SOFTMAX), is_call(theirs[0], *_SOFTMAX)),
    )


def _numbers(program: Program) -> list[fx.Node]:
    """The floating-point outputs, each once."""
    nodes = dict.fromkeys(output_nodes(program.graph))
    return [node for node in nodes if is_tensor(node) and node.meta["val"].is_floating_point()]


def _logarithms(value: torch.Tensor, certain: bool) -> torch.Tensor:
    """Of the probabilities."""
    return value.float().clamp_min(_LEAST).log() if certain else functional.log_softmax(value.float(), 1)


def _squares(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(len(value), -1).square().sum(1)
