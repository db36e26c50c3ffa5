"""The decision to remove channels, and the goal in channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.plan.decision import Decision, predicted, whole_numbers
from ...compiler.plan.goal import Goal
from ...compiler.support.errors import GoalError


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Decision):
    """Decision: keep some units of a unit group and remove the others.

    Arguments:
        group: Name of the unit group.
        kept: Positions within the group of the units that stay, ascending.
        total: Number of units of the group.
        error: Relative error of the layers that consume the group, predicted when the units were chosen. None if not
            predicted.

    Example:
        >>> print(foldcut.PruneChannels(group="layer1.0.conv1", kept=(0, 2, 3), total=8))
        keep 3 of 8 units of layer1.0.conv1
    """

    group: str
    kept: tuple[int, ...]
    total: int
    error: float | None = None

    kind = "prune_channels"
    nouns = ("group pruned", "groups pruned")

    @property
    def subject(self) -> str:
        """Name of the unit group."""
        return self.group

    @property
    def how(self) -> str:
        """Units kept and in total."""
        return f"{len(self.kept)} of {self.total} units kept"

    @property
    def count(self) -> int:
        """Number of units that stay."""
        return len(self.kept)

    @property
    def takes_away(self) -> bool:
        """Whether any unit is removed."""
        return len(self.kept) < self.total

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruneChannels:
        """The decision that `to_dict` wrote."""
        (total,) = whole_numbers([data["total"]], 1)
        kept = whole_numbers(data["kept"], 0, total)
        if list(kept) != sorted(set(kept)):
            raise ValueError(f"the units kept of {data['group']!r} do not ascend")
        return cls(group=str(data["group"]), kept=kept, total=total, error=predicted(data["error"]))

    def __str__(self) -> str:
        return f"keep {len(self.kept)} of {self.total} units of {self.group}"


@dataclass(frozen=True, kw_only=True)
class UnitCount(Decision):
    """Keep `count` units of a group, chosen later by what the layers that read them need. It never stands in a
    finished plan.
    """

    group: str
    count: int
    total: int
    error: float | None = None

    @property
    def kind(self) -> str:  # type: ignore[override]  # one of its own would be read from plans
        return PruneChannels.kind

    @property
    def subject(self) -> str:
        return self.group

    @property
    def change(self) -> list[Any]:
        return [self.group, self.count]


@dataclass(frozen=True)
class Channels(Goal):
    """Goal: keep a share of the units of every prunable group.

    Each group keeps the nearest count on its lattice (multiples of `ChannelLimits.multiple_of` channels), and at
    least the minimum of `ChannelLimits`.

    Arguments:
        keep: Share of the units, above 0 and at most 1.

    Raises:
        GoalError: If the share is out of range.

    Example:
        >>> foldcut.Channels(0.5).words()
        '50 % of the channels kept in every group'
    """

    keep: float

    kind = "channels"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, (int, float)) or isinstance(self.keep, bool) or not 0 < self.keep <= 1:
            raise GoalError(
                f"Channels({self.keep!r}) is not a goal",
                hint="give the share of channels to keep, above 0 and at most 1: Channels(0.5) keeps half",
            )

    def words(self) -> str:
        """The goal as reports word it."""
        return f"{100 * self.keep:g} % of the channels kept in every group"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": self.kind, "keep": float(self.keep)}

    def __str__(self) -> str:
        return f"{self.keep:g} of the channels kept"
