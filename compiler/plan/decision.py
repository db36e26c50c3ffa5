"""One change of a network by a plan: the base class of decisions, with a JSON round trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from ..ir.program import Program
from ..support.errors import PlanError

#: Fields of a decision that say what it was predicted to do, not what it does.
PREDICTIONS = ("error", "saving")


class Decision:
    """One change of a network, as plain data. Base class; each rewrite has its own subclass.

    Subclass it as a frozen dataclass whose fields JSON can hold, with a field `error` (the relative output error that
    the change is predicted to add, or None), define `subject`, and set `kind` to the name of the rewrite. Defining
    the subclass registers its `kind`, so that plans are read with it.

    Raises:
        PlanError: If a subclass has the `kind` of one that foldcut brings.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class ToRelu(foldcut.Decision):
        ...     node: str
        ...     error: float | None = None
        ...     kind = "to_relu"
        ...     @property
        ...     def subject(self):
        ...         return self.node
        >>> ToRelu(node="gelu").to_dict()
        {'kind': 'to_relu', 'node': 'gelu', 'error': None}
        >>> ToRelu.from_dict({"kind": "to_relu", "node": "gelu", "error": None}) == ToRelu(node="gelu")
        True
    """

    #: The name of the rewrite.
    kind: ClassVar[str]
    #: What one and what several of them are called: ``("layer factorised", "layers factorised")``.
    nouns: ClassVar[tuple[str, str]] = ("change", "changes")
    _known: ClassVar[dict[str, type[Decision]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        kind = cls.__dict__.get("kind")
        if not isinstance(kind, str):
            return
        known = Decision._known.get(kind)
        if known is not None and _of_foldcut(known) and not _of_foldcut(cls):
            raise PlanError(
                f"{cls.__name__}.kind is {kind!r}, which is that of foldcut.{known.__name__}",
                hint="give the rewrite and its decisions a name of their own",
            )
        Decision._known[kind] = cls

    @property
    def subject(self) -> str:
        """Name of what is changed. A plan has one decision of a kind per subject."""
        raise NotImplementedError

    @property
    def what(self) -> str:
        """What is changed, for display."""
        return self.subject

    @property
    def how(self) -> str:
        """How it is changed, for display: ``8 of 16 units kept``."""
        return str(self)

    def marks(self, program: Program) -> dict[str, dict[str, Any]]:
        """What a picture of the original network shows beside its nodes.

        Arguments:
            program: The original network.

        Returns:
            Plain data by node name, such as the ranks of a layer.
        """
        del program
        return {}

    @property
    def takes_away(self) -> bool:
        """Whether the decision changes anything."""
        return True

    @property
    def change(self) -> Any:
        """The change without its predictions, as plain data. Equal for two decisions that do the same."""
        return {name: value for name, value in self._fields().items() if name not in PREDICTIONS}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the kind and all fields."""
        return {"kind": self.kind, **self._fields()}

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decision:
        """Read a decision back.

        Arguments:
            data: The result of `to_dict`.

        Returns:
            The decision.

        Raises:
            KeyError, TypeError, ValueError: If `data` is anything else.
        """
        tuples = {f.name for f in fields(cls) if str(f.type).startswith("tuple")}  # type: ignore[arg-type]
        values = {name: value for name, value in data.items() if name != "kind"}
        return cls(**{name: tuple(value) if name in tuples else value for name, value in values.items()})


def _of_foldcut(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


@dataclass(frozen=True)
class UnknownDecision(Decision):
    """A decision of a rewrite that is not available. It is kept as it was read, and cannot be applied."""

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


def known_decision(decision: Decision, kind: type[Decision]) -> Decision:
    """A decision as one of its class, also where that class came, or was defined again, after its plan was read. Raises
    PlanError for what is none of it."""
    stands_in = not isinstance(vars(type(decision)).get("kind"), str) and not isinstance(decision, UnknownDecision)
    if isinstance(decision, kind) or stands_in:  # what stands in for one, until it is decided, has no kind of its own
        return decision
    try:
        return kind.from_dict(decision.to_dict())
    except (KeyError, TypeError, ValueError) as cause:
        raise PlanError(
            f"no decision of {decision.kind}: {cause!r}", hint="pass a plan.json as it was saved"
        ) from cause


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
