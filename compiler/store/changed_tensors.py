"""A pass that changes weights is kept as the tensors that it changed. They are put back into the very program that it
started from, so names, graph and history come out as if it had run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ir.edit import set_tensors
from ..ir.program import Program
from .analysis_store import Tensors


def with_changes(data: Mapping[str, Any], before: Program, after: Program) -> tuple[dict[str, Any], Tensors]:
    """`data` with what the program's history grew by, and the tensors that are others than before."""
    old = before.module.state_dict()
    new = {n: t for n, t in after.module.state_dict().items() if t.numel() and t.data_ptr() != old[n].data_ptr()}
    return {**data, "notes": list(after.history[len(before.history) :])}, new


def changed(program: Program, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Program:
    """The program with the tensors put in, under the notes of the pass that made them."""
    for note in data["notes"]:
        program = set_tensors(program, tensors, note=note)
    return program
