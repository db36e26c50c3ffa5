"""Does a Program hold what it promises? Every rewrite must leave these invariants as it found them.

The graph is well formed; each stored tensor has the shape and dtype that its node states; each node's stated value
follows from its operands' when the node is run again on fake tensors, for any batch; inputs and outputs
are those of the signature; names are unique. Nothing here changes the Program.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..support.errors import ProgramError, named_first_line
from .program import Program, TensorSpec, dtype_name, is_tensor, output_nodes
from .trial_shapes import TrialShapes, UnknownShapeError

#: What symbols are set to when two forms of one size are compared.
TRIAL_SIZES = (5, 11)
_OPS = ("placeholder", "get_attr", "call_function", "output")


def check_program(program: Program, before: Program | None = None) -> None:
    """Raise ProgramError, with the node, at the first invariant that does not hold.

    With `before`, the program that a rewrite started from, inputs and outputs must be called as there, and names that
    shared one tensor there must share one here.
    """
    _check_nodes(program)
    _check_constants(program)
    _check_graph(program)
    _check_signature(program)
    _check_values(program)
    if before is not None:
        _check_names(program, before)
        _check_sharing(program, before)


def _fail(program: Program, node: fx.Node | None, message: str, expected: object, actual: object) -> ProgramError:
    return ProgramError(
        message,
        node=None if node is None else node.name,
        expected=expected,
        actual=actual,
        excerpt=None if node is None or "val" not in node.meta else program.excerpt(node),
        hint="the rewrite before this check has a defect; please report it with the graph's text (Program.text())",
    )


def _check_nodes(program: Program) -> None:
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node.op not in _OPS:
            raise _fail(program, node, "a node of an unknown kind", ", ".join(_OPS), node.op)
        if node.name in seen:
            raise _fail(program, node, "two nodes have one name", "unique names", node.name)
        seen.add(node.name)


def _check_graph(program: Program) -> None:
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError, NameError) as cause:
        raise _fail(program, None, "the graph is not well formed", "graph.lint() passes", str(cause)) from cause


def _check_constants(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        try:
            value: Any = program.constant(node)
        except AttributeError:
            raise _fail(program, node, "it reads a tensor that is not there", node.target, "no such name") from None
        stated = node.meta.get("val")
        both = isinstance(value, torch.Tensor) and isinstance(stated, torch.Tensor)
        if both and _form(value) != _form(stated):
            raise _fail(program, node, f"{node.target} is not as stated", _form(stated), _form(value))


def _form(value: torch.Tensor) -> str:
    return f"{dtype_name(value.dtype)}[{', '.join(str(d) for d in value.shape)}]"


def _check_signature(program: Program) -> None:
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and is_tensor(n)]
    _compare_specs(program, "input", program.inputs, inputs)
    outputs = output_nodes(program.graph)
    _compare_specs(program, "output", program.outputs, outputs)
    # a name is the user's, not the node's: a file's inputs are called as in the file
    for what, specs in (("inputs", program.inputs), ("outputs", program.outputs)):
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise _fail(program, None, f"two {what} have one name", "unique names", names)
    structure = getattr(program.module, "_out_spec", None)
    result = next(n for n in program.graph.nodes if n.op == "output").args[0]
    leaves = pytree.tree_leaves(result)
    if structure is not None and structure.num_leaves != len(leaves):
        raise _fail(program, None, "the output structure has another size", structure.num_leaves, len(leaves))


def _check_names(program: Program, before: Program) -> None:
    """The user's names stay: those of a file's inputs, say, which are not those of their nodes."""
    for what in ("inputs", "outputs"):
        old, new = ([spec.name for spec in getattr(p, what)] for p in (before, program))
        if old != new:
            raise _fail(program, None, f"the {what} have other names", old, new)


def _compare_specs(program: Program, what: str, specs: tuple[TensorSpec, ...], nodes: list[fx.Node]) -> None:
    if len(specs) != len(nodes):
        raise _fail(program, None, f"the signature has another number of {what}s", len(specs), len(nodes))
    for spec, node in zip(specs, nodes, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise _fail(program, node, f"the {what} {spec.name} is no tensor", str(spec), type(value).__name__)
        sizes = [(stated, _number(size)) for stated, size in zip(spec.shape, value.shape, strict=False)]
        fits = len(spec.shape) == value.dim() and all(
            size is None if isinstance(stated, str) else size == stated for stated, size in sizes
        )
        if not fits or spec.dtype != value.dtype:
            raise _fail(program, node, f"the {what} {spec.name} is not as stated", str(spec), _form(value))


def _number(size: int | torch.SymInt) -> int | None:
    """A size as a number, None when it is symbolic."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return None if expr.free_symbols else int(expr)


def _check_values(program: Program) -> None:
    """Run every node again on what its operands state: its result must be as it states. At two batch sizes, which
    settles nearly all; what they do not tell, or say is wrong, is settled by symbolic shapes."""
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and is_tensor(n)]
    before = {n.name: _form(n.meta["val"]) for n in inputs}
    trials, again = TrialShapes(program, trials=2), _Symbolically(program, inputs)
    for node in program.graph.nodes:
        if node.op == "call_function" and not _settled(trials, node):
            again.check(node)
    for node in inputs:
        if _form(node.meta["val"]) != before[node.name]:
            raise _fail(program, node, "the graph fixes its batch size", before[node.name], _form(node.meta["val"]))


def _settled(trials: TrialShapes, node: fx.Node) -> bool:
    try:
        return trials.agrees(node)
    except UnknownShapeError:
        return False


class _Symbolically:
    """Nodes run on symbolic fake tensors."""

    def __init__(self, program: Program, inputs: Sequence[fx.Node]) -> None:
        self._program = program
        own = inputs[0].meta["val"].fake_mode if inputs else None
        self._mode: FakeTensorMode = own or FakeTensorMode(allow_non_fake_inputs=True)
        self._known = {s for n in inputs for d in n.meta["val"].shape for s in _symbols(d)}

    def check(self, node: fx.Node) -> None:
        """Raise ProgramError unless the node gives what it states."""
        operands = {n: self._value(n) for n in node.all_input_nodes}
        if any(isinstance(o, torch.nn.Module) for o in operands.values()):
            return  # an operator that holds a graph of its own
        stated = node.meta.get("val")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: operands[n])
        environment = self._mode.shape_env
        quiet = environment.ignore_fresh_unbacked_symbols() if environment is not None else nullcontext()
        try:
            with self._mode, enable_python_dispatcher(), quiet:
                found = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as cause:  # operators raise many unrelated types: all of them mean that the graph does not fit
            message = f"its operands do not fit: {named_first_line(cause)}"
            raise _fail(self._program, node, message, _text(stated), "no result") from cause
        one, two = pytree.tree_leaves(stated), pytree.tree_leaves(found)
        if len(one) != len(two) or not all(_same(a, b, self._known) for a, b in zip(one, two, strict=True)):
            raise _fail(self._program, node, "its value is not as stated", _text(stated), _text(found))

    def _value(self, node: fx.Node) -> Any:
        """What a node states; of a stored tensor, its own."""
        if node.op != "get_attr":
            return node.meta.get("val")
        value = self._program.constant(node)
        return self._mode.from_tensor(value.detach(), static_shapes=True) if isinstance(value, torch.Tensor) else value


def _sizes(leaf: Any) -> list[Any]:
    if isinstance(leaf, torch.Tensor):
        return list(leaf.shape)
    return [leaf] if isinstance(leaf, (int, torch.SymInt)) else []


def _same(stated: Any, found: Any, known: set[str]) -> bool:
    if isinstance(stated, torch.Tensor) != isinstance(found, torch.Tensor):
        return False
    if isinstance(stated, torch.Tensor) and (stated.dtype != found.dtype or stated.dim() != found.dim()):
        return False
    return all(_same_size(a, b, known) for a, b in zip(_sizes(stated), _sizes(found), strict=False))


def _same_size(stated: Any, found: Any, known: set[str]) -> bool:
    """Equal for every batch size. Sizes that depend on data have symbols of their own in each run and are not
    compared."""
    if (_symbols(stated) | _symbols(found)) - known:
        return True
    return all(_at(stated, trial) == _at(found, trial) for trial in TRIAL_SIZES)


def _at(size: Any, trial: int) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    ordered = sorted(expr.free_symbols, key=str)
    return int(expr.xreplace({s: trial + 2 * place for place, s in enumerate(ordered)}))


def _symbols(size: Any) -> set[str]:
    return {str(s) for s in size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()


def _text(value: Any) -> str:
    return str([_form(v) if isinstance(v, torch.Tensor) else str(v) for v in pytree.tree_leaves(value)])


def _check_sharing(program: Program, before: Program) -> None:
    """Names that are one tensor in the program before are one tensor in this one."""
    named = set(program.first_names)
    partners: dict[str, str] = {}
    for name, first in before.first_names.items():
        if name in named:
            partner = partners.setdefault(first, name)
            if program.first_names[name] != program.first_names[partner]:
                raise _fail(program, None, f"{name} and {partner} are no longer one tensor", "shared", "apart")
