"""A plan: decisions in the order of application, for one network. Plain data with a JSON round trip, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..support.errors import GoalError, PlanError
from ..support.strict_json import read_json
from .decision import Decision, read_decision
from .goal import Goal, read_goal

PLAN_VERSION = 2
#: What decisions were called in version 1.
_RENAMED = {"drop_block": "drop_blocks", "factorize_layer": "factorize"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Decisions in the order of application, for the program with the given fingerprint. `files` are the digests of the
    networks that were saved with it, by file name; a plan is the same one without them."""

    decisions: tuple[Decision, ...]
    goal: Goal
    fingerprint: str
    predicted: Mapping[str, float]
    files: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": PLAN_VERSION,
            "goal": self.goal.to_dict(),
            "fingerprint": self.fingerprint,
            "predicted": dict(self.predicted),
            "decisions": [d.to_dict() for d in self.decisions],
            **({"files": dict(self.files)} if self.files else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Raises PlanError for another version or a malformed plan. A decision of a rewrite that is not imported is
        carried along as it is (`UnknownDecision`)."""
        try:
            if data["version"] not in (1, PLAN_VERSION):
                raise PlanError(
                    "the plan has another version",
                    expected=PLAN_VERSION,
                    actual=data["version"],
                    hint="make the plan again",
                )
            return cls(
                decisions=_decisions(data["decisions"]),
                goal=read_goal(data["goal"]),
                fingerprint=str(data["fingerprint"]),
                predicted=dict(data["predicted"]),
                files={str(name): str(digest) for name, digest in data.get("files", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, GoalError) as cause:
            raise PlanError(f"not a plan: {cause!r}", hint="pass a plan.json written by foldcut") from cause

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.json. Raises PlanError."""
        try:
            data = read_json(Path(path).read_bytes())
        except (OSError, ValueError) as cause:
            raise PlanError(f"cannot read {path}: {cause}", hint="pass a plan.json written by foldcut") from cause
        return cls.from_dict(data)

    def check(self, fingerprint: str) -> None:
        """Raise PlanError unless the plan was made for the program with this fingerprint."""
        if fingerprint != self.fingerprint:
            raise PlanError(
                "the plan was made for another network",
                expected=self.fingerprint,
                actual=fingerprint,
                hint="apply it to the network (and weights) that it was made for, or compile again",
            )


def _decisions(data: Any) -> tuple[Decision, ...]:
    """Raises ValueError where two of them are about one region, group or layer: which of them counts is not said."""
    if not isinstance(data, list):
        raise ValueError("the decisions are no list")
    decisions = tuple(read_decision({**item, "kind": _RENAMED.get(item["kind"], item["kind"])}) for item in data)
    names = [(decision.kind, decision.subject) for decision in decisions]
    twice = [name for i, (kind, name) in enumerate(names) if (kind, name) in names[:i]]
    if twice:
        raise ValueError(f"two decisions are about {twice[0]!r}")
    return decisions
