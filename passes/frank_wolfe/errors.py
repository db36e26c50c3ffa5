"""What goes wrong in compression-aware training: sets, optimizer settings, gradients."""

from __future__ import annotations

from ...compiler.support.errors import CompilerError


class FrankWolfeError(CompilerError):
    """A set or a setting is out of range, a weight is not in its set, or a gradient is not finite.

    Raised before anything is written: weights and optimizer state are as they were.
    """

    stage = "frank_wolfe"
