"""What hardening.py asks of one network: capture, cuts, drops, factors, two batch sizes, ONNX Runtime.

Every stage ends as ok, or in one finding: `wrong` (a value that the oracle says is another), `exception` (an error that
is not a CompilerError), `refused` (a CompilerError) or `unknown` (the oracle cannot tell).
"""

from __future__ import annotations

import copy
import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.analysis.unit_groups import UnitGroup
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import CompilerError
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import Pruned, prune_channels
from foldcut.passes.drop.drop_blocks import drop_blocks
from hardening_expected import Expected, deletions
from hardening_networks import Network, Recipe, build
from hardening_oracle import UnknownError
from hardening_pieces import PIECES
from torch.utils import _pytree as pytree

#: Two batch sizes, neither that of the capture (3).
BATCHES = (2, 5)
TOLERANCE = 1e-4
#: The most severe first: what a network with several findings counts as.
STATUSES = ("wrong", "exception", "unknown", "refused", "ok")


class WrongError(Exception):
    """foldcut made something that computes something else."""


@dataclass
class Case:
    """One network under test and what was found about it."""

    recipe: Recipe
    number: int
    network: Network
    rng: random.Random
    thorough: bool = False
    program: Program | None = None
    provenance: Provenance | None = None
    last_cut: tuple[torch.Tensor, Pruned] | None = None
    free: list[UnitGroup] = field(default_factory=list)
    findings: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    locks: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    @property
    def pieces(self) -> list[str]:
        """The kinds of pieces that the network was made of."""
        found = []
        for part in self.network.chain.modules():
            if type(part).__name__.lower() in PIECES:
                kind = getattr(part, "kind", "")
                found.append(type(part).__name__ + (f" {kind}" if kind else ""))
        return sorted(set(found))

    @property
    def status(self) -> str:
        found = {f["status"] for f in self.findings}
        return next((s for s in STATUSES if s in found), "ok")

    @contextmanager
    def stage(self, name: str) -> Any:
        """Note how the stage ends; nothing gets out of it."""
        start = time.process_time()
        try:
            yield
        except WrongError as cause:
            self.note("wrong", name, str(cause))
        except UnknownError as cause:
            self.note("unknown", name, f"the oracle does not know {cause}")
        except CompilerError as cause:
            self.note("refused", name, f"{type(cause).__name__}: {cause.message}")
        except Exception as cause:
            place = traceback.extract_tb(cause.__traceback__)
            homes = ("foldcut", "compiler", "passes")
            own = [p for p in place if any(f"/{home}/" in p.filename for home in homes)]
            at = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else f"harness, {Path(place[-1].filename).name}"
            self.note("exception", name, f"{type(cause).__name__}: {first_words(cause)} ({at})")
        finally:
            self.seconds[name] += time.process_time() - start

    def note(self, status: str, stage: str, message: str) -> None:
        self.findings.append({"status": status, "stage": stage, "message": message[:400]})


def first_words(cause: BaseException) -> str:
    return (str(cause).strip().splitlines() or [""])[0][:200]


def message_class(message: str) -> str:
    """A message without names and numbers, to count by."""
    message = re.sub(
        r"aten[.:\w]+", "OP", re.sub(r"(?<![\w'])\w*_\d+|\b[\w.]+\.(weight|bias|\w*\d\w*)\b", "NODE", message)
    )
    return re.sub(r"\(.*?\)|\[.*?\]|-?\d+(\.\d+)?(e-?\d+)?", "N", message)[:110]


def leaves(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def tensors_of(program: Program) -> dict[str, torch.Tensor]:
    """Parameters, buffers and constants by name."""
    return {str(n.target): program.constant(n).detach() for n in program.graph.nodes if n.op == "get_attr"}


def check_program(program: Program) -> None:
    """The program's own check, where it has one."""
    check: Callable[[], object] = getattr(program, "check", program.graph.lint)
    check()


def error_between(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference relative to the largest value; infinite where shapes differ."""
    if len(found) != len(wanted):
        return float("inf")
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.numel() == 0:
            continue
        scale = max(1e-3, float(other.abs().max()))
        error = float((one.double() - other.double()).abs().max()) / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


def same(found: Any, wanted: Any, what: str, tolerance: float = TOLERANCE) -> None:
    error = error_between(leaves(found), leaves(wanted))
    if not error <= tolerance:
        raise WrongError(f"{what}: off by {error:.2g}")


def run(recipe: Recipe, number: int, *, onnx: bool, deep: bool, thorough: bool = False) -> Case:
    """Everything about one network."""
    case = Case(recipe, number, build(recipe), random.Random(f"cuts {number}"), thorough)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with case.stage("network"), torch.no_grad():
            values = leaves(case.network(*case.network.example(3, 0)))
            if not all(bool(v.isfinite().all()) for v in values):
                case.counts["unusable"] = 1
                return case
        with case.stage("capture"):
            case.program = capture(case.network, case.network.example(3, 0))
        if case.program is not None:
            _captured(case, case.program, onnx=onnx, deep=deep)
    return case


def _captured(case: Case, program: Program, *, onnx: bool, deep: bool) -> None:
    from hardening_exact import check_deep, check_exact

    case.counts["operators"] = sum(1 for n in program.graph.nodes if n.op == "call_function")
    with case.stage("batch"):
        check_program(program)
        for count in BATCHES:
            inputs = case.network.example(count, count)
            with torch.no_grad():
                wanted = case.network(*inputs)
            _exactly(
                lambda p, i=inputs: p(i), program, lambda n, i=inputs: n(*i), case, wanted, f"captured, batch {count}"
            )
    final = program
    with case.stage("analyse"):
        case.provenance = find_units(program)
    if case.provenance is not None:
        final = _cuts(case, case.provenance) or program
    with case.stage("drop"):
        _drops(case, program)
    check_exact(case, program)
    if deep:
        check_deep(case, program)
    if onnx:
        with case.stage("onnx"):
            check_onnx(case, final)


def _exactly(
    ours: Callable[[Any], Any], program: Program, theirs: Callable[[Any], Any], case: Case, wanted: Any, what: str
) -> None:
    """Compare what the program gives with what is wanted; where float32 may be to blame, both again in float64."""
    found = ours(program)
    error = error_between(leaves(found), leaves(wanted))
    if error <= TOLERANCE:
        return
    if error < 0.05:
        with doubled(case.network) as network, torch.no_grad():
            try:
                precise = copy.deepcopy(program.module).double()
                error = error_between(leaves(ours(_Running(precise))), leaves(theirs(network)))
            except (RuntimeError, TypeError):
                pass  # a dtype that is written into the graph
        if error <= TOLERANCE / 10:
            case.counts["settled in float64"] += 1
            return
    raise WrongError(f"{what}: off by {error:.2g}")


class _Running:
    """A module called as a Program is, on inputs brought to float64."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Any:
        with torch.no_grad():
            return self.module(*(doubles(inputs)))


def doubles(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@contextmanager
def doubled(network: Network) -> Any:
    copied = copy.deepcopy(network).double()

    def call(*inputs: Any) -> Any:
        return copied(*doubles(inputs))

    call.network = copied  # type: ignore[attr-defined]
    yield call


def _cuts(case: Case, provenance: Provenance) -> Program | None:
    """Several random cuts; returns the last program that was cut."""
    for group in provenance.groups:
        case.counts["groups"] += 1
        if group.reason is not None:
            case.locks[message_class(group.reason)] += 1
    prunable = list(provenance.prunable)
    case.counts["prunable"] = len(prunable)
    case.counts["units prunable"] = sum(len(g) for g in prunable)
    case.counts["unknown operators"] = len(provenance.unknown)
    free = []
    with case.stage("choose"):
        free, refused = cuttable_groups(provenance, prunable)
        for _, cause in refused:
            case.counts["groups refused"] += 1
            case.note("refused", "choose", f"RewriteError: {cause.message}")
    case.free = free
    case.counts["cuttable"] = len(free)
    result = None
    for units in _choices(case, free):
        with case.stage("cut"):
            result = _cut(case, provenance, units) or result
    return result


def _choices(case: Case, groups: Sequence[Any]) -> list[torch.Tensor]:
    """Units to remove: of every group, and of one or of half of them. With `thorough`, of each group alone as well."""
    rng = case.rng
    if not groups:
        return []

    def some(group: Any) -> torch.Tensor:
        return group.units[torch.tensor(rng.sample(range(len(group)), rng.randint(1, len(group) - 1)))]

    subsets = [list(groups), [rng.choice(groups)] if rng.random() < 0.5 else rng.sample(list(groups), len(groups) // 2)]
    if case.thorough:
        subsets += [[g] for g in groups] * 3 + [list(groups)] * 3
    return [torch.cat([some(g) for g in subset]) for subset in subsets if subset]


def _cut(case: Case, provenance: Provenance, units: torch.Tensor) -> Program:
    case.last_cut = units, prune_channels(provenance, units)
    pruned = case.last_cut[1].program
    check_program(pruned)
    case.counts["cuts"] += 1
    case.counts["units cut"] += len(units)
    before = tensors_of(provenance.program)
    gone = deletions(before, tensors_of(pruned))
    if not gone:
        raise WrongError("units were removed and no weight is smaller")
    expected = Expected(case.network, gone, before)
    for count in BATCHES:
        inputs = case.network.example(count, count)
        marked = expected(inputs)
        if any(m.gone is not None for m in marked):
            raise WrongError("an output depends on an element that was removed")
        wanted = [m.value for m in marked]

        def precisely(network: Any, inputs: Any = inputs) -> Any:
            wide = {name: value.double() if value.is_floating_point() else value for name, value in before.items()}
            return [m.value for m in Expected(network.network, gone, wide)(doubles(inputs))]

        _exactly(lambda p, i=inputs: p(i), pruned, precisely, case, wanted, f"cut by {len(units)} units, batch {count}")
    with torch.no_grad():
        if error_between(leaves(case.network(*inputs)), wanted) > 1e-3:
            case.counts["cuts that show"] += 1
    return pruned


def bypassed(program: Program, inputs: tuple[Any, ...], swaps: Mapping[str, str]) -> Any:
    """What the graph computes when each node of `swaps` hands on another's value."""
    values: dict[str, Any] = {}
    given = iter(program.flatten(inputs))

    def value(node: torch.fx.Node) -> Any:
        return values[swaps.get(node.name, node.name)]

    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node.name] = next(given)
            elif node.op == "get_attr":
                values[node.name] = program.constant(node)
            elif node.op == "call_function":
                values[node.name] = node.target(
                    *torch.fx.node.map_arg(node.args, value), **torch.fx.node.map_arg(node.kwargs, value)
                )
            else:
                return torch.fx.node.map_arg(node.args[0], value)
    raise AssertionError("a graph without an output")


def _drops(case: Case, program: Program) -> None:
    """One region bypassed, and all that do not overlap: as if the branch's value were its entry's."""
    regions = list(find_regions(program).regions)
    case.counts["regions"] = len(regions)
    if not regions:
        return
    case.rng.shuffle(regions)
    chosen: list[Any] = []
    for region in regions:
        if not any(region.overlaps(other) for other in chosen):
            chosen.append(region)
    for drops in (chosen[:1], chosen) if len(chosen) > 1 else (chosen,):
        smaller = drop_blocks(program, drops)
        check_program(smaller)
        case.counts["drops"] += len(drops)
        swaps = {d.exit: d.entry for d in drops}
        for name in list(swaps):
            while swaps[name] in swaps:
                swaps[name] = swaps[swaps[name]]
        for count in BATCHES:
            inputs = case.network.example(count, count)
            same(smaller(inputs), bypassed(program, inputs, swaps), f"{len(drops)} regions dropped, batch {count}")


def check_onnx(case: Case, program: Program) -> None:
    """The exported program in ONNX Runtime beside torch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(to_onnx(program), options, providers=["CPUExecutionProvider"])
    case.counts["exports"] += 1
    for count in BATCHES:
        inputs = case.network.example(count, count)
        feed = {s.name: x.numpy() for s, x in zip(program.inputs, inputs, strict=True)}
        known = {i.name for i in session.get_inputs()}
        found = session.run(None, {k: v for k, v in feed.items() if k in known})
        same([torch.from_numpy(np.asarray(v)) for v in found], program(inputs), f"ONNX Runtime, batch {count}", 1e-3)
