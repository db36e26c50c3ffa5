"""The text of an exported program, looked through before torch reads it.

torch evaluates the sizes of a `.pt2` file as Python expressions, puts its names into Python that it runs, and imports
the modules that its argument trees name. So all that is not data has to be of the form that torch.export writes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from ..support.errors import CaptureError
from ..support.strict_json import read_json

#: What srepr writes of sizes and of conditions on them, and the functions that torch adds.
_SIZES = (
    "Abs Add And BooleanFalse BooleanTrue CeilDiv CeilToInt CleanDiv Eq Equality Float FloatPow FloatTrueDiv "
    "FloorDiv FloorToInt Ge GreaterThan Gt Half Identity IntTrueDiv Integer IsNonOverlappingAndDenseIndicator "
    "LShift Le LessThan Lt Max Min Mod ModularIndexing Mul Ne NegativeOne Not One Or Piecewise Pow PowByNatural "
    "PythonMod RShift Rational RoundDecimal RoundToInt StrictGreaterThan StrictLessThan Symbol ToFloat TruncToFloat "
    "TruncToInt Tuple Unequality Where Xor Zero bool ceiling float floor int max min"
)
_FUNCTIONS = frozenset(_SIZES.split())
_GUARD_FUNCTIONS = _FUNCTIONS | {"isinstance", "len", "isnan", "size", "stride", "storage_offset", "dim", "numel"}
_GUARD_METHODS = frozenset({"size", "stride", "storage_offset", "dim", "numel"})
_GUARD_ATTRIBUTES = _GUARD_METHODS | {"shape", "isnan", "inf", "nan"}
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
#: A power in a size beyond this, or numbers of more digits, are no size of anything.
_MOST_POWER, _MOST_POWERS, _MOST_NUMBER = 16, 4, 1 << 63
_LONGEST = 20_000
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.ASCII)
_SYMBOL = re.compile(r"\w+", re.ASCII)
_QUOTABLE = re.compile(r"[^\"'\\\x00-\x1f\x7f\u2028\u2029]*")
#: Operators by name; of Python's own those that torch applies to sizes.
_OPERATOR = re.compile(
    r"torch\.ops\.(?!_*(loaded|load)_)[a-zA-Z]\w*\.(__i?(and|or|xor|lshift|rshift)__|(?!__)\w+)(\.(?!__)\w+)?"
    r"|(?:torch\.ops\.)_(?!_)\w+\.(?!__)\w+(\.(?!__)\w+)?"
    r"|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|and_|or_|not_|xor|add|sub|mul|truediv|floordiv|mod|pow|lshift|rshift|getitem)"
    r"|math\.\w+|torch\._?sym_\w+",
    re.ASCII,
)
#: Operators that reach files, other processes or the interpreter.
_REACHING = re.compile(
    r"torch\.ops\.((aten\.(from_file|save|_print|warn)|debugprims\.load_tensor)(\..*)?"
    r"|(prim|profiler|symm_mem|c10d\w*|_c10d\w*|rpc|_test|higher_order\.triton\w*|higher_order\.print)(\..*)?)"
)
#: Text that torch keeps as it is.
_PLAIN = frozenset({"metadata", "torch_version", "verifiers"})
_TEXTS = frozenset({"as_string", "as_strings"})
#: Text that names parameters and modules: torch puts it between quotes.
_QUOTED = _TEXTS | {"parameter_name", "buffer_name", "tensor_constant_name", "fqn", "user_input_name"}
_NOT_FINITE = re.compile(r"-?Infinity|NaN")


def check_exported_text(content: bytes) -> None:
    """Raise CaptureError for the JSON of an exported program that could make torch run code of its own."""
    _walk(_json(content))


def _json(content: bytes) -> Any:
    try:
        return read_json(content)
    except ValueError as cause:
        raise CaptureError(f"the graph in the file is not JSON: {cause}", hint="the file is damaged") from cause


def _walk(value: Any) -> None:
    """Every text by the check of its field, without recursion: files nest as deep as they like."""
    waiting: list[tuple[Any, str, str]] = [(value, "", "")]
    while waiting:
        found, field, above = waiting.pop()
        if field in _PLAIN and _is_plain(found):
            continue
        if field in _TEXTS and above == "arg" and _is_plain(found):
            continue  # what an operator gets is printed as a literal; what the network gets is put between quotes
        if isinstance(found, dict):
            for inner in found:
                _check_key(inner, field)
            waiting += [(item, inner, field) for inner, item in found.items()]
        elif isinstance(found, list):
            waiting += [(item, field, above) for item in found]
        elif isinstance(found, str):
            _CHECKS.get(field, _check_name)(found)


def _is_plain(found: Any) -> bool:
    """Whether there is nothing but text: a tensor may have the name of a field."""
    values = found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
    return all(value is None or isinstance(value, str) for value in values)


def _check_key(key: str, above: str) -> None:
    if above == "range_constraints" and (len(key) > 9 or not _SYMBOL.fullmatch(key)):
        raise _refusal("a symbol", key)
    if not _QUOTABLE.fullmatch(key):
        raise _refusal("a name", key)


def _check_name(text: str) -> None:
    if text and not (text.isidentifier() or re.fullmatch(r"[\w.]+", text)):
        raise _refusal("a name", text)


def _check_float(text: str) -> None:
    if not _NOT_FINITE.fullmatch(text):
        raise _refusal("a number", text)


def _check_quoted(text: str) -> None:
    if not _QUOTABLE.fullmatch(text):
        raise _refusal("a name", text)


def _check_operator(text: str) -> None:
    if not _OPERATOR.fullmatch(text):
        raise _refusal("an operator", text)
    if _REACHING.fullmatch(text):
        raise _refusal("an operator that reaches beyond the network", text)


def _check_size(text: str) -> None:
    _Expression(text, _FUNCTIONS, guard=False).check()


def _check_guard(text: str) -> None:
    _Expression(text, _GUARD_FUNCTIONS, guard=True).check()


def _check_tree(text: str) -> None:
    """An argument tree: names in quotes, and no class that torch would have to import."""
    if not text:
        return
    waiting = [_json(text.encode("utf-8", "surrogatepass"))]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if {"__enum__", "default_factory_module", "default_factory_name"} & found.keys():
                raise _refusal("an argument tree that names a class to import", text)
            for key in found:
                _check_quoted(key)
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            _check_context(found)


def _check_arguments(text: str) -> None:
    """The tree of what forward() gets: its keywords become the names of parameters."""
    _check_tree(text)
    try:
        children = _json(text.encode())[1]["children_spec"] if text else []
        for keywords in children[1:2]:
            for name in _json(str(keywords["context"] or "[]").encode()):
                if not str(name).isidentifier():
                    raise _refusal("a keyword", str(name))
    except (KeyError, IndexError, TypeError, UnicodeError) as cause:
        raise _refusal("an argument tree", text) from cause


def _check_context(text: str) -> None:
    """A string in an argument tree: a key, the name of a type, or JSON once more."""
    if text[:1] in ("{", "["):
        _check_tree(text)
    elif not _QUOTABLE.fullmatch(text.strip('"')):
        raise _refusal("a name in an argument tree", text)


_CHECKS: dict[str, Callable[[str], None]] = {
    "expr_str": _check_size,
    "guards_code": _check_guard,
    "target": _check_operator,
    "as_operator": _check_operator,
    "in_spec": _check_arguments,
    "out_spec": _check_tree,
    **dict.fromkeys(("as_float", "as_floats"), _check_float),
    **dict.fromkeys(_QUOTED, _check_quoted),
}


class _Expression:
    """Numbers, symbols, arithmetic, comparisons, and calls of known functions."""

    def __init__(self, text: str, functions: frozenset[str], *, guard: bool) -> None:
        self.text, self.functions, self.guard, self.powers = text, functions, guard, 0

    def check(self) -> None:
        """Raise CaptureError for anything else."""
        if len(self.text) > _LONGEST or not (self.text.isascii() and self.text.isprintable()):
            raise _refusal("a size", self.text)
        try:
            tree = ast.parse(self.text, mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as cause:
            raise _refusal("a size", self.text) from cause
        for node in ast.walk(tree.body):
            for field in ast.iter_child_nodes(node):
                self._allow(field, node)
        self._allow(tree.body, tree)

    def _allow(self, node: ast.AST, above: ast.AST) -> None:
        plain = (ast.Load, ast.keyword, ast.UnaryOp, ast.unaryop, ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop)
        arithmetic = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Tuple)
        allowed = isinstance(node, (*plain, *arithmetic))
        if isinstance(node, (ast.BinOp, ast.Pow)):
            allowed = self._power(node)
        elif isinstance(node, ast.Call):
            allowed = self._call(node)
        elif isinstance(node, ast.Constant):
            allowed = self._constant(node.value, above)
        elif isinstance(node, ast.Name):
            allowed = "__" not in node.id
        elif self.guard and isinstance(node, ast.Attribute):
            allowed = node.attr in _GUARD_ATTRIBUTES
        elif self.guard and isinstance(node, (ast.Subscript, ast.List)):
            allowed = True
        if not allowed:
            raise _refusal("a size", self.text)

    def _power(self, node: ast.BinOp | ast.Pow) -> bool:
        if isinstance(node, ast.Pow):
            return True
        return not isinstance(node.op, ast.Pow) or self._bounded(node.right)

    def _bounded(self, exponent: ast.AST) -> bool:
        """Whether a power stays small, in a tower of powers as well: a small number or a symbol, nothing to compute."""
        self.powers += 1
        computing = (ast.BinOp, ast.Attribute, ast.Subscript, ast.IfExp)
        called = [n.func for n in ast.walk(exponent) if isinstance(n, ast.Call)]
        plain = not any(isinstance(n, computing) for n in ast.walk(exponent))
        named = all(getattr(f, "id", "") in {"Integer", "Float", "Rational", "Symbol"} for f in called)
        numbers = [n.value for n in ast.walk(exponent) if isinstance(n, ast.Constant) and not isinstance(n.value, str)]
        small = all(isinstance(n, (int, float)) and abs(n) <= _MOST_POWER for n in numbers)
        return self.powers <= _MOST_POWERS and plain and named and small

    def _call(self, node: ast.Call) -> bool:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in self.functions or any(k.arg is None for k in node.keywords):
            return False
        return name not in _POWERS or all(self._bounded(a) for a in node.args[1:2])

    def _constant(self, value: object, above: ast.AST) -> bool:
        if isinstance(value, str):
            return self._string(value, above)
        if isinstance(value, (int, float)):
            return abs(value) <= _MOST_NUMBER or value == float("inf")
        return value is None

    def _string(self, value: str, above: ast.AST) -> bool:
        """sympy evaluates strings: only a symbol's name and a number's digits may be one."""
        if self.guard:
            return isinstance(above, (ast.Subscript, ast.Compare)) and bool(re.fullmatch(r"[\w. -]*", value))
        called = getattr(above.func, "id", "") if isinstance(above, ast.Call) else ""
        form = {"Symbol": _SYMBOL, "Float": _NUMBER, "Integer": _NUMBER}.get(called)
        return form is not None and form.fullmatch(value) is not None


def _refusal(what: str, text: str) -> CaptureError:
    return CaptureError(
        f"the file holds {what} that torch.export does not write, and that could run code",
        actual=repr(text[:120]),
        hint="do not trust this file; where you do, torch.export.load it yourself and pass the ExportedProgram",
    )
