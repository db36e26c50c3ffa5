"""What each kind of rewrite hands on: the smaller network before mimicking, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...passes.prune.submodular import Selection
from ...passes.solve.resolve_network import LayerError
from ...passes.solve.targets import Kept
from ..analysis.provenance import Provenance
from ..ir.program import Program
from ..plan.plan import Decision
from ..support.errors import Reject


@dataclass(frozen=True, kw_only=True)
class TriedPlan:
    """A plan that was tried on the way: its measured latency ratio, its relative output error after a quick re-solve,
    how many decisions of each kind it has (`drop_blocks`, `prune_channels`, `factorize`), how many plans were measured
    until one like it was found to save enough, and whether it was chosen."""

    ratio: float
    error: float
    counts: Mapping[str, int]
    rounds: int = 1
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A smaller network before mimicking: what was decided, whether the goal was met, what was left alone and why, and
    the relative output errors so far, stage by stage.

    `layers` are the errors of the layers that were solved again, `kept` the channels left of each node that lost some;
    `provenance` and `selections` are there when channels were looked at, `tried` when several plans were compared.
    """

    program: Program
    decisions: tuple[Decision, ...]
    met: bool
    rejects: tuple[Reject, ...]
    errors: Mapping[str, float]
    layers: tuple[LayerError, ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict)
    provenance: Provenance | None = None
    selections: Mapping[str, Selection] = field(default_factory=dict)
    tried: tuple[TriedPlan, ...] = ()
