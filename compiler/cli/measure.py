"""`foldcut measure`."""

from __future__ import annotations

from ..support.progress import opened_progress
from ..support.strict_json import json_text
from .console import guarded, out
from .measure_files import MeasureWish, measure_files, read_sizes, show_measured
from .options import MeasureOptions
from .samples import sample_reader


def run(options: MeasureOptions) -> None:
    """Carry it out."""

    def work() -> None:
        wish = MeasureWish(
            backend=options.backend,
            batch=options.batch,
            threads=options.threads,
            seed=options.seed,
            inputs=sample_reader(options.inputs, options),
            sizes=read_sizes(options.dim or []),
            self_check=options.self_check,
            regime="cold" if options.regime == "cold" else "hot",
        )
        with opened_progress(not (options.as_json or options.quiet), "measure") as progress:
            found = measure_files(options.before, options.after, wish, progress=progress)
        if options.as_json:
            print(json_text(found.to_dict(samples=options.samples)))
        else:
            show_measured(found, out)

    guarded(work, debug=options.debug)
