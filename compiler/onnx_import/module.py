"""An ONNX graph as a torch module that `torch.export` can trace: every node through its builder of the table."""

from __future__ import annotations

import keyword
import re
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.fx import traceback

from ..devices.spilled import mapped_copies
from ..onnx.call import (
    BORROWED,
    Builder,
    Constant,
    OnnxCall,
    Size,
    Sizes,
    Unsupported,
    Value,
    builder_of,
    sizes_builder_of,
)
from ..onnx.functions import STANDARD
from ..onnx.opaque_node import can_be_opaque, opaque
from ..onnx.weights import trained_names
from ..support.errors import CaptureError, first_line
from . import integer_operators as onnx_integers  # noqa: F401 - they fill the table
from . import math_operators as onnx_math  # noqa: F401 - they fill the table
from . import nn_operators as onnx_nn  # noqa: F401 - they fill the table
from . import shape_operators as onnx_shape  # noqa: F401 - they fill the table
from . import sizes as onnx_sizes  # noqa: F401 - they fill the table
from .shape_operators import known

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

#: What an initializer's name may hold as an attribute: fx writes names into the Python code that it runs.
_UNSAFE = re.compile(r"[^A-Za-z0-9_/:\-]")


class OnnxModule(nn.Module):
    """Runs a normalised ONNX graph with torch. Initializers become parameters (statistics and integers: buffers) of
    their own names, dots opening submodules; a matrix that only multiplies from the right is stored transposed."""

    def __init__(
        self,
        graph: gs.Graph,
        opset: int,
        fixed_batch: int | None = None,
        *,
        initializers: Iterable[str] | None = None,
    ) -> None:
        """`initializers` names the file's own weights; without it every float constant counts as one."""
        super().__init__()
        self._graph_nodes = list(graph.nodes)
        self._input_names = [t.name for t in graph.inputs]
        self._output_names = [t.name for t in graph.outputs]
        self._opset, self._fixed_batch = opset, fixed_batch
        self._paths: dict[str, str] = {}
        self._read = {t.name for node in graph.nodes for t in node.inputs} | set(self._output_names)
        names = graph.tensors() if initializers is None else initializers
        self._constants = self._register(graph, trained_names(graph, names))
        self.train(False)

    def free_batch(self, fixed: int | None) -> OnnxModule:
        """Whether the batch that the file fixes is to be any batch: its size, or None. Returns the module."""
        self._fixed_batch = fixed
        return self

    def weight(self, name: str) -> torch.Tensor:
        """The parameter or buffer of an initializer, as it is now (tracing swaps them)."""
        path, _, leaf = self._paths[name].rpartition(".")
        value: torch.Tensor = getattr(self.get_submodule(path), leaf)
        return value

    def forward(self, *inputs: torch.Tensor) -> Any:
        """All outputs: the tensor itself where there is one, else a tuple."""
        env: dict[str, Value | None] = {**self._constants, **dict(zip(self._input_names, inputs, strict=True))}
        batch = next((x.shape[0] for x in inputs if x.dim()), None)
        for node in self._graph_nodes:
            with traceback.annotate({"onnx_node": _label(node)}):
                for output, value in zip(node.outputs, self._outputs(node, env, batch), strict=False):
                    if output.name:
                        env[output.name] = value
        results = tuple(self._result(env, name) for name in self._output_names)
        return results[0] if len(results) == 1 else results

    @staticmethod
    def _result(env: Mapping[str, Value | None], name: str) -> torch.Tensor:
        value = env.get(name)
        if value is None:
            raise CaptureError(f"nothing computes the output {name!r}", hint="the file is damaged")
        return value if isinstance(value, torch.Tensor) else value.tensor()

    def _outputs(self, node: gs.Node, env: Mapping[str, Value | None], batch: Size | None) -> list[Value | None]:
        try:
            inputs = tuple(env[t.name] if t.name else None for t in node.inputs)
        except KeyError as cause:
            raise CaptureError(f"nothing computes the value {cause}", node=_label(node)) from cause
        used = tuple(i for i, t in enumerate(node.outputs) if t.name in self._read) or (0,)
        call = OnnxCall(node, inputs, self._opset, self._fixed_batch, batch, used)
        built = self._build(call)
        return list(built) if isinstance(built, (list, tuple)) else [built]

    def _build(self, call: OnnxCall) -> Any:
        """By the rule for known numbers, else by the table, else opaque."""
        node, domain = call.node, call.node.domain or ""
        rules: list[Builder | None] = []
        if domain in STANDARD:
            rules = [sizes_builder_of(node.op) if _all_known(call) else None, builder_of(node.op, self._opset)]
        reason = f"{node.op} is not in the table"
        try:
            for rule in filter(None, rules):
                try:
                    return rule(call)
                except Unsupported as refusal:
                    reason = str(refusal)
            if not can_be_opaque(node.op, domain, self._opset):
                raise Unsupported(reason)
            return opaque(call)
        except Unsupported as refusal:
            raise CaptureError(
                f"{node.op} cannot be imported: {refusal}", node=_label(node), hint="replace the node before exporting"
            ) from refusal
        except CaptureError:
            raise
        except Exception as cause:  # shapes that do not fit raise whatever torch raises
            raise CaptureError(f"{node.op} does not work out: {first_line(cause)}", node=_label(node)) from cause

    def _register(self, graph: gs.Graph, trained: Container[str]) -> dict[str, Constant]:
        import onnx_graphsurgeon as gs

        transposed_names = _right_factors(graph)
        constants = {}
        for name, tensor in graph.tensors().items():
            if not isinstance(tensor, gs.Constant):
                continue
            transposed = name in transposed_names
            value = _torch_tensor(name, np.asarray(tensor.values))
            if not isinstance(tensor.values, np.memmap):
                value = value.t().contiguous() if transposed else value.clone()
            elif transposed:  # such a copy is not to be in memory either
                value = value.t().contiguous()
                (value,) = mapped_copies([value]) or [value]
            self._paths[name] = self._enter(name, nn.Parameter(value) if name in trained else value)
            if value.dtype not in BORROWED.values():
                # the file's own copy of the weights may go now
                tensor.values = (value.t() if transposed else value).numpy()
            constants[name] = Constant(name, np.asarray(tensor.values), self, transposed)
        return constants

    def _enter(self, name: str, value: torch.Tensor) -> str:
        """Register under the initializer's own name as far as Python and torch allow it; returns the path."""
        atoms = [_atom(atom) for atom in name.split(".")]
        if not all(atoms):
            atoms = [_atom(name.replace(".", "_"))]
        owner: nn.Module = self
        for index, atom in enumerate(atoms[:-1]):
            while hasattr(owner, atom) and atom not in owner._modules:
                atom += "_"
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner._modules[atom]  # type: ignore[assignment]
            atoms[index] = atom
        leaf = atoms[-1] or "_"
        while hasattr(owner, leaf):
            leaf += "_"
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
        return ".".join([*atoms[:-1], leaf])


def _atom(name: str) -> str:
    """One name that Python takes behind a dot, and for a variable of the code that fx writes."""
    safe = _UNSAFE.sub("_", name)
    return f"{safe}_" if keyword.iskeyword(safe) or safe == "self" else safe


def unsupported(graph: gs.Graph, opset: int) -> dict[str, list[str]]:
    """Operators that neither the table nor ONNX Runtime covers -> the names of their nodes."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        domain = node.domain or ""
        if domain in STANDARD and builder_of(node.op, opset) is not None:
            continue
        if not can_be_opaque(node.op, domain, opset):
            op = node.op if domain in STANDARD else f"{domain}.{node.op}"
            found.setdefault(op, []).append(_label(node))
    return found


def _label(node: gs.Node) -> str:
    """The node's name, or that of what it computes."""
    return str(node.name or next((t.name for t in node.outputs if t.name), node.op))


def _all_known(call: OnnxCall) -> bool:
    given = [v for v in call.inputs if v is not None]
    return bool(given) and any(isinstance(v, Sizes) for v in given) and all(known(v) for v in given)


def _right_factors(graph: gs.Graph) -> set[str]:
    """The constant matrices that every reader multiplies by from the right: they are stored as `linear` wants them."""
    uses: dict[str, bool] = dict.fromkeys((t.name for t in graph.outputs), False)
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            right = index == 1 and (node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB", 0)))
            matrix = right and tensor.shape is not None and len(tensor.shape) == 2
            uses[tensor.name] = uses.get(tensor.name, True) and matrix
    return {name for name, right in uses.items() if right}


def _torch_tensor(name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The same values in torch; types that numpy borrows from ml_dtypes go over by their bits."""
    array = np.asarray(array, order="C")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only memory, which is copied before anything else
        try:
            if array.dtype.name in BORROWED:
                bits = array.view(np.int16 if array.dtype.itemsize == 2 else np.uint8)
                return torch.from_numpy(bits).view(BORROWED[array.dtype.name])
            return torch.from_numpy(array)
        except (TypeError, ValueError) as cause:
            raise CaptureError(
                f"the initializer {name!r} has a type that torch does not know",
                actual=array.dtype,
                hint="strings and four-bit weights cannot be imported",
            ) from cause
