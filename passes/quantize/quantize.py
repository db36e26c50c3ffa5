"""A network with layers in int8: grids for values from data, weights rounded one layer after another, each on what
those before it now deliver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.devices.precision import WideSum, in_float64
from ...compiler.ir.edit import set_tensors
from ...compiler.ir.execute import run_until
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import in_batches, in_turn
from ...compiler.support.errors import RewriteError, plural
from ...compiler.support.progress import Progress, silent
from ..solve.layers import Layer, add_delta, current_parameter, find_layers
from ..solve.lockstep import Lockstep, Step, plan_steps
from ..solve.moments import Moments, thinning
from ..solve.resolve_network import batch_size_for, touched
from .edit_quantize import LEAST_SCALE, IntegerWeights, ValueGrid, quantize_program
from .rounding import Rounded, rounded, rounding_macs
from .values import quantizable

#: A bias is at most so many steps: half of what int32 holds, so that sums of products fit in beside it.
MOST_STEPS = 2**30


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights are rounded: integers up to `limit`, biases stored as `bias` says (``int32`` or ``float32``), and the
    rows of inputs that a Gram matrix reads, per column."""

    limit: int
    bias: str = "int32"
    rows_per_column: int | None = 50


def quantize(
    program: Program,
    layers: Sequence[str],
    grids: Mapping[str, ValueGrid],
    samples: CalibrationSet,
    how: Rounding,
    *,
    progress: Progress = silent,
) -> Program:
    """Put the values on their grids and round the weights of the layers, in topological order, in one streamed sweep.

    Each weight is rounded by the Gram matrix of the layer's inputs (`rounded`) as the layers before it, rounded by
    then, deliver them; its bias takes over what that changes on average. Weights and biases are not solved again toward
    the original: what rounding and clipping do to values is noise to them, and fitting it loses more than it gains
    (docs/quantize.md). Products are in float32, sums and solves in float64.
    """
    student = quantize_program(program, grids, {}, note="values on integer grids")
    there, _ = find_layers(student)
    own = {name for name, node in student.nodes.items() if node.op == "call_function" and name not in program.nodes}
    targets, changed = touched(student, there, {}, {}, own)
    # only inputs are asked for: a step for each layer, which ends where the layer begins
    groups = [[replace(t, anchor=t.layer.input, counterparts=())] for t in targets if t.layer.node in layers]
    steps = plan_steps(program, student, groups, changed)
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[str, Rounded] = {}
    batch_size = in_batches(len(samples), batch_size_for(student, there.values()))
    with Lockstep(program, student, samples, batch_size=batch_size) as lockstep:
        for done, step in enumerate(steps, 1):
            lockstep.advance(step, tensors)
            layer = step.targets[0].layer
            gram = _input_gram(lockstep, step, layer, tensors, how.rows_per_column)
            stored[layer.node] = _round(student, layer, gram, how, _grid_before(layer, grids), tensors)
            lockstep.finish(step)
            progress("quantise", done, len(steps))
    rounded_program = set_tensors(program, tensors, note="weights and biases on integer grids") if tensors else program
    weights = {
        name: _integers(there[name], grids, stored[name], _bias(rounded_program, there[name]), how) for name in layers
    }
    note = f"{plural(len(layers), 'layer')} in int8"
    return quantize_program(rounded_program, grids, weights, note=note)


def _input_gram(
    lockstep: Lockstep, step: Step, layer: Layer, tensors: dict[str, torch.Tensor], rows_per_column: int | None
) -> torch.Tensor:
    """The Gram matrix of a layer's inputs as the student's layers before it deliver them."""
    student, total = lockstep.student, WideSum()
    for view in lockstep.views(step):
        with torch.no_grad():
            value = run_until(student, [layer.input], view.student, tensors)[layer.input]
        columns, count = layer.extent(student, value)
        rows = layer.rows(student, value, thinning(count * len(lockstep), columns, rows_per_column))
        total.add(Moments.of(rows, rows.new_zeros(len(rows), 0, rows.shape[2])).gram)
    return total.value()


def plain_integers(
    program: Program, layers: Sequence[str], grids: Mapping[str, ValueGrid], how: Rounding
) -> dict[str, IntegerWeights]:
    """Weights rounded value by value: the whole range of each output, without data."""
    there = quantizable(program)
    found = {}
    for name in layers:
        layer, bias = there[name], _bias(program, there[name])
        plain = rounded_plainly(program, layer, _grid_before(layer, grids), how.limit)
        found[name] = _integers(layer, grids, plain, bias, how)
    return found


def rounded_plainly(program: Program, layer: Layer, grid: ValueGrid, limit: int) -> Rounded:
    """The weight of a layer rounded value by value over the whole range of each output, for inputs on a grid."""
    bias = _bias(program, layer)
    weight = in_float64(_matrix(layer, program.module.get_parameter(layer.weight).detach(), bias))
    scales = torch.maximum(weight.abs().amax(2, keepdim=True) / limit, _least_scales(weight, bias, grid))
    scales = scales.float().double()
    values = (weight / scales).round().clamp(-limit, limit).to(torch.int8)
    return Rounded(values=values, scales=scales, shift=weight.new_zeros(weight.shape[:2]))


def _gram(layer: Layer, gram: torch.Tensor) -> torch.Tensor:
    """The Gram matrix that a layer is rounded by: without a bias nothing takes over what is lost on average."""
    if layer.bias is None:
        gram = gram.clone()
        gram[:, -1], gram[:, :, -1], gram[:, -1, -1] = 0.0, 0.0, 1.0
    return gram


def _round(
    student: Program,
    layer: Layer,
    gram: torch.Tensor,
    how: Rounding,
    grid: ValueGrid,
    tensors: dict[str, torch.Tensor],
) -> Rounded:
    """The weight of a layer rounded, in `tensors`, with what its bias takes over."""
    weight = current_parameter(student, layer.weight, tensors)
    bias = None if layer.bias is None else current_parameter(student, layer.bias, tensors)
    matrix = _matrix(layer, weight, bias)
    least = _least_scales(matrix, bias, grid)
    macs = rounding_macs(matrix)
    found = in_turn(macs, lambda: rounded(matrix, _gram(layer, gram), how.limit, least))
    tensors[layer.weight] = found.weight.reshape(weight.shape).to(weight)
    if layer.bias is not None and bias is not None:
        tensors[layer.bias] = add_delta(bias, found.shift)
    return found


def _bias(program: Program, layer: Layer) -> torch.Tensor | None:
    return None if layer.bias is None else program.module.get_parameter(layer.bias).detach()


def _matrix(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The weight as a matrix. Raises RewriteError where it or the bias is not finite: no grid has a place for that."""
    finite = weight.isfinite().all() if bias is None else weight.isfinite().all() & bias.isfinite().all()
    if not bool(finite):
        raise RewriteError(
            "its weights are not finite", node=layer.node, hint=f"repair the network: {layer.weight} holds inf or NaN"
        )
    return layer.matrix(weight)


def _grid_before(layer: Layer, grids: Mapping[str, ValueGrid]) -> ValueGrid:
    return grids[layer.input.removesuffix("_dequantized")]


def _least_scales(weight: torch.Tensor, bias: torch.Tensor | None, grid: ValueGrid) -> torch.Tensor:
    """Scales of a weight as a matrix that are large enough for its bias, in steps of the input's scale times these, to
    fit into int32: an output of zeros may have any bias (a batch norm whose factor is zero is folded into one). Biases
    in floating point too: runtimes may round them themselves."""
    steps = torch.full_like(in_float64(weight[:, :, :1]), LEAST_SCALE)
    if bias is not None:
        steps = torch.maximum(steps, in_float64(bias).abs().reshape(steps.shape) / MOST_STEPS)
    return (steps / grid.scale).clamp(min=LEAST_SCALE)


def _integers(
    layer: Layer, grids: Mapping[str, ValueGrid], found: Rounded, bias: torch.Tensor | None, how: Rounding
) -> IntegerWeights:
    """A rounded weight as it is stored, the bias in steps of the input's times the weight's.

    Raises RewriteError where sums of products could leave the 32 bits that kernels add them up in.
    """
    grid = _grid_before(layer, grids)
    scales = found.scales.reshape(-1).float()
    steps = scales * grid.scale
    reach = found.values.double().abs().sum(2).reshape(-1) * max(
        grid.high - grid.zero_point, grid.zero_point - grid.low
    )
    stored, bias_scales = bias, None
    if bias is not None and how.bias == "int32":
        stored = (in_float64(bias) / steps.double()).round()
        reach, bias_scales = reach + stored.abs(), steps
        stored = stored.clamp(-(2**31), 2**31 - 1).to(torch.int32)
    if float(reach.max()) >= 2**31:
        raise RewriteError(
            "its sums of products may not fit into 32 bits",
            node=layer.node,
            hint=f"leave it in floating point: foldcut.Quantize(ignore=({layer.node!r},))",
        )
    return IntegerWeights(values=found.values, scales=scales, limit=how.limit, bias=stored, bias_scales=bias_scales)
