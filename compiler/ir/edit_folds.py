"""Exact folds: what a layer can take over from its neighbours without changing what the network computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from ..devices.precision import in_float64
from .edit import erase_dead, rebuild
from .execute import run_until
from .graph_copy import copied
from .norms import BatchNorm, batch_norm_of
from .program import Program, is_call, is_constant, is_tensor
from .segments import is_dequantized

aten = torch.ops.aten


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
    graph = copied(program.graph)
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
    erase_dead(module.graph)
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
        new = in_float64(folded.module.get_parameter(item.weight).detach())
        shift = in_float64(folded.module.get_parameter(item.bias).detach())
        result[item.weight] = (new / norm.scale.view(-1, *[1] * (old.dim() - 1))).to(old)
        assert norm.bias is not None  # _foldable
        own = _conv_bias(program, item.weight)
        result[norm.bias] = (shift + norm.scale * (norm.mean - own)).to(old)
    return result


def _conv_bias(program: Program, weight: str) -> torch.Tensor:
    node = next(
        n
        for n in program.graph.nodes
        if n.op == "call_function" and any(str(i.target) == weight for i in n.all_input_nodes)
    )
    bias = node.args[2] if len(node.args) > 2 else None
    return (
        in_float64(program.constant(bias).detach())
        if isinstance(bias, fx.Node)
        else torch.zeros((), dtype=torch.float64)
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
    owner._parameters[leaf] = nn.Parameter((in_float64(old) * scale).to(old))
    holder, _, name = bias.rpartition(".")
    if holder and holder != path and not hasattr(module, holder):
        module.add_submodule(holder, nn.Module())
    module.get_submodule(holder).register_parameter(
        name, nn.Parameter((norm.offset + norm.scale * (own - norm.mean)).to(old))
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
    erase_dead(graph)
    merged.name = output
    by_name[output] = merged


def fold_parameters(program: Program) -> Program:
    """Compute once what a convolution or linear map derives from constants alone, and store it as its parameter.

    Weight standardisation, scaled weights, biases with a part set to zero: exact, and the layer becomes one like any
    other. Vectors that several nodes read (exporters write equal biases once) become one for each reader, so that no
    layer's channels hang on another's. A program without either comes back as it is.
    """
    return _separate_vectors(_fold_derived(program))


def _separate_vectors(program: Program) -> Program:
    """A copy of each shared trained vector for every reader but the first; the first keeps the name."""
    readers: dict[int, list[tuple[str, str]]] = {}
    for node in program.graph.nodes:
        value = program.constant(node) if node.op == "get_attr" else None
        if isinstance(value, nn.Parameter) and value.dim() == 1 and value.data_ptr() in program.shared_storage:
            readers.setdefault(value.data_ptr(), []).extend((node.name, user.name) for user in node.users)
    pairs = [pair for found in readers.values() for pair in found[1:]]
    if not pairs:
        return program
    graph = copied(program.graph)
    module = rebuild(program.module, graph)
    by_name = {n.name: n for n in module.graph.nodes}
    copied_parameters = program.copied_parameters
    for source, reader in pairs:
        old = by_name[source]
        copied_parameters += program.tensor(str(old.target)).numel()
        target = _free_name(module, str(old.target).replace(".", "_"))
        module.register_parameter(target, nn.Parameter(program.tensor(str(old.target)).detach().clone()))
        by_name[reader].replace_input_with(old, _read_before(module, by_name[reader], target, old))
    erase_dead(module.graph)
    note = f"separate {len(pairs)} shared vectors"
    return replace(
        program,
        module=rebuild(module, module.graph),
        history=(*program.history, note),
        copied_parameters=copied_parameters,
    )


def _read_before(module: fx.GraphModule, reader: fx.Node, target: str, like: fx.Node) -> fx.Node:
    """A node that reads the tensor `target`, in front of its reader; of the shape and type of another node."""
    with module.graph.inserting_before(reader):
        constant = module.graph.get_attr(target)
    constant.meta["val"] = like.meta["val"]
    return constant


def _free_name(module: nn.Module, stem: str) -> str:
    number = 2
    while hasattr(module, f"{stem}_{number}"):
        number += 1
    return f"{stem}_{number}"


def _fold_derived(program: Program) -> Program:
    wanted, derived = [], {}
    for node in program.graph.nodes:
        if is_call(node, aten.conv1d, aten.conv2d, aten.conv3d, aten.linear):
            for index, source in enumerate(node.args[1:3], 1):
                # what is stored as integers stays so: the layer is computed in them
                free = isinstance(source, fx.Node) and not is_dequantized(source)
                value = _derived_value(program, source) if free else None
                if isinstance(source, fx.Node) and value is not None:
                    wanted.append((node.name, index))
                    derived[source.name] = value
    if not wanted:
        return program
    graph = copied(program.graph)
    module = rebuild(program.module, graph)
    by_name = {n.name: n for n in module.graph.nodes}
    for name, index in wanted:
        node = by_name[name]
        source = node.args[index]
        assert isinstance(source, fx.Node)
        target = f"folded_{source.name}"
        if not hasattr(module, target):
            module.register_parameter(target, nn.Parameter(derived[source.name].detach().clone()))
        node.update_arg(index, _read_before(module, node, target, source))
    erase_dead(module.graph)
    return replace(
        program, module=rebuild(module, module.graph), history=(*program.history, f"fold {len(wanted)} parameters")
    )


def _derived_value(program: Program, node: fx.Node) -> torch.Tensor | None:
    """The value of a floating-point call that reads constants only, directly or through other calls."""
    if node.op != "call_function" or not is_tensor(node) or not node.meta["val"].is_floating_point():
        return None
    pending, seen = [node], {node}
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand.op == "placeholder":
                return None
            if operand.op == "call_function" and operand not in seen:
                seen.add(operand)
                pending.append(operand)
    with torch.no_grad():
        value = run_until(program, [node.name], {})[node.name]
    return value if isinstance(value, torch.Tensor) else None
