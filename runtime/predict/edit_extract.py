"""Taking segments out of a program, as a program of their own with fixed sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...compiler.ir.edit import rebuild
from ...compiler.ir.program import Program, TensorSpec, is_size
from ...compiler.ir.segments import Segment


def extract_segments(program: Program, segments: Sequence[Segment], *, batch: int) -> Program:
    """The segments side by side as one Program: it takes the entries of each and returns the exits of each.

    Entry and exit `name` of segment number i are called ``s{i}_{name}``. Every size is the number that it is at that
    batch, so nothing depends on what lies outside; weights are shared with `program`, which does not change. Exact:
    the same calls on the same values.
    """
    graph = fx.Graph()
    inputs: list[TensorSpec] = []
    outputs: dict[str, fx.Node] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for index, segment in enumerate(segments):
            for name in segment.entries:
                value = program.nodes[name].meta["val"]
                entry = graph.placeholder(f"s{index}_{name}")
                entry.meta["val"] = torch.empty(program.shape(program.nodes[name], batch), dtype=value.dtype)
                inputs.append(_spec(entry.name, entry))
        entries = {node.name: node for node in graph.nodes}
        copier = _Copier(program=program, graph=graph, mode=mode, batch=batch)
        for index, segment in enumerate(segments):
            copies = {name: entries[f"s{index}_{name}"] for name in segment.entries}
            for name in segment.nodes:
                copies[name] = copier.copied(program.nodes[name], copies)
            outputs |= {f"s{index}_{name}": copies[name] for name in segment.exits}
    graph.output(tuple(outputs.values()))
    return Program(
        module=rebuild(program.module, graph),
        inputs=tuple(inputs),
        outputs=tuple(_spec(name, node) for name, node in outputs.items()),
        history=(*program.history, f"{len(segments)} segments at batch {batch}"),
    )


@dataclass(frozen=True, kw_only=True)
class _Copier:
    """Puts calls of a program into a new graph, with sizes as the numbers that they are at a batch. `constants` are
    those that the new graph has by now."""

    program: Program
    graph: fx.Graph
    mode: FakeTensorMode
    batch: int
    constants: dict[str, fx.Node] = field(default_factory=dict)

    def copied(self, node: fx.Node, copies: dict[str, fx.Node]) -> fx.Node:
        """The call with its operands as they are in the new graph: `copies`, or constants."""

        def here(operand: fx.Node) -> Any:
            if is_size(operand):
                return self.program.scalar(operand, self.batch)
            return copies[operand.name] if operand.name in copies else self._constant(operand)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), here)
        call = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        call.meta["val"] = node.target(*_values(args), **_values(kwargs))  # type: ignore[operator]
        return call

    def _constant(self, operand: fx.Node) -> fx.Node:
        """What is neither entry nor member is a constant."""
        if operand.name not in self.constants:
            constant = self.graph.get_attr(str(operand.target))
            value = self.program.constant(operand).detach()
            constant.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
            self.constants[operand.name] = constant
        return self.constants[operand.name]


def _values(arguments: Any) -> Any:
    return fx.node.map_arg(arguments, lambda node: node.meta["val"])


def _spec(name: str, node: fx.Node) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name=name, shape=tuple(int(d) for d in value.shape), dtype=value.dtype)
