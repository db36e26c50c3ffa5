"""What removing channels saves, group by group: equal to cutting each group by itself."""

from typing import Any

import pytest
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.analysis.unit_groups import surplus_units
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.prune.channel_latency import group_savings, touched_layers
from foldcut.runtime.predict.latency_table import LatencyTable

pytestmark = pytest.mark.usefixtures("quick_measurement")


def check(program: Program, backend: Any) -> None:
    provenance = find_units(program)
    groups, _ = cuttable_groups(provenance, provenance.prunable)
    counts = {g.name: [len(g) // 2] for g in groups}
    assert len(groups) > 1
    table = LatencyTable(backend, rounds=2)
    found = group_savings(provenance, groups, counts, table)
    before = table.predict(program).units
    for group in groups:
        (count,), (saving,) = counts[group.name], found[group.name]
        alone = prune_channels(provenance, surplus_units([group], {group.name: count})).program
        assert saving == pytest.approx(1 - table.predict(alone).units / before, abs=0.02)
        assert saving > 0


def test_a_residual_network(residual: Program, work_backend: Any) -> None:
    check(residual, work_backend)


def test_inverted_blocks(inverted: Program, work_backend: Any) -> None:
    check(inverted, work_backend)


def test_counts_between_those_timed_are_interpolated(residual: Program, work_backend: Any) -> None:
    provenance = find_units(residual)
    groups, _ = cuttable_groups(provenance, provenance.prunable)
    every = {g.name: list(range(len(g) - 1, 0, -1)) for g in groups}
    found = group_savings(provenance, groups, every, LatencyTable(work_backend, rounds=2))
    for group in groups:
        savings = [0.0, *found[group.name]]  # at the whole group, one unit less, two units less ...
        assert len(savings) == len(group)
        for fewer in range(len(group) - 2, 0, -2):  # the smallest count is timed, so is every second from there
            assert savings[fewer] == pytest.approx((savings[fewer - 1] + savings[fewer + 1]) / 2)


def test_the_layers_of_a_group(residual: Program) -> None:
    provenance = find_units(residual)
    group = next(g for g in provenance.prunable if g.name.startswith("blocks.0"))
    touched = touched_layers(provenance, group)
    assert len(touched) == 2  # the convolution that makes the channels and the one that reads them
    for name in touched:
        assert residual.path(residual.nodes[name]).startswith("blocks.0")
