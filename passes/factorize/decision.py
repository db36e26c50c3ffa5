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
    """Replace one layer by the factors of a scheme at these ranks, per group; `full` are the ranks at which it would be
    exact.

    `error` is the relative error of the layer's output when the ranks were chosen.
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
        return self.layer

    @property
    def what(self) -> str:
        return self.path or self.layer

    @property
    def how(self) -> str:
        return f"{self.scheme}, {self._rank_words()}"

    def marks(self, program: Program) -> dict[str, dict[str, Any]]:
        del program
        return {self.layer: {"scheme": self.scheme, "ranks": list(self.ranks), "full": list(self.full)}}

    @property
    def change(self) -> list[Any]:
        return [self.layer, self.scheme, list(self.ranks)]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FactorizeLayer:
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
    """Factorise every layer that gets cheaper by it, each on its own: to `rank`, to a share `keep` of its full rank,
    to the least rank that keeps a share `energy` of its output's energy, or whose relative error is at most `error`
    (energy 0.99 and error 0.01 are the same), or to the largest rank that costs at most a share `macs` of the layer's
    multiply-accumulates. Give just one of them."""

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
