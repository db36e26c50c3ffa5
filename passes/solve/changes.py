"""What rewrites did to a network, as far as a solve has to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .targets import Kept


@dataclass(frozen=True, kw_only=True)
class Changes:
    """`dropped` lists (entry, exit) of bypassed regions by the names of the original's nodes, `kept` the channels left
    of each node that lost some, `replaced` the nodes that stand where another one of that name stood (factorised
    layers, exchanged activations)."""

    dropped: tuple[tuple[str, str], ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict, repr=False)
    replaced: tuple[str, ...] = ()

    def then(self, later: Changes) -> Changes:
        """These, and those of a rewrite behind them."""
        return Changes(
            dropped=(*self.dropped, *later.dropped),
            kept={**self.kept, **later.kept},
            replaced=(*self.replaced, *later.replaced),
        )
