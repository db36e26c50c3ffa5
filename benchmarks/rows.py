"""Tables of which every row is made in a process of its own, and rows kept line by line: what benchmarks share."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Record:
    """The row of one model, written to its file at every step, so that a killed process leaves what it found."""

    def __init__(self, path: Path) -> None:
        self.path, self.row = path, Row()

    def note(self, **values: Any) -> None:
        self.row |= values | {"peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}
        self.path.write_text(json.dumps(self.row))

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Note that the work inside ended, or what went wrong in which stage."""
        try:
            yield
            self.note(stage="end")
        except Exception as cause:
            place = traceback.extract_tb(cause.__traceback__)[-1]
            text = f"{self.row['stage']}: {type(cause).__name__}: {cause} ({Path(place.filename).name}:{place.lineno})"
            self.note(failure=text[:2000])


def make_rows(
    arguments: argparse.Namespace,
    names: Sequence[tuple[str, str]],
    settings: Sequence[str],
    show: Callable[[Row], str],
) -> list[Row]:
    """The rows of all (source, name), each printed as it is there. `settings` are the arguments that decide what a row
    holds: a child gets them, and --resume takes only rows that were made with the same."""
    rows = _finished(arguments, settings) if arguments.resume else {}
    for source, name in names:
        key = f"{source}/{name}"
        if key not in rows:
            rows[key] = _run_apart(source, name, arguments, settings)
            _save(arguments, settings, rows)
        print(show(rows[key]), flush=True)
    return [rows[f"{source}/{name}"] for source, name in names]


def _finished(arguments: argparse.Namespace, settings: Sequence[str]) -> dict[str, Row]:
    if not arguments.output.exists():
        return {}
    stored = json.loads(arguments.output.read_text())
    for setting in settings:
        if stored[setting] != getattr(arguments, setting):
            sys.exit(f"{arguments.output} was made with {setting} = {stored[setting]}: resume with the same")
    return {f"{row['source']}/{row['name']}": row for row in stored["rows"]}


def _save(arguments: argparse.Namespace, settings: Sequence[str], rows: Mapping[str, Row]) -> None:
    """Replace the output in one step, so that an interrupted run can be resumed."""
    if arguments.output:
        content = {setting: getattr(arguments, setting) for setting in settings} | {"rows": list(rows.values())}
        write_json(arguments.output, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def read_lines(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; none where there is no file, and no line that a kill left half written."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a JSON-lines file, on a line of its own whatever the file ends with."""
    whole = not path.exists() or path.read_bytes().endswith(b"\n") or not path.stat().st_size
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(row) + "\n")


def _run_apart(source: str, name: str, arguments: argparse.Namespace, settings: Sequence[str]) -> Row:
    """One row in a process of its own, so that peak memory is its own and a crash or a timeout ends nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "row.json", Path(folder) / "log.txt"
        command = [sys.executable, "-W", "ignore", sys.argv[0], "--child", source, name, str(path)]
        for setting in settings:
            option, value = f"--{setting.replace('_', '-')}", getattr(arguments, setting)
            command += ([option] if value else []) if isinstance(value, bool) else [option, str(value)]
        failure, started = None, time.perf_counter()
        with log.open("w") as file:
            try:
                status = subprocess.run(command, stdout=file, stderr=file, timeout=arguments.timeout).returncode
            except subprocess.TimeoutExpired:
                failure, status = f"timeout after {arguments.timeout:.0f} s", 0
        row: Row = {"source": source, "name": name, "seconds": round(time.perf_counter() - started, 1)}
        row |= json.loads(path.read_text()) if path.exists() else {}
        if status:
            end = " | ".join(log.read_text(errors="replace").splitlines()[-2:])
            failure = f"killed by signal {-status}" if status < 0 else f"exit status {status}: {end[-500:]}"
    if failure:
        row["failure"] = f"{failure} while it should {row.get('stage', 'start')}"
    return row


def best_compiled(model: Any, samples: Any, **options: Any) -> Any:
    """What `foldcut.compile` makes, also where the goal was missed. Raises GoalError where there is nothing at all."""
    import foldcut

    try:
        return foldcut.compile(model, samples, **options)
    except foldcut.GoalError as unmet:
        if unmet.best is None:
            raise
        return unmet.best
