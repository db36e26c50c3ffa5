"""How channels are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ...compiler.support.setting_checks import check_kind, check_switch, check_word
from .channel_budget import ChannelLimits

Variant = Literal["asymmetric", "sequential", "layerwise"]
Score = Literal["submodular", "l1", "l2"]


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """How channels are chosen.

    `score` is what the next layer can do without, or the L1 or L2 norm of the weights that make a channel; `variant`
    the paper's. With `resolve` the consumers are re-solved, with `stream_target` those that feed a residual addition
    for the stream behind it, not for their own output; with `polish` what is left is solved once more and refined
    together after the cut. `on_lattice` takes the multiple that channel counts go to from the backend, by
    `probe_lattice`, in place of `limits.multiple_of`; the cut then depends on the machine.
    """

    limits: ChannelLimits = field(default_factory=ChannelLimits)
    score: Score = "submodular"
    variant: Variant = "asymmetric"
    resolve: bool = True
    stream_target: bool = True
    polish: bool = True
    on_lattice: bool = False

    def __post_init__(self) -> None:
        check_kind("limits", self.limits, ChannelLimits)
        check_word("score", self.score, get_args(Score))
        check_word("variant", self.variant, get_args(Variant))
        for name in ("resolve", "stream_target", "polish", "on_lattice"):
            check_switch(name, getattr(self, name))
