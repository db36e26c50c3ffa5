"""Reading a network named on the command line: a `.pt2` file or `package.module:callable`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..archives.archive_check import check_pickled_file
from ..support.errors import CaptureError, CompilerError, first_line, named_first_line
from .capture import Model
from .model_path import check_named, names_file


def load_model(source: str, weights: Path | None) -> Model:
    """A `.pt2` path as it is; `package.module:callable` imported and called, with the state_dict loaded strictly."""
    check_named(source, weights)
    if names_file(source):
        return Path(source)
    import torch

    factory = _imported(source, CaptureError)
    try:
        model = factory if isinstance(factory, torch.nn.Module) else factory()
    except Exception as cause:  # the user's own code raises whatever it raises
        raise CaptureError(
            f"{source} failed: {type(cause).__name__}: {cause}",
            hint="name a callable that builds the network without arguments",
        ) from cause
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"{source} gave a {type(model).__name__}", expected="an nn.Module")
    if weights is not None:
        _load_weights(model, weights)
    return model.eval()


def load_evaluate(source: str) -> Callable[[Any], Any]:
    """The metric named by `package.module:callable`. Raises CompilerError for one that cannot be imported or called."""
    found = _imported(source, CompilerError)
    if not callable(found):
        raise CompilerError(
            f"--evaluate {source} is a {type(found).__name__}, which cannot be called",
            hint="name a function of the network that gives a number",
        )
    made: Callable[[Any], Any] = found
    return made


def _imported(source: str, error: type[CompilerError]) -> Any:
    """What `package.module:callable` names, from where the user is. Raises an error of the kind."""
    module_name, _, attribute = source.partition(":")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - what `python -m` would do: modules beside the user's working folder
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as cause:  # the user's own code raises whatever it raises, scripts end themselves
        raise error(
            f"cannot import {source}: {named_first_line(cause)}",
            hint="give package.module:callable, importable from here",
        ) from cause


def _load_weights(model: Any, weights: Path) -> None:
    import torch

    check_pickled_file(weights, CaptureError)
    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
        model.load_state_dict(state)
    except Exception as cause:  # a foreign file raises whatever its reader raises
        raise CaptureError(
            f"cannot load {weights} into the model: {first_line(cause)}", hint="give a plain state_dict of this network"
        ) from cause
