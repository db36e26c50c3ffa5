"""Goals and settings as the command line gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...passes.drop.decision import Blocks
from ...passes.factorize.decision import Ranks
from ...passes.factorize.select_ranks import RankSettings
from ...passes.mimic.settings import MimicSettings
from ...passes.prune.channel_budget import ChannelLimits
from ...passes.prune.decision import Channels
from ...passes.prune.settings import ChannelSettings
from ..driver.builtin import built_in
from ..driver.pipeline_settings import PipelineSettings
from ..driver.sweep import GOALS
from ..goals.counted import Macs, Parameters
from ..goals.latency import Latency
from ..goals.max_error import MaxError
from ..goals.max_loss import MaxLoss
from ..plan.goal import Goal
from ..support.errors import CalibrationError, GoalError
from ..support.memory import read_bytes
from .options import CompileOptions, RunOptions, SolveOptions, latency_number


def read_goal(options: CompileOptions) -> Goal:
    """The one goal that was given; `regime` is that of a latency. Raises GoalError."""
    options.check_goal()
    made: list[tuple[Any, Callable[[Any], Goal]]] = [
        (options.latency, lambda text: _latency(text, options.regime)),
        (options.blocks, Blocks),
        (options.keep, Channels),
        (options.macs, Macs),
        (options.parameters, Parameters),
        (options.max_error, MaxError),
        (options.max_loss, MaxLoss),
        (options.ranks, lambda share: Ranks(keep=share)),
    ]
    return next(make(value) for value, make in made if value is not None)


def read_goals(latency: str | None, macs: str | None, regime: str | None = None) -> tuple[Goal, ...]:
    """The goals of a sweep, as they were given; some latency ratios where none were. `regime` is that of all latencies.
    Raises GoalError."""
    goals: list[Goal] = [_latency(text.strip(), regime) for text in (latency or "").split(",") if text.strip()]
    goals += [Macs(_number("--macs", text)) for text in (macs or "").split(",") if text.strip()]
    if latency is None and macs is None:
        return tuple(_in_regime(goal, regime) for goal in GOALS)
    if not goals:
        raise GoalError("no goal is named", hint="--latency 0.8,0.6 or --macs 0.8,0.5; without either some ratios")
    return tuple(goals)


def read_rewrites(text: str | None, goals: Sequence[Goal]) -> list[str] | None:
    """The names that were given; `all` stands for every one that reaches one of the goals."""
    if text is None:
        return None
    if text.strip() == "all":
        return [r.name for r in built_in(PipelineSettings()) if any(r.serves(goal) for goal in goals)]
    return [name.strip() for name in text.split(",")]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise GoalError(f"{option} {text!r} is no number", hint="give ratios such as 0.8,0.6") from None


def _in_regime(goal: Goal, regime: str | None) -> Goal:
    return replace(goal, regime=regime) if regime is not None and isinstance(goal, Latency) else goal  # type: ignore[arg-type]


def _latency(text: str, regime: str | None) -> Latency:
    value, unit = latency_number(text)
    wanted: dict[str, Any] = {unit: value, "regime": regime or "hot"}
    return Latency(**wanted)


def read_settings(options: RunOptions) -> PipelineSettings:
    """What channel counts and ranks go to, what is left alone, how long a mix is looked for, how much memory there is.
    Raises GoalError."""
    multiple_of = options.multiple_of
    lattice = multiple_of == "lattice"
    try:
        multiple = None if lattice or multiple_of is None else int(multiple_of)
    except ValueError:
        raise GoalError(f"--multiple-of {multiple_of!r} is no number", hint="give a whole number, or lattice") from None
    if multiple is not None and multiple < 1:
        raise GoalError("--multiple-of starts at 1", hint=f"give a whole number from 1 on, or lattice, not {multiple}")
    steps: dict[str, Any] = {} if multiple is None else {"multiple_of": multiple}
    names = tuple(options.ignore or ())
    limits = ChannelLimits(**steps, ignore=names)
    return PipelineSettings(
        channels=ChannelSettings(limits=limits, on_lattice=lattice),
        ranks=RankSettings(**steps, ignore=names, on_lattice=lattice),
        search_seconds=options.search_seconds,
        memory_bytes=read_size(options.memory),
        device_memory_bytes=read_size(options.device_memory),
        save_temps=options.save_temps,
    )


def read_size(text: str | None) -> int | None:
    """An amount of memory, where one is given. Raises CompilerError."""
    return None if text is None else read_bytes(text)


def read_mimic(options: SolveOptions) -> MimicSettings | bool:
    """Whether there is a training, and how long it may take. Raises CalibrationError."""
    if options.mimic_seconds is None:
        return options.mimic
    if not options.mimic:
        raise CalibrationError(
            "--mimic-seconds is for the training that --no-mimic leaves out", hint="give one of them"
        )
    return MimicSettings(seconds=options.mimic_seconds)
