"""How the cost of a compile grows with samples, depth, width and resolution, beside that of a forward pass.

    python benchmarks/compile_growth.py [--output compile_growth.jsonl] [--plot docs/compile_growth.svg] [--goals ...]

A residual network with random weights is compiled without gradient while one of its sizes is doubled and doubled again:
256 images of 32 px, 6 blocks of 32 channels to begin with. Each row: CPU seconds of the whole compile, of the stages
that look at the samples (those that do multiply-accumulates), and of one forward pass of all samples, on one thread.
The slopes are those of straight lines through the logarithms: 1 is twice as much for twice the size. Rows are kept line
by line: a second call goes on.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import foldcut
import torch
from rows import Row, append_line, best_compiled, read_lines
from svg import document, frame, text
from torch import nn

SIZES = {"samples": 256, "depth": 6, "width": 32, "resolution": 32}
TIMES = (1, 2, 4)
GOALS = {"blocks": foldcut.Blocks(2), "channels": foldcut.Channels(0.5), "macs": foldcut.Macs(0.7)}
FIGURES = ("compile_s", "stages_s", "forward_s")
#: The plot, in pixels: one panel for each size.
PANEL, MARGIN = 240, 46
COLOURS = {"blocks": "#2563eb", "channels": "#16a34a", "macs": "#d97706", "forward": "#6b7280"}


class Residual(nn.Module):
    """relu(x + body(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.body = nn.Sequential(*parts[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.body(x)).relu()


def network(depth: int, width: int) -> nn.Module:
    blocks = [Residual(width) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, stride=2), nn.ReLU(), *blocks, *head).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("compile_growth.jsonl"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--goals", nargs="+", choices=list(GOALS), default=list(GOALS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for goal, (size, times) in itertools.product(arguments.goals, itertools.product(SIZES, TIMES)):
        known = {"goal": goal, "size": size, "times": times}
        found = [row for row in read_lines(arguments.output) if known.items() <= row.items()]
        if not found:
            found = [{**known, **measured(goal, {**SIZES, size: SIZES[size] * times})}]
            append_line(arguments.output, found[0])
        rows.append(found[0])
        print(found[0], flush=True)
    print(table(rows))
    if arguments.plot:
        arguments.plot.writetext(plot(rows), encoding="utf-8")


def measured(goal: str, sizes: dict[str, int]) -> Row:
    """One compile, and one forward pass of the same samples."""
    torch.manual_seed(0)
    net = network(sizes["depth"], sizes["width"])
    samples = torch.randn(sizes["samples"], 3, sizes["resolution"], sizes["resolution"])
    with torch.no_grad():
        net(samples[:2])
        started = time.process_time()
        for batch in samples.split(32):
            net(batch)
        forward_s = time.process_time() - started
    started = time.process_time()
    made = best_compiled(net, samples, goal=GOALS[goal], mimic=None, cache=False, progress=False)
    compile_s = time.process_time() - started
    looking = [stage for stage in made.report.profile if stage["least_macs"]]
    return {"compile_s": compile_s, "stages_s": sum(stage["cpu_s"] for stage in looking), "forward_s": forward_s}


def slope(rows: Sequence[Row], figure: str) -> float:
    """That of the least-squares line through (log times, log figure)."""
    xs, ys = ([math.log(row[name]) for row in rows] for name in ("times", figure))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def curves(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (goal, size)."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["goal"], row["size"]), []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Slopes of each goal and size."""
    lines = ["| goal | size | whole compile | stages that read samples | forward pass |", "|---|---|---|---|---|"]
    for (goal, size), some in curves(rows).items():
        lines.append(f"| {goal} | {size} | {' | '.join(f'{slope(some, figure):.2f}' for figure in FIGURES)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> str:
    """CPU seconds of the stages that read samples, and of a forward pass, over each size; both axes logarithmic."""
    values = [row[name] for row in rows for name in ("stages_s", "forward_s")]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    parts: list[str] = []
    for panel, size in enumerate(SIZES):
        left = MARGIN + panel * (PANEL + MARGIN)
        parts.append(frame(left, 24, PANEL))
        parts.append(text(left + PANEL / 2, 16, f"{size}, from {SIZES[size]}"))
        for power in range(low, high + 1):
            y = 24 + PANEL * (high - power) / (high - low)
            parts.append(f'<path d="M{left} {y:.1f}h{PANEL}" stroke="#e2e8f0"/>')
            parts.append(text(left - 4, y + 4, f"{10.0**power:g} s", "end"))
        parts += [text(_x(left, times), 24 + PANEL + 16, f"x{times}") for times in TIMES]
        for (goal, of), some in curves(rows).items():
            if of == size:
                for name, colour in (("stages_s", COLOURS[goal]), ("forward_s", COLOURS["forward"])):
                    points = " ".join(
                        f"{_x(left, row['times']):.1f},{24 + PANEL * (high - math.log10(row[name])) / (high - low):.1f}"
                        for row in some
                    )
                    parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    shown = [*dict.fromkeys(row["goal"] for row in rows), "forward"]
    for place, name in enumerate(shown):
        parts.append(text(MARGIN + 110 * place, PANEL + 62, name, "start", COLOURS[name]))
    return document(MARGIN + len(SIZES) * (PANEL + MARGIN), PANEL + 76, parts)


def _x(left: float, times: int) -> float:
    return left + 20 + (PANEL - 40) * math.log(times) / math.log(TIMES[-1])


if __name__ == "__main__":
    main()
