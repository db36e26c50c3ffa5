"""Copies of graphs, to be changed."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

from torch import fx

from ..support.one_at_a_time import alone

G = TypeVar("G", fx.Graph, fx.GraphModule)


def copied(graph: G) -> G:
    """A deep copy of a graph, or of a module with its graph. torch's own tree specs warn of themselves when they are
    copied (2.13): not the user's concern."""
    with alone(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
        return copy.deepcopy(graph)
