"""Copies of graphs, to be changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import TypeVar

from torch import fx

from ..support.one_at_a_time import alone

G = TypeVar("G", fx.Graph, fx.GraphModule)


def copied(graph: G) -> G:
    """A deep copy of a graph, or of a module with its graph, with the same names of nodes.

    A copy by torch gives names anew, and calls a node otherwise that torch.export had named like a builtin: `input`.
    torch's own tree specs warn of themselves when they are copied (2.13): not the user's concern.
    """
    with alone(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
        made = copy.deepcopy(graph)
    for node, original in zip(_nodes(made), _nodes(graph), strict=True):
        node.name = original.name
    return made


def _nodes(graph: fx.Graph | fx.GraphModule) -> Iterable[fx.Node]:
    return graph.graph.nodes if isinstance(graph, fx.GraphModule) else graph.nodes
