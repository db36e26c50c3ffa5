"""The picture of a compile as plain data: the blocks of the original network, their layers, and what became of each.

Blocks are the network's segments, so that one activation alone passes from each block to the next, whatever the
architecture; inside a block, layers and joins (additions, products, concatenations) keep the edges between them, and
everything else is left out. Names are those of the original program: a rewritten program keeps the names of what stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..analysis.regions import common_path
from ..ir.cost import node_macs
from ..ir.program import Program, data_inputs, is_size, is_tensor
from ..ir.segments import Segment, find_segments, is_dequantized
from ..plan.decision import Decision
from .layer_words import join_sign, layer_precision, layer_width, layer_words

#: The ends of a block, among the names of its edges.
ENTRY, EXIT = "<in>", "<out>"


def describe_graph(before: Program, after: Program, decisions: Sequence[Decision] = ()) -> dict[str, Any]:
    """The blocks of `before` in topological order, each with its layers, joins and edges, and what `after` has left of
    them. Multiply-accumulates are those of one sample. Where some layer is in integers, each that is left has its
    `precision`."""
    layers = _Layers(before, after, decisions)
    blocks = [_block(before, segment, layers) for segment in find_segments(before)]
    _number(blocks)
    return {"blocks": blocks}


def block_of_calls(before: Program, after: Program) -> dict[str, int]:
    """The place of the block that each call belongs to; a call that only `after` has belongs where its result goes."""
    home = {name: place for place, segment in enumerate(find_segments(before)) for name in segment.nodes}
    for node in reversed(list(after.graph.nodes)):
        if node.op == "call_function" and node.name not in home and not is_size(node):
            readers = [home[user.name] for user in node.users if user.name in home]
            if readers:
                home[node.name] = min(readers)
    return home


class _Layers:
    """The contractions of both programs side by side."""

    def __init__(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        self.before, self.after = before, after
        self.marks: dict[str, dict[str, Any]] = {}
        for decision in decisions:
            for name, mark in decision.marks(before).items():
                self.marks.setdefault(name, {}).update(mark)
        self.macs = {name: node_macs(before, node) for name, node in before.nodes.items()}
        self.rounded = any(is_dequantized(node) for node in after.graph.nodes)
        self._factors: dict[str, list[fx.Node]] = {}
        self._folded: dict[str, fx.Node] = {}
        for node in after.graph.nodes:
            if not node_macs(after, node):
                continue
            if node.name not in self.macs:
                self._factors.setdefault(self._served(node), []).append(node)
            elif not self.macs[node.name]:
                self._folded[self._norm_of(before.nodes[node.name])] = node

    def _served(self, node: fx.Node) -> str:
        """The layer of the original whose factor a new node is: the first layer that its value reaches."""
        while not self.macs.get(node.name):
            following = next((u for u in node.users if u.op == "call_function" and not is_size(u)), None)
            if following is None:
                return ""
            node = following
        return node.name

    def _norm_of(self, norm: fx.Node) -> str:
        """The layer of the original whose norm was folded into it: the folded layer has the norm's name."""
        while not self.macs.get(norm.name) and norm.args and isinstance(norm.args[0], fx.Node):
            norm = norm.args[0]
        return norm.name

    def describe(self, name: str) -> dict[str, Any]:
        """One layer as plain data."""
        node, left = self.before.nodes[name], self.after.nodes.get(name, self._folded.get(name))
        there = [*self._factors.get(name, []), *([] if left is None else [left])]
        made: dict[str, Any] = {
            "name": name,
            "path": self.before.path(node),
            "operation": layer_words(self.before, node),
            "macs": {"before": self.macs[name], "after": sum(node_macs(self.after, n) for n in there)},
        }
        width = layer_width(self.before, node)
        if width is not None:
            ends = [layer_width(self.after, n) for n in (there[0], there[-1])] if there else [None, None]
            first, last = ends
            made["inputs"] = {"kept": first.inputs if first else 0, "total": width.inputs}
            made["outputs"] = {"kept": last.outputs if last else 0, "total": width.outputs}
        made |= {key: value for key, value in self.marks.get(name, {}).items() if key != "drop"}
        was = layer_precision(node)
        if self.rounded and left is not None:
            made["precision"] = layer_precision(left)
        return {**made, "change": _change(made, left, was)}


def _change(layer: Mapping[str, Any], left: fx.Node | None, was: str) -> str:
    if left is None:
        return "dropped"
    if "ranks" in layer:
        return "factorised"
    cut = any(layer[side]["kept"] < layer[side]["total"] for side in ("outputs", "inputs") if side in layer)
    if cut:
        return "pruned"
    return "kept" if layer.get("precision", was) == was else "quantised"


def _block(program: Program, segment: Segment, layers: _Layers) -> dict[str, Any]:
    names, joins, edges = _reduced(program, segment, layers.macs)
    described = [layers.describe(name) for name in names]
    found: dict[str, Any] = {
        "name": common_path(program, names) or next((la["path"] for la in described if la["path"]), segment.exits[-1]),
        "layers": described,
        "joins": joins,
        "edges": edges,
        "macs": {side: sum(layer["macs"][side] for layer in described) for side in ("before", "after")},
    }
    last = program.nodes[segment.exits[-1]]
    if is_tensor(last):
        found["shape"] = list(program.shape(last))[1:]
    dropped = next((mark["drop"] for name in names if "drop" in (mark := layers.marks.get(name, {}))), None)
    if dropped is not None:
        found["drop"] = dropped
    return found


def _number(blocks: Sequence[dict[str, Any]]) -> None:
    """Tell blocks of one name apart."""
    seen: dict[str, int] = {}
    for block in blocks:
        number = seen[block["name"]] = seen.get(block["name"], 0) + 1
        if number > 1:
            block["name"] = f"{block['name']} #{number}"


def _reduced(
    program: Program, segment: Segment, macs: Mapping[str, int]
) -> tuple[list[str], list[dict[str, str]], list[list[str]]]:
    """(layers, joins, edges) of a segment: any other call stands for the layers and joins that its value comes from."""
    sources: dict[str, frozenset[str]] = {}
    names: list[str] = []
    joins: list[dict[str, str]] = []
    edges: list[list[str]] = []

    def connect(reached: frozenset[str], to: str) -> None:
        edges.extend([source, to] for source in sorted(reached, key=lambda s: program.order.get(s, -1)))

    for name in segment.nodes:
        node = program.nodes[name]
        if is_size(node):
            continue
        reached = frozenset().union(*(sources.get(o.name, frozenset([ENTRY])) for o in data_inputs(node)))
        if not macs[name] and len(reached) < 2:
            sources[name] = reached
            continue
        connect(reached, name)
        sources[name] = frozenset([name])
        if macs[name]:
            names.append(name)
        else:
            joins.append({"name": name, "operation": join_sign(node)})
    connect(frozenset().union(*(sources.get(name, frozenset()) for name in segment.exits)), EXIT)
    return names, joins, edges
