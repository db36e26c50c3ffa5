"""`foldcut verify`."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape

from ..onnx.compare_files import Comparison, compare_onnx, random_samples
from ..support.errors import plural
from ..support.strict_json import json_text
from .console import Exit, guarded, out, plain_table, show_line
from .options import VerifyOptions
from .samples import sample_reader


def run(options: VerifyOptions) -> None:
    """Carry it out."""

    def work() -> None:
        read = sample_reader(options.inputs, options)
        before, after = options.before, options.after
        samples = random_samples(before, options.limit or 8, options.seed) if read is None else read(options.limit)
        found = compare_onnx(before, after, samples, batch=options.batch)
        if options.as_json:
            print(json_text({**found.to_dict(), "same": found.same(options.tolerance)}))
        else:
            show_comparison(found, options.tolerance, out)
        if not found.same(options.tolerance):
            raise typer.Exit(Exit.NOT_MET)

    guarded(work, debug=options.debug)


def show_comparison(found: Comparison, tolerance: float, console: Console) -> None:
    """The differences of two ONNX files: a row for each output, a line for each difference of the interface."""
    table = plain_table("output", "max abs", "relative", "cosine")
    for name, difference in found.outputs.items():
        cells = [f"{difference.absolute:.2e}", f"{difference.relative:.2e}", f"{difference.cosine:.6f}"]
        table.add_row(escape(name), *(cells if difference.same_structure else ["shape or dtype differ", "", ""]))
    console.print(table)
    for line in found.interface:
        show_line(f"  {line}", console)
    verdict = "the same" if found.same(tolerance) else "different"
    show_line(f"{verdict} on {plural(found.samples, 'sample')} (tolerance {tolerance:g} relative)", console)
