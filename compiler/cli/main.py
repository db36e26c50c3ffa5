"""The command line: `foldcut compile`, `sweep`, `apply`, `synthesise`, `inspect`, `measure`, `verify` and `demo`.

Exit codes: see `console.Exit`. Nothing here imports torch: a command loads what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

import typer

from .declared import add_command
from .options import (
    ApplyOptions,
    CompileOptions,
    DemoOptions,
    InspectOptions,
    MeasureOptions,
    SweepOptions,
    SynthesiseOptions,
    VerifyOptions,
)

# Torch's threads wait for each other after every operation. Where others keep the cores busy, a thread that spins
# meanwhile takes the time that the one it waits for needs: 228 s for a compile that takes 12.
# Torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="foldcut",
    help="Make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
add_command(app, "compile", CompileOptions, "compile:run")
add_command(app, "sweep", SweepOptions, "sweep:run")
add_command(app, "apply", ApplyOptions, "apply:run")
add_command(app, "synthesise", SynthesiseOptions, "synthesis.synthesise:run")
add_command(app, "inspect", InspectOptions, "inspect:run")
add_command(app, "measure", MeasureOptions, "measure_files:run")
add_command(app, "verify", VerifyOptions, "verify:run")
add_command(app, "demo", DemoOptions, "demo:run")


def main() -> None:
    """Entry point of the `foldcut` command."""
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr does: a file name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
