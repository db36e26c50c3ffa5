"""PRACTISE (Wang & Wu, arXiv 2202.07861): blocks dropped from few images, from other images, from none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import foldcut
import torch
from cifar import views_for
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver.pipeline import mimicking, planned_network
from foldcut.compiler.driver.pipeline_settings import PipelineSettings
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.compiler.support.progress import StageClock, silent
from foldcut.passes.drop.decision import DropBlock
from foldcut.passes.drop.drop_blocks import drop_blocks
from papers_images import SIZES, Subject, calibration, subject
from papers_run import Case, Options, PaperRun, grouped, markdown, over_seeds, predicted
from practise import Finetune, finetune, finetune_program
from rows import Row

BLOCKS = 8
SETS = (50, 100, 300, 500)
#: Learning rates for a network whose batch norms are folded, where the paper's may be too large: the first that learns.
RATES = (0.02, 0.002, 0.0002)
#: Images of a real scene keep their meaning when they are mirrored.
NATURAL = ("cifar", "imagenet")
WAYS = ("dropped", "resolved", "mimicked", "finetuned")


def resnet_cases(options: Options) -> list[Case]:
    network, blocks = ("resnet20", 2) if options.quick else ("resnet56", BLOCKS)
    sizes = options.few(SETS)
    return [_case(network, "cifar", n, blocks, seed) for seed in options.seeds_or(5) for n in sizes]


def mobilenet_cases(options: Options) -> list[Case]:
    counts, sizes = options.few((1, 2, 3)), [12] if options.quick else [50, 100, 300]
    seeds = options.seeds_or(3)
    return [_case("mobilenetv2", "imagenet", n, k, seed) for seed in seeds for n in sizes for k in counts]


def other_cases(options: Options) -> list[Case]:
    small, blocks, n = ("resnet20", 2, 50) if options.quick else ("resnet56", BLOCKS, 500)
    fits = _synthetic_size(options)
    found = []
    for seed in options.seeds_or(3):
        # one file of synthetic images fits one network: the size of its images says which rows can be made
        sources = ["cifar", "imagenet", "digits", "noise", *(["synthetic"] if fits == 32 else [])]
        found += [_case(small, source, n, blocks, seed) for source in sources]
        sources = ["imagenet", "cifar", "noise", *(["synthetic"] if fits == 224 else [])]
        sizes = (12, (1,)) if options.quick else (300, (1, 2))
        found += [_case("mobilenetv2", source, sizes[0], k, seed) for source in sources for k in sizes[1]]
    file = {"file": options.synthetic.name} if options.synthetic else {}
    return [{**case, **file} if case["source"] == "synthetic" else case for case in found]


def _synthetic_size(options: Options) -> int | None:
    import numpy as np

    if options.synthetic is None:
        return None
    with np.load(options.synthetic) as archive:
        return int(archive[archive.files[0]].shape[-1])


def _case(network: str, source: str, images: int, blocks: int, seed: int) -> Case:
    return {"network": network, "source": source, "images": images, "blocks": blocks, "seed": seed}


def compressed(case: Case, options: Options) -> Row:
    """One case: foldcut's blocks, the network without them as it is, re-solved and mimicked, and the finetune of the
    same blocks on the same images. Top-1 and agreement on images that nothing was calibrated with."""
    torch.set_num_threads(1)
    about = subject(case["network"], case["seed"] if case["network"] == "mobilenetv2" else 0, options)
    images = calibration(case["network"], case["source"], case["images"], case["seed"], options)
    settings = PipelineSettings(seed=case["seed"], views=_views(case), mimic=_mimic(case, options))
    clock = StageClock()
    goal, rewrites = foldcut.Blocks(case["blocks"]), [foldcut.Drop()]
    ctx = settings.context(about.program, CalibrationSet.of(images), goal, NOTHING_KEPT, clock, silent)
    done, _ = planned_network(ctx, rewrites)
    drops = [decision for decision in done.decisions if isinstance(decision, DropBlock)]
    mimicked = mimicking(ctx, rewrites, done, settings)
    models = {
        "dropped": to_onnx(drop_blocks(about.program, drops)),
        "resolved": to_onnx(done.program),
        "mimicked": to_onnx(mimicked.program),
    }
    row: Row = {"original": about.top1, "drops": [drop.path for drop in drops]}
    row |= {name: about.judged(predicted(model, about.test)) for name, model in models.items()}
    measured = about.probe.final(models["mimicked"])
    row["latency"] = {"ratio": measured.ratio, "low": measured.low, "high": measured.high}
    row["stages_cpu_s"] = {name: round(seconds, 1) for name, seconds in clock.cpu_s.items()}
    if options.peers:
        row["finetuned"] = peer(about, drops, images, case, options)
    return row


def _views(case: Case) -> tuple[Any, ...]:
    if case["source"] not in NATURAL:
        return ()
    return views_for(case["images"]) if SIZES[case["network"]] == 32 else (foldcut.horizontal_flip,)


def _mimic(case: Case, options: Options) -> foldcut.MimicSettings:
    iterations = 1000 if case["images"] >= 300 and SIZES[case["network"]] == 32 else 400
    return foldcut.MimicSettings(iterations=10 if options.quick else iterations)


def peer(
    about: Subject, drops: Sequence[DropBlock], images: torch.Tensor, case: Case, options: Options
) -> dict[str, Any]:
    """PRACTISE's finetune: in train mode where the network has its batch norms, else at a rate that learns."""
    started = time.process_time()
    if about.module is not None:
        iterations = 5 if options.quick else 500 if case["images"] >= 300 else 300
        paths = [drop.path for drop in drops]
        student = finetune(about.module, paths, images, iterations=iterations, seed=case["seed"])
        said = {"iterations": iterations, "learning_rate": RATES[0]}
        with torch.no_grad():
            classes = torch.cat([student(part).argmax(1) for part in about.test.split(250)])
        return {**said, **about.judged(classes), "cpu_s": round(time.process_time() - started, 1)}
    iterations = 2 if options.quick else 100
    for rate in RATES:
        plan = Finetune(iterations=iterations, seed=case["seed"], batch=8 if options.quick else 32, learning_rate=rate)
        found = finetune_program(about.program, drops, images, plan)
        if found is not None and found[1] < 1:
            seconds = round(time.process_time() - started, 1)
            judged = about.judged(predicted(to_onnx(found[0]), about.test))
            return {"iterations": iterations, "learning_rate": rate, **judged, "cpu_s": seconds}
    return {"iterations": iterations, "learning_rate": None, "cpu_s": round(time.process_time() - started, 1)}


def figures(rows: Sequence[Row]) -> list[str]:
    """Top-1 of each way, over the seeds."""
    return [over_seeds(row.get(way, {}).get("top1") for row in rows) for way in WAYS]


def sizes_table(rows: Sequence[Row]) -> str:
    """Top-1 by network, blocks and number of images."""
    columns = ("network", "blocks", "images", "seeds", "original", *_HEAD, *_TAIL)
    lines = []
    for (network, blocks, images), some in grouped(rows, "network", "blocks", "images").items():
        lines.append([network, blocks, images, *_cells(some)])
    return f"{markdown(columns, lines)}\n\n{_finetuned_how(rows)}"


_HEAD = ("dropped", "re-solved", "mimicked", "PRACTISE's finetune")
_TAIL = ("agreement, mimicked", "latency ratio", "CPU s, foldcut", "CPU s, finetune")


def _cells(rows: Sequence[Row]) -> Iterable[object]:
    original = over_seeds(row["original"] for row in rows)
    agreement = over_seeds((row["mimicked"]["agreement"] for row in rows), 1)
    latency = over_seeds((row["latency"]["ratio"] for row in rows), 3)
    ours = over_seeds((sum(row["stages_cpu_s"].values()) for row in rows), 0)
    theirs = over_seeds((row.get("finetuned", {}).get("cpu_s") for row in rows), 0)
    return (len(rows), original, *figures(rows), agreement, latency, ours, theirs)


def _finetuned_how(rows: Sequence[Row]) -> str:
    """How long the rival trained: the paper has 2,000 iterations."""
    known = [(row["case"]["network"], row["case"]["images"], row["finetuned"]) for row in rows if "finetuned" in row]
    found = sorted({(net, n, said["iterations"], said["learning_rate"] or 0.0) for net, n, said in known})
    each = [
        f"{net} from {n} images {iterations} iterations, {f'rate {rate:g}' if rate else 'the loss grew at every rate'}"
        for net, n, iterations, rate in found
    ]
    return f"The finetune (2,000 iterations in the paper): {'; '.join(each)}." if each else "Without the finetune."


def sources_table(rows: Sequence[Row]) -> str:
    """Top-1 by the domain that the images are of."""
    columns = ("network", "blocks", "images of", "number", "seeds", "original", *_HEAD, *_TAIL)
    found = grouped(rows, "network", "blocks", "source", "images")
    return f"{markdown(columns, [[*key, *_cells(some)] for key, some in found.items()])}\n\n{_finetuned_how(rows)}"


RUNS = (
    PaperRun(
        name="practise_resnet56",
        what="ResNet-56 on CIFAR-10, 8 blocks, set sizes 50 to 500, 5 seeds",
        shows="accuracy against the number of images, several seeds; the analogue of the ResNet-34 tables on ImageNet",
        hours=2.5,
        cases=resnet_cases,
        make=compressed,
        table=sizes_table,
    ),
    PaperRun(
        name="practise_mobilenetv2",
        what="MobileNetV2 on ImageNet, 1 to 3 blocks, 50 to 300 images, 3 seeds; top-1 on 400 other images",
        shows="the MobileNetV2 table",
        hours=8,
        cases=mobilenet_cases,
        make=compressed,
        table=sizes_table,
    ),
    PaperRun(
        name="practise_other_data",
        what="both networks from images of other domains, noise and (with --synthetic) synthetic images, 3 seeds",
        shows="the tables of data-free and out-of-domain compression",
        hours=9,
        cases=other_cases,
        make=compressed,
        table=sources_table,
    ),
)
