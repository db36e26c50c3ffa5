"""`foldcut compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ..data.calibration_set import CalibrationData, horizontal_flip
from ..driver.api import Compiled
from ..driver.api import compile as compile_model
from ..driver.sealed import PAGE
from ..frontend.capture import Model
from ..report.report import Report
from ..report.words import kind_words, saving_words, signed
from ..support.atomic_files import check_writable
from ..support.errors import GoalError, plural
from ..support.strict_json import json_text
from .console import FIRST, Exit, after_interrupt, guarded, out, say, show_json, show_line
from .goals import read_goal, read_mimic, read_rewrites, read_settings
from .options import CompileOptions
from .samples import read_cache, read_evaluate, read_model, read_or_none, with_reference


def run(options: CompileOptions) -> None:
    """Carry it out."""

    def work() -> None:
        goal = read_goal(options)
        allowed = read_rewrites(options.rewrites, [goal])
        check_writable(options.output)
        evaluate = read_evaluate(options)
        samples = read_or_none(options)
        result, unmet = best_of(
            read_model(options),
            samples,
            goal=goal,
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
        )
        if FIRST:
            result.save(options.output)
        if options.as_json:
            show_json(json_text(result.report.to_dict()))
        elif not options.quiet:
            show_report(result.report, out)
            if options.profile:
                show_profile(result.report, out)
            say_written(options.output, result)
        if unmet is not None:
            end_unmet(unmet)

    guarded(work, debug=options.debug, by="all together", interrupted=after_interrupt(options.fresh))


def say_written(output: Path, result: Compiled) -> None:
    """What was written where, the page that people open last."""
    show_line(f"wrote {output}/ ({', '.join(result.files)})", out)
    show_line(f"open {output / PAGE} in a browser", out)


def end_unmet(unmet: GoalError) -> NoReturn:
    """The end of a command whose best result is written and does not reach the goal."""
    say(unmet.message, head=unmet.stage)
    raise typer.Exit(Exit.NOT_MET)


def best_of(model: Model, samples: CalibrationData, **options: Any) -> tuple[Compiled, GoalError | None]:
    """The compiled network, or the best there is with the error that says so."""
    try:
        return compile_model(model, samples, **options), None
    except GoalError as unmet:
        if isinstance(unmet.best, Compiled):
            return unmet.best, unmet
        raise


def show_profile(report: Report, out: Console) -> None:
    """What each stage took and did, the longest first."""
    table = Table(title="multiply-accumulates by stage")
    columns = ("stage", "s", "CPU s", "values", "gradients", "moments", "algebra", "all", "least", "times", "per CPU s")
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for row in report.profile_rows():
        table.add_row(*row)
    out.print(table)


def show_report(report: Report, out: Console) -> None:
    """The before/after table and what was dropped."""
    table = Table(title="before and after")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for row in report.rows():
        table.add_row(*row)
    out.print(table)
    for change in report.changes:
        if "error_added" in change:
            saved = f"{saving_words(change['saving'])} (predicted), " if "saving" in change else ""
            one, many, _ = kind_words(report, change["kind"])
            counted = plural(change["count"], one, many)
            show_line(f"{counted}: {saved}error {signed(change['error_added'])} after a quick re-solve", out)
    if report.unmimicked:
        show_line(f"not mimicked: {report.unmimicked}", out)
    for decision, words in zip(report.decisions, report.words, strict=True):
        error = decision.get("error")
        predicted = "" if error is None else f" (predicted error {error:.4f})"
        show_line(f"{words['what']}: {words['how']}{predicted}", out)
