"""Settings of channel pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ...compiler.support.setting_checks import check_kind, check_switch, check_word
from .channel_budget import ChannelLimits

Variant = Literal["asymmetric", "sequential", "layerwise"]
Score = Literal["submodular", "l1", "l2"]


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """How channels are chosen. `Prune` describes the score.

    Arguments:
        limits: What may be removed.
        score: ``submodular``: how well the consumers can do without a channel. ``l1`` or ``l2``: the norm of the
            weights that make it.
        variant: One of the variants of El Halabi et al. (arXiv 2203.04940): ``asymmetric``, ``sequential`` or
            ``layerwise``.
        resolve: Whether the layers that consume removed channels are re-solved.
        stream_target: Whether a layer that feeds a residual addition is solved toward the stream behind it, instead
            of its own output.
        polish: Whether all layers affected are re-solved and refined together after the cut.
        on_lattice: Whether the multiple of channel counts is taken from the backend, instead of from `limits`. The
            result then depends on the machine.

    Raises:
        CompilerError: If a setting is out of range or of the wrong type.

    Example:
        >>> limits = foldcut.ChannelLimits(multiple_of=16)
        >>> foldcut.ChannelSettings(limits=limits, score="l1").limits.multiple
        16
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
