"""The decision to drop a block, and the goal in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.analysis.regions import removed_nodes
from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision, predicted
from ...compiler.plan.goal import Delivered, Goal
from ...compiler.support.errors import GoalError, plural


@dataclass(frozen=True, kw_only=True)
class DropBlock(Decision):
    """Decision: bypass one region, so that `exit` is replaced by `entry`.

    Arguments:
        entry: Name of the node that stays.
        exit: Name of the node that is replaced.
        path: Module path of the region, for display.
        error: Predicted relative error of the features before the head, with this and all earlier drops in effect.
            None if not predicted.
        saving: Predicted share of the original's latency, MACs or parameters that it saves. None if the goal bounds
            none.

    Example:
        >>> print(foldcut.DropBlock(entry="relu", exit="relu_1", path="layer1.0"))
        drop layer1.0
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
        """Name of the region: ``entry>exit``."""
        return f"{self.entry}>{self.exit}"

    @property
    def subject(self) -> str:
        """Name of the region: ``entry>exit``."""
        return self.region

    @property
    def what(self) -> str:
        """The module path, or the name of the region."""
        return self.path or self.region

    @property
    def how(self) -> str:
        """``dropped``, and the predicted saving if there is one."""
        return "dropped" if self.saving is None else f"dropped, predicted to save {self.saving:.1%}"

    def marks(self, program: Program) -> dict[str, dict[str, Any]]:
        """The decision for each node of `program` that is removed."""
        if not {self.entry, self.exit} <= set(program.nodes):
            return {}
        drop = {"region": self.region, "error": self.error, "saving": self.saving}
        return {name: {"drop": drop} for name in removed_nodes(program, self.entry, self.exit)}

    @property
    def change(self) -> list[str]:
        """Entry and exit."""
        return [self.entry, self.exit]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": self.kind, "region": self.region, **self._fields()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DropBlock:
        """The decision that `to_dict` wrote."""
        ends = {key: str(data[key]) for key in ("entry", "exit", "path")}
        return cls(**ends, error=predicted(data["error"]), saving=predicted(data["saving"]))

    def __str__(self) -> str:
        return f"drop {self.path or self.region}"


@dataclass(frozen=True)
class Blocks(Goal):
    """Goal: drop `count` blocks.

    Blocks are chosen one at a time: the one whose loss the rest of the network recovers best, with the earlier ones
    dropped. Residual regions come first, other removable regions only when those do not suffice.

    Arguments:
        count: Number of blocks, 1 or more.

    Raises:
        GoalError: If the number is out of range.

    Example:
        >>> print(foldcut.Blocks(4))
        4 blocks dropped
    """

    count: int

    kind = "blocks"

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise GoalError(
                f"Blocks({self.count!r}) is not a goal", hint="give the number of blocks to drop, 1 or more"
            )

    def recounted(self, delivered: Delivered) -> bool:
        """Whether the plan drops enough blocks, and the network costs what that leaves."""
        return delivered.decisions >= self.count and delivered.in_effect()

    def unmet(self, result: Any) -> str:
        """How many blocks can be dropped, in words."""
        return f"only {len(result.plan.decisions)} of {plural(self.count, 'block')} can be dropped"

    def __str__(self) -> str:
        return f"{plural(self.count, 'block')} dropped"
