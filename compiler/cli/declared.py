"""Commands from dataclasses: each field is an option or an argument, which typer reads as it reads a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from typing import Any, get_type_hints

import typer

from ..starting import started
from ..support.errors import CompilerError
from .console import guarded, say


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a command, and what is checked and said of them within the first second, without torch. Base
    class."""

    def check(self) -> None:
        """Raise CompilerError for what can be seen to be wrong before anything is loaded."""

    def first_words(self) -> str:
        """What the command is about to do; nothing where it does not say so."""
        return ""


def check_kept(cache: Path | None, fresh: bool) -> None:
    """Raise CompilerError for a place to keep what is not to be kept."""
    if fresh and cache is not None:
        raise CompilerError("--fresh keeps no analyses", hint="leave out --cache or --fresh")


def add_command(app: typer.Typer, name: str, kind: type[Options], where: str) -> None:
    """Add a command with the options of a dataclass, whose docstring is its help.

    `where` names what carries it out, ``module:function`` beside this one: it is imported when the command runs, so
    that help, completion and what is said first need not wait for torch.
    """

    def run(**values: Any) -> None:
        options = kind(**values)
        begin(options)
        module, _, function = where.partition(":")
        work: Callable[[Any], None] = getattr(import_module(f".{module}", __package__), function)
        started()  # torch is there: until now Ctrl-C ended the process
        work(options)

    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in sorted(fields(kind), key=lambda field: field.default is not MISSING)
    ]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    app.command(name, help=getdoc(kind))(run)


def begin(options: Options) -> None:
    """Check what can be checked at once, and say what will be done unless nothing is to be said."""

    def work() -> None:
        options.check()
        words = options.first_words()
        if words and not getattr(options, "quiet", False) and not getattr(options, "as_json", False):
            say(words)

    guarded(work, debug=getattr(options, "debug", False), by="each")
