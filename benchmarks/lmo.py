"""Time of the spectral oracles against a full SVD: what one Frank-Wolfe step on a weight costs.

    python benchmarks/lmo.py [--share 0.1] [--repeats 9] [--shapes 512x4608 ...] [--output lmo.json]

For each shape a momentum turns as it does in training: m <- 0.9 m + g, g of low rank plus noise. At every step three
ways find the vertex of the spectral-k-support ball for the same m, k = share * full rank, in turns: from
`torch.linalg.svd`, by the exact Gram eigendecomposition, and by subspace iteration from the basis of the step before.
Ratios are medians over steps of the times within a step, so that a busy machine slows all three; the gap is the share
of the optimum that the vertex misses, the worst over steps. One thread, float32, first steps not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from foldcut.passes.frank_wolfe import SpectralKSupport, Subspace
from rows import Row, write_json

SHAPES = ("64x576", "128x1152", "256x2304", "512x4608")
#: Steps before the times count: the first basis is exact and momentum has to build up.
WARM_UP = 3
T = TypeVar("T")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    print(f"k = {arguments.share:g} of full rank, {arguments.repeats} steps, {arguments.threads} thread(s)\n")
    print("| matrix | k | full SVD ms | Gram, times faster | gap | subspace, times faster | gap |")
    print(f"|{'---|' * 7}", flush=True)
    rows: list[Row] = []
    for text in arguments.shapes:
        rows.append(compare(text, arguments))
        print(table_row(rows[-1]), flush=True)
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("share", "repeats", "threads", "sweeps", "seed")}
        write_json(arguments.output, settings | {"rows": rows})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="rows x columns")
    parser.add_argument("--share", type=float, default=0.1, help="k over full rank")
    parser.add_argument("--repeats", type=int, default=9, help="steps that count")
    parser.add_argument(
        "--sweeps", type=int, default=Subspace().sweeps, help="sweeps of the subspace iteration at each step"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    return parser.parse_args()


def compare(text: str, arguments: argparse.Namespace) -> Row:
    """The three ways side by side at each of the steps."""
    rows, columns = (int(part) for part in text.split("x"))
    k = max(1, round(arguments.share * min(rows, columns)))
    exact, warm = SpectralKSupport(k=k), SpectralKSupport(k=k, oracle=Subspace(sweeps=arguments.sweeps))
    draw = torch.Generator().manual_seed(arguments.seed)
    m, basis = torch.zeros(rows, columns), None
    times: dict[str, list[float]] = {"svd": [], "gram": [], "subspace": []}
    gaps: dict[str, list[float]] = {"gram": [], "subspace": []}
    for step in range(WARM_UP + arguments.repeats):
        m = 0.9 * m + gradient(rows, columns, draw)
        stack, start = m.unsqueeze(0), basis
        svd_ms, (by_svd, best) = timed(lambda m=m: svd_vertex(m, k))
        gram_ms, by_gram = timed(lambda stack=stack: exact.unit_vertices(stack).points[0])
        warm_ms, found = timed(lambda stack=stack, start=start: warm.unit_vertices(stack, start))
        basis = found.bases
        if step >= WARM_UP:
            for name, milliseconds in (("svd", svd_ms), ("gram", gram_ms), ("subspace", warm_ms)):
                times[name].append(milliseconds)
            gaps["gram"].append(missed(m, by_gram, best))
            gaps["subspace"].append(missed(m, found.points[0], best))
            assert missed(m, by_svd, best) < 1e-5
    return {
        "shape": [rows, columns],
        "k": k,
        "svd_ms": statistics.median(times["svd"]),
        "gram_ratio": ratio(times["svd"], times["gram"]),
        "gram_gap": max(gaps["gram"]),
        "subspace_ratio": ratio(times["svd"], times["subspace"]),
        "subspace_gap": max(gaps["subspace"]),
    }


def gradient(rows: int, columns: int, draw: torch.Generator) -> torch.Tensor:
    """A product of rank 64 at most, as of a batch of 64, with falling weights, plus noise."""
    rank = min(64, rows)
    left, right = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    noise = 0.05 * torch.randn(rows, columns, generator=draw)
    return left / torch.arange(1, rank + 1).sqrt() @ right / rank**0.5 + noise


def svd_vertex(m: torch.Tensor, k: int) -> tuple[torch.Tensor, float]:
    """The vertex from a full SVD, and -<m, v> there: the norm of the k largest singular values."""
    u, values, vh = torch.linalg.svd(m, full_matrices=False)
    best = float(values[:k].norm())
    return -(u[:, :k] * values[:k] @ vh[:k]) / best, best


def missed(m: torch.Tensor, vertex: torch.Tensor, best: float) -> float:
    return 1 + float((m.double() * vertex.double()).sum()) / best


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds of CPU time, and the result."""
    start = time.process_time()
    result = work()
    return (time.process_time() - start) * 1e3, result


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def table_row(row: Row) -> str:
    rows, columns = row["shape"]
    return (
        f"| {rows} x {columns} | {row['k']} | {row['svd_ms']:.1f} | {row['gram_ratio']:.1f} | {row['gram_gap']:.1e} "
        f"| {row['subspace_ratio']:.1f} | {row['subspace_gap']:.1e} |"
    )


if __name__ == "__main__":
    main()
