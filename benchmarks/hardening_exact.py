"""Rewrites that may change nothing at all: the exactness oracles of hardening.py."""

from __future__ import annotations

from typing import Any

import torch
from foldcut.compiler.analysis.provenance import Provenance
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import Pruned, prune_channels
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.passes.factorize.decision import FactorizeLayer
from foldcut.passes.factorize.decompositions import Geometry
from foldcut.passes.factorize.factorize import factorize_plain
from foldcut.passes.factorize.low_rank import SCHEMES, suitable
from foldcut.passes.prune.select_channels import choose_channels
from foldcut.passes.solve.changes import Changes
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.resolve_network import ResolveSettings, resolve_network
from hardening_checks import Case, WrongError, check_program, error_between, leaves, same, tensors_of
from hardening_expected import deletions
from hardening_hidden import check_hidden

#: Operators whose statistics run over channels: what is zero still counts in them.
STATISTICS = ("layer_norm", "group_norm", "rms_norm", "softmax", "mean", "var")
#: One network in so many is factorised: layers are much alike, whatever stands around them.
FULL_RANK_EVERY = 3


def check_exact(case: Case, program: Program) -> None:
    """The cheap ones, on every network."""
    with case.stage("keep all"):
        inputs = case.network.example(4, 9)
        kept = drop_blocks(program, [])
        if case.provenance is not None:
            kept = prune_channels(case.provenance, []).program
        for found, wanted in zip(leaves(kept(inputs)), leaves(program(inputs)), strict=True):
            if not torch.equal(found, wanted):
                raise WrongError("with nothing removed the outputs are not the same bits")
    if case.number % FULL_RANK_EVERY == 0:
        with case.stage("full rank"):
            _full_rank(case, program)
    with case.stage("zero branch"):
        _zero_branch(case, program)
    if case.provenance is not None:
        with case.stage("dead units"):
            _dead_units(case, case.provenance)


def _full_rank(case: Case, program: Program) -> None:
    layers, _ = find_layers(program)
    decisions = []
    for name, layer in layers.items():
        size = Geometry.of(program, layer)
        schemes = suitable(size, list(SCHEMES))
        if schemes and case.rng.random() < 0.5:
            scheme = case.rng.choice(schemes)
            full = scheme.full(size)
            decisions.append(FactorizeLayer(layer=name, scheme=scheme.name, ranks=full, full=full))
    if not decisions:
        return
    case.counts["layers factorised"] += len(decisions)
    whole = factorize_plain(program, decisions)
    check_program(whole)
    for count in (2, 5):
        inputs = case.network.example(count, count)
        same(whole(inputs), program(inputs), f"{len(decisions)} layers at full rank, batch {count}", 2e-3)


def _zero_branch(case: Case, program: Program) -> None:
    """Where the weights of a residual branch are zero and the branch adds nothing, dropping it changes nothing."""
    regions = [r for r in find_regions(program).regions if r.kind == "residual"]
    if not regions:
        return
    region = case.rng.choice(regions)
    zeros = {}
    for name in region.nodes:
        for operand in program.nodes[name].all_input_nodes:
            if operand.op == "get_attr" and program.owned(operand):
                zeros[str(operand.target)] = torch.zeros_like(program.constant(operand))
    if not zeros:
        return
    silent = set_tensors(program, zeros, note="a silent branch")
    smaller = drop_blocks(silent, [region])
    check_program(smaller)
    # The samples compared are those on which the branch was seen to add nothing: a clamp in front of it may be the
    # identity on some samples and not on others.
    inputs = case.network.example(5, 5)
    before = torch.fx.Interpreter(silent.module)
    values: dict[str, Any] = {}
    before.run_node = _recording(before.run_node, values, {region.entry, region.exit})  # type: ignore[method-assign]
    with torch.no_grad():
        before.run(*program.flatten(inputs), enable_io_processing=False)
    if not torch.equal(values[region.entry], values[region.exit]):
        return
    case.counts["zero branches dropped"] += 1
    same(smaller(inputs), silent(inputs), "a branch of zeros dropped", 1e-5)


def _recording(run: Any, values: dict[str, Any], wanted: set[str]) -> Any:
    def step(node: torch.fx.Node) -> Any:
        result = run(node)
        if node.name in wanted:
            values[node.name] = result
        return result

    return step


def _dead_units(case: Case, provenance: Provenance) -> None:
    """All that a cut takes away set to zero first: the cut then changes nothing, but for norms over channels."""
    found = _silenced(case, provenance)
    if found is None:
        return
    silent, smaller, count = found
    case.counts["dead units removed"] += count
    for batch in (2, 5):
        inputs = case.network.example(batch, batch)
        same(smaller.program(inputs), silent(inputs), f"{count} dead units removed, batch {batch}")


def _silenced(case: Case, provenance: Provenance) -> tuple[Program, Pruned, int] | None:
    """The network with all that the last cut took away set to zero, that cut of it, and the number of units; None where
    a norm over channels would notice, or nothing can be set."""
    program = provenance.program
    if case.last_cut is None:
        return None
    units, pruned = case.last_cut
    if any(word in str(program.nodes[name].target) for name in pruned.kept for word in STATISTICS):
        return None
    state = tensors_of(program)
    gone = deletions(state, tensors_of(pruned.program))
    dead = {name: state[name].masked_fill(lost, 0) for name, lost in gone.items()}
    if not dead:
        return None
    silent = set_tensors(program, dead, note="dead units")
    return silent, prune_channels(provenance, units, dead), len(units)


def check_deep(case: Case, program: Program) -> None:
    """Those that need calibration data, on a share of the networks."""
    calibration = CalibrationSet.of(case.network.example(48, 3))
    with case.stage("re-solve"):
        if case.provenance is not None:
            _resolve(case, case.provenance, calibration)
    with case.stage("re-solve a cut of dead units"):
        if case.provenance is not None:
            _resolve_silenced(case, case.provenance, calibration)
    check_hidden(case)
    with case.stage("re-solve nothing"):
        settings = ResolveSettings(refine=0)
        again = resolve_network(program, program, calibration, Changes(), settings=settings).program
        inputs = case.network.example(4, 9)
        if error_between(leaves(again(inputs)), leaves(program(inputs))) != 0:
            raise WrongError("a network without a change is changed by a re-solve")


def _resolve(case: Case, provenance: Provenance, calibration: CalibrationSet) -> None:
    """No layer's error grows by its solve; the cut with the solved weights computes what the zeroed network does."""
    free = case.free
    if not free:
        return
    counts = {g.name: case.rng.randint(1, len(g) - 1) for g in free}
    choice = choose_channels(provenance, calibration, counts)
    case.counts["re-solved"] += 1
    for layer in choice.layers:
        if not layer.after <= layer.before * (1 + 1e-6) + 1e-9:
            raise WrongError(f"the error of a layer grew by its solve: {layer.before:.3g} to {layer.after:.3g}")
    pruned = prune_channels(provenance, choice.removed, choice.tensors)
    check_program(pruned.program)
    solved = resolve_network(provenance.program, pruned.program, calibration, Changes(kept=pruned.kept))
    check_program(solved.program)
    for layer in solved.layers:
        if not layer.after <= layer.before * (1 + 1e-6) + 1e-9:
            raise WrongError(f"the error of a layer grew by a solve of all: {layer.before:.3g} to {layer.after:.3g}")
    wide = set_tensors(provenance.program, choice.tensors, note="solved")
    touched = {n for n in pruned.kept if any(w in str(wide.nodes[n].target) for w in STATISTICS)}
    if not touched and all(name in wide.nodes for name in pruned.kept):
        inputs = case.network.example(5, 5)
        readers = {s.parameter for s in provenance.slots if s.role == "in"}
        if readers <= set(choice.tensors):
            same(pruned.program(inputs), wide(inputs), "cut with solved weights beside the same weights uncut", 1e-3)


def _resolve_silenced(case: Case, provenance: Provenance, calibration: CalibrationSet) -> None:
    """A cut that changes nothing changes nothing when the network is solved behind it either."""
    found = _silenced(case, provenance)
    if found is None:
        return
    silent, smaller, count = found
    settings = ResolveSettings(refine=0)
    changes = Changes(kept=smaller.kept)
    solved = resolve_network(silent, smaller.program, calibration, changes, settings=settings).program
    case.counts["re-solved exactly"] += 1
    inputs = case.network.example(5, 5)
    same(solved(inputs), silent(inputs), f"{count} dead units removed and the network solved", 1e-3)
