"""The channel rewrite: units leave every tensor that they run through. Physically smaller, no masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from ...compiler.analysis.provenance import Provenance
from ...compiler.ir.edit import Call, replace_calls, set_tensors
from ...compiler.ir.execute import ConcreteValues, run_until
from ...compiler.ir.program import Program, is_constant, is_tensor
from ...compiler.support.errors import RewriteError, plural
from ..solve.targets import Kept, select_kept
from .cut_proof import Prover
from .shape_arguments import Cut, new_call

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The smaller program, and for each node that lost channels the indices that stayed along each dimension.

    `select` brings a value of the original network into the smaller one's shape.
    """

    program: Program
    kept: Mapping[str, Kept] = field(repr=False)

    def select(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return select_kept(value, self.kept.get(name, ()))


def prune_channels(
    provenance: Provenance,
    units: torch.Tensor | Iterable[int],
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Pruned:
    """Remove units from a program: slice every parameter that they run through, and recompute the shape constants.

    Each data movement is proven first: the new call on the filtered labels must give the old result filtered. Exact
    when the removed channels are zero wherever they are consumed and no normalisation runs over them. The batch stays
    dynamic, node names stay. `tensors` are new values of parameters, in their old shapes. With no units the program
    comes back as it is. Raises RewriteError, before any tensor is made, when a unit is locked or the graph does not
    allow the cut.
    """
    program = provenance.program
    removed = provenance.removal(units)
    if not bool(removed.any()):
        changed = set_tensors(program, tensors, note="new weights") if tensors else program
        return Pruned(program=changed, kept={})
    try:
        return _cut(provenance, removed, tensors)
    except RewriteError as cause:
        raise CutRefusedError.of(cause, removed.nonzero().reshape(-1)) from cause


def prove_cut(provenance: Provenance, units: torch.Tensor | Iterable[int]) -> None:
    """Raise RewriteError when these units cannot be removed together, as far as that is seen before the cut is made."""
    removed = provenance.removal(units)
    try:
        _proven(_Cutter(provenance, removed))
    except RewriteError as cause:
        raise CutRefusedError.of(cause, removed.nonzero().reshape(-1)) from cause


def _proven(cutter: _Cutter) -> dict[str, Call]:
    """The calls that change, each proven."""
    program, calls = cutter.program, {}
    prover = Prover(ConcreteValues(program))
    for node in program.graph.nodes:
        if node.op != "call_function" or node.name in cutter.computed:
            continue
        try:
            if cutter.touches(node):
                cut = cutter.cut(node)
                call = prover.prove(cut, new_call(cut))
                if call is not None:
                    calls[node.name] = call
        except RewriteError:
            if node.name not in cutter.provenance.inputless:
                raise
            # what is left of this constant does not follow from what is left of its operands: it is evaluated
            cutter.computed.add(node.name)
    return calls


def _cut(provenance: Provenance, removed: torch.Tensor, tensors: Mapping[str, torch.Tensor] | None) -> Pruned:
    program = provenance.program
    cutter = _Cutter(provenance, removed)
    calls = _proven(cutter)
    calls |= cutter.evaluated(tensors or {})
    current = {name: program.tensor(name).detach() for name in cutter.parameters} | dict(tensors or {})
    tensors = {name: select_kept(value, cutter.parameters.get(name, ())) for name, value in current.items()}
    count = int(removed.sum())
    smaller = replace_calls(program, calls, tensors, note=f"prune {plural(count, 'unit')}")
    return Pruned(program=smaller, kept=_selectable(cutter))


def _selectable(cutter: _Cutter) -> dict[str, Kept]:
    """What is kept of each node that lost channels. Where channels and batch share a dimension there are no such
    indices."""
    found = {}
    for node in cutter.program.graph.nodes:
        try:
            kept = cutter.kept(node)
        except RewriteError:
            if node.name not in cutter.provenance.inputless:
                raise
            continue  # a constant of which no slices are left; what reads it is evaluated
        cut = [dim for dim, indices in enumerate(kept) if indices is not None]
        if cut and not any(cutter.program.follows_batch(node.meta["val"].shape[dim]) for dim in cut):
            found[node.name] = kept
    return found


class CutRefusedError(RewriteError):
    """The graph does not allow a cut. `units` are those that were to go."""

    units: torch.Tensor

    @classmethod
    def of(cls, cause: RewriteError, units: torch.Tensor) -> CutRefusedError:
        """The same refusal, with the units."""
        found = cls(
            cause.message,
            hint=cause.hint,
            node=cause.node,
            expected=cause.expected,
            actual=cause.actual,
            excerpt=cause.excerpt,
        )
        found.units = units
        return found


class _Cutter:
    """What a removal leaves of each node and parameter."""

    def __init__(self, provenance: Provenance, removed: torch.Tensor) -> None:
        self.provenance, self.removed = provenance, removed
        self.program = provenance.program
        self._kept: dict[str, Kept] = {}
        #: constants that the graph computes and that do not follow the cut of what they read: evaluated before it
        self.computed = set(provenance.inputless - provenance.followed)
        self.parameters = self._parameters()

    def _parameters(self) -> dict[str, Kept]:
        found: dict[str, list[torch.Tensor | None]] = {}
        for slot in self.provenance.slots:
            gone = self.removed[slot.labels]
            if bool(gone.any()):
                rank = self.program.tensor(slot.parameter).dim()
                dims = found.setdefault(slot.parameter, [None] * rank)
                stay = (~gone).nonzero().reshape(-1)
                known = dims[slot.dim]
                if known is not None and not torch.equal(known, stay):
                    raise RewriteError(f"{slot.parameter} would be cut in two ways", node=slot.node)
                dims[slot.dim] = stay
        for name, labels in self.provenance.constants.items():
            try:
                kept = self.provenance.kept(labels, self.removed)
            except RewriteError:
                continue  # it stays whole; what reads it is cut, or cannot be
            if any(k is not None for k in kept):
                dims = found.setdefault(name, [None] * len(kept))
                found[name] = [k if k is not None else d for k, d in zip(kept, dims, strict=True)]
        return {name: tuple(dims) for name, dims in found.items()}

    def kept(self, node: fx.Node) -> Kept:
        if node.name not in self._kept:
            self._kept[node.name] = self.provenance.node_kept(node, self.removed)
        return self._kept[node.name]

    def parameter_kept(self, node: fx.Node) -> Kept:
        rank = self.program.constant(node).dim()
        return self.parameters.get(self.program.first_names[str(node.target)], (None,) * rank)

    def results(self, node: fx.Node) -> tuple[Kept, ...]:
        value = self.provenance.values.get(node.name)
        if isinstance(value, tuple):
            return tuple(self.provenance.kept(v, self.removed) if isinstance(v, torch.Tensor) else () for v in value)
        return (self.kept(node),)

    def touches(self, node: fx.Node) -> bool:
        """Whether an operand or a result of the node changes."""
        if any(k is not None for result in self.results(node) for k in result):
            return True
        operands = [self.parameter_kept(n) if is_constant(n) else self.kept(n) for n in node.all_input_nodes]
        return any(k is not None for kept in operands for k in kept)

    def evaluated(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Call]:
        """Calls that give the value of a computed constant, as it was before the cut, without what is removed."""
        calls: dict[str, Call] = {}
        concerned: set[str] = set()
        trained: set[str] = set()
        for node in self.program.graph.nodes:
            if node.name not in self.provenance.inputless:
                continue
            operands = [n for n in node.all_input_nodes if n.op == "get_attr"]
            cut = any(k is not None for n in operands for k in self.parameter_kept(n))
            if cut or any(n.name in concerned for n in node.all_input_nodes):
                concerned.add(node.name)
            if any(n.name in trained or self._is_trained(n) for n in node.all_input_nodes):
                trained.add(node.name)
            read = is_tensor(node) and any(u.name not in self.computed for u in node.users)
            if node.name not in self.computed or not read:
                continue
            kept = self.kept(node)
            if node.name in concerned or any(k is not None for k in kept):
                value = select_kept(run_until(self.program, [node.name], {}, tensors)[node.name].detach(), kept)
                if node.name in trained:  # what stands for trained values counts and trains as they do
                    value = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
                calls[node.name] = Call(target=aten.clone.default, args=(value,), kwargs={})
        return calls

    def _is_trained(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and isinstance(self.program.constant(node), torch.nn.Parameter)

    def cut(self, node: fx.Node) -> Cut:
        return Cut(
            program=self.program,
            node=node,
            kept=self.kept,
            parameter_kept=self.parameter_kept,
            results=self.results(node),
        )
