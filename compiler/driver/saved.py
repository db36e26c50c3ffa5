"""Reading a folder that `Compiled.save` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..frontend.capture import capture
from ..ir.program import Program
from ..onnx.model_file import WEIGHTS, OnnxFile, OnnxModel, fits_a_message
from ..report.report import Report
from ..support.atomic_files import Content, StoredFile
from ..support.errors import OutputError
from ..support.strict_json import json_text, read_json
from .builtin import Plan
from .result import Compiled
from .sealed import ONNX, PLAN, PT2, REPORT, check_file, check_plan, networks_of


def load(folder: str | Path) -> Compiled:
    """Read a folder written by `Compiled.save`, ``foldcut compile`` or ``foldcut apply``.

    The files are checked against the digests in ``plan.json``, so a damaged file or one of another run is refused.
    The weights are part of the folder: no data is needed.

    Arguments:
        folder: The folder.

    Returns:
        The `Compiled` network, with its report if the folder has one.

    Raises:
        OutputError: If the folder or one of its files is missing, unreadable or of another run.
        PlanError: If ``plan.json`` is malformed or of an unknown version.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> samples = torch.randn(40, 8)
        >>> cut = foldcut.PruneChannels(group="0", kept=tuple(range(16)), total=32)
        >>> fingerprint = foldcut.capture(net, samples[:2]).fingerprint
        >>> plan = foldcut.Plan(decisions=(cut,), goal=foldcut.Channels(0.5), fingerprint=fingerprint, predicted={})
        >>> out = foldcut.apply(net, plan, calibration=samples, mimic=False, cache=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = foldcut.load(out.save(folder))
        ...     torch.equal(again.module(samples), out.module(samples))
        True
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
        onnx: OnnxModel = OnnxFile(path / ONNX) if (path / WEIGHTS).is_file() else (path / ONNX).read_bytes()
        pt2 = _content(path / PT2)
    except (OSError, ValueError) as cause:
        raise OutputError(f"cannot read {path}: {cause}", hint="compile again, or copy the folder again") from cause
    check_plan(plan)
    check_file(plan, ONNX, onnx)
    check_file(plan, PT2, pt2)
    _check_report(path, plan, report)
    return Compiled(
        plan=plan,
        make_program=lambda: _program(path, plan),
        make_networks=lambda: networks_of(onnx, pt2),
        compiled_report=_read_report(path, report) if report else None,
    )


def _content(path: Path) -> Content:
    return path.read_bytes() if fits_a_message(path.stat().st_size) else StoredFile(path)


def _program(path: Path, plan: Plan) -> Program:
    try:
        check_file(plan, PT2, StoredFile(path / PT2))
    except OSError as cause:
        raise OutputError(f"cannot read {path / PT2}: {cause}", hint="copy the folder again") from cause
    return capture(path / PT2)


def _read_report(path: Path, data: Mapping[str, Any]) -> Report:
    try:
        return Report.read(data)
    except TypeError as cause:
        raise OutputError(f"{path / REPORT} is not a report: {cause}", hint="compile again") from cause


def _check_report(path: Path, plan: Plan, report: Any) -> None:
    if not isinstance(report, dict):
        raise OutputError(f"{path / REPORT} is not a report", hint="compile again, or copy the folder again")
    # through JSON: tuples come back from it as lists
    if report and report.get("decisions") != read_json(json_text(plan.as_read()["decisions"])):
        raise OutputError(f"{path / REPORT} is that of another plan", hint="compile again, or copy the folder again")
