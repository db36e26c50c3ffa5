"""What torch.onnx does again in each export, done once or left out: the same model in a third of the time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

#: What is replaced: module, class in it (or none), name, and what makes the replacement of the original.
_Replacement = tuple[str, str, str, Callable[[Any], Any]]


@contextmanager
def nothing_twice() -> Iterator[None]:
    """Exports inside take shortcuts. Where a torch or an onnxscript keeps one of these functions elsewhere, that one is
    not shortened."""
    with ExitStack() as stack:
        for module, owner, name, made in _replacements():
            stack.enter_context(_replaced(module, owner, name, made))
        yield


@contextmanager
def _replaced(module: str, owner: str, name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    try:
        place = import_module(module)
        place = getattr(place, owner) if owner else place
        original = vars(place)[name]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    setattr(place, name, made(original))
    try:
        yield
    finally:
        setattr(place, name, original)


def _replacements() -> list[_Replacement]:
    exporter = "torch.onnx._internal.exporter._decomp"
    promotion = "torch.onnx._internal.fx.passes.type_promotion"
    return [
        (exporter, "", "create_onnx_friendly_decomposition_table", _kept_table),
        (promotion, "_TypePromotionInterpreter", "run_node", _as_stated),
        ("onnxscript.rewriter._rewrite_rule", "RewriteRule", "try_rewrite", _tried_where_it_fits),
    ]


def _kept_table(original: Callable[..., Any]) -> Callable[..., Any]:
    """The table of decompositions follows from the operators that have a translation: one for each such set."""

    def table(operators: Any) -> Any:
        return dict(_tables(original, frozenset(operators)))

    return table


@functools.lru_cache(maxsize=4)
def _tables(original: Callable[..., Any], operators: frozenset[Any]) -> Any:
    return original(operators)


def _as_stated(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where types are promoted, the network is run on fake tensors to learn the types of operands. Nodes state these,
    those that were promoted too (the pass runs them and writes it down): only what states nothing is run."""
    from torch.onnx._internal.fx.passes.type_promotion import get_type_promotion_rule

    def run_node(interpreter: Any, node: Any) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return original(interpreter, node)
        rule = get_type_promotion_rule(node, interpreter.type_promotion_table)
        if rule is not None:
            with interpreter._set_current_node(node):
                interpreter._maybe_promote_node(node, rule)
        return node.meta["val"]

    return run_node


def _tried_where_it_fits(original: Callable[..., Any]) -> Callable[..., Any]:
    """A rewriting rule is tried at every node, and one with two outputs lists all nodes each time. It can only match
    where the node is of the operator that its pattern ends with: elsewhere it says so at once."""
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    def try_rewrite(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        last = rule._target_pattern.output_nodes[0].op_identifier()
        fits = last is None or (last[0] == node.domain and last[1] == node.op_type)
        if fits or options.get("tracer") is not None or type(rule._matcher) is not SimplePatternMatcher:
            return original(rule, model, graph, node, **options)
        return None

    return try_rewrite
