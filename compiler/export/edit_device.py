"""Programs moved to another device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ..devices.spilled import mapped_copies, stays_in_a_file
from ..ir.edit import rebuild
from ..ir.graph_copy import copied
from ..ir.program import Program, tensor_identity


def moved(program: Program, device: torch.device) -> Program:
    """A program on another device: its tensors, those that its graph makes, and what it was traced with.

    Tensors that share memory share it there too. The program itself comes back where all its tensors are on the device.

    Arguments:
        program: The program.
        device: Where it shall compute.

    Returns:
        The same function there. Names, history and signature stay.

    Example:
        >>> from foldcut.compiler.export.edit_device import moved
        >>> program = foldcut.capture(nn.Linear(8, 4).eval(), torch.randn(2, 8))
        >>> moved(program, torch.device("cpu")) is program
        True
    """
    old = _tensors(program)
    if old and all(value.device == device for value in old.values()):
        return program
    module = rebuild(program.module, copied(program.graph))
    for name, value in converted_tensors(old, lambda tensor: tensor.to(device)):
        put_tensor(module, name, value)
    for node in module.graph.nodes:
        _move_node(node, device)
    return replace(program, module=rebuild(module, module.graph))


def on_cpu(program: Program) -> Program:
    """A program on the CPU, where files are written and segments are timed: `moved`."""
    return moved(program, torch.device("cpu"))


def kept_in_a_file(program: Program, *beside: Program) -> Program:
    """A program whose own weights, those that no program `beside` it has, are in files that are mapped into memory,
    where they take gigabytes and there is room for files. The program itself comes back where they do not.

    Arguments:
        program: The program.
        beside: Programs that hold some of its weights.

    Returns:
        The same function, bit for bit.

    Example:
        >>> from foldcut.compiler.export.edit_device import kept_in_a_file
        >>> program = foldcut.capture(nn.Linear(8, 4).eval(), torch.randn(2, 8))
        >>> kept_in_a_file(program) is program  # it is small
        True
    """
    theirs = {tensor.untyped_storage().data_ptr() for other in beside for tensor in _tensors(other).values()}
    own = {
        name: tensor
        for name, tensor in _tensors(program).items()
        if tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in theirs
    }
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own.values()}
    if not stays_in_a_file(sum(storages.values())):
        return program
    module = rebuild(program.module, copied(program.graph))
    for name, value in converted_tensors(own, lambda tensor: (mapped_copies([tensor]) or [tensor])[0]):
        put_tensor(module, name, value)
    return replace(program, module=module)


def _tensors(program: Program) -> dict[str, torch.Tensor]:
    named = {name: program.tensor(name) for name in _tensor_names(program)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}  # else a graph within it


def _tensor_names(program: Program) -> list[str]:
    return sorted({str(n.target) for n in program.graph.nodes if n.op == "get_attr"})


def put_tensor(module: fx.GraphModule, name: str, value: torch.Tensor | nn.Parameter) -> None:
    """Put a tensor under a name of a module that was rebuilt."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value


def converted_tensors(
    old: dict[str, torch.Tensor], convert: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor | nn.Parameter]]:
    """Each tensor as `convert` makes it, on another device or in another type, under its name; one for names of one
    tensor, parts of one memory for parts of one."""
    storages = {name: value.untyped_storage().data_ptr() for name, value in old.items()}
    there: dict[Hashable, torch.Tensor | nn.Parameter] = {}
    wholes: dict[int, torch.Tensor] = {}
    for name, value in old.items():
        key, storage = tensor_identity(value), storages[name]
        if key not in there:
            new = value.detach()
            sharing = [old[n] for n, s in storages.items() if s == storage and value.numel()]
            if len({tensor_identity(other) for other in sharing}) > 1:
                if storage not in wholes:
                    count = new.untyped_storage().nbytes() // new.itemsize
                    wholes[storage] = convert(new.as_strided((count,), (1,), 0))
                new = wholes[storage].as_strided(new.shape, new.stride(), new.storage_offset())
            new = convert(new)
            there[key] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
        yield name, there[key]


def _move_node(node: fx.Node, device: torch.device) -> None:
    """What a node makes, and what it was traced with, on another device."""
    if node.op == "call_function":
        node.args = fx.node.map_aggregate(node.args, lambda leaf: _instead(leaf, device))
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda leaf: _instead(leaf, device))
        arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
        if not node.all_input_nodes and any(argument.name == "device" for argument in arguments):
            node.kwargs = {**node.kwargs, "device": device}
    if "val" in node.meta:
        node.meta["val"] = pytree.tree_map_only(FakeTensor, lambda value: _stated(value, device), node.meta["val"])


def _stated(value: FakeTensor, device: torch.device) -> torch.Tensor:
    with value.fake_mode, torch.no_grad():
        return value.to(device)


def _instead(leaf: Any, device: torch.device) -> Any:
    return device if isinstance(leaf, torch.device) else leaf
