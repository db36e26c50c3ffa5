"""Functions that an ONNX model defines for itself: counted before they are put in the place of their calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..support.errors import CaptureError, first_line

if TYPE_CHECKING:
    import onnx

#: Domains of the standard operators: the same set under two names.
STANDARD = ("", "ai.onnx")
#: A model may grow to so many nodes and bytes by inlining. Networks of a thousand layers have some ten thousand nodes;
#: two gigabytes are what a protobuf message holds.
MOST_NODES = 200_000
MOST_BYTES = (2 << 30) - 1
#: Functions that call functions deeper than this are refused.
_DEEPEST = 64

_Name = tuple[str, str, str]


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Calls of the model's own functions replaced by their bodies. To be called behind `check_functions`."""
    if not model.functions:
        return model
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model, convert_version=True)
    except Exception as cause:  # C++ raises what it likes
        raise CaptureError(f"the model's own functions cannot be inlined: {first_line(cause)}") from cause


def check_functions(model: onnx.ModelProto) -> None:
    """Raise CaptureError when functions call each other in a circle or too deep, when two have one name, or when
    inlining them would make more of the model than anyone wrote. Counts; nothing is expanded."""
    if not model.functions:
        return
    functions = {_name(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) != len(model.functions):
        raise CaptureError("two functions of the model have one name", hint="export the model again")
    sizes: dict[_Name, tuple[int, int]] = {}
    for name in functions:
        _count(name, functions, sizes)
    nodes, size = _total(model.graph.node, sizes)
    if nodes > MOST_NODES or size > MOST_BYTES:
        raise CaptureError(
            "the model's own functions call each other so often that it cannot be inlined",
            expected=f"at most {MOST_NODES} nodes and {MOST_BYTES} bytes",
            actual=f"{nodes} nodes and {size} bytes",
            hint="do not trust this file, or export the model without functions",
        )


def _name(domain: str, name: str, overload: str) -> _Name:
    return ("" if domain in STANDARD else domain, name, overload)


def _count(first: _Name, functions: dict[_Name, onnx.FunctionProto], sizes: dict[_Name, tuple[int, int]]) -> None:
    """Nodes and bytes of a function with all that it calls, those of the callees first."""
    path: list[_Name] = [first]
    while path:
        name = path[-1]
        if name in sizes:
            path.pop()
            continue
        open_ones = [c for c in _called(functions[name].node, functions) if c not in sizes]
        if open_ones:
            if open_ones[0] in path or len(path) >= _DEEPEST:
                circle = open_ones[0] in path
                raise CaptureError(
                    f"the model's own functions {'call each other in a circle' if circle else 'nest too deep'}",
                    node=path[-1][1],
                    hint="export the model again",
                )
            path.append(open_ones[0])
            continue
        sizes[name] = _total(functions[name].node, sizes)
        path.pop()


def _total(nodes: Iterable[onnx.NodeProto], sizes: dict[_Name, tuple[int, int]]) -> tuple[int, int]:
    count = size = 0
    for node in _all_nodes(nodes):
        own = (1, node.ByteSize())
        called = sizes.get(_name(node.domain, node.op_type, node.overload), own)
        count, size = count + called[0], size + called[1]
    return count, size


def _called(nodes: Iterable[onnx.NodeProto], functions: dict[_Name, onnx.FunctionProto]) -> list[_Name]:
    names = (_name(node.domain, node.op_type, node.overload) for node in _all_nodes(nodes))
    return [name for name in dict.fromkeys(names) if name in functions]


def _all_nodes(nodes: Iterable[onnx.NodeProto], depth: int = 0) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their graphs."""
    if depth > _DEEPEST:
        raise CaptureError("graphs nest too deep", hint="no exporter writes such a model")
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _all_nodes(graph.node, depth + 1)
