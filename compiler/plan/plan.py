"""Goals, decisions and plans: plain data with a JSON round trip, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..support.errors import GoalError, PlanError
from ..support.strict_json import read_json
from .latency_goal import Latency as Latency  # a goal like those below

PLAN_VERSION = 1


@dataclass(frozen=True)
class Blocks:
    """Drop exactly `count` blocks, those whose loss the rest of the network recovers best."""

    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise GoalError(
                f"Blocks({self.count!r}) is not a goal", hint="give the number of blocks to drop, 1 or more"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "blocks", "count": self.count}

    def __str__(self) -> str:
        return f"{self.count} block{'s' if self.count > 1 else ''} dropped"


@dataclass(frozen=True)
class Channels:
    """Keep a share `keep` of the units of every prunable group, as near as the channel lattice allows."""

    keep: float

    def __post_init__(self) -> None:
        if not isinstance(self.keep, (int, float)) or isinstance(self.keep, bool) or not 0 < self.keep <= 1:
            raise GoalError(
                f"Channels({self.keep!r}) is not a goal",
                hint="give the share of channels to keep, above 0 and at most 1: Channels(0.5) keeps half",
            )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "channels", "keep": float(self.keep)}

    def __str__(self) -> str:
        return f"{self.keep:g} of the channels kept"


@dataclass(frozen=True)
class Macs:
    """Come down to at most `ratio` times the original's multiply-accumulates, cut where it costs the least error."""

    ratio: float

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or isinstance(self.ratio, bool) or not 0 < self.ratio < 1:
            raise GoalError(
                f"Macs({self.ratio!r}) is not a goal",
                hint="give a ratio between 0 and 1: Macs(0.6) asks for 40 % fewer multiply-accumulates",
            )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "macs", "ratio": float(self.ratio)}

    def __str__(self) -> str:
        return f"MACs ratio {self.ratio:g}"


@dataclass(frozen=True)
class Parameters:
    """Come down to at most `ratio` times the original's trained values, cut where it costs the least error: for a limit
    on the size of a file or on memory."""

    ratio: float

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or isinstance(self.ratio, bool) or not 0 < self.ratio < 1:
            raise GoalError(
                f"Parameters({self.ratio!r}) is not a goal",
                hint="give a ratio between 0 and 1: Parameters(0.5) asks for half of the parameters",
            )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "parameters", "ratio": float(self.ratio)}

    def __str__(self) -> str:
        return f"parameters ratio {self.ratio:g}"


@dataclass(frozen=True)
class MaxError:
    """Be as fast as can be while the relative output error stays at most `error`: sum ||S - T||^2 / sum ||T||^2 over
    all outputs. The verdict is that of the test samples, which no choice has seen."""

    error: float

    def __post_init__(self) -> None:
        if not isinstance(self.error, (int, float)) or isinstance(self.error, bool) or not 0 < self.error < 1:
            raise GoalError(
                f"MaxError({self.error!r}) is not a goal",
                hint="give a relative squared error between 0 and 1: MaxError(0.02) allows two percent",
            )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "max_error", "error": float(self.error)}

    def __str__(self) -> str:
        return f"output error at most {self.error:g}"


@dataclass(frozen=True)
class Ranks:
    """Factorise every layer that gets cheaper by it, each on its own: to `rank`, to a share `keep` of its full rank,
    to the least rank that keeps a share `energy` of its output's energy, or whose relative error is at most `error`
    (energy 0.99 and error 0.01 are the same), or to the largest rank that costs at most a share `macs` of the layer's
    multiply-accumulates. Give just one of them."""

    rank: int | None = None
    keep: float | None = None
    energy: float | None = None
    error: float | None = None
    macs: float | None = None

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

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "ranks", **self._values()}

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


Goal = Latency | Blocks | Channels | Macs | Parameters | MaxError | Ranks
#: Goals that bound what can be counted without a measurement.
CountedGoal = Macs | Parameters
#: Goals that dropping blocks reaches.
DropGoal = Latency | Blocks
#: Goals that low rank reaches.
RankGoal = Latency | Macs | Parameters | Ranks


def goal_from_dict(data: Mapping[str, Any]) -> Goal:
    """The goal that `to_dict` wrote. Raises PlanError for anything else."""
    if data.get("kind") == "latency":
        return Latency(data.get("ratio"), data.get("ms"), data.get("regime", "hot"))
    if data.get("kind") == "blocks":
        return Blocks(data["count"])
    if data.get("kind") == "channels":
        return Channels(data["keep"])
    if data.get("kind") == "macs":
        return Macs(data["ratio"])
    if data.get("kind") == "parameters":
        return Parameters(data["ratio"])
    if data.get("kind") == "max_error":
        return MaxError(data["error"])
    if data.get("kind") == "ranks":
        return Ranks(**{key: value for key, value in data.items() if key != "kind"})
    raise PlanError(f"unknown goal {dict(data)!r}", hint="the plan was written by another version of foldcut")


@dataclass(frozen=True, kw_only=True)
class DropBlock:
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

    kind = "drop_block"

    @property
    def region(self) -> str:
        return f"{self.entry}>{self.exit}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "region": self.region, **asdict(self)}

    def __str__(self) -> str:
        return f"drop {self.path or self.region}"


@dataclass(frozen=True, kw_only=True)
class PruneChannels:
    """Keep these units of one unit group (positions within the group, ascending) and remove the others.

    `error` is the relative error of the layers that consume the group, as predicted when the units were chosen.
    """

    group: str
    kept: tuple[int, ...]
    total: int
    error: float | None = None

    kind = "prune_channels"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self), "kept": list(self.kept)}

    def __str__(self) -> str:
        return f"keep {len(self.kept)} of {self.total} units of {self.group}"


@dataclass(frozen=True, kw_only=True)
class FactorizeLayer:
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

    kind = "factorize_layer"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self), "ranks": list(self.ranks), "full": list(self.full)}

    def __str__(self) -> str:
        ranks, full = (" x ".join(map(str, numbers)) for numbers in (self.ranks, self.full))
        return f"factorise {self.path or self.layer} ({self.scheme}) to rank {ranks} of {full}"


Decision = DropBlock | PruneChannels | FactorizeLayer


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
        """Raises PlanError for another version or a malformed plan."""
        try:
            if data["version"] != PLAN_VERSION:
                raise PlanError(
                    "the plan has another version",
                    expected=PLAN_VERSION,
                    actual=data["version"],
                    hint="make the plan again",
                )
            return cls(
                decisions=_decisions(data["decisions"]),
                goal=goal_from_dict(data["goal"]),
                fingerprint=str(data["fingerprint"]),
                predicted=dict(data["predicted"]),
                files={str(name): str(digest) for name, digest in data.get("files", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, GoalError) as cause:
            raise PlanError(f"not a plan: {cause!r}", hint="pass a plan.json written by foldcut") from cause

    @classmethod
    def load(cls, path: str | Path) -> Plan:
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
    decisions = tuple(map(_decision, data))
    names = [(d.kind, subject(d)) for d in decisions]
    twice = [name for i, (kind, name) in enumerate(names) if (kind, name) in names[:i]]
    if twice:
        raise ValueError(f"two decisions are about {twice[0]!r}")
    return decisions


def subject(decision: Decision) -> str:
    """The region, group or layer that a decision is about."""
    if isinstance(decision, DropBlock):
        return decision.region
    return decision.group if isinstance(decision, PruneChannels) else decision.layer


def _decision(data: Mapping[str, Any]) -> Decision:
    if data["kind"] not in (DropBlock.kind, PruneChannels.kind, FactorizeLayer.kind):
        raise PlanError(f"unknown decision {data['kind']!r}", hint="the plan was written by a newer version of foldcut")
    error = None if data["error"] is None else float(data["error"])
    if data["kind"] == PruneChannels.kind:
        (total,) = _whole([data["total"]], 1)
        kept = _whole(data["kept"], 0, total)
        if list(kept) != sorted(set(kept)):
            raise ValueError(f"the units kept of {data['group']!r} do not ascend")
        return PruneChannels(group=str(data["group"]), kept=kept, total=total, error=error)
    if data["kind"] == FactorizeLayer.kind:
        ranks, full = _whole(data["ranks"], 1), _whole(data["full"], 1)
        if not isinstance(data["scheme"], str) or not data["scheme"]:
            raise ValueError(f"{data['scheme']!r} is no scheme")
        names = {key: str(data[key]) for key in ("layer", "scheme", "path")}
        return FactorizeLayer(**names, ranks=ranks, full=full, error=error)
    ends = {key: str(data[key]) for key in ("entry", "exit", "path")}
    return DropBlock(**ends, error=error, saving=None if data["saving"] is None else float(data["saving"]))


def _whole(numbers: Any, least: int, end: float = float("inf")) -> tuple[int, ...]:
    """Whole numbers from `least` to below `end`, one at least. Raises TypeError and ValueError for anything else."""
    bad = [n for n in numbers if type(n) is not int or not least <= n < end]
    if bad or not numbers:
        raise ValueError(f"{bad[:3]} where whole numbers from {least} to below {end} belong")
    return tuple(numbers)
