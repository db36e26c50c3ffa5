"""Every module of the passes that computes with tensors does so on fake tensors of another device, or says why not.

Which modules compute is read off the source: they call a function of torch that makes numbers, or take tensors. A test
counts only where an operator on the device was called from code of that module.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.ir.program import Program
from foldcut.passes.drop.adaptors import _merged
from foldcut.passes.factorize.decompositions import Metric, _leading, _whitened_basis
from foldcut.passes.frank_wolfe import GroupKSupport, KSupport, LpBall, NuclearBall, SpectralKSparse
from foldcut.passes.frank_wolfe.projections import onto_capped_l1, onto_l2
from foldcut.passes.frank_wolfe.spectral_oracles import Subspace, polar_factors
from foldcut.passes.frank_wolfe.update import Job, move
from foldcut.passes.mimic.crops import Crop
from foldcut.passes.mimic.divided_adam import DividedAdam
from foldcut.passes.quantize.edit_quantize import ValueGrid
from foldcut.passes.quantize.grids import energy, product
from foldcut.passes.quantize.quantize import _gram, _least_scales
from foldcut.passes.quantize.rounding import rounded
from foldcut.passes.quantize.scaling_groups import _column_factors
from foldcut.passes.solve.closed_form import _least_norm, ridge_level
from foldcut.passes.solve.layers import find_layers
from foldcut.passes.solve.lockstep import Lockstep, plan_steps
from foldcut.passes.solve.moments import Moments
from foldcut.passes.solve.refine import _collect, _Ends
from foldcut.passes.solve.resolve_network import ResolveSettings, _parts
from foldcut.passes.solve.targets import trace_target
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
PASSES = Path(__file__).parents[2] / "passes"
#: What of torch makes no numbers.
NO_NUMBERS = {"device", "dtype", "Generator", "Size", "Tensor", "enable_grad", "finfo", "iinfo", "no_grad"}
WIDE = torch.float64


def sweep(there: Any, residual: Program, nets: SimpleNamespace) -> None:
    layers = find_layers(residual)[0]
    program, samples = there.program(residual), there.samples(nets.images(8))
    with there.mode, there.called:
        targets = [trace_target(program, layer, {}) for layer in layers.values()]
        steps = plan_steps(program, program, [targets], set(list(program.nodes)[1:]))
        with Lockstep(program, program, samples, batch_size=4, ram_bytes=1 << 40) as lockstep:
            for step in steps:
                lockstep.advance(step, {})
                for _, part in _parts(lockstep, step, step.targets[0], {}, ResolveSettings()):
                    assert part.gram.device == there.device
                lockstep.finish(step)


def gradients(there: Any, residual: Program, nets: SimpleNamespace) -> None:
    program, samples = there.program(residual), there.samples(nets.images(8))
    with there.mode, there.called:
        *_, inner, end, _head = (trace_target(program, layer, {}) for layer in find_layers(residual)[0].values())
        (step,) = plan_steps(program, program, [[inner, end]], set(list(program.nodes)[1:]))
        with Lockstep(program, program, samples, batch_size=4, ram_bytes=1 << 40) as lockstep:
            lockstep.advance(step, {})
            _collect(lockstep, step, [inner], {}, seed=0, ends=_Ends())


def steps_of_frank_wolfe(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    pairs = [(there.empty(8, 10), there.empty(8, 10)) for _ in range(2)]
    for constraint in (LpBall(p=2.0), KSupport(k=3), GroupKSupport(k=2), NuclearBall(), SpectralKSparse(k=2)):
        jobs = [Job(weight=w, direction=m, constraint=constraint, lr=0.1, rescale="gradient") for w, m in pairs]
        with there.mode, there.called:
            assert move(jobs).etas.device == there.device
            assert constraint.gauges(torch.stack([weight for weight, _ in pairs])).device == there.device


def projections(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    stack = there.empty(2, 7, dtype=WIDE)
    with there.mode, there.called:
        assert onto_l2(stack).device == onto_capped_l1(stack.abs(), 3).device == there.device


def spectra(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    matrices = there.empty(2, 12, 14)
    with there.mode, there.called:
        found = Subspace().leading(matrices, 2, None)
        again = Subspace().leading(matrices, 2, found.basis)
        assert polar_factors(again.image).device == there.device


def decompositions(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    gram = there.empty(2, 7, 7, dtype=WIDE)
    moments = Moments(gram=gram, cross=there.empty(2, 7, 3, dtype=WIDE), energy=there.empty(2, 3, dtype=WIDE), rows=9)
    with there.mode, there.called:
        metric = Metric.of(moments, ridge=1e-3, centred=True)
        weight = there.empty(2, 4, 6, dtype=WIDE)
        assert metric.full(weight).device == Metric().full(weight).device == there.device
        assert _leading(metric.full(weight))[1].device == there.device
        assert _whitened_basis(weight.transpose(1, 2), metric.full(weight)).device == there.device


def closed_form(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    gram, cross = there.empty(2, 7, 7, dtype=WIDE), there.empty(2, 7, 3, dtype=WIDE)
    moments = Moments(gram=gram, cross=cross, energy=there.empty(2, 3, dtype=WIDE), rows=9)
    with there.mode, there.called:
        assert ridge_level(moments).device == _least_norm(gram, cross).device == there.device


def rounding(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    weight, gram = there.empty(2, 6, 70), there.empty(2, 71, 71, dtype=WIDE)
    with there.mode, there.called:
        assert rounded(weight, gram, 127, there.empty(2, 6, 1, dtype=WIDE)).values.device == there.device


def integers(there: Any, residual: Program, nets: SimpleNamespace) -> None:
    layer = next(iter(find_layers(residual)[0].values()))
    program, value = there.program(residual), there.empty(2, 3, 8, 8)
    weight, grid = program.module.get_parameter(layer.weight), ValueGrid(scale=0.1, zero_point=3)
    bias, gram = there.empty(len(weight)), there.empty(1, 28, 28, dtype=WIDE)
    with there.mode, there.called:
        assert grid.rounded(value).device == there.device
        assert energy(product(program, layer, value, weight)).device == there.device
        assert _least_scales(layer.matrix(weight), bias, grid).device == there.device
        assert _gram(layer, gram).device == there.device
        assert _column_factors(program, layer, there.empty(3)).device == there.device


def adaptors(there: Any, residual: Program, _nets: SimpleNamespace) -> None:
    name = next(iter(find_layers(residual)[0].values())).weight
    program = there.program(residual)
    weight = program.module.get_parameter(name)
    with there.mode, there.called:
        for inner, size in ((set(), weight.shape[0]), ({name}, weight.shape[1])):
            assert _merged(program, {name: there.empty(size, size)}, inner)[name].device == there.device


def crops(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    images = there.empty(3, 2, 8, 8)
    with there.called:  # not within the mode: where crops lie is drawn on the CPU, in numbers
        found = Crop(size=(4, 4), whole=(8, 8)).cut((images,), torch.Generator())
    assert found[0].device == there.device


def adam(there: Any, _residual: Program, _nets: SimpleNamespace) -> None:
    with there.mode, there.called:
        weight = nn.Parameter(there.empty(4, 3))
        weight.grad = there.empty(4, 3)
        made = DividedAdam([weight], divided=False)
        made.step([0.1])
        made.zero_grad()
    assert weight.device == there.device


Exercise = Callable[[Any, Program, SimpleNamespace], None]
#: What runs code of a module on fake tensors.
COVERED: dict[str, Exercise] = {
    **dict.fromkeys(("solve/layers", "solve/lockstep", "solve/moments", "solve/resolve_network"), sweep),
    "solve/targets": sweep,
    "solve/refine": gradients,
    "solve/closed_form": closed_form,
    **dict.fromkeys(("frank_wolfe/update", "frank_wolfe/ordering", "frank_wolfe/vector_balls"), steps_of_frank_wolfe),
    "frank_wolfe/spectral_balls": steps_of_frank_wolfe,
    "frank_wolfe/projections": projections,
    "frank_wolfe/spectral_oracles": spectra,
    "factorize/decompositions": decompositions,
    "quantize/rounding": rounding,
    **dict.fromkeys(("quantize/edit_quantize", "quantize/grids", "quantize/quantize"), integers),
    "quantize/scaling_groups": integers,
    "drop/adaptors": adaptors,
    "mimic/crops": crops,
    "mimic/divided_adam": adam,
}

_GRAPH = "tables and labels of a graph, on the CPU: nothing of it is computed for a batch"
_CHOICE = "the choice of channels is the CPU's: thousands of small decisions"
_READ = "decides by numbers that it reads, which fake tensors have not; on the second device in "
#: Why a module is not run on fake tensors.
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys([f"cut/{name}" for name in ("cut_proof", "cut_rules", "cuttable", "shape_arguments")], _GRAPH),
    "cut/prune_channels": _READ + "test_passes_devices.py",
    **dict.fromkeys(("factorize/factorize", "factorize/rank_trials"), _READ + "test_passes_devices.py"),
    **dict.fromkeys(("frank_wolfe/constraints", "frank_wolfe/feasibility"), _READ + "test_open_ends.py"),
    "frank_wolfe/optimizer": _READ + "test_training_devices.py",
    "frank_wolfe/parameter_groups": _READ + "test_open_ends.py",
    **dict.fromkeys(("mimic/pairs", "mimic/training", "mimic/training_stage"), _READ + "test_training_devices.py"),
    **dict.fromkeys([f"prune/{name}" for name in ("channel_budget", "channel_latency", "condensed")], _CHOICE),
    **dict.fromkeys([f"prune/{name}" for name in ("counted_cuts", "error_curves", "factors", "rewrite")], _CHOICE),
    **dict.fromkeys([f"prune/{name}" for name in ("select_channels", "submodular", "units")], _CHOICE),
    **dict.fromkeys(("quantize/equalise", "quantize/ranges"), _READ + "test_passes_devices.py"),
}


def computing() -> set[str]:
    """The modules that compute with tensors, by their source."""
    found = set()
    for path in PASSES.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if any(_computes(node) for node in ast.walk(tree)):
            found.add(path.relative_to(PASSES).with_suffix("").as_posix())
    return found


def _computes(node: ast.AST) -> bool:
    if isinstance(node, ast.arg):
        return node.annotation is not None and "Tensor" in ast.unparse(node.annotation)
    if not isinstance(node, ast.Call):
        return False
    names = ast.unparse(node.func).split(".")
    if names[0] == "F":
        return True
    return len(names) > 1 and names[0] == "torch" and names[1] not in {*NO_NUMBERS, "fx", "ops", "utils"}


def test_every_module_that_computes_is_covered_or_says_why_not() -> None:
    assert not COVERED.keys() & LEFT_OUT.keys()
    assert computing() == COVERED.keys() | LEFT_OUT.keys()
    here = Path(__file__).parent
    for module, reason in LEFT_OUT.items():
        tests = [word for word in reason.split() if word.endswith(".py")]
        assert all((here / name).is_file() for name in tests), module


class Called:
    """Within, the modules of the passes are noted that call operators on fake tensors of a device."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self._mode, self._device, self.modules = mode, device, set[str]()

    def __enter__(self) -> Called:
        real = type(self._mode).dispatch

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            result = real(self._mode, *args, **kwargs)
            leaves = pytree.tree_leaves((args, kwargs, result))
            if any(isinstance(leaf, FakeTensor) and leaf.device == self._device for leaf in leaves):
                frame: FrameType | None = sys._getframe(1)
                while frame is not None:
                    _, _, place = frame.f_code.co_filename.rpartition("/passes/")
                    self.modules.add(place.removesuffix(".py"))
                    frame = frame.f_back
            return result

        self._mode.dispatch = dispatch  # type: ignore[method-assign]
        return self

    def __exit__(self, *_said: object) -> None:
        del self._mode.dispatch  # what is of the class is there again


@pytest.mark.parametrize("module", COVERED)
def test_it_computes_there(module: str, fake: Any, residual: Program, nets: SimpleNamespace) -> None:
    fake.called = Called(fake.mode, fake.device)
    COVERED[module](fake, residual, nets)
    assert module in fake.called.modules


def test_reading_mixing_and_running_elsewhere_show(fake: Any, residual: Program, nets: SimpleNamespace) -> None:
    """Else the tests above could not fail."""
    del residual, nets
    weight = fake.empty(2, 6, 70)
    with fake.mode, Called(fake.mode, fake.device) as called:
        with pytest.raises(DataDependentOutputException):
            float(energy(weight))
        with pytest.raises(RuntimeError, match=r"same device|Device Propagation"):
            rounded(weight, torch.ones(2, 71, 71, dtype=WIDE), 127, fake.empty(2, 6, 1, dtype=WIDE))
    with fake.mode, Called(fake.mode, fake.device) as called:
        energy(torch.ones(3, 4))
    assert "quantize/grids" not in called.modules
