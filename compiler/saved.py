"""What `Compiled.save` wrote, read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from .capture import capture
from .errors import OutputError
from .plan import Plan
from .program import Program

#: The files of an output folder. The page is for people: it is written, and never read.
ONNX, PT2, PLAN, REPORT, PAGE = "model.onnx", "model.pt2", "plan.json", "report.json", "report.html"


@dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """A compiled network from its folder: `.module` and `.program` (read from model.pt2 when first asked for), `.onnx`
    (bytes), `.plan`, and `.report` as plain data."""

    folder: Path
    plan: Plan
    report: Mapping[str, Any]
    onnx: bytes

    @cached_property
    def program(self) -> Program:
        """Raises CaptureError when model.pt2 cannot be read."""
        return capture(self.folder / PT2)

    @property
    def module(self) -> fx.GraphModule:
        """The compiled network as a torch module; arguments and outputs as the original's."""
        return self.program.module


def load(folder: str | Path) -> Saved:
    """Read what `Compiled.save` (or `foldcut compile`) wrote. The network has its weights in it: no calibration set is
    needed to run it.

    Raises OutputError when the folder or one of its files is missing or unreadable, PlanError for a plan of another
    version.
    """
    path = Path(folder)
    missing = [name for name in (ONNX, PT2, PLAN, REPORT) if not (path / name).is_file()]
    if missing:
        raise OutputError(
            f"{path} is not a compiled network: it has no {', no '.join(missing)}",
            hint="give the folder that Compiled.save or `foldcut compile -o` wrote",
        )
    plan = Plan.load(path / PLAN)
    try:
        report = json.loads((path / REPORT).read_text())
        onnx = (path / ONNX).read_bytes()
    except (OSError, ValueError) as cause:
        raise OutputError(f"cannot read {path}: {cause}", hint="compile again, or copy the folder again") from cause
    if not isinstance(report, dict):
        raise OutputError(f"{path / REPORT} is not a report", hint="compile again, or copy the folder again")
    return Saved(folder=path, plan=plan, report=report, onnx=onnx)
