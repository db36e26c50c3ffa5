"""What a search for a mix of rewrites may ask, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .proposals import Item, Mix, Scale
from .search_time import SearchTime

#: No plan is made from single items' figures when so many plans were tried.
MOST_TRIALS = 48

#: Brings a plan nearer to the goal: the plan, the scales of the items that it may change.
Adjust = Callable[[Mix, Mapping[Item, Scale]], Mix]


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a search asks and how long: `measure` gives a plan's ratio, of latency or what else is to be saved, `trial`
    its relative output error; both are expensive. `adjust` brings a plan nearer to the goal where what single items
    save is known exactly, given the scales of the items that it may change. No plan is made from single items' figures
    once `most_trials` were tried; when the `time` has run out, the best plan of those tried so far stands, each kind's
    own and one of all kinds among them, once one reaches the goal. The search ends with a plan that reaches it and
    loses at most `enough`. `together` finds out what some plans lose that do not depend on each other, before `trial`
    is asked for each; None where that is no faster."""

    measure: Callable[[Mix], float]
    trial: Callable[[Mix], float]
    together: Callable[[Sequence[Mix]], None] | None = None
    adjust: Adjust | None = None
    most_trials: int = MOST_TRIALS
    enough: float = 0.0
    time: SearchTime = field(default_factory=SearchTime)
