"""The tables and figures of foldcut's three papers, as commands.

    python benchmarks/papers.py --list
    python benchmarks/papers.py --run practise_resnet56 [--seeds 0 1 2] --data ../shared/data --models ../shared/models
        [--output papers.jsonl] [--quick] [--no-peers] [--synthetic images.npz] [--digits digits.npz] [--epochs N]
        [--where network=lenet images=50 ...]
    python benchmarks/papers.py --table [--plot docs/papers_recoverability.svg] [--output papers.jsonl]

A run makes its rows one by one, seed by seed, and appends each to the output as it is made. A row that is there is not
made again: a run that was stopped goes on. The methods that foldcut is compared with get the same images (and blocks,
or channel counts) in the same row. `--quick` makes tiny rows that show that a run works; they are kept apart. `--table`
prints the part of docs/papers.md that is made of rows. Exit code 1: rows failed; 2: no such run.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from papers_claims import claims_section
from papers_coverage import coverage_table
from papers_frank_wolfe import RUNS as FRANK_WOLFE
from papers_practise import RUNS as PRACTISE
from papers_recoverability import RUNS as RECOVERABILITY
from papers_recoverability import plot
from papers_run import Options, PaperRun, make_rows, markdown, rows_of
from papers_submodular import RUNS as SUBMODULAR

RUNS: dict[str, PaperRun] = {
    run.name: run for run in (*PRACTISE[:2], *RECOVERABILITY, *PRACTISE[2:], *SUBMODULAR, *FRANK_WOLFE)
}


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.list:
        print(listed())
        return
    if arguments.table:
        print(tables(arguments.output, arguments.quick))
        if arguments.plot:
            rows = rows_of("practise_recoverability", arguments.output, arguments.quick)
            arguments.plot.write_text(plot(rows), encoding="utf-8")
        return
    names = ("data", "models", "output", "synthetic", "digits", "quick", "peers", "epochs")
    options = Options(
        **{name: getattr(arguments, name) for name in names},
        seeds=None if arguments.seeds is None else tuple(arguments.seeds),
        where=tuple(arguments.where),
    )
    failed = sum(make_rows(RUNS[name], options) for name in arguments.run)
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="the runs, and how long they take")
    what.add_argument("--run", nargs="+", choices=list(RUNS), metavar="NAME", help="make the rows of these runs")
    what.add_argument("--table", action="store_true", help="the Markdown of the rows that there are")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--output", type=Path, default=Path("papers.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the run")
    parser.add_argument("--synthetic", type=Path, help=".npz of images for the network, as `foldcut synthesise` writes")
    parser.add_argument(
        "--digits", type=Path, help=".npz of `images` (n, h, w) and `labels`, instead of scikit-learn's"
    )
    parser.add_argument(
        "--where", nargs="+", type=_field, default=[], help="only cases with FIELD=VALUE; several may be"
    )
    parser.add_argument("--quick", action="store_true", help="tiny rows: does it run?")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="foldcut alone")
    parser.add_argument("--epochs", type=int, help="of the networks that a run trains")
    parser.add_argument("--plot", type=Path, help="with --table: the figure of recoverability, as SVG")
    return parser.parse_args()


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    return name, value


def listed() -> str:
    """The runs, and how long they take."""
    lines = [(run.name, run.what, run.shows, _time(run.hours)) for run in RUNS.values()]
    return markdown(("name", "what", "in the paper", "CPU time, one core"), lines)


def _time(hours: float) -> str:
    return f"{hours:g} h" if hours >= 1 else f"{60 * hours:.0f} min"


def tables(output: Path, quick: bool) -> str:
    """What the papers show row by row, then what came out of each run."""
    rows = {name: rows_of(name, output, quick) for name in RUNS}
    parts = [coverage_table(rows), claims_section(rows), "## What came out"]
    for name, run in RUNS.items():
        whole = len(run.cases(Options(data=Path(), models=Path(), output=output, quick=quick)))
        made = f"{len(rows[name])} rows of {whole}."
        found = f"{made}\n\n{run.table(rows[name])}" if rows[name] else "Not run yet."
        parts.append(f"### `{name}`: {run.what}\n\n{found}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
