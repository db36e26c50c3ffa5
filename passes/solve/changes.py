"""What rewrites did to a network, as far as a solve has to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .targets import Kept


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What rewrites did to a network, as far as the solve after them has to know it.

    Arguments:
        dropped: (entry, exit) of each bypassed region, by the names of the original's nodes.
        kept: The channels that are left of each node that lost some.
        replaced: The nodes that stand where another one of that name stood: factorised layers, other activations.

    Example:
        >>> foldcut.Changes(dropped=(("relu", "relu_1"),)).then(foldcut.Changes(replaced=("conv2d",)))
        Changes(dropped=(('relu', 'relu_1'),), replaced=('conv2d',))
    """

    dropped: tuple[tuple[str, str], ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict, repr=False)
    replaced: tuple[str, ...] = ()

    def then(self, later: Changes) -> Changes:
        """These changes and later ones.

        Arguments:
            later: The changes of a rewrite that was applied after them.

        Returns:
            All of them.
        """
        return Changes(
            dropped=(*self.dropped, *later.dropped),
            kept={**self.kept, **later.kept},
            replaced=(*self.replaced, *later.replaced),
        )
