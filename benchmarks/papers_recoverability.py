"""Each block's recoverability beside the error that dropping it leaves once all layers behind it are solved again."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence

import torch
from foldcut.compiler.analysis.regions import Region, find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.edit import expose
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop.adaptors import AdaptorSettings
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks, standing_for
from foldcut.passes.drop.recoverability import Recoverability, RecoverabilitySettings
from foldcut.passes.solve.features import head_features
from foldcut.passes.solve.resolve_network import resolve_network
from papers_images import Subject, calibration, subject
from papers_run import Case, Options, PaperRun, grouped, markdown, percent, predicted
from rows import Row
from svg import document, dot, frame, text

#: Scores, from cheap to expensive; `adaptors` is the paper's.
MODES = ("plain", "local", "calibrated", "adaptors")
#: Iterations of the adaptors, where the paper has 1,000: their ranking is known long before.
ITERATIONS = 20
#: Test images that the error is read on, and top-1 (as many as there are of ImageNet).
JUDGED, TOP1 = 200, 2000
PANEL, MARGIN, TOP = 240, 60, 30
COLOURS = {"plain": "#6b7280", "local": "#16a34a", "calibrated": "#2563eb", "adaptors": "#d97706"}


def cases(options: Options) -> list[Case]:
    small = "resnet20" if options.quick else "resnet56"
    found = [(small, "cifar", 50 if options.quick else 200), ("mobilenetv2", "imagenet", 12 if options.quick else 100)]
    return [
        {"network": network, "source": source, "images": n, "block": block, "seed": seed}
        for seed in options.seeds_or(1)
        for network, source, n in found
        for block in range(_count(network, options.quick))
    ]


def _count(network: str, quick: bool) -> int:
    """How many blocks a network has that can be dropped."""
    return 2 if quick else {"resnet56": 25, "mobilenetv2": 10}[network]


def scored(case: Case, options: Options) -> Row:
    """One block: its scores, and what dropping it leaves."""
    torch.set_num_threads(1)
    about = subject(case["network"], case["seed"] if case["network"] == "mobilenetv2" else 0, options)
    images = calibration(case["network"], case["source"], case["images"], case["seed"], options)
    region = blocks(about.program)[case["block"]]
    scores, seconds = scores_of(about, images, region, options)
    started = time.process_time()
    student = drop_blocks(about.program, [region])
    found = resolve_network(about.program, student, CalibrationSet.of(images), changes_of_drops([region])).program
    solve_s = time.process_time() - started
    error = feature_error(about.program, found, region, about.test[:JUDGED])
    classes = predicted(to_onnx(found), about.test[:TOP1])
    return {
        "path": region.path,
        "macs": region.cost.macs,
        "scores": scores,
        "scores_cpu_s": seconds,
        "left": error,
        "left_cpu_s": round(solve_s, 1),
        "top1": percent(classes, about.labels[:TOP1]),
        "original": percent(about.said[:TOP1], about.labels[:TOP1]),
    }


@functools.lru_cache(maxsize=2)
def blocks(program: Program) -> tuple[Region, ...]:
    """What a goal in blocks chooses from."""
    return find_regions(program).blocks


def scores_of(
    about: Subject, images: torch.Tensor, region: Region, options: Options
) -> tuple[dict[str, float], dict[str, float]]:
    """The block's recoverability in each mode, and the CPU seconds of each."""
    scores, seconds = {}, {}
    adaptors = AdaptorSettings(iterations=2 if options.quick else ITERATIONS, batch_size=8 if options.quick else 64)
    for mode in MODES:
        if mode == "adaptors" and not options.peers:
            continue
        started = time.process_time()
        settings = RecoverabilitySettings(mode=mode, samples=min(64, len(images)), adaptors=adaptors)  # type: ignore[arg-type]
        look = Recoverability(
            about.program, CalibrationSet.of(images), regions=blocks(about.program), settings=settings
        )
        scores[mode] = float(look((), [region])[region.name])
        seconds[mode] = round(time.process_time() - started, 1)
    return scores, seconds


@torch.no_grad()
def feature_error(teacher: Program, student: Program, region: Region, images: torch.Tensor) -> float:
    """Relative error of the features before the head on images that nothing was solved with."""
    names = head_features(teacher)
    theirs, ours = expose(teacher, names), expose(student, [standing_for(name, [region]) for name in names])
    error = energy = 0.0
    for part in images.split(25):
        for wanted, found in zip(theirs(part), ours(part), strict=True):
            error += float((found - wanted).double().square().sum())
            energy += float(wanted.double().square().sum())
    return error / energy


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's; of fewer than three values there is none to speak of."""
    from scipy.stats import spearmanr

    return float(spearmanr(xs, ys).statistic) if len(xs) > 2 else math.nan


def table(rows: Sequence[Row]) -> str:
    """Rank correlation of each score with the error that is left, and the blocks from least to most."""
    parts = []
    for (network,), some in grouped(rows, "network").items():
        lines = []
        for mode in _modes(some):
            cpu_s = sum(row["scores_cpu_s"][mode] for row in some)
            values = [[row["scores"][mode] for row in some], [row["left"] for row in some]]
            lines.append([mode, f"{rank_correlation(*values):.2f}", f"{cpu_s:.0f}"])
        columns = ("score", f"rank correlation with the error left, {len(some)} blocks", "CPU s of all scores")
        parts.append(f"{network}, {some[0]['case']['images']} images:\n\n{markdown(columns, lines)}")
        blocks_ = [
            (
                row["path"],
                *(f"{row['scores'][mode]:.4f}" for mode in _modes(some)),
                f"{row['left']:.4f}",
                f"{row['top1']:.2f} of {row['original']:.2f}",
            )
            for row in sorted(some, key=lambda row: row["left"])
        ]
        parts.append(markdown(("block", *_modes(some), "error left", "top-1"), blocks_))
    return "\n\n".join(parts)


def _modes(rows: Sequence[Row]) -> list[str]:
    return [mode for mode in MODES if all(mode in row["scores"] for row in rows)]


def plot(rows: Sequence[Row]) -> str:
    """Each block's scores over the error that it leaves, a panel for each network, both axes logarithmic."""
    parts: list[str] = []
    panels = list(grouped(rows, "network").items())
    for place, ((network,), some) in enumerate(panels):
        left = MARGIN + place * (PANEL + MARGIN)
        parts += [frame(left, TOP, PANEL), text(left + PANEL / 2, TOP - 10, f"{network}: score over error left")]
        xs = [row["left"] for row in some]
        ys = [row["scores"][mode] for row in some for mode in _modes(some)]
        across, up = Scale(xs), Scale(ys)
        parts += [text(left + PANEL * share, TOP + PANEL + 16, f"{value:.2g}") for value, share in across.ends]
        parts += [text(left - 4, TOP + PANEL * (1 - share) + 4, f"{value:.2g}", "end") for value, share in up.ends]
        for mode in _modes(some):
            for row in some:
                x, y = left + PANEL * across(row["left"]), TOP + PANEL * (1 - up(row["scores"][mode]))
                parts.append(dot(x, y, COLOURS[mode], f"{row['path']}: {mode} {row['scores'][mode]:.3g}"))
    for place, mode in enumerate(_modes(rows)):
        parts.append(text(MARGIN + 110 * place, TOP + PANEL + 40, mode, "start", COLOURS[mode]))
    return document(MARGIN + max(1, len(panels)) * (PANEL + MARGIN), TOP + PANEL + 54, parts)


class Scale:
    """Shares of a logarithmic axis with a little room at its ends."""

    def __init__(self, values: Sequence[float]) -> None:
        known = [max(value, 1e-9) for value in values]
        self.low, self.high = min(known) / 1.2, max(known) * 1.2
        self.ends = [(value, self(value)) for value in (min(known), max(known))]

    def __call__(self, value: float) -> float:
        return math.log(max(value, 1e-9) / self.low) / math.log(self.high / self.low)


RUNS = (
    PaperRun(
        name="practise_recoverability",
        what="each block's recoverability against the error that dropping it leaves, both networks",
        shows="the figure of recoverability against what is left after recovering, and the ablation of the score",
        hours=1.2,
        cases=cases,
        make=scored,
        table=table,
    ),
)
