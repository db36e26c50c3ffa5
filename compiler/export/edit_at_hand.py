"""An `ExportedProgram` from the graph at hand, without tracing the network once more."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch._export.utils import placeholder_naming_pass
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from ..ir.program import Program, is_tensor

#: What an argument of a call may be beside a node: whatever else there is, tracing again may take otherwise.
_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
#: What an input may be that is no tensor.
_CONSTANTS = (bool, int, float, str, type(None))
#: What torch.export gives a size that any batch may take: with 0 and 1 it never traces.
_LEAST = 2


class _UnlikeError(Exception):
    """The graph has something of which it is not certain what tracing would make."""


def exported_at_hand(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram | None:
    """What torch.export gives for a Program and example inputs, made of the Program's own graph.

    A Program is a functional ATen graph whose nodes state their values already: traced once more, each call becomes
    itself, with the same value. That holds where all of these do, and None comes back where one does not:

    - calls of operators that write to none of their operands, with nodes and plain values as arguments;
    - stored values that are parameters and buffers (no graphs of branches or loops);
    - values that are stated on fake tensors with strides, and sizes that follow from those of the inputs: no size that
      data decide, none that is bounded, and no condition on sizes but that those of two inputs are the same.

    The nodes keep their names; weights are shared. Shapes are stated anew, so nothing that torch.onnx finds out about
    sizes comes back to the Program.
    """
    try:
        return _Lifted(program, args, kwargs).exported()
    except _UnlikeError:
        return None


class _Lifted:
    """The graph with its tensors as inputs, on the way."""

    def __init__(self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._program, self._example = program, (args, kwargs)
        self._module = program.module
        self._specs: tuple[Any, Any] = (
            getattr(self._module, "_in_spec", None),
            getattr(self._module, "_out_spec", None),
        )
        _require(None not in self._specs)
        self._values = _FreshValues(program)
        self._graph = fx.Graph()
        self._inputs: list[InputSpec] = []
        self._new: dict[fx.Node, fx.Node] = {}

    def exported(self) -> torch.export.ExportedProgram:
        """Raises _UnlikeError."""
        self._lift_tensors()
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self._add_input(node)
        for node in self._program.graph.nodes:
            if node.op == "call_function":
                self._add_call(node)
            else:
                _require(node.op in {"placeholder", "get_attr", "output"})
        outputs = self._add_output()
        signature = ExportGraphSignature(self._inputs, outputs)
        module = fx.GraphModule({}, fx.Graph())
        module._graph = self._graph  # as torch does: code made of names that are not final would not compile
        args, kwargs = self._example
        placeholder_naming_pass(module, signature, self._module, args, kwargs, {}, {})
        return torch.export.ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=signature,
            state_dict=self._module.state_dict(keep_vars=True),
            range_constraints=self._values.ranges(),
            module_call_graph=self._call_graph(),
            example_inputs=self._example,
            constants={},
            verifiers=[TrainingIRVerifier],
        )

    def _lift_tensors(self) -> None:
        """Every parameter, then every buffer becomes an input; nodes that read one name read one input."""
        readers: dict[str, list[fx.Node]] = {}
        for node in self._program.graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(str(node.target), []).append(node)
        kinds: list[tuple[InputKind, Any]] = [
            (InputKind.PARAMETER, self._module.named_parameters(remove_duplicate=False)),
            (InputKind.BUFFER, self._module.named_buffers(remove_duplicate=False)),
        ]
        for kind, named in kinds:
            for name, tensor in named:
                node = self._placeholder(self._free_name(), self._values.stored(tensor))
                persistent = True if kind == InputKind.BUFFER else None
                self._inputs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))
                self._new |= dict.fromkeys(readers.pop(name, ()), node)
        _require(not readers)

    def _free_name(self) -> str:
        """A name for the moment: the user's names come first, then torch's rules for weights."""
        name = f"lifted_{len(self._inputs)}"
        while name in self._program.nodes:
            name += "_"
        return name

    def _add_input(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        argument: TensorArgument | ConstantArgument
        if is_tensor(node):
            new = self._placeholder(node.name, self._values.stated(value))
            argument = TensorArgument(new.name)
        else:
            _require(type(value) in _CONSTANTS)
            new = self._placeholder(node.name, value)
            argument = ConstantArgument(new.name, value)
        self._inputs.append(InputSpec(InputKind.USER_INPUT, argument, None))
        self._new[node] = new

    def _placeholder(self, name: str, value: Any) -> fx.Node:
        node = self._graph.placeholder(name)
        node.meta["val"] = value
        return node

    def _add_call(self, node: fx.Node) -> None:
        schema = getattr(node.target, "_schema", None)
        _require(schema is None or not schema.is_mutable)
        _require("val" in node.meta or (schema is not None and not schema.returns))
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            _require(isinstance(leaf, (fx.Node, slice, *_PLAIN)) or leaf is ...)
        new = self._graph.node_copy(node, self._new.__getitem__)
        new.name = node.name
        # `from_node` holds addresses of this process, `tensor_meta` says what `val` says
        new.meta = {key: value for key, value in node.meta.items() if key not in {"from_node", "tensor_meta"}}
        new.meta.setdefault("nn_module_stack", {"L__self__": ("", _path(type(self._module)))})
        if "val" in node.meta:
            new.meta["val"] = self._values.stated(node.meta["val"])
        self._new[node] = new

    def _add_output(self) -> list[OutputSpec]:
        result = next(n for n in self._program.graph.nodes if n.op == "output").args[0]
        leaves = pytree.tree_leaves(result, is_leaf=lambda leaf: leaf is None)
        _require(len(leaves) == self._specs[1].num_leaves)
        specs = []
        for leaf in leaves:
            _require(leaf is None or (isinstance(leaf, fx.Node) and is_tensor(leaf)))
            argument = ConstantArgument("", None) if leaf is None else TensorArgument(self._new[leaf].name)
            specs.append(OutputSpec(OutputKind.USER_OUTPUT, argument, None))
        self._graph.output(tuple(None if leaf is None else self._new[leaf] for leaf in leaves))
        return specs

    def _call_graph(self) -> list[ModuleCallEntry]:
        """The whole with its signature, and the modules that the weights lie in."""
        args, kwargs = self._example
        bound = inspect.signature(self._module.forward).bind_partial(*args).arguments
        signature = ModuleCallSignature(
            inputs=[], outputs=[], in_spec=self._specs[0], out_spec=self._specs[1], forward_arg_names=[*bound, *kwargs]
        )
        inner = [ModuleCallEntry(name) for name, _ in self._module.named_modules() if name]
        return [ModuleCallEntry("", signature), *inner]


class _FreshValues:
    """What nodes state, on fake tensors and sizes of their own."""

    def __init__(self, program: Program) -> None:
        inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and is_tensor(n)]
        _require(bool(inputs) and all(isinstance(value, FakeTensor) for value in inputs))
        self._old: ShapeEnv | None = inputs[0].fake_mode.shape_env
        self._environment = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._environment, allow_non_fake_inputs=True, export=True)
        self._sizes: dict[Any, int | torch.SymInt] = {}
        self._symbols: dict[Any, int] = {}
        if self._old is not None:
            _require(all(guard.expr.is_Equality and _symbols_only(guard.expr.args) for guard in self._old.guards))
        for value in inputs:
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    self._add_symbol(size)

    def _add_symbol(self, size: torch.SymInt) -> None:
        symbol = size.node.expr
        _require(symbol.is_Symbol and size.node.shape_env is self._old and size.node.hint is not None)
        if symbol in self._symbols:
            return
        bounds = self._old.bound_sympy(symbol)  # type: ignore[union-attr]
        _require(bounds.lower <= _LEAST and bounds.upper == int_oo)
        self._symbols[symbol] = int(size.node.hint)
        self._environment.add_backed_var_to_val(symbol, self._symbols[symbol])
        self._environment.constrain_symbol_range(symbol, compiler_min=_LEAST, compiler_max=int_oo)

    def ranges(self) -> dict[Any, Any]:
        """The sizes that each symbol stands for."""
        return {symbol: ValueRanges(_LEAST, int_oo) for symbol in self._symbols}

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a parameter or a buffer states."""
        _require(type(tensor) in {torch.Tensor, nn.Parameter})
        return self._tensor(tensor)

    def stated(self, value: Any) -> Any:
        """A node's value."""
        leaves, structure = pytree.tree_flatten(value)
        return pytree.tree_unflatten([self._leaf(leaf) for leaf in leaves], structure)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            _require(isinstance(leaf, FakeTensor))
            return self._tensor(leaf)
        if isinstance(leaf, torch.SymInt):
            return self._size(leaf)
        _require(type(leaf) in _CONSTANTS)
        return leaf

    def _tensor(self, like: torch.Tensor) -> torch.Tensor:
        _require(like.layout == torch.strided and not like.is_quantized)
        shape, strides = ([self._size(size) for size in sizes] for sizes in (like.shape, like.stride()))
        with self._mode:
            return torch.empty_strided(
                shape, strides, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
            )

    def _size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._sizes:
            _require(expression.free_symbols <= self._symbols.keys())
            number = int(expression.xreplace(self._symbols))
            self._sizes[expression] = self._environment.create_symintnode(expression, hint=number)
        return self._sizes[expression]


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _symbols_only(expressions: tuple[Any, ...]) -> bool:
    return all(expression.is_Symbol for expression in expressions)


def _require(holds: bool) -> None:
    if not holds:
        raise _UnlikeError
