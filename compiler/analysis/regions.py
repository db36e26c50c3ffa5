"""Removable regions: parts of the graph with one entry and one exit of the same shape and dtype. Every path from the
input to the exit runs through the entry, every path from the entry to the output through the exit (dominators and
post-dominators of the data flow), with a contraction in between. Module names play no part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx
import torch
from torch import fx

from ..ir.cost import Cost, node_macs, region_cost
from ..ir.edit import signature
from ..ir.program import Program, data_inputs, is_call, is_tensor
from ..support.errors import Reject

aten = torch.ops.aten
Kind = Literal["residual", "gate", "plain", "concat"]

_INPUT, _OUTPUT = "<input>", "<output>"


@dataclass(frozen=True, kw_only=True)
class Region:
    """A removable region: bypassing it replaces `exit` by `entry` and deletes `nodes`.

    Arguments:
        entry: Name of the node that stays.
        exit: Name of the node that is replaced. It has the shape and dtype of `entry`.
        kind: ``residual`` or ``gate`` if a path free of contractions leads to the exit, joined by addition or by
            multiplication; ``plain`` if none does; ``concat`` for two operands of one concatenation (a dense layer).
        nodes: Names of the nodes that are deleted, `exit` included.
        path: Module path that the contractions share, for display only.
        cost: MACs, parameters and bytes at batch 1.
        parent: Name of the smallest region that strictly contains this one, or None.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4))
        >>> [(region.name, region.kind, region.cost.macs) for region in foldcut.find_regions(program).regions]
        [('input_1>linear', 'plain', 16)]
    """

    entry: str
    exit: str
    kind: Kind
    nodes: frozenset[str]
    path: str
    cost: Cost
    parent: str | None = None

    @property
    def name(self) -> str:
        """Identity within the program: ``entry>exit``."""
        return f"{self.entry}>{self.exit}"

    def overlaps(self, other: Region) -> bool:
        """Whether some node belongs to this region and to `other`."""
        return not self.nodes.isdisjoint(other.nodes)


@dataclass(frozen=True, kw_only=True)
class RegionAnalysis:
    """The removable regions of a program, and the joins that close none.

    Arguments:
        regions: Regions in topological order of their exits.
        rejects: Additions of two activations that close no removable region, with the reason.

    Example:
        >>> foldcut.find_regions(foldcut.capture(nn.Sequential(nn.Linear(4, 8)).eval(), torch.randn(2, 4)))
        RegionAnalysis(regions=(), rejects=())
    """

    regions: tuple[Region, ...]
    rejects: tuple[Reject, ...]

    @property
    def outermost(self) -> tuple[Region, ...]:
        """Regions that no other region contains."""
        return tuple(r for r in self.regions if r.parent is None)

    @property
    def blocks(self) -> tuple[Region, ...]:
        """Residual regions without a residual region inside; without any, the plain and concat regions."""
        residual = [r for r in self.regions if r.kind == "residual"]
        inner = {r.parent for r in residual}
        blocks = tuple(r for r in residual if r.name not in inner)
        return blocks or tuple(r for r in self.regions if r.kind in {"plain", "concat"})

    def find(self, name: str) -> Region | None:
        """The region called `name` (``entry>exit``), or None."""
        return next((r for r in self.regions if r.name == name), None)


def find_regions(program: Program) -> RegionAnalysis:
    """Find the removable regions of a program. Of pairs that remove the same contractions one is kept.

    Arguments:
        program: The program to analyse. It is not changed.

    Returns:
        A `RegionAnalysis`: the regions, and the additions that close none.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4))
        >>> [region.path for region in foldcut.find_regions(program).regions]
        ['0']
    """
    flow = _Flow(program)
    regions: list[Region] = []
    rejects: list[Reject] = []
    taken: set[frozenset[str]] = set()
    for members, found in flow.candidates():
        pairs = [pair for pair in found if flow.keeps_inputs(*pair)]
        if not pairs:
            continue
        entry, exit_ = max(pairs, key=lambda pair: _preference(program, *pair))
        regions.append(_region(program, flow, entry, exit_))
        taken.add(members)
    covered = frozenset().union(*(r.nodes for r in regions)) if regions else frozenset()
    regions += _concat_regions(program, flow, covered)
    covered = frozenset().union(covered, *(r.nodes for r in regions))
    rejects += _rejected_joins(program, flow, covered)
    regions.sort(key=lambda r: (program.order[r.exit], -len(r.nodes)))
    return RegionAnalysis(regions=tuple(_with_parents(regions)), rejects=tuple(rejects))


class _Flow:
    """The data-flow graph with its dominator trees. Parameters and symbolic sizes are not data flow."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph: nx.DiGraph[str] = nx.DiGraph()
        for node in program.graph.nodes:
            for operand in data_inputs(node):
                self.graph.add_edge(operand.name, _OUTPUT if node.op == "output" else node.name)
        inputs = [n.name for n in program.graph.nodes if n.op == "placeholder" and n.name in self.graph]
        self.dominators = [_tree(self.graph, name) for name in inputs]
        self.graph.add_edges_from((_INPUT, name) for name in inputs)
        self.post_dominators = _tree(self.graph.reverse(copy=False), _OUTPUT) if _OUTPUT in self.graph else {}
        self._span = _spans(self.post_dominators, _OUTPUT)
        self.macs = {name: node_macs(program, node) for name, node in program.nodes.items()}

    def candidates(self) -> Iterator[tuple[frozenset[str], list[tuple[str, str]]]]:
        """(contractions removed, equivalent (entry, exit) pairs that remove just those)."""
        found: dict[frozenset[str], list[tuple[str, str]]] = {}
        for exit_ in self.program.nodes:
            if exit_ not in self.post_dominators or not is_tensor(self.program.nodes[exit_]):
                continue
            for entry, members in self._entries(exit_):
                found.setdefault(members, []).append((entry, exit_))
        yield from found.items()

    def _entries(self, exit_: str) -> Iterator[tuple[str, frozenset[str]]]:
        """Same-typed dominators of `exit_` that it post-dominates, as far up as they remove the first contractions."""
        wanted = signature(self.program.nodes[exit_])
        for tree in self.dominators:
            first: frozenset[str] | None = None
            for entry in _ancestors(tree, exit_):
                if signature(self.program.nodes[entry]) != wanted or not self.post_dominates(exit_, entry):
                    continue
                contractions = frozenset(n for n in self.between(entry, exit_) if self.macs[n])
                if not contractions:
                    continue
                if first is not None and contractions != first:
                    break
                first = contractions
                yield entry, contractions

    def common_entry(self, node: str) -> str | None:
        """The nearest value that all inputs' paths to the node run through, or None."""
        trees = [tree for tree in self.dominators if node in tree]
        if not trees:
            return None
        common = set.intersection(*(set(_ancestors(tree, node)) for tree in trees))
        return next((e for e in _ancestors(trees[0], node) if e in common), None)

    def post_dominates(self, above: str, below: str) -> bool:
        """Whether every path from `below` to an output runs through `above` (a subtree test by visiting times)."""
        if above not in self._span or below not in self._span:
            return False
        (enter, leave), (inner, _) = self._span[above], self._span[below]
        return enter < inner <= leave

    def keeps_inputs(self, entry: str, exit_: str) -> bool:
        """No other input loses its last reader or ends at the exit (a mask may come in by a contraction)."""
        removed = removed_nodes(self.program, entry, exit_)
        stack, seen = [exit_], {exit_, entry}
        while stack:
            node = stack.pop()
            if node == _INPUT:
                return False
            if self.macs.get(node) and node in removed:
                continue
            for previous in self.graph.predecessors(node):
                if previous not in seen:
                    seen.add(previous)
                    stack.append(previous)
        inputs = [n for n in self.program.graph.nodes if n.op == "placeholder" and n.users and n.name != entry]
        return not any(all(user.name in removed for user in n.users) for n in inputs)

    def between(self, entry: str, exit_: str) -> set[str]:
        """Nodes on a path from entry to exit, without the entry."""
        floor = self.program.order[entry]
        stack, seen = [exit_], {exit_}
        while stack:
            for previous in self.graph.predecessors(stack.pop()):
                if previous not in seen and previous != entry and self.program.order.get(previous, -1) > floor:
                    seen.add(previous)
                    stack.append(previous)
        return {n for n in seen if n == exit_ or self._reaches(entry, n, seen)}

    def _reaches(self, entry: str, node: str, within: set[str]) -> bool:
        stack, seen = [node], {node}
        while stack:
            for previous in self.graph.predecessors(stack.pop()):
                if previous == entry:
                    return True
                if previous in within and previous not in seen:
                    seen.add(previous)
                    stack.append(previous)
        return False


def _tree(graph: nx.DiGraph[str], root: str) -> dict[str, str]:
    """Immediate (post-)dominator of each node; the root has none."""
    return {
        node: above
        for node, above in nx.immediate_dominators(graph, root).items()
        if above is not None and node != root
    }


def _spans(tree: dict[str, str], root: str) -> dict[str, tuple[int, int]]:
    """Visiting time of each tree node and the last one below it: a is above b when b's time falls in a's span."""
    forest: nx.DiGraph[str] = nx.DiGraph((above, node) for node, above in tree.items())
    if root not in forest:
        return {}
    enter = {node: time for time, node in enumerate(nx.dfs_preorder_nodes(forest, root))}
    leave = dict(enter)
    for node in nx.dfs_postorder_nodes(forest, root):
        leave[node] = max([leave[node], *(leave[child] for child in forest.successors(node))])
    return {node: (enter[node], leave[node]) for node in enter}


def _ancestors(tree: dict[str, str], node: str) -> Iterator[str]:
    while node in tree:
        node = tree[node]
        if node in (_INPUT, _OUTPUT):
            return
        yield node


def _preference(program: Program, entry: str, exit_: str) -> tuple[bool, int, int]:
    """Same operation at both ends first, then the later exit, then the nearer entry."""
    first, last = program.nodes[entry], program.nodes[exit_]
    return _operation(first) == _operation(last), program.order[exit_], program.order[entry]


def _operation(node: fx.Node) -> object:
    """What the node computes; a getitem is named by the operation it reads."""
    source = node.args[0] if node.op == "call_function" and node.args and "getitem" in str(node.target) else node
    return source.target if isinstance(source, fx.Node) else node.target


def _region(program: Program, flow: _Flow, entry: str, exit_: str) -> Region:
    nodes = removed_nodes(program, entry, exit_)
    contracted = {n for n in nodes if flow.macs.get(n)}
    return Region(
        entry=entry,
        exit=exit_,
        kind=_kind(program, entry, exit_, contracted),
        nodes=frozenset(nodes),
        path=common_path(program, contracted),
        cost=region_cost(program, (program.nodes[n] for n in nodes)),
    )


def removed_nodes(program: Program, entry: str, exit_: str) -> set[str]:
    """The nodes without a reader once `exit_` is replaced by `entry`, except parameters and what feeds `entry`."""
    dead = {exit_}
    for node in reversed(list(program.graph.nodes)):
        if node.op != "call_function" or program.order[node.name] >= program.order[exit_] or node.name == entry:
            continue
        if node.users and all(user.name in dead for user in node.users):
            dead.add(node.name)
    alive = _upstream(program.nodes[entry])
    return {n for n in dead if n not in alive}


def _upstream(node: fx.Node) -> set[str]:
    stack, seen = [node], {node.name}
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand.name not in seen:
                seen.add(operand.name)
                stack.append(operand)
    return seen


def _kind(program: Program, entry: str, exit_: str, contracted: set[str]) -> Kind:
    """Follow contraction-free paths back from the exit; the join where the branch comes in decides."""
    joins: list[fx.Node] = []
    direct = _free_of(program, exit_, entry, contracted, joins)
    if not direct:
        return "plain"
    return "gate" if joins and all(is_call(j, aten.mul) for j in joins) else "residual"


def _free_of(program: Program, node: str, entry: str, contracted: set[str], joins: list[fx.Node]) -> bool:
    """Whether a path without contraction leads from entry to node; collects the two-operand joins on such paths."""
    memo: dict[str, bool] = {entry: True}
    floor = program.order[entry]
    members = [n for n in program.nodes.values() if floor < program.order[n.name] <= program.order[node]]
    for member in members:
        operands = [memo.get(o.name, False) for o in data_inputs(member)]
        memo[member.name] = any(operands) and member.name not in contracted
        if memo[member.name] and len(operands) > 1 and not all(operands):
            joins.append(member)
    joins[:] = [j for j in joins if j.name in _upstream(program.nodes[node])]
    return memo.get(node, False)


def _concat_regions(program: Program, flow: _Flow, covered: frozenset[str]) -> list[Region]:
    """Operands of a concatenation that an equal-shaped earlier operand of the same concatenation can stand for."""
    regions: dict[frozenset[str], Region] = {}
    for node in program.graph.nodes:
        if not is_call(node, aten.cat):
            continue
        operands = [o for o in node.args[0] if isinstance(o, fx.Node) and is_tensor(o)]
        for position, operand in enumerate(operands):
            entry = next((o for o in reversed(operands[:position]) if signature(o) == signature(operand)), None)
            if entry is None or entry is operand or operand.op != "call_function":
                continue
            if program.order[entry.name] >= program.order[operand.name]:
                continue
            nodes = removed_nodes(program, entry.name, operand.name)
            contracted = frozenset(n for n in nodes if flow.macs.get(n))
            if not contracted or contracted & covered or contracted in regions:
                continue
            regions[contracted] = Region(
                entry=entry.name,
                exit=operand.name,
                kind="concat",
                nodes=frozenset(nodes),
                path=common_path(program, contracted),
                cost=region_cost(program, (program.nodes[n] for n in nodes)),
            )
    return list(regions.values())


def _rejected_joins(program: Program, flow: _Flow, covered: frozenset[str]) -> list[Reject]:
    """Additions of two activations that look like a residual join but close no removable region."""
    rejects = []
    for name, node in program.nodes.items():
        operands = data_inputs(node)
        if not is_call(node, aten.add) or len(operands) < 2 or name in covered or not is_tensor(node):
            continue
        entry = flow.common_entry(name)
        if entry is None:
            reason = "its operands come from different inputs"
        elif signature(program.nodes[entry]) != signature(node):
            reason = (
                f"the shape changes between {entry} and {name}: {signature(program.nodes[entry])} -> {signature(node)}"
            )
        else:
            reason = "a value inside is also used outside"
        rejects.append(Reject(reason=reason, node=name))
    return rejects


def common_path(program: Program, names: Iterable[str]) -> str:
    """The longest module path that the nodes share; for an ONNX file without such paths, the first and last name."""
    paths = [program.path(program.nodes[n]) for n in sorted(names, key=program.order.__getitem__)]
    if not paths:
        return ""
    common = []
    for atoms in zip(*(re.split("([./])", path) for path in paths), strict=False):
        if len(set(atoms)) > 1:
            break
        common.append(atoms[0])
    shared = "".join(common).strip("./")
    if shared or program.origin is None:
        return shared
    return f"{paths[0]} ... {paths[-1]}"


def _with_parents(regions: list[Region]) -> list[Region]:
    result = []
    for region in regions:
        around = [r for r in regions if region.nodes < r.nodes]
        parent = min(around, key=lambda r: len(r.nodes)).name if around else None
        result.append(replace(region, parent=parent))
    return result
