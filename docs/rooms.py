"""Which rooms there are, and which of them import which others: read off the source.

    python docs/rooms.py            # the table that ARCHITECTURE.md shows

A room is a folder below compiler/, passes/ or runtime/ with Python files in it. An import counts wherever it stands,
but for those that only a type checker reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("compiler", "passes", "runtime")
#: What the installed package shows of all rooms.
PUBLIC = "compiler/_package"


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package ``foldcut``."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def room(module: str, known: dict[str, Path]) -> str:
    """The folder of a module."""
    return known[module].parent.relative_to(ROOT).as_posix()


def imports(path: Path, known: dict[str, Path], *, lazy: bool = True) -> Iterator[str]:
    """The modules of this package that a file imports; without `lazy`, when it is imported itself."""
    tree = ast.parse(path.read_text())
    skipped = {id(part) for node in ast.walk(tree) if _for_types(node) for part in ast.walk(node)}
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (n.name.removeprefix("foldcut.") for n in node.names if n.name.startswith("foldcut."))
        elif isinstance(node, ast.ImportFrom):
            source = _source(node, path)
            for alias in node.names if source is not None else ():
                whole = f"{source}.{alias.name}".lstrip(".")
                found = whole if whole in known else source
                if found in known:
                    yield str(found)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _source(node: ast.ImportFrom, path: Path) -> str | None:
    """What is imported from, below ``foldcut``; None outside of it."""
    if not node.level:
        name = node.module or ""
        return name.removeprefix("foldcut").lstrip(".") if name.split(".")[0] == "foldcut" else None
    folder = [] if path.parent.name == "_package" else list(path.relative_to(ROOT).parent.parts)
    base = folder[: len(folder) - (node.level - 1)]
    return ".".join([*base, *(node.module or "").split(".")]).strip(".")


def edges() -> dict[str, set[str]]:
    """For each room those that it imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        here = room(module, known)
        if here != PUBLIC and here not in PACKAGES:
            others = {room(other, known) for other in imports(path, known)}
            found.setdefault(here, set()).update(others - {here, *PACKAGES})
    return found


def ordered(graph: dict[str, set[str]]) -> list[str]:
    """The rooms, each behind all that it imports. Raises ValueError, with the rooms, where they go in a circle."""
    order: list[str] = []
    left = dict(graph)
    while left:
        free = sorted(name for name, others in left.items() if others <= set(order))
        if not free:
            raise ValueError(f"rooms that import each other: {', '.join(sorted(left))}")
        order.append(free[0])
        del left[free[0]]
    return order


def table() -> str:
    """Each room with its files and the rooms that it imports, in an order in which imports go up only."""
    graph, known = edges(), modules()
    rows = ["| room | files | imports |", "|---|---|---|"]
    for name in ordered(graph):
        files = sum(room(module, known) == name and path.name != "__init__.py" for module, path in known.items())
        rows.append(f"| {name} | {files} | {', '.join(sorted(graph[name])) or '-'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
