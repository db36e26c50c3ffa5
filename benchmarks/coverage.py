"""Channel pruning on architectures that nobody hard-coded: half of every prunable group goes, then all is checked.

    pip install --no-deps torchvision timm && pip install huggingface_hub pyyaml safetensors
    python benchmarks/coverage.py [--timm NAME ...] [--torchvision NAME ...] [--output FILE.json [--resume]]

Without names: all torchvision classifiers and one small timm model per family; with names: only those. Random weights
and inputs: the question is structure, not accuracy. Each model runs in its own process with one torch thread. It passes
when the smaller network runs at batch 1 and 3 with equal rows and ONNX Runtime agrees with torch at both.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import prune_channels
from foreign_ops import declare_torchvision_ops
from rows import Record, Row, make_rows
from torch.utils import _pytree as pytree

#: One small model per family.
TIMM = """
    mixer_s16_224 gmlp_s16_224 resmlp_12_224 poolformer_s12 caformer_s18 coatnet_nano_rw_224 maxvit_pico_rw_256
    xcit_nano_12_p16_224 pvt_v2_b0 levit_128s cait_xxs24_224 deit_tiny_patch16_224 vit_tiny_r_s16_p8_224
    vit_relpos_small_patch16_224 vitamin_small_224 beit_base_patch16_224 eva02_tiny_patch14_224 mobilevit_xs
    mobilevitv2_050 efficientvit_b0 efficientvit_m0 edgenext_xx_small repvgg_a0 mobileone_s0 resnet26t seresnet18
    nf_resnet50 dm_nfnet_f0 resnetv2_50 dla34 hrnet_w18_small ghostnet_100 repghostnet_050 crossvit_tiny_240
    volo_d1_224 tnt_s_patch16_224 twins_svt_small visformer_tiny convmixer_768_32 convit_tiny coat_lite_tiny
    focalnet_tiny_srf davit_tiny mvitv2_tiny fastvit_t8 halonet26t botnet26t_256 lambda_resnet26t res2net50_26w_4s
    selecsls42 vovnet39a cspdarknet53 cspnext_tiny resnest14d skresnet18 hgnet_tiny rexnet_100 tinynet_e mixnet_s
    nest_tiny gcvit_xxtiny inception_next_atto sequencer2d_s tf_efficientnetv2_b0 fbnetv3_b mobilenetv3_small_050
    mobilenetv4_conv_small mobilenetv4_hybrid_medium convnextv2_atto starnet_s1 tiny_vit_5m_224 repvit_m0_9
    efficientformer_l1 efficientformerv2_s0 fasternet_t0 hiera_tiny_224 iformer_t lcnetv2_small mambaout_femto
    nextvit_small pit_ti_224 rdnet_tiny regnety_002 regnetz_005 shvit_s1 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tresnet_m efficientvim_m1 lowformer_b0 inception_v4
    inception_resnet_v2 legacy_xception xception41 dpn68
"""

TOLERANCE = 1e-4
#: What every prunable group keeps, and the multiple that the channels left are rounded to.
KEEP, MULTIPLE = 0.5, 8
#: Less than this share of the MACs left is what one expects of a network whose channels are understood.
ENOUGH = 0.6
#: CPU seconds of analysis and rewrite above which a model is named in the summary.
SLOW = 60.0


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        source, name, path = arguments.child
        check_model(source, name, Record(Path(path)), seed=arguments.seed, onnx=not arguments.skip_onnx)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the running child along
    names = wanted(arguments)
    print("| network | groups free + locked | parameters | MACs | rows | ONNX Runtime vs torch | CPU s | peak MiB | |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    failed = summarise(make_rows(arguments, names, ("seed", "skip_onnx"), table_row))
    sys.exit(1 if failed else 0)


def torchvision_names() -> list[str]:
    declare_torchvision_ops()
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timm", nargs="*", metavar="NAME", help="timm models; default: one per family")
    parser.add_argument("--torchvision", nargs="*", metavar="NAME", help="torchvision classifiers; default: all")
    parser.add_argument("--skip-onnx", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900.0, help="wall seconds for one model")
    parser.add_argument("--output", type=Path, help="JSON file, written after each model")
    parser.add_argument("--resume", action="store_true", help="skip the models that --output already holds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume and not arguments.output:
        parser.error("--resume needs --output")
    return arguments


def wanted(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(source, name) of the models to run: all defaults when no names are given at all."""
    timm, torchvision = arguments.timm, arguments.torchvision
    if timm is None and torchvision is None:
        timm, torchvision = TIMM.split(), torchvision_names()
    names = [("torchvision", n) for n in torchvision or []] + [("timm", n) for n in timm or []]
    return list(dict.fromkeys(names))


def check_model(source: str, name: str, record: Record, *, seed: int, onnx: bool) -> None:
    """Everything about one model, into `record`; what goes wrong is noted there as well."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with record.to_the_end():
        program, images = captured(source, name, record, seed)
        smaller = prune_half(program, record)
        record.note(stage="run the smaller network")
        record.note(**compare_rows(smaller, images))
        if onnx:
            record.note(stage="export")
            check_onnx(program, smaller, images, record)


def captured(source: str, name: str, record: Record, seed: int) -> tuple[foldcut.Program, torch.Tensor]:
    """The network as a Program, and three images."""
    record.note(stage="build")
    network, images = make(source, name, seed)
    record.note(stage="capture")
    started = time.process_time()
    program = foldcut.capture(network, images[:2])
    record.note(capture_seconds=round(time.process_time() - started, 2))
    return program, images


def make(source: str, name: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network with random weights in eval mode, and three random images of its size."""
    declare_torchvision_ops()
    torch.manual_seed(seed)
    if source == "torchvision":
        import torchvision

        network = torchvision.models.get_model(name, weights=None)
        size = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    else:
        import timm

        network = timm.create_model(name, pretrained=False)
        size = timm.data.resolve_model_data_config(network)["input_size"]
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))
    enliven(network, images)
    return network.eval(), images


def enliven(network: torch.nn.Module, images: torch.Tensor) -> None:
    """Let the outputs depend on everything: noise in place of weights that start at (almost) zero (heads, branch ends,
    layer scales), and batch norms with the statistics of the images, so that nothing fades away with depth."""

    def with_statistics(norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.train(inputs[0].dim() > 2 and inputs[0].shape[-1] > 1)  # behind pooling three samples are too few

    network.eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("bias") and float(parameter.abs().amax()) < 1e-3:
                parameter.normal_(std=0.02 if parameter.dim() > 1 else 0.3)
        norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        hooks = [norm.register_forward_pre_hook(with_statistics) for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        network(images)
    for hook in hooks:
        hook.remove()


def prune_half(program: foldcut.Program, record: Record) -> foldcut.Program:
    """Half of every prunable group goes, the last units; sizes, times and locks are noted."""
    record.note(stage="fold parameters")
    program = fold_parameters(program)
    record.note(stage="analyse", memory_before_mib=record.row["peak_mib"])
    started = time.process_time()
    provenance = find_units(program)
    analysed = time.process_time()
    record.note(stage="rewrite", find_seconds=round(analysed - started, 2), **describe_groups(provenance))
    resumed = time.process_time()
    groups, stuck = cuttable_groups(provenance, provenance.prunable)
    chosen = [group.units[group.count_for(KEEP, MULTIPLE) :] for group in groups]
    units = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long)
    smaller = prune_channels(provenance, units).program
    seconds = analysed - started + time.process_time() - resumed
    record.note(
        cpu_seconds=round(seconds, 2),
        units_removed=len(units),
        stuck={group.name: cause.message for group, cause in stuck},
        parameters=program.parameter_count(),
        parameters_left=smaller.parameter_count() / program.parameter_count(),
        macs=program_cost(program).macs,
        macs_left=program_cost(smaller).macs / program_cost(program).macs,
    )
    record.note(memory_after_mib=record.row["peak_mib"])
    return smaller


def describe_groups(provenance: Provenance) -> Row:
    locked = [group for group in provenance.groups if group.reason is not None]
    return {
        "prunable": len(provenance.prunable),
        "locked": len(locked),
        "reasons": dict(Counter(short(str(group.reason)) for group in locked)),
        "locked_groups": [[group.name, len(group), group.reason] for group in locked],
        "unknown": {target: len(nodes) for target, nodes in provenance.unknown.items()},
    }


def compare_rows(program: foldcut.Program, images: torch.Tensor) -> Row:
    """Batch 1 against the first row of batch 3, and how much rows differ from each other: next to nothing would make
    the comparison empty."""
    differences, spreads = [], []
    for three, one in zip(leaves(program(images)), leaves(program(images[:1])), strict=True):
        if len(three) != 3 or len(one) != 1:
            raise RuntimeError(f"batches of 3 and 1 came out as {tuple(three.shape)} and {tuple(one.shape)}")
        differences.append(relative(three[:1], one))
        spreads.append(relative(three[:1], three[1:2]))
    if not max(differences) <= TOLERANCE:
        raise RuntimeError(f"a row depends on the rest of its batch: {max(differences):.1e} relative")
    return {"rows_difference": max(differences), "rows_spread": max(spreads)}


def check_onnx(program: foldcut.Program, smaller: foldcut.Program, images: torch.Tensor, record: Record) -> None:
    """Export and compare; when that fails, the network before pruning tells whether pruning is to blame."""
    try:
        difference = onnx_difference(smaller, images)
        record.note(onnx_difference=difference)
        if difference <= TOLERANCE:
            return
        problem = f"ONNX Runtime is {difference:.1e} from torch"
    except Exception as cause:
        problem = f"{type(cause).__name__}: {cause}"
    try:
        before = f"{onnx_difference(program, images):.1e} from torch"
    except Exception as cause:
        before = f"{type(cause).__name__}: {str(cause)[:200]}"
    raise RuntimeError(f"{problem[:800]}; before pruning: {before}")


def onnx_difference(program: foldcut.Program, images: torch.Tensor) -> float:
    """ONNX Runtime against torch at batch 1 and 3, relative to the largest output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = to_onnx(program)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        results = session.run(None, {session.get_inputs()[0].name: images[:batch].numpy()})
        for expected, actual in zip(leaves(program(images[:batch])), results, strict=True):
            worst = max(worst, relative(torch.from_numpy(np.asarray(actual)), expected))
    return worst


def leaves(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    largest = float(expected.abs().max())
    if not 0 < largest < float("inf"):
        raise RuntimeError(f"the largest output is {largest}: nothing would be compared")
    if actual.shape != expected.shape:
        raise RuntimeError(f"shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected")
    return float((actual - expected).abs().max()) / largest


def short(reason: str) -> str:
    """A lock reason without the names of nodes and parameters."""
    head = re.split(r",? at |: | \(|, ", reason)[0]
    return re.sub(r"\b(by|shares) \S+", r"\1 ...", head)


def table_row(row: Row) -> str:
    cells = [
        f"{row['prunable']} + {row['locked']}" if "prunable" in row else "",
        share(row, "parameters_left"),
        share(row, "macs_left"),
        f"{row['rows_difference']:.0e}" if "rows_difference" in row else "",
        f"{row['onnx_difference']:.0e}" if "onnx_difference" in row else "",
        f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else "",
        f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
    ]
    notes = [f"unknown: {describe(row['unknown'])}"] if row.get("unknown") else []
    notes += [f"FAILED: {' '.join(row['failure'].splitlines()[:2])}"] if row.get("failure") else []
    return " | ".join([f"| {row['name']}", *cells, "; ".join(notes).replace("|", "/")]) + " |"


def share(row: Row, key: str) -> str:
    return f"x{row[key]:.3f}" if key in row else ""


def describe(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Print what the table comes to; returns the rows that failed."""
    failed = [row for row in rows if row.get("failure")]
    measured = [row for row in rows if "macs_left" in row]
    little = [row for row in measured if row["macs_left"] > ENOUGH]
    slow = [row for row in measured if row["cpu_seconds"] > SLOW]
    print(f"\npassed: {len(rows) - len(failed)} of {len(rows)} (tolerance {TOLERANCE:g} relative)")
    for row in failed:
        print(f"- {row['source']} {row['name']}: {' '.join(row['failure'].splitlines()[:2])}")
    print(f"lost at least {1 - ENOUGH:.0%} of their MACs: {len(measured) - len(little)} of {len(rows)}")
    for row in little:
        locks = describe(row["reasons"]) or "none"
        print(f"- {row['source']} {row['name']}: x{row['macs_left']:.3f} left; locked groups: {locks}")
    print(f"over {SLOW:.0f} s of CPU for analysis and rewrite: {', '.join(r['name'] for r in slow) or 'none'}")
    if measured:
        worst = max(measured, key=lambda row: row["cpu_seconds"])
        total = sum(row["cpu_seconds"] for row in measured)
        print(f"slowest: {worst['name']}, {worst['cpu_seconds']:.1f} s; all together {total:.0f} s")
    unknown: Counter[str] = Counter()
    for row in measured:
        unknown.update(row["unknown"])
    print(f"operators without a rule: {describe(unknown) or 'none'}", flush=True)
    return failed


if __name__ == "__main__":
    main()
