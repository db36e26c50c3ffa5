"""The decision to factorise a layer, and the goal in ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision, predicted, whole_numbers
from ...compiler.plan.goal import Goal
from ...compiler.support.errors import GoalError


@dataclass(frozen=True, kw_only=True)
class FactorizeLayer(Decision):
    """Decision: replace one layer by a chain of thinner ones.

    Arguments:
        layer: Name of the node.
        scheme: ``channel``, ``spatial`` or ``tucker``.
        ranks: Ranks of the factors, per group.
        full: Ranks at which the scheme is exact up to rounding.
        path: Module path of the layer, for display.
        error: Relative error of the layer's output when the ranks were chosen. None if not predicted.

    Example:
        >>> print(foldcut.FactorizeLayer(layer="conv2d_3", scheme="spatial", ranks=(40,), full=(192,)))
        factorise conv2d_3 (spatial) to rank 40 of 192
    """

    layer: str
    scheme: str
    ranks: tuple[int, ...]
    full: tuple[int, ...]
    path: str = ""
    error: float | None = None

    kind = "factorize"
    nouns = ("layer factorised", "layers factorised")

    @property
    def subject(self) -> str:
        """Name of the layer."""
        return self.layer

    @property
    def what(self) -> str:
        """The module path, or the name of the layer."""
        return self.path or self.layer

    @property
    def how(self) -> str:
        """Scheme and ranks."""
        return f"{self.scheme}, {self._rank_words()}"

    def marks(self, program: Program) -> dict[str, dict[str, Any]]:
        """Scheme and ranks of the layer."""
        del program
        return {self.layer: {"scheme": self.scheme, "ranks": list(self.ranks), "full": list(self.full)}}

    @property
    def change(self) -> list[Any]:
        """Layer, scheme and ranks."""
        return [self.layer, self.scheme, list(self.ranks)]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FactorizeLayer:
        """The decision that `to_dict` wrote."""
        ranks, full = whole_numbers(data["ranks"], 1), whole_numbers(data["full"], 1)
        if not isinstance(data["scheme"], str) or not data["scheme"]:
            raise ValueError(f"{data['scheme']!r} is no scheme")
        names = {key: str(data[key]) for key in ("layer", "scheme", "path")}
        return cls(**names, ranks=ranks, full=full, error=predicted(data["error"]))

    def __str__(self) -> str:
        return f"factorise {self.what} ({self.scheme}) to {self._rank_words()}"

    def _rank_words(self) -> str:
        ranks, full = (" x ".join(map(str, numbers)) for numbers in (self.ranks, self.full))
        return f"rank {ranks} of {full}"


@dataclass(frozen=True)
class Ranks(Goal):
    """Goal: factorise every layer that gets cheaper by it, each on its own. Exactly one argument is given.

    Arguments:
        rank: The rank of each layer, 1 or more.
        keep: Share of the full rank.
        energy: Least rank that keeps this share of the energy of the layer's output. The same as ``error=1 -
            energy``.
        error: Cheapest factorisation with at most this relative error of the layer's output.
        macs: Most accurate factorisation with at most this share of the layer's multiply-accumulates.

    Raises:
        GoalError: If not exactly one is given, or if it is out of range. Shares are above 0 and at most 1.

    Example:
        >>> print(foldcut.Ranks(energy=0.99))
        0.99 of the energy
    """

    rank: int | None = None
    keep: float | None = None
    energy: float | None = None
    error: float | None = None
    macs: float | None = None

    kind = "ranks"

    def __post_init__(self) -> None:
        given = self._values()
        shares = [value for key, value in given.items() if key != "rank"]
        good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= 1 for v in shares)
        whole = self.rank is None or (isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1)
        if len(given) != 1 or not good or not whole:
            text = ", ".join(f"{key}={value!r}" for key, value in given.items())
            raise GoalError(
                f"Ranks({text}) is not a goal",
                hint="give one of rank=8 (1 or more), keep=0.5, energy=0.99, error=0.01, macs=0.5 (above 0, at most 1)",
            )

    def _values(self) -> dict[str, Any]:
        """What was given."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def words(self) -> str:
        """The goal as reports word it."""
        return f"layers factorised to {self}"

    def __str__(self) -> str:
        ((key, value),) = self._values().items()
        named = {
            "rank": "rank {:g}",
            "keep": "{:g} of full rank",
            "energy": "{:g} of the energy",
            "error": "layer error at most {:g}",
            "macs": "{:g} of each layer's MACs",
        }
        return named[key].format(value)
