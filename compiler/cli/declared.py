"""Commands from dataclasses: each field is an option or an argument, which typer reads as it reads a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from inspect import Parameter, Signature, getdoc
from typing import Any, get_type_hints

import typer

from ..starting import started


def add_command(app: typer.Typer, name: str, kind: type, where: str) -> None:
    """Add a command with the options of a dataclass, whose docstring is its help.

    `where` names what carries it out, ``module:function`` beside this one: it is imported when the command runs, so
    that help and completion need not wait for torch.
    """

    def run(**values: Any) -> None:
        module, _, function = where.partition(":")
        work: Callable[[Any], None] = getattr(import_module(f".{module}", __package__), function)
        started()  # torch is there: until now Ctrl-C ended the process
        work(kind(**values))

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
