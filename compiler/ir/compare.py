"""Comparing what two networks compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..devices.precision import in_float64, widest

#: Rounding steps that fall on the other side: what a network with quantised values may differ by, relative to its
#: largest output.
ROUNDED_TOLERANCE = 2e-2


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far apart two sets of outputs are, the worst output first.

    `absolute` is max |a - b|, `relative` that over max |a| of the same output's finite entries (absolute where these
    are all zero), `cosine` the least cosine between the finite entries of flattened outputs. `same_structure` is False
    when number, shapes or dtypes of the outputs differ; the figures are then infinite.
    """

    absolute: float
    relative: float
    cosine: float
    same_structure: bool = True

    def __str__(self) -> str:
        if not self.same_structure:
            return "outputs differ in number, shape or dtype"
        return f"max abs {self.absolute:.2e}, relative {self.relative:.2e}, cosine {self.cosine:.6f}"


def flatten_outputs(outputs: Any) -> list[torch.Tensor]:
    """The tensors of an output structure, in order; complex ones as pairs of real numbers."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]


def compare(reference: Any, other: Any) -> Difference:
    """Compare two output structures in float64."""
    left, right = flatten_outputs(reference), flatten_outputs(other)
    if len(left) != len(right) or any(
        a.shape != b.shape or a.dtype != b.dtype for a, b in zip(left, right, strict=False)
    ):
        return Difference(absolute=float("inf"), relative=float("inf"), cosine=-1.0, same_structure=False)
    absolute, relative, cosine = 0.0, 0.0, 1.0
    for a, b in zip(left, right, strict=True):
        if a.numel() == 0:
            continue
        x, y = (in_float64(value.detach()).cpu().flatten() for value in (a, b))
        worst = _worst(x, y)
        absolute = max(absolute, worst)
        relative = max(relative, worst / (_largest(x) or 1.0))
        finite = x.isfinite() & y.isfinite()  # infinities, of masked logits say, have no direction
        cosine = min(cosine, _cosine(x[finite], y[finite]))
    return Difference(absolute=absolute, relative=relative, cosine=cosine)


def squared_distance(reference: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of (other - reference)^2, sum of reference^2) of `squares`, on their device: nothing waits for it."""
    error, energy = squares(reference, other)
    return error.sum(), energy.sum()


def squares(reference: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """((other - reference)^2, reference^2) entry by entry, in float64 where the device has it (`widest`).

    Entries that are equal, infinities of one sign and NaN included (masked logits), add no error; infinite ones no
    energy.
    """
    wide = widest(reference.device)
    t, s = reference.detach().to(wide), other.detach().to(wide)
    equal = (t == s) | (t.isnan() & s.isnan())
    error = torch.where(equal, torch.zeros_like(t), s - t).square()
    energy = torch.where(t.isfinite(), t, torch.zeros_like(t)).square()
    return error, energy


def relative_error(reference: Any, other: Any) -> float:
    """Relative mean squared error, sum ||b - a||^2 / sum ||a||^2 over all outputs, in float64."""
    error = energy = 0.0
    for a, b in zip(flatten_outputs(reference), flatten_outputs(other), strict=True):
        part, norm = squared_distance(a, b)
        error, energy = error + float(part), energy + float(norm)
    if energy > 0:
        return error / energy
    return 0.0 if error == 0 else float("inf")


def _worst(x: torch.Tensor, y: torch.Tensor) -> float:
    same = (x == y) | (x.isnan() & y.isnan())
    worst = torch.where(same, torch.zeros_like(x), (x - y).abs())
    return float("inf") if bool(worst.isnan().any()) else float(worst.max())


def _largest(x: torch.Tensor) -> float:
    """The largest finite absolute value; 0 where there is none."""
    return float(torch.where(x.isfinite(), x.abs(), torch.zeros_like(x)).max())


def _cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    norms = float(x.norm() * y.norm())
    if norms == 0 or norms != norms:
        return 1.0 if torch.equal(x, y) else 0.0
    return float(x @ y) / norms
