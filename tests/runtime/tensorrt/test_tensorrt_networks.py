"""Networks of every kind that foldcut cuts, built by the TensorRT that is installed: as they are, cut, and in fp16."""

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.runtime.measure.backend import Array
from foldcut.runtime.tensorrt.backend import TensorRTBackend
from foldcut.runtime.tensorrt.half_precision import to_half_precision
from torch import nn

AVAILABLE = TensorRTBackend().available()
builds_here = pytest.mark.skipif(not AVAILABLE.can_build, reason=AVAILABLE.reason)
NETWORKS = ("residual", "inverted", "gated", "transformer")


@pytest.fixture(scope="module")
def programs(nets: SimpleNamespace, residual: Program, inverted: Program, transformer: Program) -> dict[str, Program]:
    gated = nets.seeded(lambda: nets.image_net(nn.ReLU(), nets.Gated(), nn.ReLU()), seed=4)
    found = {"residual": residual, "inverted": inverted, "transformer": transformer}
    return {**found, "gated": capture(gated, nets.images())}


@pytest.fixture(scope="module")
def exported(programs: dict[str, Program]) -> Callable[[str], bytes]:
    """The ONNX bytes of a network, exported once."""
    return cache(lambda name: to_onnx(programs[name]))


def samples_for(name: str, program: Program, nets: SimpleNamespace, count: int) -> dict[str, Array]:
    batch: torch.Tensor = nets.tokens(count) if name == "transformer" else nets.images(count)
    return {program.inputs[0].name: batch.numpy()}


def halved(program: Program) -> Program:
    provenance = find_units(program)
    units = [unit for group in provenance.prunable for unit in group.units[1::2].tolist()]
    return prune_channels(provenance, units).program


@builds_here
@pytest.mark.parametrize("name", NETWORKS)
def test_engines_before_and_after_pruning(
    name: str, programs: dict[str, Program], exported: Callable[[str], bytes], nets: SimpleNamespace
) -> None:
    smaller = halved(programs[name])
    assert smaller.parameter_count() < programs[name].parameter_count()
    inputs = samples_for(name, smaller, nets, 3)
    for model in (exported(name), to_onnx(smaller)):
        engine = TensorRTBackend().build(model, inputs)
        engine.info.check_inputs(inputs)
        assert [tensor.name for tensor in engine.info.inputs] == list(inputs)
        assert engine.plan


@pytest.mark.parametrize("name", NETWORKS)
def test_the_predicted_error_of_half_precision_is_that_of_torch(
    name: str, programs: dict[str, Program], exported: Callable[[str], bytes], nets: SimpleNamespace
) -> None:
    """Torch's own float16 rounds elsewhere, so the two agree in size, not in each digit."""
    program = programs[name]
    samples = samples_for(name, program, nets, 16)
    batch = torch.from_numpy(next(iter(samples.values())))
    predicted = to_half_precision(exported(name), samples)
    assert predicted.kept == {}
    assert predicted.converted > 3
    expected = program(batch).detach()
    actual = copy.deepcopy(program.module).half()(batch.half()).detach().float()
    real = float((actual - expected).abs().max() / expected.abs().max())
    assert real / 4 < predicted.error < 4 * real


@builds_here
@pytest.mark.parametrize("name", ["gated", "transformer"])
def test_engines_in_half_precision(
    name: str, programs: dict[str, Program], exported: Callable[[str], bytes], nets: SimpleNamespace
) -> None:
    inputs = samples_for(name, programs[name], nets, 3)
    engine = TensorRTBackend(precision="fp16").build(exported(name), inputs)
    assert 0 < engine.info.half_error < 0.01
    assert engine.info.outputs[0].dtype == "float32"
