"""`Program`: a trained network as one functional ATen graph, and the few questions that every pass asks of it."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..support import tally
from ..support.errors import CaptureError

if TYPE_CHECKING:
    from ..onnx.signature import OnnxSignature

T = TypeVar("T")
Dim = int | str
#: One batch in the form that the model takes it: a tensor, a tuple of arguments or a dict of keyword arguments.
Batch = torch.Tensor | tuple[Any, ...] | dict[str, Any]
#: Types of half precision.
HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one input or output.

    Arguments:
        name: Name of the input or output.
        shape: One entry per dimension: an int, or a string for a dynamic one (``"batch"`` for a batch dimension).
        dtype: The `torch.dtype`.

    Example:
        >>> print(foldcut.TensorSpec(name="images", shape=("batch", 3, 32, 32), dtype=torch.float32))
        images: float32[batch, 3, 32, 32]
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}: {dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A functional ATen `torch.fx.GraphModule` with its signature.

    A program is never mutated: a rewrite returns a new one, which shares the tensors that did not change. Plans and
    reports identify nodes by name. A node that survives a rewrite keeps its name.

    Arguments:
        module: The graph module. It takes the arguments of the captured model and returns its output structure.
        inputs: Specifications of the inputs, in order.
        outputs: Specifications of the outputs, in order.
        history: The rewrites applied so far.
        origin: Interface, opset and metadata of the ONNX file that the program was read from. None for a torch model.
        copied_parameters: Number of values that folding duplicated from tensors shared by several layers.

    Example:
        >>> program = foldcut.capture(nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval(), torch.randn(2, 8))
        >>> program.parameter_count(), list(program.nodes)[-3:]
        (36, ['linear', 'relu', 'output'])
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    history: tuple[str, ...] = field(default=())
    #: The interface, opset and words of the ONNX file that the program came from, None for a torch module.
    origin: OnnxSignature | None = None
    #: Values of the copies that folding made of shared vectors: the network that was given stores them once.
    copied_parameters: int = 0

    def __call__(self, batch: Batch) -> Any:
        """Run on one batch, without gradients, on the device of the program's tensors, in half precision where the
        program takes that.

        Arguments:
            batch: A tensor, a tuple of positional or a dict of keyword arguments.

        Returns:
            The output structure of the captured model.
        """
        from .cost import call_macs  # what costs are read off imports this module
        from .execute import placed

        args, kwargs = as_arguments(placed(self, batch))
        tally.count(tally.FORWARD, call_macs(self, pytree.tree_leaves((args, kwargs))))
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def derived(self, analysis: Callable[[Program], T]) -> T:
        """Return ``analysis(self)``, computed once and kept with the program."""
        known: dict[Any, Any] = self.__dict__.setdefault("_derived", {})
        if analysis not in known:
            known[analysis] = analysis(self)
        return cast(T, known[analysis])

    @property
    def graph(self) -> fx.Graph:
        """The `torch.fx.Graph` of the module."""
        return self.module.graph

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        """Every graph node by name, in topological order."""
        return {node.name: node for node in self.graph.nodes}

    @cached_property
    def order(self) -> Mapping[str, int]:
        """Position of each node in topological order, by name."""
        return {name: index for index, name in enumerate(self.nodes)}

    @cached_property
    def batch_symbols(self) -> frozenset[str]:
        """Names of the symbols that stand for the batch dimension of an input."""
        symbols: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder" and is_tensor(node) and node.meta["val"].dim() > 0:
                symbols |= _symbols(node.meta["val"].shape[0])
        return frozenset(symbols)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of graph text and weights. Equal fingerprints mean equal functions on one torch version."""
        digest = hashlib.blake2b(self.text().encode(), digest_size=16)
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def shared_storage(self) -> frozenset[int]:
        """Data pointers of the tensors that more than one node reads."""
        readers: dict[int, int] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                value = self.constant(node)
                if isinstance(value, torch.Tensor):
                    readers[value.data_ptr()] = readers.get(value.data_ptr(), 0) + len(node.users)
        return frozenset(pointer for pointer, count in readers.items() if count > 1)

    def owned(self, node: Any) -> bool:
        """Whether `node` is a floating-point parameter that a single node reads."""
        if not is_constant(node):
            return False
        value = self.constant(node)
        return (
            isinstance(value, torch.nn.Parameter)
            and value.is_floating_point()
            and value.data_ptr() not in self.shared_storage
        )

    def parameter_count(self) -> int:
        """Number of trained values (`nn.Parameter`). Tensors that share storage count once."""
        seen = {p.data_ptr(): p.numel() for p in self.module.parameters()}
        return sum(seen.values())

    def constant(self, node: fx.Node) -> torch.Tensor:
        """The tensor behind `node`, a ``get_attr`` node."""
        return self.tensor(str(node.target))

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter, buffer or constant called `name`."""
        value: Any = self.module
        for atom in name.split("."):
            value = getattr(value, atom)
        return cast(torch.Tensor, value)

    @cached_property
    def first_names(self) -> Mapping[str, str]:
        """Name of each tensor that the graph reads, mapped to the first name under which it reads the same tensor."""
        first: dict[Hashable, str] = {}
        names = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                value, name = self.constant(node), str(node.target)
                names[name] = first.setdefault(tensor_identity(value), name)
        return names

    def scalar(self, node: fx.Node, batch: int = 1) -> Any:
        """The value of a scalar `node` (a size, a flag), with batch symbols set to `batch`."""
        value = node.meta["val"]
        return self.dim(value, batch) if isinstance(value, (int, torch.SymInt)) else value

    def follows_batch(self, size: int | torch.SymInt) -> bool:
        """Whether the dimension `size` depends on the batch size."""
        return bool(_symbols(size) & self.batch_symbols)

    def shape(self, node: fx.Node, batch: int = 1) -> tuple[int, ...]:
        """The shape of the tensor of `node`, with batch symbols set to `batch` and other dynamic dimensions to their
        traced size.
        """
        return tuple(self.dim(d, batch) for d in node.meta["val"].shape)

    def dim(self, size: int | torch.SymInt, batch: int = 1) -> int:
        """The dimension `size` as an int, with batch symbols set to `batch`."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        values = {s: batch if str(s) in self.batch_symbols else _hint(size, s) for s in expr.free_symbols}
        return int(expr.xreplace(values))

    def path(self, node: fx.Node) -> str:
        """The module path that `node` was traced from (``layer1.0.conv1``), or the name of the node in the ONNX file.
        Empty when it is not known.
        """
        named = node.meta.get("custom", {}).get("onnx_node")
        if named:
            return str(named)
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return ""
        return str(list(stack.values())[-1][0])

    def text(self) -> str:
        """The graph as deterministic text, one line per node, with symbols renamed in order of appearance."""
        from .text import program_text

        return program_text(self)

    def excerpt(self, node: fx.Node, context: int = 2) -> str:
        """The lines of the graph text around `node`, with `context` lines on either side."""
        from .text import node_excerpt

        return node_excerpt(self, node, context)

    def check(self, before: Program | None = None) -> None:
        """Check that graph, stated shapes, tensors and signature agree.

        Arguments:
            before: The program before a rewrite. If given, names that shared one tensor there have to share one here,
                and inputs and outputs must keep their names.

        Raises:
            ProgramError: At the first invariant that does not hold, with the node.
        """
        from .program_check import check_program

        check_program(self, before)

    def flatten(self, batch: Batch) -> list[Any]:
        """Flatten a batch into the values of the placeholders.

        Arguments:
            batch: One batch in the input structure of the model.

        Returns:
            The values, in the order of the placeholders.

        Raises:
            CaptureError: If the batch does not have the structure of the captured inputs.
        """
        args, kwargs = as_arguments(batch)
        in_spec = getattr(self.module, "_in_spec", None)
        if in_spec is None:
            return [*args, *kwargs.values()]
        names = list(in_spec.child(1).context)
        if not args and kwargs and not names:
            # keyword call of a model captured with positional arguments: go by placeholder name
            args, kwargs = tuple(kwargs[spec.name] for spec in self.inputs), {}
        leaves, spec = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in names if name in kwargs}))
        if spec != in_spec:
            raise CaptureError(
                "the batch does not have the structure of the captured inputs",
                expected=", ".join(map(str, self.inputs)),
                actual=f"{len(leaves)} leaves: {spec}",
                hint="pass batches built like the example that the model was captured with",
            )
        return leaves

    def structure(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The ``(args, kwargs)`` of the module for the values of the placeholders: the inverse of `flatten`."""
        spec = getattr(self.module, "_in_spec", None)
        if spec is None:
            return tuple(leaves), {}
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        return tuple(args), dict(kwargs)


def tensor_identity(value: torch.Tensor) -> Hashable:
    """Equal for two tensors only when each element of one is the same place in memory as that of the other: a
    transposed view of a square weight is another tensor. Each tensor without elements counts as another one."""
    if not value.numel():
        return id(value)
    pointer = value.untyped_storage().data_ptr()
    return pointer, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype


def as_arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a model call from one batch."""
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, dict):
        return (), batch
    return (batch,), {}


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is a single tensor (not a tuple, a symbolic size or None)."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_call(node: fx.Node, *targets: Callable[..., Any]) -> bool:
    """Whether the node calls one of the given functions (any overload of an ATen packet counts)."""
    if node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    return node.target in targets or packet in targets


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def is_constant(node: Any) -> bool:
    """Whether the value is a parameter, a buffer or a constant of the graph."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The operands that carry activations: no parameters, no symbolic sizes."""
    return [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]


def is_size(node: fx.Node) -> bool:
    """Whether the node computes a symbolic size or another scalar, not a tensor."""
    return node.op == "call_function" and isinstance(
        node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymBool)
    )


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes returned by the graph, in order, repeated values kept."""
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    leaves = pytree.tree_leaves(result)
    return [n for n in leaves if isinstance(n, fx.Node)]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dim_names(shapes: Iterable[Sequence[Any]]) -> dict[str, str]:
    """Readable names for symbols, in order of appearance: ``batch`` for a first leading one, then d0, d1 ..."""
    names: dict[str, str] = {}
    for shape in shapes:
        for position, size in enumerate(shape):
            for symbol in sorted(_symbols(size)):
                if symbol not in names:
                    lead = position == 0 and "batch" not in names.values()
                    names[symbol] = "batch" if lead else f"d{len(names)}"
    return names


def dim_text(size: Any, names: Mapping[str, str]) -> Dim:
    """A dimension for people: a number, or the expression with readable symbol names."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    if not expr.free_symbols:
        return int(expr)
    import sympy

    return str(expr.xreplace({s: sympy.Symbol(names.get(str(s), str(s))) for s in expr.free_symbols}))


def _symbols(size: Any) -> set[str]:
    if isinstance(size, torch.SymInt) and hasattr(size.node, "expr"):
        return {str(s) for s in size.node.expr.free_symbols}
    return set()


def _hint(size: torch.SymInt, symbol: Any) -> int:
    hints = size.node.shape_env.backed_var_to_val
    return int(hints.get(symbol, 1))


def getitem_source(node: fx.Node) -> fx.Node | None:
    """The multi-output node behind a `getitem(…, 0)`, or None."""
    if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
        return cast(fx.Node, node.args[0])
    return None
