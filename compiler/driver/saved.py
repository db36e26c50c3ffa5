"""What `Compiled.save` wrote, read back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from ..frontend.capture import capture
from ..ir.program import Program
from ..plan.plan import Plan
from ..support.errors import OutputError
from ..support.strict_json import json_file, json_text, read_json

#: The files of an output folder. The page is for people: it is written, and never read.
ONNX, PT2, PLAN, REPORT, PAGE = "model.onnx", "model.pt2", "plan.json", "report.json", "report.html"


def digest(content: bytes) -> str:
    """What a file is known again by."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def with_plan(plan: Plan, networks: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a network with its plan.json, which holds their digests and its own: so that one of another run, of
    a save that was cut off, or one that was damaged since, is not taken for one of them."""
    read = Plan.from_dict(read_json(json_text(plan.to_dict())))  # as it will be read: numbers have one form
    sealed = replace(
        plan, files={**{name: digest(content) for name, content in networks.items()}, PLAN: _own_digest(read)}
    )
    return {**networks, PLAN: json_file(sealed.to_dict())}


def check_file(plan: Plan, name: str, content: bytes) -> None:
    """Raise OutputError unless the file is the one that was saved with the plan. One that the plan does not know, as
    those of earlier versions do not, passes."""
    if plan.files.get(name, found := digest(content)) != found:
        raise OutputError(
            f"{name} is not the one that {PLAN} was saved with",
            hint="copy the whole folder again, or compile again: a save was cut off, or files of two runs were mixed",
        )


def check_plan(plan: Plan) -> None:
    """Raise OutputError when a plan's decisions are not the ones that its network was saved with."""
    if plan.files.get(PLAN, found := _own_digest(plan)) != found:
        raise OutputError(
            f"{PLAN} is not as it was saved with {PT2}",
            hint="copy the whole folder again; to have an edited plan carried out, give a calibration set",
        )


def _own_digest(plan: Plan) -> str:
    return digest(json_file(replace(plan, files={}).to_dict()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """A compiled network from its folder: `.module` and `.program` (read from model.pt2 when first asked for), `.onnx`
    (bytes), `.plan`, and `.report` as plain data (empty for what `foldcut apply` wrote)."""

    folder: Path
    plan: Plan
    report: Mapping[str, Any]
    onnx: bytes

    @cached_property
    def program(self) -> Program:
        """Raises CaptureError when model.pt2 cannot be read, OutputError when it has changed since the folder was."""
        try:
            check_file(self.plan, PT2, (self.folder / PT2).read_bytes())
        except OSError as cause:
            raise OutputError(f"cannot read {self.folder / PT2}: {cause}", hint="copy the folder again") from cause
        return capture(self.folder / PT2)

    @property
    def module(self) -> fx.GraphModule:
        """The compiled network as a torch module; arguments and outputs as the original's."""
        return self.program.module


def load(folder: str | Path) -> Saved:
    """Read what `Compiled.save`, `foldcut compile` or `foldcut apply` wrote. The network has its weights in it: no
    calibration set is needed to run it.

    Raises OutputError when the folder or one of its files is missing, unreadable or of another run, PlanError for a
    plan of another version.
    """
    path = Path(folder)
    missing = [name for name in (ONNX, PT2, PLAN) if not (path / name).is_file()]
    if missing:
        raise OutputError(
            f"{path} is not a compiled network: it has no {', no '.join(missing)}",
            hint="give the folder that Compiled.save, `foldcut compile -o` or `foldcut apply -o` wrote",
        )
    plan = Plan.load(path / PLAN)
    try:
        report = read_json((path / REPORT).read_bytes()) if (path / REPORT).is_file() else {}
        onnx, pt2 = ((path / name).read_bytes() for name in (ONNX, PT2))
    except (OSError, ValueError) as cause:
        raise OutputError(f"cannot read {path}: {cause}", hint="compile again, or copy the folder again") from cause
    check_plan(plan)
    check_file(plan, ONNX, onnx)
    check_file(plan, PT2, pt2)
    _check_report(path, plan, report)
    return Saved(folder=path, plan=plan, report=report, onnx=onnx)


def _check_report(path: Path, plan: Plan, report: Any) -> None:
    if not isinstance(report, dict):
        raise OutputError(f"{path / REPORT} is not a report", hint="compile again, or copy the folder again")
    # through JSON: tuples come back from it as lists
    if report and report.get("decisions") != read_json(json_text([d.to_dict() for d in plan.decisions])):
        raise OutputError(f"{path / REPORT} tells of another plan", hint="compile again, or copy the folder again")
