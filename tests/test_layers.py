"""The rooms of the package, read off its source: who imports whom, who changes graphs, how long files are.

`docs/rooms.py` reads them; ARCHITECTURE.md shows its table.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import foldcut
import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("foldcut_rooms", ROOT / "docs" / "rooms.py")
assert SPEC is not None and SPEC.loader is not None
rooms: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(rooms)

KNOWN: dict[str, Path] = rooms.modules()
FILES = sorted(KNOWN.values())
ids = [path.relative_to(ROOT).as_posix() for path in FILES]
#: A folder, and a function, may have so much.
MOST_FILES, MOST_LINES, MOST_STATEMENTS, MOST_PARAMETERS = 15, 400, 60, 6
#: Methods and functions that change a graph or a module's own tensors.
MUTATORS = {
    "erase_node",
    "replace_all_uses_with",
    "replace_input_with",
    "call_function",
    "call_module",
    "call_method",
    "create_node",
    "get_attr",
    "inserting_before",
    "inserting_after",
    "eliminate_dead_code",
    "update_arg",
    "update_kwarg",
    "node_copy",
    "recompile",
    "lint",
    "register_parameter",
    "register_buffer",
    "add_submodule",
    "delete_submodule",
}


def test_the_imports_are_read_right() -> None:
    """The reader itself: a test that finds nothing would pass for ever."""
    found = set(rooms.imports(KNOWN["passes.drop.rewrite"], KNOWN))
    assert {"compiler.plan.goal", "passes.solve.layers", "passes.drop.decision"} <= found
    assert "compiler.ir.text" in set(rooms.imports(KNOWN["compiler.ir.program"], KNOWN))
    assert "compiler.ir.text" not in set(rooms.imports(KNOWN["compiler.ir.program"], KNOWN, lazy=False))
    graph = rooms.edges()
    assert len(FILES) > 200 and len(graph) > 20 and sum(map(len, graph.values())) > 100
    with pytest.raises(ValueError, match="a, b"):
        rooms.ordered({"a": {"b"}, "b": {"a"}, "c": set()})


def test_rooms_import_one_way() -> None:
    order = rooms.ordered(rooms.edges())
    assert order[0] == "compiler/support" and order.index("compiler/driver") > order.index("passes/drop")


def test_no_module_is_imported_while_it_is_imported() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_edges_from(
        (module, other) for module, path in KNOWN.items() for other in rooms.imports(path, KNOWN, lazy=False)
    )
    assert [circle for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_the_table_of_rooms_is_up_to_date() -> None:
    assert rooms.table() in (ROOT / "ARCHITECTURE.md").read_text(), "python docs/rooms.py prints it"


def test_rooms_are_small() -> None:
    counts = {folder: sum(p.is_file() for p in folder.iterdir()) for folder in {path.parent for path in FILES}}
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_every_room_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in FILES} - {Path(rooms.PUBLIC)}
    assert sorted(listed) == sorted({"foldcut", *(".".join(("foldcut", *folder.parts)) for folder in folders)})


def changes_graphs(path: Path) -> bool:
    """Files that may: they say so by their name. What makes the first graph of an ONNX file is one of them."""
    return path.name.startswith("edit") or path.relative_to(ROOT).as_posix() == "compiler/onnx_import/module.py"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_edits_change_graphs(path: Path) -> None:
    if changes_graphs(path):
        return
    calls = {
        node.func.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    # a new Program leaves out the guards and the unused buffers of a graph that nobody has seen yet
    # and the check of a Program asks for fx's own, which changes nothing
    allowed = {"exported_program.py": {"erase_node"}, "program_check.py": {"lint"}}.get(path.name, set())
    assert not calls & MUTATORS - allowed


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_node_is_assigned_to_outside_edits(path: Path) -> None:
    if changes_graphs(path):
        return
    assigned = {
        target.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Assign, ast.AugAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
    }
    assert not assigned & {"args", "kwargs", "target", "meta", "_parameters", "_buffers", "data"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many values a function is given, itself or its class not counted."""
    given = function.args
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(names) - (bool(names) and names[0].arg in ("self", "cls")) + bool(given.vararg) + bool(given.kwarg)


def exported(package: Path) -> list[str]:
    """What a package names as public."""
    for node in ast.parse(package.read_text()).body if package.exists() else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_functions_are_short(path: Path) -> None:
    """What the docstring says does not count, nor do options that have a name of what users call themselves: public
    functions, and constructors, as the fields of a dataclass do not."""
    public = {"__init__", *foldcut.__all__, *exported(path.parent / "__init__.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            words = ast.get_docstring(node, clean=False) or ""
            assert (node.end_lineno or 0) - node.lineno + 1 - len(words.splitlines()) <= MOST_STATEMENTS, node.name
            options = sum(default is not None for default in node.args.kw_defaults) if node.name in public else 0
            assert parameters(node) - options <= MOST_PARAMETERS, node.name


def is_overload_or_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("overload" in ast.dump(d) for d in node.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    """Modules, classes and functions at the top of a file. Methods may speak for themselves."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not is_overload_or_protocol(node)
    ]
    assert missing == []


def test_every_test_file_has_a_name_of_its_own() -> None:
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_samples_are_counted_by_one_function() -> None:
    """``1 test samples`` was said in seven places: a number before the word is `plural`'s to write."""
    word = re.compile(r"\s*(\w+ ){0,2}samples\b")
    found = []
    for path in FILES:
        for text in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)):
            for value, words in pairwise(text.values):
                counted = isinstance(value, ast.FormattedValue) and isinstance(words, ast.Constant)
                if counted and word.match(str(words.value)):  # type: ignore[attr-defined]
                    found.append(f"{path.relative_to(ROOT)}:{text.lineno}")
    assert not found
