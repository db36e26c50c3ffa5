"""A latency goal is never reached by the network that it started from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.program import Program
from ..plan.goal import Goal
from ..rewrite.rewrite import Applied
from ..support.errors import GoalError

#: So many reasons are named; the report has all.
_MOST_REASONS = 5


def require_change(before: Program, done: Applied, goal: Goal) -> None:
    """Raise GoalError when a latency goal led to no change: no decision that takes something away, or a network that
    computes the same operations on the same shapes. What such a network gains is the noise of its measurement."""
    if not goal.needs_change:
        return
    if any(decision.takes_away for decision in done.decisions) and _work(before) != _work(done.program):
        return
    raise GoalError(f"nothing can be done towards {goal}: the network is as it was", hint=_reasons(done))


def _work(program: Program) -> list[tuple[str, str]]:
    """What is computed, whatever the weights are: operations, and the shapes of what they read and make."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return [(str(node.target), str([_shapes(node), *map(_shapes, node.all_input_nodes)])) for node in calls]


def _shapes(node: fx.Node) -> Any:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [[str(size) for size in v.shape] for v in values if isinstance(v, torch.Tensor)]


def _reasons(done: Applied) -> str:
    """Why things were left alone: what was refused, and what locks the groups of channels."""
    found = list(dict.fromkeys(str(reject) for reject in done.rejects))
    more = [f"{len(found) - _MOST_REASONS} more, see foldcut inspect"] if len(found) > _MOST_REASONS else []
    return "; ".join([*found[:_MOST_REASONS], *more]) or "no rewrite saves latency on this backend"
