"""The decision to drop a block, and the goal in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.analysis.regions import removed_nodes
from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision, predicted
from ...compiler.plan.goal import Delivered, Goal
from ...compiler.support.errors import GoalError


@dataclass(frozen=True, kw_only=True)
class DropBlock(Decision):
    """Bypass one region: `exit` is replaced by `entry`.

    `path` is the module path for people. `error` is the relative output error that was predicted when the block was
    chosen (with the decisions before it in force), `saving` the predicted share of the original's latency (None where
    nothing was measured).
    """

    entry: str
    exit: str
    path: str = ""
    error: float | None = None
    saving: float | None = None

    kind = "drop_blocks"
    nouns = ("block dropped", "blocks dropped")

    @property
    def region(self) -> str:
        return f"{self.entry}>{self.exit}"

    @property
    def subject(self) -> str:
        return self.region

    @property
    def what(self) -> str:
        return self.path or self.region

    @property
    def how(self) -> str:
        return "dropped" if self.saving is None else f"dropped, predicted to save {self.saving:.1%} of the latency"

    def marks(self, program: Program) -> dict[str, dict[str, Any]]:
        if not {self.entry, self.exit} <= set(program.nodes):
            return {}
        drop = {"region": self.region, "error": self.error, "saving": self.saving}
        return {name: {"drop": drop} for name in removed_nodes(program, self.entry, self.exit)}

    @property
    def change(self) -> list[str]:
        return [self.entry, self.exit]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "region": self.region, **self._fields()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DropBlock:
        ends = {key: str(data[key]) for key in ("entry", "exit", "path")}
        return cls(**ends, error=predicted(data["error"]), saving=predicted(data["saving"]))

    def __str__(self) -> str:
        return f"drop {self.path or self.region}"


@dataclass(frozen=True)
class Blocks(Goal):
    """Drop exactly `count` blocks, those whose loss the rest of the network recovers best."""

    count: int

    kind = "blocks"

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise GoalError(
                f"Blocks({self.count!r}) is not a goal", hint="give the number of blocks to drop, 1 or more"
            )

    def recounted(self, delivered: Delivered) -> bool:
        return delivered.decisions >= self.count and delivered.in_effect()

    def unmet(self, result: Any) -> str:
        return f"only {len(result.plan.decisions)} of {self.count} blocks can be dropped"

    def __str__(self) -> str:
        return f"{self.count} block{'s' if self.count > 1 else ''} dropped"
