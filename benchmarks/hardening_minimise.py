"""Failures of hardening.py made small: pieces are left out for as long as the network still fails in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hardening_checks import message_class, run
from hardening_networks import Recipe, build, smaller

#: Stages that only some networks go through.
DEEP = ("re-solve", "re-solve nothing", "dead channels", "copied channels", "permuted channels")
#: Runs that one failure may cost.
MOST_RUNS = 40

PROGRAM = '''"""{status} at stage "{stage}": {message}

Found as network {number} of seed {seed}, made small. Run from the folder benchmarks/ (or with it on PYTHONPATH).

{text}
"""

from hardening_checks import run
from hardening_networks import Recipe, Step, build

recipe = {recipe}
print(build(recipe))
case = run(recipe, {number}, onnx={onnx}, deep={deep}, thorough=True)
for finding in case.findings:
    print(finding["status"], finding["stage"], finding["message"])
'''


def failures(recipe: Recipe, number: int, *, onnx: bool, deep: bool) -> tuple[list[dict[str, str]], Any]:
    case = run(recipe, number, onnx=onnx, deep=deep, thorough=True)
    return [f for f in case.findings if f["status"] in {"wrong", "exception"}], case


def kind_of(finding: dict[str, str]) -> tuple[str, str, str]:
    """Failures of one kind: wrong values by stage, exceptions by what they say."""
    said = "" if finding["status"] == "wrong" else message_class(finding["message"])
    return finding["status"], finding["stage"], said


def minimised(recipe: Recipe, number: int, kind: tuple[str, str, str]) -> tuple[Recipe, Any]:
    """The recipe with as few pieces as still fail in that way, and its case."""
    settings = {"onnx": kind[1] == "onnx", "deep": kind[1] in DEEP}
    found, case = failures(recipe, number, **settings)
    if kind not in map(kind_of, found):
        return recipe, case
    runs, changed = 0, True
    while changed and runs < MOST_RUNS:
        changed = False
        for candidate in smaller(recipe):
            runs += 1
            try:
                found, tried = failures(candidate, number, **settings)
            except Exception:  # a recipe that cannot be built any more
                continue
            if kind in map(kind_of, found):
                recipe, case, changed = candidate, tried, True
                break
            if runs >= MOST_RUNS:
                break
    return recipe, case


def keep(recipe: Recipe, number: int, row: dict[str, Any], folder: Path, most: int) -> str:
    """Make the first failure of a row small, print it and keep it as a file; returns the file's name. No more than
    `most` of one kind are made small."""
    finding = next(f for f in row["findings"] if f["status"] in {"wrong", "exception"})
    kind = kind_of(finding)
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join([kind[0], kind[1].replace(" ", "_")])
    if len(list(folder.glob(f"{name}-*.py"))) >= most:
        return ""
    small, case = minimised(recipe, number, kind)
    shown = next((f for f in case.findings if kind_of(f) == kind), finding)
    pieces = [type(p).__name__ + (f":{p.kind}" if hasattr(p, "kind") else "") for p in build(small).chain.parts]
    text = case.program.text() if case.program is not None else ""
    settings = {"onnx": kind[1] == "onnx", "deep": kind[1] in DEEP}
    path = folder / f"{name}-{number}.py"
    body = PROGRAM.format(**shown, number=number, seed=row["seed"], text=text, recipe=repr(small), **settings)
    path.write_text(body)
    print(json.dumps({"failure": str(path), **shown, "pieces": pieces, "start": small.start}), flush=True)
    return path.name
