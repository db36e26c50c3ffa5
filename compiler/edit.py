"""The only module that changes fx graphs and the tensors behind them. Everything here returns a new Program."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .errors import RewriteError
from .norms import BatchNorm, batch_norm_of
from .program import Program, is_call, is_constant, is_tensor

aten = torch.ops.aten


def rebuild(root: fx.GraphModule, graph: fx.Graph, *, copy_tensors: bool = False) -> fx.GraphModule:
    """A GraphModule over `graph` that shares (or copies) just those tensors of `root` that the graph still names."""
    module = fx.GraphModule(root, graph)
    if copy_tensors:
        # one memo for all tensors, so that weights tied in the model stay tied in the copy
        memo: dict[int, object] = {}
        for owner in module.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    owner._parameters[name] = copy.deepcopy(parameter, memo)
            for name, buffer in list(owner._buffers.items()):
                if buffer is not None:
                    owner._buffers[name] = copy.deepcopy(buffer.detach(), memo)
    module.eval()
    return module


def bypass(program: Program, entry: str, exit_: str, *, note: str | None = None) -> Program:
    """Replace every use of node `exit_` by node `entry` and remove what nobody reads any more.

    Exact when the region's branch is zero. Node names, shared weights and the dynamic batch stay.
    Raises RewriteError when a node is missing, when shapes or dtypes differ, or when `entry` depends on `exit_`.
    """
    for name in (entry, exit_):
        if name not in program.nodes:
            raise RewriteError(
                f"no node {name!r} in the program", hint="apply a plan to the program that it was made for"
            )
    before, after = program.nodes[entry], program.nodes[exit_]
    if signature(before) != signature(after):
        raise RewriteError(
            "a region can be bypassed only when its entry and exit have one shape and dtype",
            node=exit_,
            expected=signature(before),
            actual=signature(after),
            excerpt=program.excerpt(after),
        )
    if program.order[entry] >= program.order[exit_]:
        raise RewriteError(f"{entry} does not come before {exit_}", node=exit_, excerpt=program.excerpt(after))
    graph = copy.deepcopy(program.graph)
    by_name = {n.name: n for n in graph.nodes}
    by_name[exit_].replace_all_uses_with(by_name[entry])
    _erase_dead(graph)
    module = rebuild(program.module, graph)
    graph.lint()
    return replace(program, module=module, history=(*program.history, note or f"bypass {entry} -> {exit_}"))


def set_tensors(program: Program, tensors: Mapping[str, torch.Tensor], *, note: str) -> Program:
    """Give the named parameters or buffers new values of the same shape. The old Program keeps the old ones."""
    module = rebuild(program.module, copy.deepcopy(program.graph))
    owners = {}
    for target, value in tensors.items():
        path, _, leaf = target.rpartition(".")
        old = _lookup(program, target)
        if old.shape != value.shape:
            raise RewriteError(
                f"{target} has another shape",
                expected=list(old.shape),
                actual=list(value.shape),
                hint="values may change here, shapes not",
            )
        owners[path] = _own(module, path)
        new = value.detach().to(old.dtype)
        if isinstance(old, nn.Parameter):
            owners[path]._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            owners[path]._buffers[leaf] = new
    return replace(program, module=module, history=(*program.history, note))


def expose(program: Program, names: Sequence[str], *, copy_tensors: bool = False) -> fx.GraphModule:
    """A module that returns the values of the named nodes as a tuple, and computes nothing else. Takes the program's
    arguments."""
    graph = copy.deepcopy(program.graph)
    by_name = {n.name: n for n in graph.nodes}
    for node in graph.nodes:
        if is_call(node, aten.view):
            node.target = aten.reshape.default  # a view asks for one memory layout; the module takes any
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (tuple(by_name[name] for name in names),)
    codegen = graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure(tuple(range(len(names)))))
    _erase_dead(graph)
    return rebuild(program.module, graph, copy_tensors=copy_tensors)


@dataclass(frozen=True, kw_only=True)
class FoldedNorm:
    """A batch norm that a convolution took over: the names before (`weight`, `bias` of the norm) and the
    convolution's own."""

    norm: BatchNorm
    weight: str
    bias: str


def fold_batch_norms(program: Program) -> tuple[Program, tuple[FoldedNorm, ...]]:
    """Merge each batch norm into the convolution that alone feeds it: W' = scale * W, b' = offset + scale * (b - mean).

    Exact up to rounding. The merged convolution takes the name of the norm's output, whose value it has.
    `unfold_tensors` takes
    new weights back to the program with its norms.
    """
    graph = copy.deepcopy(program.graph)
    module = rebuild(program.module, graph)
    by_name = {n.name: n for n in module.graph.nodes}
    folded: list[FoldedNorm] = []
    for name, node in program.nodes.items():
        norm = batch_norm_of(program, node) if node.op == "call_function" else None
        if norm is None or norm.node != name or not _foldable(program, node, norm.scale):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        weight = str(source.args[1].target)  # type: ignore[union-attr]
        bias = f"{weight.rpartition('.')[0] or 'folded'}.folded_bias_{len(folded)}".lstrip(".")
        _write_folded(program, module, norm, weight, bias)
        _replace_with_biased(module.graph, by_name, source.name, norm.output, bias)
        folded.append(FoldedNorm(norm=norm, weight=weight, bias=bias))
    _erase_dead(module.graph)
    return replace(
        program, module=rebuild(module, module.graph), history=(*program.history, "fold batch norms")
    ), tuple(folded)


def unfold_tensors(program: Program, folded: Program, norms: Sequence[FoldedNorm]) -> dict[str, torch.Tensor]:
    """The tensors of `folded` in terms of `program`, whose norms it took over: W = W' / scale, norm bias = b' + scale
    * (mean - b).

    Only tensors that `program` has are returned.
    """
    result = {
        n: p.detach() for n, p in folded.module.named_parameters() if n in dict(program.module.named_parameters())
    }
    for item in norms:
        norm = item.norm
        old = program.module.get_parameter(item.weight).detach()
        new = folded.module.get_parameter(item.weight).detach().double()
        shift = folded.module.get_parameter(item.bias).detach().double()
        result[item.weight] = (new / norm.scale.view(-1, *[1] * (old.dim() - 1))).to(old.dtype)
        assert norm.bias is not None  # _foldable
        own = _conv_bias(program, item.weight)
        result[norm.bias] = (shift + norm.scale * (norm.mean - own)).to(old.dtype)
    return result


def _conv_bias(program: Program, weight: str) -> torch.Tensor:
    node = next(
        n
        for n in program.graph.nodes
        if n.op == "call_function" and any(str(i.target) == weight for i in n.all_input_nodes)
    )
    bias = node.args[2] if len(node.args) > 2 else None
    return (
        program.constant(bias).detach().double() if isinstance(bias, fx.Node) else torch.zeros((), dtype=torch.float64)
    )


def _foldable(program: Program, node: fx.Node, scale: torch.Tensor) -> bool:
    """A norm with a trained bias, fed by a convolution that feeds nothing else and owns its weight.

    A norm with a channel of scale (almost) zero stays: new weights could not be taken back through it.
    """
    if not bool((scale.abs() > scale.abs().max() * 1e-6).all()):
        return False
    source = node.args[0]
    if (
        not isinstance(source, fx.Node)
        or not is_call(source, aten.conv1d, aten.conv2d, aten.conv3d)
        or len(source.users) != 1
    ):
        return False
    weight = source.args[1]
    bias = source.args[2] if len(source.args) > 2 else None
    return (
        program.owned(weight)
        and program.owned(node.args[2])
        and (node.args[1] is None or program.owned(node.args[1]))
        and (bias is None or is_constant(bias))
    )


def _write_folded(program: Program, module: fx.GraphModule, norm: BatchNorm, weight: str, bias: str) -> None:
    old = program.module.get_parameter(weight).detach()
    own = _conv_bias(program, weight)
    scale = norm.scale.view(-1, *[1] * (old.dim() - 1))
    path, _, leaf = weight.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters[leaf] = nn.Parameter((old.double() * scale).to(old.dtype))
    holder, _, name = bias.rpartition(".")
    if holder and holder != path and not hasattr(module, holder):
        module.add_submodule(holder, nn.Module())
    module.get_submodule(holder).register_parameter(
        name, nn.Parameter((norm.offset + norm.scale * (own - norm.mean)).to(old.dtype))
    )


def _replace_with_biased(graph: fx.Graph, by_name: dict[str, fx.Node], conv: str, output: str, bias: str) -> None:
    source, result = by_name[conv], by_name[output]
    with graph.inserting_before(source):
        parameter = graph.get_attr(bias)
    with graph.inserting_after(source):
        args = [*source.args[:2], parameter, *source.args[3:]]
        merged = graph.call_function(source.target, tuple(args), dict(source.kwargs))  # type: ignore[arg-type]
    merged.meta = dict(result.meta)
    result.replace_all_uses_with(merged)
    _erase_dead(graph)
    merged.name = output
    by_name[output] = merged


def signature(node: fx.Node) -> str:
    """Shape and dtype as text, symbols included: equal text means that one may stand for the other."""
    if not is_tensor(node):
        return "not a tensor"
    value = node.meta["val"]
    return f"{value.dtype}{[str(d) for d in value.shape]}"


def _erase_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op not in {"placeholder", "output"} and not node.users:
            graph.erase_node(node)


def _lookup(program: Program, target: str) -> torch.Tensor:
    value: object = program.module
    for atom in target.split("."):
        value = getattr(value, atom, None)
    if not isinstance(value, torch.Tensor):
        raise RewriteError(f"no tensor {target!r} in the program")
    return value


def _own(module: fx.GraphModule, path: str) -> nn.Module:
    """The submodule at `path`, with its own tensor tables.

    `rebuild` makes fresh submodules along every path (fx copies attributes one by one), so writing into
    their tables does not reach the program that the module came from.
    """
    return module.get_submodule(path)
