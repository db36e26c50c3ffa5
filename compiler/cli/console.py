"""What every command says and how it ends: lines, errors, exit codes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from enum import IntEnum
from typing import Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..processes.launching import launched, rank_given
from ..support.errors import CompilerError

#: Of several processes of one command the first writes and speaks; of the others only errors are heard.
RANK = rank_given()
FIRST = not RANK
out, err = Console(quiet=not FIRST), Console(stderr=True, quiet=not FIRST)


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    #: A foldcut error: bad input, nothing written.
    ERROR = 1
    #: Wrong usage of the command line (typer's own).
    USAGE = 2
    #: A goal was not met (the best result is written), or files differ.
    NOT_MET = 3
    #: Ctrl-C; no file is half-written.
    INTERRUPTED = 130


def show_line(line: str | Text, console: Console) -> None:
    """One line as it is: not wrapped, so that a path can be copied and a log searched; nothing in it counts as
    markup."""
    console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True)


def show_json(text: str) -> None:
    """What ``--json`` asks for, on stdout."""
    if FIRST:
        print(text)


def plain_table(*columns: str) -> Table:
    """A table without lines, whose cells are never shortened."""
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def after_interrupt(fresh: bool, written: str = "nothing was written") -> str:
    """What is true of a command that was interrupted: analyses are kept unless it was asked to keep none."""
    return written if fresh else f"{written}; what is done is kept, and the same command goes on from there"


def say(text: str, *, head: str = "", style: str = "bold red") -> None:
    """A line on stderr, `head` in front of it in colour."""
    show_line(Text.assemble((head, style), ": " if head else "", text), err)


def guarded(
    work: Callable[[], None],
    *,
    debug: bool,
    interrupted: str = "nothing was written",
    by: Literal["first", "each", "all together"] = "first",
) -> None:
    """Errors as one line and a hint; warnings as one line each. `by` says which of several processes work."""
    if by == "first" and not FIRST:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: say(str(message), head="warning", style="yellow")
        try:
            with launched() if by == "all together" else nullcontext():
                work()
        except CompilerError as error:
            if debug:
                raise
            _fail(error)
        except typer.Exit:
            raise
        except Exception as error:  # what foldcut did not foresee still ends in one line
            if debug:
                raise
            if not FIRST:
                sys.stderr.write(f"process {RANK}: {type(error).__name__}: {error}\n")
            say(f"{type(error).__name__}: {error}", head="internal error")
            say("  hint: run again with --debug for the trace and report it with the model")
            raise typer.Exit(Exit.ERROR) from None
        except KeyboardInterrupt:
            say(f"interrupted; {interrupted}")
            raise typer.Exit(Exit.INTERRUPTED) from None


def _fail(error: CompilerError) -> NoReturn:
    if not FIRST:
        sys.stderr.write(f"process {RANK}: {error.stage}: {error.message}\n")
    say(error.message, head=error.stage)
    for label, value in (("at", error.node), ("expected", error.expected), ("actual", error.actual)):
        if value is not None:
            say(f"  {label}: {value}")
    if error.hint:
        say(f"  hint: {error.hint}")
    raise typer.Exit(Exit.ERROR)
