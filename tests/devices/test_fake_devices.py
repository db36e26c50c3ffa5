"""What runs for each batch, on fake tensors of another device: torch's own rules for devices, and nothing to read.

A fake tensor has no numbers, so whatever decides by one raises, and so does mixing devices. The device is ``cuda``
where torch is built with it. A build for the CPU alone cannot even slice a fake tensor of cuda ("not linked with
support for cuda devices"): there it is the second device of these tests. Solves decide, whether a system is definite
and whether an error fell: `test_solve_devices.py` has those.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.devices.precision import WideSum
from foldcut.compiler.ir.compare import squared_distance
from foldcut.compiler.ir.execute import bind, device_of, run_until
from foldcut.compiler.ir.program import Program
from foldcut.passes.frank_wolfe import GroupKSupport, KSparse, KSupport, LpBall, NuclearBall, SpectralKSparse
from foldcut.passes.frank_wolfe.constraints import Constraint
from foldcut.passes.frank_wolfe.update import Job, move
from foldcut.passes.quantize.rounding import rounded
from foldcut.passes.solve.layers import Layer, find_layers
from foldcut.passes.solve.lockstep import Lockstep, plan_steps
from foldcut.passes.solve.moments import MomentSum, _batch_parts
from foldcut.passes.solve.refine import _collect, _Ends
from foldcut.passes.solve.resolve_network import ResolveSettings, _parts
from foldcut.passes.solve.targets import trace_target
from torch._subclasses.fake_tensor import DataDependentOutputException

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(params=["residual", "transformer", "inverted"])
def case(request: pytest.FixtureRequest, nets: SimpleNamespace) -> tuple[Program, torch.Tensor]:
    program: Program = request.getfixturevalue(request.param)
    return program, nets.tokens(12) if request.param == "transformer" else nets.images(12)


def test_what_is_read_or_mixed_raises(fake: Any) -> None:
    """Else the tests below could not fail."""
    there = fake.empty(3)
    with fake.mode:
        with pytest.raises(DataDependentOutputException):
            float(there.sum())
        with pytest.raises(RuntimeError, match=r"same device|Device Propagation"):
            _ = there + torch.ones(3)


def test_networks_run(case: tuple[Program, torch.Tensor], fake: Any) -> None:
    program, samples = fake.program(case[0]), fake.samples(case[1])
    assert device_of(program) == fake.device
    total = WideSum()
    with fake.mode:
        for batch in samples.batches(4):
            output = program(batch)
            values = run_until(program, list(find_layers(case[0])[0]), bind(program, batch))
            assert {value.device for value in (output, *values.values())} == {fake.device}
            total.add(squared_distance(output, output * 2)[0])
        assert total.value().device == fake.device and total.value().dtype == torch.float64


@pytest.mark.parametrize("rows_per_column", [None, 1])
def test_moments(rows_per_column: int | None, case: tuple[Program, torch.Tensor], fake: Any) -> None:
    layers = find_layers(case[0])[0]
    sums = {name: MomentSum() for name in layers}
    program, samples = fake.program(case[0]), fake.samples(case[1])
    with fake.mode:
        for _, name, part in _batch_parts(program, layers, samples, 4, rows_per_column):
            sums[name].add(part)
        found = {name: total.moments() for name, total in sums.items()}
    for name, moments in found.items():
        columns = case[0].module.get_parameter(layers[name].weight)[0].numel() + 1
        assert moments.gram.shape == (layers[name].groups, columns, columns)
        assert moments.gram.device == moments.cross.device == moments.energy.device == fake.device
        assert moments.gram.dtype == torch.float64


@pytest.mark.parametrize("rows_per_column", [None, 1])
def test_sweeps(rows_per_column: int | None, case: tuple[Program, torch.Tensor], fake: Any) -> None:
    """Both networks side by side, up to the moments of each layer and back along its branch."""
    layers = find_layers(case[0])[0]
    program, samples = fake.program(case[0]), fake.samples(case[1])
    settings = ResolveSettings(rows_per_column=rows_per_column)
    seen = 0
    with fake.mode:
        targets = [trace_target(program, layer, {}) for layer in layers.values()]
        steps = plan_steps(program, program, [[target] for target in targets], set(list(program.nodes)[1:]))
        with Lockstep(program, program, samples, batch_size=4, ram_bytes=1 << 40) as lockstep:
            for step in steps:
                lockstep.advance(step, {})
                for _, part in _parts(lockstep, step, step.targets[0], {}, settings):
                    assert part.gram.device == part.cross.device == fake.device
                    seen += 1
                lockstep.finish(step)
    assert seen == 3 * len(layers) > 6


def test_gradients_along_a_branch(residual: Program, nets: SimpleNamespace, fake: Any) -> None:
    layers = list(find_layers(residual)[0].values())
    program, samples = fake.program(residual), fake.samples(nets.images(12))
    with fake.mode:
        *_, inner, end, _head = (trace_target(program, layer, {}) for layer in layers)
        (step,) = plan_steps(program, program, [[inner, end]], set(list(program.nodes)[1:]))
        with Lockstep(program, program, samples, batch_size=4, ram_bytes=1 << 40) as lockstep:
            lockstep.advance(step, {})
            gradients, sides = _collect(lockstep, step, [inner], {}, seed=0, ends=_Ends())
    assert gradients[0].device == sides[0].device == fake.device
    assert gradients[0].shape == (1, 8, 72) and sides[0].shape == (1, 8, 8)


def test_rows_of_convolutions(fake: Any) -> None:
    """Strides, dilation, groups; all rows and every third."""
    value, image = fake.empty(5, 4, 9, 9), fake.empty(5, 8, 7, 7)
    weight = fake.empty(8, 2, 3, 3)
    program = SimpleNamespace(module=SimpleNamespace(get_parameter=lambda _: weight))
    for window in (((2, 2), (1, 1), (1, 1)), ((1, 1), (2, 2), (2, 2)), ((1, 1), (0, 0), (1, 1))):
        layer = Layer(node="conv", input="x", weight="w", bias=None, groups=2, window=window)
        with fake.mode:
            columns, count = layer.extent(program, value)  # type: ignore[arg-type]
            for every in (1, 3):
                rows = layer.rows(program, value, every)  # type: ignore[arg-type]
                assert rows.device == fake.device and rows.shape == (2, columns, -(-count // every))
            assert layer.picked(image, 3).device == layer.outputs(image, 3).device == fake.device


def test_rounding_to_integers(fake: Any) -> None:
    weight, gram = fake.empty(2, 6, 70), fake.empty(2, 71, 71, dtype=torch.float64)
    least = fake.empty(2, 6, 1, dtype=torch.float64)
    with fake.mode:
        found = rounded(weight, gram, 127, least)
    assert {found.values.device, found.scales.device, found.shift.device} == {fake.device}
    assert found.values.shape == weight.shape and found.values.dtype == torch.int8


@pytest.mark.parametrize(
    "constraint",
    [LpBall(p=2.0), KSparse(k=3), KSupport(k=3), GroupKSupport(k=2), NuclearBall(), SpectralKSparse(k=2)],
    ids=str,
)
def test_steps_of_frank_wolfe(constraint: Constraint, fake: Any) -> None:
    """The step itself: norms are read once behind it."""
    pairs = [(fake.empty(8, 10), fake.empty(8, 10)) for _ in range(2)]
    jobs = [Job(weight=w, direction=m, constraint=constraint, lr=0.1, rescale="gradient") for w, m in pairs]
    with fake.mode:
        assert move(jobs).etas.device == fake.device
