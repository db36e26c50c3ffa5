"""Every table and figure of the three papers that this project knows of: reproduced, by analogy, or impossible here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from foldcut.compiler.support.errors import plural
from papers_run import grouped, markdown, over_seeds
from rows import Row

REPRODUCED, ANALOGUE, IMPOSSIBLE = "reproduced", "analogue", "impossible here"
SEE = "see the paper"
NOT_YET = "not run yet"
PAPERS = {
    "practise": "PRACTISE: Practical Network Acceleration with Tiny Sets (Wang & Wu, arXiv 2202.07861)",
    "submodular": "Data-Efficient Structured Pruning via Submodular Optimization (El Halabi et al., arXiv 2203.04940)",
    "frank_wolfe": "Compression-aware Training of Neural Networks using Frank-Wolfe (Zimmer et al., arXiv 2205.11921)",
}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table or figure of a paper by its content, what stands for it here and why, the run that makes it, what came
    out in few words, and what the paper says where that is known for sure."""

    paper: str
    what: str
    state: str
    why: str
    run: str | None = None
    ours: Callable[[Sequence[Row]], str] | None = None
    theirs: str = SEE


def coverage_table(rows: Mapping[str, Sequence[Row]]) -> str:
    """A section for each paper."""
    parts = []
    for key, title in PAPERS.items():
        lines = [
            [
                s.what,
                s.state if not s.run or rows.get(s.run) else f"{s.state}, once run",
                s.why,
                f"`{s.run}`" if s.run else "-",
                _ours(s, rows),
                s.theirs,
            ]
            for s in SHOWN
            if s.paper == key
        ]
        columns = ("in the paper", "here", "what and why", "run", "ours", "theirs")
        parts.append(f"## {title}\n\n{markdown(columns, lines)}")
    return "\n\n".join(parts)


def _ours(shown: Shown, rows: Mapping[str, Sequence[Row]]) -> str:
    if shown.run is None:
        return "-"
    found = rows.get(shown.run, ())
    return NOT_YET if not found else (shown.ours or _below)(found)


def _below(rows: Sequence[Row]) -> str:
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''}, below"


def _by_size(rows: Sequence[Row]) -> str:
    """Top-1 after all, and the finetune's, at each number of images; of most blocks where there are several."""
    most = max(row["case"]["blocks"] for row in rows)
    parts = []
    for (images,), some in grouped((r for r in rows if r["case"]["blocks"] == most), "images").items():
        ours = over_seeds((row["mimicked"]["top1"] for row in some), 1)
        theirs = over_seeds((row.get("finetuned", {}).get("top1") for row in some), 1)
        parts.append(f"{images} images: {ours}, its finetune {theirs}")
    return f"{plural(most, 'block')}: {'; '.join(parts)}"


def _by_source(rows: Sequence[Row]) -> str:
    parts = []
    for (network, blocks, source), some in grouped(rows, "network", "blocks", "source").items():
        ours = over_seeds((row["mimicked"]["top1"] for row in some), 1)
        theirs = over_seeds((row.get("finetuned", {}).get("top1") for row in some), 1)
        parts.append(f"{network}, {blocks} blocks, {source}: {ours}, its finetune {theirs}")
    return "; ".join(parts)


def _by_correlation(rows: Sequence[Row]) -> str:
    from papers_recoverability import rank_correlation

    parts = []
    for (network,), some in grouped(rows, "network").items():
        left = [row["left"] for row in some]
        scores = ", ".join(
            f"{mode} {rank_correlation([row['scores'][mode] for row in some], left):.2f}" for mode in some[0]["scores"]
        )
        parts.append(f"{network}: rank correlation {scores}")
    return "; ".join(parts)


def _at_quarter(rows: Sequence[Row]) -> str:
    """Top-1 at a quarter of the channels, the nearest to what the paper calls limited data and deep cuts."""
    keep = min((row["case"]["keep"] for row in rows), key=lambda keep: abs(keep - 0.25))
    by = grouped((r for r in rows if r["case"]["keep"] == keep), "method")
    cells = [
        f"{method} {over_seeds((row['resolved']['top1'] for row in some), 1)}"
        for (method,), some in sorted(by.items(), key=lambda item: -item[1][0]["resolved"]["top1"])
    ]
    return f"keep {keep:g}, solved again: {', '.join(cells)}"


def _nearest_the_best(rows: Sequence[Row]) -> str:
    every = [line for row in rows for line in row["layers"]]
    near = [line["greedy"] / line["best"] for line in every if line["best"] is not None]
    shares = [line["guarantee"] for line in every]
    found = f"at least {min(near):.3f} of the best ({len(near)} subsets tried out)" if near else "the best is not known"
    return f"{found}; guaranteed {min(shares):.1e} to {max(shares):.1e}"


def _errors_by_share(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        errors: dict[float, list[float]] = {}
        for line in row["layers"]:
            errors.setdefault(line["keep"], []).append(line["error"])
        found = ", ".join(f"{statistics.median(some):.4f} at {keep:g}" for keep, some in errors.items())
        parts.append(f"{row['case']['network']}, median over layers: {found}")
    return "; ".join(parts)


def _spectral_step(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        found = row["methods"]
        ratios = f"spectral set x{found['spectral:30:0.1']['ratio']:.2f}, nuclear x{found['nuclear:1e-3']['ratio']:.2f}"
        parts.append(f"{row['case']['network']}: {ratios}")
    return "; ".join(parts)


_DATA = "the ImageNet training set and GPUs are not here"
_SHARED = "ResNet-56 on CIFAR-10 and MobileNetV2 on 700 ImageNet images stand for it: "
SHOWN = (
    Shown(
        paper="practise",
        what="ResNet-34 on ImageNet from 50 to 1,000 images, beside earlier few-shot methods",
        state=ANALOGUE,
        why=f"{_SHARED}{_DATA}; the rival is its own finetune from the same blocks and images",
        run="practise_resnet56",
        ours=_by_size,
        theirs="7 points above earlier methods on average, at 22 % less latency",
    ),
    Shown(
        paper="practise",
        what="MobileNetV2 on ImageNet",
        state=ANALOGUE,
        why="the same network, other weights (batch norms folded), top-1 on 400 images instead of 50,000: a sampling "
        "error of 2 points",
        run="practise_mobilenetv2",
        ours=_by_size,
    ),
    Shown(
        paper="practise",
        what="ResNet-50 on ImageNet, beside methods with more data",
        state=IMPOSSIBLE,
        why=f"no weights of a ResNet-50 trained on ImageNet here, and {_DATA}",
    ),
    Shown(
        paper="practise",
        what="latency against accuracy of dropping blocks, filters and other schemes",
        state=ANALOGUE,
        why="`benchmarks/cifar.py --all` has every way to reach a latency ([joint.md](joint.md)), "
        "[drop_blocks.md](drop_blocks.md) the latency of each count of blocks",
    ),
    Shown(
        paper="practise",
        what="recoverability of each block against what is left after recovering; the score with and without latency",
        state=REPRODUCED,
        why="on other networks, with the paper's adaptors (20 iterations for 1,000) beside foldcut's scores; "
        "[the figure](papers_recoverability.svg)",
        run="practise_recoverability",
        ours=_by_correlation,
    ),
    Shown(
        paper="practise",
        what="without data: synthetic images",
        state=ANALOGUE,
        why="other networks; images that `foldcut synthesise` makes from the network's batch norms, with `--synthetic`",
        run="practise_other_data",
        ours=lambda rows: _by_source([r for r in rows if r["case"]["source"] == "synthetic"]) or NOT_YET,
    ),
    Shown(
        paper="practise",
        what="images of other domains",
        state=ANALOGUE,
        why="other networks and other domains: ImageNet at 32 px, digits, noise; CIFAR-10 enlarged",
        run="practise_other_data",
        ours=lambda rows: _by_source([r for r in rows if r["case"]["source"] != "synthetic"]) or NOT_YET,
    ),
    Shown(
        paper="practise",
        what="ablations: adaptors, loss, iterations, how many seeds",
        state=ANALOGUE,
        why="the closed form in the adaptors' place is ablated in [drop_blocks.md](drop_blocks.md) (development runs); "
        "seeds are those of the rows",
    ),
    Shown(
        paper="practise",
        what="time of compression",
        state=ANALOGUE,
        why="CPU seconds of either side in the same run: [drop_blocks.md](drop_blocks.md), and in every row here",
    ),
    Shown(
        paper="submodular",
        what="LeNet on MNIST: accuracy against compression, without fine-tuning",
        state=ANALOGUE,
        why="scikit-learn's 8 x 8 digits, enlarged, as MNIST is not here (`--digits` takes it), LeNet of 20 and 50 "
        "channels trained by the run",
        run="submodular_lenet",
        ours=_at_quarter,
    ),
    Shown(
        paper="submodular",
        what="VGG11 on CIFAR-10: the same",
        state=ANALOGUE,
        why="trained by the run for 8 epochs, and CIFAR-10 here is of JPEG files",
        run="submodular_vgg11",
        ours=_at_quarter,
    ),
    Shown(
        paper="submodular",
        what="ResNet-56 on CIFAR-10: the same",
        state=REPRODUCED,
        why="other weights; the first convolution of each block, from 500 images",
        run="submodular_resnet56",
        ours=_at_quarter,
    ),
    Shown(
        paper="submodular",
        what="the three variants: layerwise, sequential, asymmetric",
        state=REPRODUCED,
        why="rows `greedy-*` of the runs above",
        run="submodular_resnet56",
    ),
    Shown(
        paper="submodular",
        what="with and without reweighting",
        state=REPRODUCED,
        why="both columns of the runs above, for every method",
        run="submodular_resnet56",
    ),
    Shown(
        paper="submodular",
        what="per-layer budgets of equal accuracy loss",
        state=REPRODUCED,
        why="within the MACs of equal shares, beside foldcut's error curves, which take no labels",
        run="submodular_budgets",
    ),
    Shown(
        paper="submodular",
        what="the guarantee: greedy reaches 1 - exp(-gamma) of the best",
        state=REPRODUCED,
        why="proved there; here beside the real error, and beside the best subset where all can be tried",
        run="submodular_guarantee",
        ours=_nearest_the_best,
    ),
    Shown(
        paper="submodular",
        what="the error falls exponentially with the number of channels kept",
        state=REPRODUCED,
        why="proved there under assumptions; here each layer's error at five shares",
        run="submodular_guarantee",
        ours=_errors_by_share,
    ),
    Shown(
        paper="submodular",
        what="with fine-tuning on the little data, and on all of it",
        state=ANALOGUE,
        why="mimicking from the same unlabelled images instead: [prune_channels.md](prune_channels.md), rows *then "
        "mimicking*; fine-tuning on all data is GPU days",
    ),
    Shown(
        paper="submodular",
        what="time of selection",
        state=ANALOGUE,
        why="240 times a refit for every candidate, the same channels: `benchmarks/submodular.py`, "
        "[prune_channels.md](prune_channels.md#speed-of-selection)",
    ),
    Shown(
        paper="frank_wolfe",
        what="filter pruning without retraining on CIFAR and ImageNet, beside other compression-aware training",
        state=ANALOGUE,
        why="ResNet-8 for 6 epochs instead of wide networks for many: GPU days",
        run="frank_wolfe_rivals",
    ),
    Shown(
        paper="frank_wolfe",
        what="low rank without retraining, beside nuclear-norm regularisation",
        state=ANALOGUE,
        why="the same",
        run="frank_wolfe_rivals",
    ),
    Shown(
        paper="frank_wolfe",
        what="cost of training with spectral sets beside nuclear norms",
        state=REPRODUCED,
        why="on a CPU, one step beside another; k a tenth of full rank. The oracles alone: "
        "[frank_wolfe.md](frank_wolfe.md#cost-of-a-step)",
        run="frank_wolfe_steps",
        ours=_spectral_step,
        theirs="significantly less than approaches based on nuclear-norm regularisation",
    ),
    Shown(
        paper="frank_wolfe",
        what="rescaling of the learning rate by the gradient, and others",
        state=ANALOGUE,
        why="all rescalings are there (`FrankWolfe(rescale=...)`) and tested for what they compute; not compared",
    ),
    Shown(
        paper="frank_wolfe",
        what="unstructured sparsity by k-sparse and k-support sets",
        state=ANALOGUE,
        why="the sets are there and tested; foldcut removes only what makes a network faster, so nothing is measured",
    ),
    Shown(
        paper="frank_wolfe",
        what="semantic segmentation",
        state=IMPOSSIBLE,
        why="no data set and no trained network of that kind here",
    ),
)
