"""A plan: the decisions of a compile as plain data with a JSON round trip, without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    """The decisions of a compile, in the order of application, for one network.

    Arguments:
        decisions: The decisions.
        goal: The goal that they were made for.
        fingerprint: Fingerprint of the program that they were made for.
        predicted: Latency ratio that was predicted, where known, and relative output error after each stage, by name.
        files: Digests of the files that were saved with the plan, by name. Ignored when plans are compared.
        version: Version of the format that the plan was read from. Ignored when plans are compared; plans are written
            in the newest.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), torch.randn(2, 8))
        >>> drop = foldcut.DropBlock(entry="input_1", exit="linear")
        >>> goal, fingerprint = foldcut.Blocks(1), program.fingerprint
        >>> plan = foldcut.Plan(decisions=(drop,), goal=goal, fingerprint=fingerprint, predicted={})
        >>> foldcut.Plan.from_dict(plan.to_dict()) == plan
        True
    """

    decisions: tuple[Decision, ...]
    goal: Goal
    fingerprint: str
    predicted: Mapping[str, float]
    files: Mapping[str, str] = field(default_factory=dict, compare=False)
    version: int = field(default=PLAN_VERSION, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the content of ``plan.json``."""
        return replace(self, version=PLAN_VERSION).as_read()

    def as_read(self) -> dict[str, Any]:
        """The same in the version of the format that the plan was read from."""
        names = {new: old for old, new in _RENAMED.items()} if self.version == 1 else {}
        decisions = [decision.to_dict() for decision in self.decisions]
        return {
            "version": self.version,
            "goal": self.goal.to_dict(),
            "fingerprint": self.fingerprint,
            "predicted": dict(self.predicted),
            "decisions": [{**data, "kind": names.get(data["kind"], data["kind"])} for data in decisions],
            **({"files": dict(self.files)} if self.files else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan back. A decision of a rewrite that is not available is kept as it was read.

        Arguments:
            data: The result of `to_dict`.

        Returns:
            The plan.

        Raises:
            PlanError: If the data are malformed or of an unknown version.
        """
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
                version=data["version"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, GoalError) as cause:
            raise PlanError(f"not a plan: {cause!r}", hint="pass a plan.json written by foldcut") from cause

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a ``plan.json``.

        Arguments:
            path: The file.

        Returns:
            The plan.

        Raises:
            PlanError: If the file cannot be read, is malformed or of an unknown version.
        """
        try:
            data = read_json(Path(path).read_bytes())
        except (OSError, ValueError) as cause:
            raise PlanError(f"cannot read {path}: {cause}", hint="pass a plan.json written by foldcut") from cause
        return cls.from_dict(data)

    def check(self, fingerprint: str) -> None:
        """Check that the plan was made for a program.

        Arguments:
            fingerprint: Fingerprint of the program.

        Raises:
            PlanError: If it was made for another one.
        """
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
