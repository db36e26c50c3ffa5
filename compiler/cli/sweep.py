"""`foldcut sweep`."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from ..data.calibration_set import horizontal_flip
from ..driver.sweep import Sweep, SweepPoint, sweep
from ..support.atomic_files import check_writable
from ..support.strict_json import json_text
from .console import FIRST, Exit, after_interrupt, guarded, out, plain_table, say, show_json, show_line
from .goals import read_goals, read_mimic, read_rewrites, read_settings
from .options import SweepOptions
from .samples import read_cache, read_evaluate, read_model, read_or_none, with_reference


def run(options: SweepOptions) -> None:
    """Carry it out."""

    def work() -> None:
        goals = read_goals(options.latency, options.macs, options.regime)
        allowed = read_rewrites(options.rewrites, goals)
        check_writable(options.output)
        evaluate = read_evaluate(options)
        samples = read_or_none(options)
        loaded = read_model(options)
        found = sweep(
            loaded,
            samples,
            goals=goals,
            backend=options.backend,
            batch=options.batch,
            threads=options.threads,
            device=options.device,
            mimic=read_mimic(options),
            views=(horizontal_flip,) if options.flip else (),
            seed=options.seed,
            rewrites=allowed,
            settings=with_reference(read_settings(options), options),
            progress=not (options.as_json or options.quiet),
            cache=read_cache(options.cache, options.fresh),
            evaluate=evaluate,
            each=_Written(options.output),
        )
        if options.as_json:
            show_json(json_text(found.to_dict()))
        elif not options.quiet:
            _show(found)
            show_line(f"wrote {options.output}/", out)
        if not all(point.met for point in found.points):
            raise typer.Exit(Exit.NOT_MET)

    interrupted = after_interrupt(options.fresh, "finished goals are in the folder")
    guarded(work, debug=options.debug, by="all together", interrupted=interrupted)


class _Written:
    """Puts every point of a sweep into its folder as it comes, with the index of those that are there, and says which
    goals were not met. As long as there is nothing to keep it waits: then an error says all, and nothing is written."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._points: list[SweepPoint] = []
        self._waiting: list[SweepPoint] = []

    def __call__(self, point: SweepPoint) -> None:
        self._points.append(point)
        self._waiting.append(point)
        if not FIRST:
            return
        if point.compiled is not None:
            point.compiled.save(self._output / point.name)
        if all(p.compiled is None for p in self._points):
            return
        Sweep(points=tuple(self._points)).save_index(self._output)
        for seen in self._waiting:
            if not seen.met:
                say(
                    seen.reason if str(seen.goal) in seen.reason else f"{seen.goal}: {seen.reason}",
                    head="goal",
                )
        self._waiting.clear()


def _show(found: Sweep) -> None:
    table = plain_table("goal", "latency ratio", "95 %", "output error", "decisions", "")
    front = {point.name for point in found.front}
    for point in found.points:
        if point.compiled is None:
            table.add_row(str(point.goal), "not reached", "", "", "", escape(point.reason))
            continue
        report = point.compiled.report
        latency = report.latency
        notes = [] if point.met else ["not met"]
        notes += [] if point.name in front else ["another is as fast and nearer"]
        table.add_row(
            str(point.goal),
            f"{latency['ratio']:.3f}",
            f"{latency['low']:.3f} to {latency['high']:.3f}",
            f"{report.output_error:.4f}",
            str(len(report.decisions)),
            ", ".join(notes),
        )
    out.print(table)
