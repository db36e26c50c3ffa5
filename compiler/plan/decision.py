"""What a plan does to one thing of a network: the base of all decisions, with a JSON round trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..ir.program import Program
from ..support.errors import PlanError

#: Fields of a decision that say what it was predicted to do, not what it does.
PREDICTIONS = ("error", "saving")


class Decision:
    """One change of a network, as plain data. A rewrite brings its own: subclass this as a frozen dataclass whose
    fields JSON can hold, and set `kind` to the rewrite's name.

    A subclass is known by its `kind` from where it is defined on, so that plans are read with it. Every decision has a
    field `error`, what it is predicted to add to the relative output error, or None.
    """

    #: The name of the rewrite.
    kind: ClassVar[str]
    #: What one and what several of them are called: ``("layer factorised", "layers factorised")``.
    nouns: ClassVar[tuple[str, str]] = ("change", "changes")
    _known: ClassVar[dict[str, type[Decision]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        kind = cls.__dict__.get("kind")
        if isinstance(kind, str):
            Decision._known[kind] = cls

    @property
    def subject(self) -> str:
        """The name of what it is about: a plan has one decision of a kind about each."""
        raise NotImplementedError

    @property
    def what(self) -> str:
        """What it is about, for people."""
        return self.subject

    @property
    def how(self) -> str:
        """What was done to that, for people: ``8 of 16 units kept``."""
        return str(self)

    def marks(self, program: Program) -> dict[str, dict[str, Any]]:
        """What a picture of the original shows beside its nodes, by name: plain data, such as the ranks of a layer."""
        del program
        return {}

    @property
    def takes_away(self) -> bool:
        """Whether anything changes by it at all."""
        return True

    @property
    def change(self) -> Any:
        """What becomes of the network, as plain data: equal for two decisions that do the same."""
        return {name: value for name, value in self._fields().items() if name not in PREDICTIONS}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._fields()}

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decision:
        """The decision that `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(**{name: value for name, value in data.items() if name != "kind"})


@dataclass(frozen=True)
class UnknownDecision(Decision):
    """A decision of a rewrite that is not there: it is carried along as it was read, and cannot be put into effect."""

    kind: str  # type: ignore[misc]
    data: Mapping[str, Any] = field(hash=False)

    @property
    def subject(self) -> str:
        return str(sorted(self.data.items()))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)

    def __str__(self) -> str:
        return f"{self.kind} (this rewrite is not there)"


def read_decision(data: Mapping[str, Any]) -> Decision:
    """The decision that plan.json holds. Raises PlanError, KeyError, TypeError or ValueError for what is none."""
    kind = data["kind"]
    if not isinstance(kind, str):
        raise PlanError(f"unknown decision {kind!r}", hint="pass a plan.json written by foldcut")
    known = Decision._known.get(kind)
    return UnknownDecision(kind=kind, data=dict(data)) if known is None else known.from_dict(data)


def counted_words(decisions: Sequence[Decision]) -> list[str]:
    """How many decisions there are of each kind: ``3 blocks dropped``."""
    nouns = {decision.kind: decision.nouns for decision in decisions}
    counts = Counter(decision.kind for decision in decisions)
    return [f"{count} {nouns[kind][count > 1]}" for kind, count in counts.items()]


def whole_numbers(numbers: Any, least: int, end: float = float("inf")) -> tuple[int, ...]:
    """Whole numbers from `least` to below `end`, one at least. Raises TypeError and ValueError for anything else."""
    bad = [n for n in numbers if type(n) is not int or not least <= n < end]
    if bad or not numbers:
        raise ValueError(f"{bad[:3]} where whole numbers from {least} to below {end} belong")
    return tuple(numbers)


def predicted(value: Any) -> float | None:
    """A predicted figure as it was read."""
    return None if value is None else float(value)
