"""`cifar.py --method submodular`: channel pruning of the first convolution of each block, row by row in one run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from cifar_data import Cifar, accuracy, load_cifar, load_resnet
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.analysis.unit_groups import UnitGroup
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import Pruned, prune_channels
from foldcut.passes.mimic.settings import MimicSettings
from foldcut.passes.mimic.training import Lesson
from foldcut.passes.mimic.training_stage import mimic
from foldcut.passes.prune.channel_budget import ChannelLimits, CutModel, allocate
from foldcut.passes.prune.error_curves import error_curves
from foldcut.passes.prune.select_channels import choose_channels, find_consumers, select_by_norm
from foldcut.passes.prune.settings import ChannelSettings
from foldcut.passes.prune.submodular import Selection
from foldcut.passes.solve.changes import Changes
from foldcut.passes.solve.moments import collect_moments
from foldcut.passes.solve.resolve_network import ResolveSettings, resolve_network
from torch_pruning_peer import prune_with_torch_pruning

KEEPS = (0.75, 0.5, 0.25)
Counts = Mapping[str, int]


class Bench:
    """The network, its data and one row per method."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.teacher_module = load_resnet(arguments.models, arguments.net)
        samples = max(arguments.samples)
        self.data: Cifar = load_cifar(arguments.data, samples, arguments.test_limit)
        self.images = self.data.calibration
        self.teacher = capture(self.teacher_module, self.images[:2])
        self.provenance: Provenance = find_units(self.teacher)
        self.groups = [g for g in self.provenance.prunable if len(g.consumers) == 1]
        self.calibration = CalibrationSet.of(self.images)
        self.macs = program_cost(self.teacher).macs
        self.rows: list[dict[str, Any]] = []
        self.curves: dict[str, torch.Tensor] | None = None

    def row(self, keep: float, method: str, make: Callable[[], Any]) -> Any:
        """Run one method, note accuracy, MACs and CPU seconds."""
        started = time.process_time()
        result = make()
        seconds = time.process_time() - started
        program = result.program if isinstance(result, Pruned) else result
        module = program.module if isinstance(program, Program) else program
        macs = program_cost(program).macs / self.macs if isinstance(program, Program) else float("nan")
        row = {"keep": keep, "method": method, "accuracy": accuracy(module, self.data), "macs": macs, "cpu_s": seconds}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return result

    def moments_seconds(self) -> float:
        """The forward passes and Gram matrices that any method of this kind needs."""
        layers = {n: c.layer for n, c in find_consumers(self.provenance).items() if n in self._consuming()}
        started = time.process_time()
        collect_moments(self.teacher, layers, self.calibration)
        return time.process_time() - started

    def _consuming(self) -> set[str]:
        weights = {name for g in self.groups for name, _ in g.consumers}
        return {s.node for s in self.provenance.slots if s.role == "in" and s.parameter in weights}

    def counts(self, keep: float) -> dict[str, int]:
        return {g.name: round(keep * len(g)) for g in self.groups}

    def cut(self, counts: Counts, *, solve: bool = True, **options: Any) -> Pruned:
        """Choose, solve, and remove channels."""
        choice = choose_channels(self.provenance, self.calibration, counts, how=ChannelSettings(**options))
        return prune_channels(self.provenance, choice.removed, choice.tensors if solve else None)

    def norms(self, counts: Counts) -> dict[str, Selection]:
        return {g.name: select_by_norm(self.provenance, g, counts[g.name], power=1) for g in self.groups}

    def polish(self, pruned: Pruned, refine: int) -> Pruned:
        settings = ResolveSettings(refine=refine)
        changes = Changes(kept=pruned.kept)
        found = resolve_network(self.teacher, pruned.program, self.calibration, changes, settings=settings)
        return replace(pruned, program=found.program)

    def allocated(self, keep: float) -> dict[str, int]:
        """Counts with at most the MACs of the uniform cut, by the groups' error curves."""
        model = CutModel.of_macs(self.provenance, self.groups)
        if self.curves is None:
            self.curves = error_curves(self.provenance, self.calibration, self.groups)
        uniform = self.counts(keep)
        target = model([uniform[g.name] for g in self.groups])
        return allocate(model, self.curves, target, ChannelLimits(multiple_of=1, least=0.05))[0]

    def mimicked(self, pruned: Pruned) -> Program:
        fit, held_out = self.calibration.split(self.arguments.seed, 0.1)
        settings = MimicSettings(iterations=self.arguments.iterations[0])
        import foldcut

        views = (foldcut.horizontal_flip,) if self.arguments.views else ()
        lesson = Lesson(
            teacher=self.teacher,
            student=pruned.program,
            fit=fit.with_views(views),
            judge=held_out,
            kept=pruned.kept,
            seed=self.arguments.seed,
        )
        return mimic(lesson, settings).program

    def peers(self, keep: float) -> None:
        """What the other tools and the paper do."""
        counts = self.counts(keep)
        norms = self.norms(counts)
        convs = [_module_name(g) for g in self.groups]
        self.row(keep, "L1-norm channels, nothing else", lambda: self.cut(counts, solve=False, given=norms))
        self.row(
            keep,
            "Torch-Pruning (group magnitude), batch norm re-estimated",
            lambda: prune_with_torch_pruning(self.teacher_module, self.images, convs, keep),
        )
        self.row(
            keep,
            "L1-norm channels, asymmetric re-solve",
            lambda: self.cut(counts, given=norms, stream_target=False),
        )
        self.row(
            keep,
            "asymmetric greedy, re-solve (the paper's best)",
            lambda: self.cut(counts, stream_target=False),
        )

    def ours(self, keep: float) -> None:
        counts = self.counts(keep)
        greedy = self.row(keep, "asymmetric greedy, stream target", lambda: self.cut(counts))
        self.row(keep, "the same, polished", lambda: self.polish(greedy, 2))
        spread = self.row(keep, "budgets by error curves, stream target", lambda: self.cut(self.allocated(keep)))
        best = self.row(keep, "the same, polished: foldcut", lambda: self.polish(spread, self.arguments.refine))
        if self.arguments.iterations[0]:
            self.row(keep, "foldcut, then mimicking", lambda: self.mimicked(best))


def _module_name(group: UnitGroup) -> str:
    return group.producers[0][0].removesuffix(".weight")


def run(arguments: argparse.Namespace) -> None:
    """All rows, and the table."""
    torch.set_num_threads(1)
    bench = Bench(arguments)
    dense = accuracy(bench.teacher_module, bench.data)
    print(
        f"{arguments.net}: {dense:.2f} % on {len(bench.data.labels)} test images, {len(bench.images)} for calibration"
    )
    print(f"moments of all consumers alone: {bench.moments_seconds():.1f} s of CPU", flush=True)
    for keep in arguments.keep:
        if not arguments.no_peers:
            bench.peers(keep)
        bench.ours(keep)
    table(bench.rows)
    if arguments.output:
        arguments.output.write_text(json.dumps({"dense": dense, "rows": bench.rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> None:
    print("\n| keep | method | accuracy | MACs | CPU s |\n|---|---|---|---|---|")
    for row in rows:
        macs = "-" if row["macs"] != row["macs"] else f"{row['macs']:.3f}"
        print(f"| {row['keep']:g} | {row['method']} | {row['accuracy']:.2f} | {macs} | {row['cpu_s']:.1f} |")


__all__ = ["KEEPS", "run"]
