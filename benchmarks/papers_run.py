"""What the runs of papers.py share: their options, and the rows that are kept one by one."""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import Row, append_line, read_lines

Case = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says. `peers`: whether the methods that foldcut is compared with run too."""

    data: Path
    models: Path
    output: Path
    seeds: tuple[int, ...] | None = None
    synthetic: Path | None = None
    digits: Path | None = None
    quick: bool = False
    peers: bool = True
    epochs: int | None = None
    where: tuple[tuple[str, str], ...] = ()

    def few(self, whole: Sequence[Any], first: int = 1) -> list[Any]:
        """All of an axis, or the first so many where it only has to be shown that it runs."""
        return list(whole[:first] if self.quick else whole)

    def seeds_or(self, count: int) -> list[int]:
        """The seeds that were asked for, else so many."""
        return list(self.seeds) if self.seeds is not None else self.few(range(count))

    def wants(self, case: Case) -> bool:
        """Whether a case is among those that are asked for: any of the values that are named for a field of it."""
        named = {name for name, _ in self.where}
        return all((name, str(case[name])) in self.where for name in named & set(case))

    def beside(self, name: str) -> Path:
        """A file that a run keeps beside its rows."""
        return self.output.with_name(f"{self.output.stem}_{name}{'_quick' if self.quick else ''}")


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """A run: what it shows of which paper, how long all of it takes on one of two cores, its cases, what makes the row
    of one, and the Markdown of all rows."""

    name: str
    what: str
    shows: str
    hours: float
    cases: Callable[[Options], list[Case]]
    make: Callable[[Case, Options], Row]
    table: Callable[[Sequence[Row]], str]


def key_of(run: str, case: Mapping[str, Any], quick: bool) -> str:
    """What a row is known by."""
    return json.dumps([run, dict(case), quick], sort_keys=True)


def kept_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by their keys."""
    return {key_of(row["run"], row["case"], row["quick"]): row for row in read_lines(path) if "case" in row}


def make_rows(run: PaperRun, options: Options) -> int:
    """Make the rows that are not there yet, each appended when it is whole; how many failed. A case that fails is told
    and leaves no row: the next call tries it again."""
    failed, cases = 0, [case for case in run.cases(options) if options.wants(case)]
    for index, case in enumerate(cases):
        if key_of(run.name, case, options.quick) in kept_rows(options.output):
            continue
        started, cpu = time.perf_counter(), time.process_time()
        try:
            row = run.make(case, options)
        except Exception as cause:  # one of many rows: the others are worth having
            traceback.print_exc()
            print(f"{run.name} {index + 1}/{len(cases)} {case}: failed: {cause}", file=sys.stderr, flush=True)
            failed += 1
            continue
        seconds = {"seconds": round(time.perf_counter() - started, 1), "cpu_s": round(time.process_time() - cpu, 1)}
        row = {"run": run.name, "case": case, "quick": options.quick, **seconds, **row}
        append_line(options.output, row)
        print(f"{index + 1}/{len(cases)} {json.dumps(row)}", flush=True)
    return failed


def rows_of(run: str, path: Path, quick: bool = False) -> list[Row]:
    """The rows of one run."""
    return [row for row in kept_rows(path).values() if row["run"] == run and row["quick"] == quick]


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by some fields of their cases, in the order of those fields."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row["case"].get(name) for name in names), []).append(row)
    return dict(sorted(found.items(), key=lambda item: [(isinstance(v, str), v) for v in item[0]]))


def over_seeds(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and, of several, standard deviation; a dash where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def markdown(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table."""
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def predicted(model: bytes, images: torch.Tensor, batch: int = 50) -> torch.Tensor:
    """The classes that ONNX Runtime says, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: part.numpy()})[0].argmax(1) for part in images.split(batch)]
    return torch.cat([torch.from_numpy(part) for part in found])


def percent(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How often two lists of classes say the same."""
    return 100 * float((found == wanted).double().mean())
