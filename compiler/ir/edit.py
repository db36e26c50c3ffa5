"""The only module that changes fx graphs and the tensors behind them, with `edit_folds`, its second half. Everything
here returns a new
Program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..devices.spilled import mapped_copies, stays_in_a_file
from ..support.errors import CaptureError, RewriteError, first_line
from .cost import tensor_bytes
from .execute import device_of
from .graph_copy import copied
from .program import Program, is_tensor, output_nodes, tensor_identity
from .trial_shapes import TrialShapes, UnknownShapeError

aten = torch.ops.aten


def rebuild(root: fx.GraphModule, graph: fx.Graph, *, copy_tensors: bool = False) -> fx.GraphModule:
    """A GraphModule over `graph` that shares (or copies) just those tensors of `root` that the graph still names."""
    module = fx.GraphModule(root, graph)
    if copy_tensors:
        _copy_tensors(module)
    module.eval()
    return module


def _copy_tensors(module: fx.GraphModule) -> None:
    """Give the module tensors of its own, in place: in a file where they are many gigabytes."""
    tensors = [*module.parameters(), *module.buffers()]
    # one memo for all tensors, so that weights tied in the model stay tied in the copy
    memo: dict[int, Any] = {}
    here = [t for t in tensors if t.device.type == "cpu" and type(t) in {torch.Tensor, nn.Parameter}]
    copies = mapped_copies(here) if stays_in_a_file(tensor_bytes(here)) else None
    for tensor, mapped in zip(here, copies or (), strict=copies is not None):
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(mapped, tensor.requires_grad) if is_parameter else mapped
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = copy.deepcopy(parameter, memo)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                known = memo.get(id(buffer))
                owner._buffers[name] = copy.deepcopy(buffer.detach(), memo) if known is None else known


def free_name(owner: nn.Module, wanted: str) -> str:
    """The name itself where the module has nothing of it, else the first free one with a number behind it."""
    name, number = wanted, 0
    while hasattr(owner, name):
        number += 1
        name = f"{wanted}_{number}"
    return name


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
    graph = copied(program.graph)
    by_name = {n.name: n for n in graph.nodes}
    by_name[exit_].replace_all_uses_with(by_name[entry])
    erase_dead(graph)
    module = rebuild(program.module, graph)
    graph.lint()
    return replace(program, module=module, history=(*program.history, note or f"bypass {entry} -> {exit_}"))


def set_tensors(program: Program, tensors: Mapping[str, torch.Tensor], *, note: str) -> Program:
    """Give the named parameters or buffers new values of the same shape. The old Program keeps the old ones."""
    module = rebuild(program.module, copied(program.graph))
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
        new = value.detach().to(old.dtype).to(old.device)
        if isinstance(old, nn.Parameter):
            owners[path]._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            owners[path]._buffers[leaf] = new
    return replace(program, module=module, history=(*program.history, note))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call as it shall be: `args` and `kwargs` may name nodes of the old graph and hold tensors, which become
    constants."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def replace_calls(
    program: Program, calls: Mapping[str, Call], tensors: Mapping[str, torch.Tensor], *, note: str
) -> Program:
    """Give nodes other calls and parameters or buffers other values, of any shape, and work out all shapes anew.

    Names that share one tensor share the new one. Raises RewriteError when the new graph does not fit together or
    when an input or output would change its shape.
    """
    graph = copied(program.graph)
    module = rebuild(program.module, graph)
    by_name, device = {n.name: n for n in module.graph.nodes}, device_of(program)
    for target, value in _with_aliases(program, tensors).items():
        _assign(module, target, value)
    for name, call in calls.items():
        node = by_name[name]

        def here(leaf: Any, node: fx.Node = node) -> Any:
            if isinstance(leaf, fx.Node):
                return by_name[leaf.name]
            return _constant_node(module, node, leaf.to(device)) if isinstance(leaf, torch.Tensor) else leaf

        node.target = call.target
        node.args = fx.node.map_aggregate(call.args, here)
        node.kwargs = fx.node.map_aggregate(dict(call.kwargs), here)
    erase_dead(module.graph)
    result = replace(program, module=rebuild(module, module.graph), history=(*program.history, note))
    infer_shapes(result, set(calls))
    result.graph.lint()
    check_interface(program, result)
    return result


def check_interface(program: Program, changed: Program) -> None:
    """Raise RewriteError unless inputs and outputs are as many as they were, of the shapes and dtypes that they had."""
    for what, nodes in (("inputs", _input_nodes), ("outputs", output_nodes)):
        before, after = nodes(program.graph), nodes(changed.graph)
        message = f"a rewrite may not change the {what}"
        if len(before) != len(after):
            raise RewriteError(message, expected=len(before), actual=len(after))
        check_same(zip(before, after, strict=True), message)


def _input_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def check_same(pairs: Iterable[tuple[fx.Node, fx.Node]], message: str) -> None:
    """Raise RewriteError at the first pair of nodes, before and after, of another shape or dtype."""
    for before, after in pairs:
        if signature(before) != signature(after):
            raise RewriteError(message, node=before.name, expected=signature(before), actual=signature(after))


def _with_aliases(program: Program, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | nn.Parameter]:
    """The new tensors under every name that the graph has for the old ones; parameters as parameters."""
    fresh: dict[Hashable, torch.Tensor | nn.Parameter] = {}
    for target, value in tensors.items():
        old = _lookup(program, target)
        new = value.detach().to(old.dtype).to(old.device)
        shared = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        fresh[tensor_identity(old)] = shared
    targets = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"} | set(tensors)
    found = {t: _lookup(program, t) for t in sorted(targets)}
    keys = {t: tensor_identity(v) for t, v in found.items()}
    return {t: fresh[key] for t, key in keys.items() if key in fresh}


def _assign(module: fx.GraphModule, target: str, value: torch.Tensor | nn.Parameter) -> None:
    path, _, leaf = target.rpartition(".")
    owner = _own(module, path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value


def _constant_node(module: fx.GraphModule, before: fx.Node, value: torch.Tensor) -> fx.Node:
    """A new buffer with this value, or a parameter where it is one, read in front of a node."""
    number = 0
    while hasattr(module, f"_constant_{number}"):
        number += 1
    if isinstance(value, nn.Parameter):
        module.register_parameter(f"_constant_{number}", value)
    else:
        module.register_buffer(f"_constant_{number}", value)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(f"_constant_{number}")


def infer_shapes(program: Program, rewritten: set[str]) -> None:
    """Write the shape and dtype, symbolic batch included, of every node that a change reaches, by running those nodes
    on fake tensors: at a few batch sizes where those tell, else symbolically."""
    mode = next(
        (n.meta["val"].fake_mode for n in program.graph.nodes if n.op == "placeholder" and is_tensor(n)), None
    ) or FakeTensorMode(allow_non_fake_inputs=True)
    inputs = {n.name: signature(n) for n in program.graph.nodes if n.op == "placeholder"}
    changed: set[fx.Node] = set()
    trials = TrialShapes(program)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            value = program.constant(node).detach()
            if "val" not in node.meta or node.meta["val"].shape != value.shape:
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
                changed.add(node)
        elif node.op == "call_function" and (node.name in rewritten or changed.intersection(node.all_input_nodes)):
            before, known = node.meta.get("val"), "val" in node.meta
            try:
                # a new node makes what it reads into something alike
                found = trials.symbolic(node, before if known else node.all_input_nodes[0].meta["val"])
            except UnknownShapeError:
                found = _fake_result(program, node, mode)
            node.meta["val"] = found
            if not known or (found is not before and _shapes(found) != _shapes(before)):
                changed.add(node)
            trials.forget(node)
    for node in program.graph.nodes:
        if node.op == "placeholder" and signature(node) != inputs[node.name]:
            raise RewriteError(
                "the rewrite would fix the batch size",
                node=node.name,
                expected=inputs[node.name],
                actual=signature(node),
            )


def _fake_result(program: Program, node: fx.Node, mode: FakeTensorMode) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    try:
        # without the Python dispatcher some operators read the batch as a number and fix it for good
        with mode, enable_python_dispatcher():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError, IndexError) as cause:
        raise RewriteError(
            f"the rewritten graph does not fit together: {first_line(cause)}",
            node=node.name,
            excerpt=program.excerpt(node),
        ) from cause


def _shapes(value: Any) -> str:
    """Shapes and dtypes of all leaves as text."""
    leaves = pytree.tree_leaves(value)
    return str([(str(v.dtype), [str(d) for d in v.shape]) if isinstance(v, torch.Tensor) else str(v) for v in leaves])


def expose(program: Program, names: Sequence[str], *, copy_tensors: bool = False) -> fx.GraphModule:
    """A module that returns the values of the named nodes as a tuple, and computes nothing else. Takes the program's
    arguments."""
    graph = copied(program.graph)
    by_name = {n.name: n for n in graph.nodes}
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (tuple(by_name[name] for name in names),)
    codegen = graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure(tuple(range(len(names)))))
    erase_dead(graph)
    return rebuild(program.module, graph, copy_tensors=copy_tensors)


def signature(node: fx.Node) -> str:
    """Shape and dtype as text, symbols included: equal text means that one may stand for the other."""
    if not is_tensor(node):
        return "not a tensor"
    value = node.meta["val"]
    return f"{value.dtype}{[str(d) for d in value.shape]}"


def take_any_layout(graph: fx.Graph) -> None:
    """Views become reshapes, in place. A view asks for the strides that were there while tracing; attention kernels,
    memory formats and rewrites give others. What reads memory by its strides reads its operand in one row first, where
    that row is what was in memory."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):  # not `view.dtype`: that one reads the bits
            node.target = aten.reshape.default
        elif node.target in (aten.as_strided.default, aten.as_strided_copy.default):
            _read_in_one_row(graph, node)


def _read_in_one_row(graph: fx.Graph, node: fx.Node) -> None:
    """Raises CaptureError where what is read lies in memory with gaps or repetitions."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(value, torch.Tensor):
        return
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: -_hint(strides[dim]))
    if not _row_major([value.shape[dim] for dim in order], [strides[dim] for dim in order]):
        raise CaptureError(
            "the network reads memory by strides that belong to another tensor",
            node=node.name,
            hint="call .contiguous() before as_strided",
        )
    if value.dim() < 2:
        return
    with graph.inserting_before(node):
        if order != list(range(value.dim())):
            source = _like(node, graph.call_function(aten.permute.default, (source, order)), value.permute(order))
        row = graph.call_function(aten.reshape.default, (source, [-1]))
    node.update_arg(0, _like(node, row, value.permute(order).reshape([-1])))


def _like(node: fx.Node, fresh: fx.Node, value: torch.Tensor) -> fx.Node:
    """A new node that comes from where another one does."""
    fresh.meta = {**node.meta, "val": value}
    return fresh


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _row_major(shape: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt]) -> bool:
    """Whether the elements lie in memory in their order, for any batch; found without a guard on a size."""
    expected: Any = 1
    for sizes in zip(reversed(shape), reversed(strides), strict=True):
        size, stride = (s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def erase_dead(graph: fx.Graph) -> None:
    """Remove what nobody reads any more; inputs stay."""
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
