"""The layers of the package, read off its source: who imports whom, who changes graphs, how long files are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compiler", "passes", "runtime")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
#: The modules of compiler/ that put the layers together; all others are the core.
TOP = {
    "api",
    "cli",
    "channel_pipeline",
    "cli_measure",
    "cli_tables",
    "pipeline",
    "latency_probe",
    "demo",
    "_package",
} | {
    "drop_pipeline",
    "channel_latency",
    "cli_goals",
    "cli_options",
    "cli_plans",
    "joint_pipeline",
    "joint_proposals",
    "joint_rewrite",
    "rank_choice",
    "rank_latency",
    "rank_pipeline",
    "report_parts",
    "rewritten",
    "stored_latency",
    "stored_passes",
    "cache_folder",
    "left_alone",
    "pipeline_settings",
    "replay",
    "sweep",
}
#: The modules that may change graphs.
EDITS = {f"compiler/{name}.py" for name in ("edit", "edit_chain", "edit_extract", "edit_folds", "onnx_module")}
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

ids = [str(p.relative_to(ROOT)) for p in FILES]


def home(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def module(path: Path) -> str:
    """Name within its package: the part that TOP speaks of."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, str]]:
    """(package, module) of everything imported from within foldcut; the module is "" for the package itself."""
    parts = ["foldcut", *path.relative_to(ROOT).with_suffix("").parts]
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            source = (*base, *(node.module or "").split("."))
            source = tuple(part for part in source if part)
            # `from . import x` may name modules
            found |= {source} if len(source) > 2 else {(*source, alias.name) for alias in node.names}
    own = {f[1:] for f in found if f[0] == "foldcut" and len(f) > 1}
    return {(f[0], f[1] if len(f) > 1 else "") for f in own if f[0] in PACKAGES}


def test_the_imports_are_read_right() -> None:
    """The reader itself: a test that finds nothing would pass for ever."""
    assert ("compiler", "program") in imports(ROOT / "passes" / "drop_blocks.py")
    assert ("passes", "drop_blocks") in imports(ROOT / "compiler" / "drop_pipeline.py")
    assert ("compiler", "errors") in imports(ROOT / "runtime" / "backend.py")
    assert ("compiler", "text") in imports(ROOT / "compiler" / "program.py")
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_who_imports_whom(path: Path) -> None:
    here = home(path)
    if here == "compiler":
        if module(path) not in TOP:
            assert {package for package, _ in imports(path)} <= {"compiler"}
            assert not {name for package, name in imports(path) if package == "compiler"} & TOP
        return
    for package, name in imports(path):
        assert package in {here, "compiler"}, f"{here} must not import {package}.{name}"
        assert package == here or name not in TOP, f"{name} is no part of the core"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_edit_changes_graphs(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in EDITS:
        return
    calls = {
        node.func.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    # capture leaves out the guards and the unused buffers of a graph that nobody has seen yet
    # and the check of a Program asks for fx's own, which changes nothing
    allowed = {"capture.py": {"erase_node"}, "program_check.py": {"lint"}}.get(path.name, set())
    assert not calls & MUTATORS - allowed


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_node_is_assigned_to_outside_edit(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in EDITS:
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
    assert len(path.read_text().splitlines()) <= 400


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
