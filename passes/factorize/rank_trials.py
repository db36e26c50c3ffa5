"""What factorised layers do to a network's outputs, on a few samples and before anything is solved again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.output_error import bounded, relative_to
from ...compiler.devices.precision import WideSums, added
from ...compiler.ir.compare import squared_distance
from ...compiler.ir.execute import Tensors, bind, descendants, run_until
from ...compiler.ir.program import is_tensor, output_nodes
from ...compiler.processes.sharing import in_batches, own
from ...compiler.support.memory import at_most
from ...compiler.support.progress import Progress, silent
from .factorize import shift_tensors
from .select_ranks import Option, RankAnalysis

#: Values of a batch that are held while layers are exchanged one by one, in bytes, where there is plenty of memory.
HELD_BYTES = 512 << 20


class Trials(Protocol):
    """Errors of plans of ranks: what `RankTrials` measures."""

    def alone(self, choice: Mapping[str, Option]) -> dict[str, float]: ...

    def error(self, choice: Mapping[str, Option]) -> float: ...

    def without(self, choice: Mapping[str, Option]) -> dict[str, float]: ...


class RankTrials:
    """Runs the original network with the weights that factors stand for; no graph is rewritten for it.

    Every error is relative, sum ||S - T||^2 / sum ||T||^2 over all outputs and samples, accumulated in float64;
    `BROKEN` where it is not finite.
    """

    def __init__(self, analysis: RankAnalysis, samples: CalibrationSet, *, progress: Progress = silent) -> None:
        self.analysis, self.samples, self._progress = analysis, samples, progress
        self._outputs = list(dict.fromkeys(node.name for node in output_nodes(analysis.program.graph)))
        self._tensors: dict[tuple[str, Option], Tensors] = {}

    def alone(self, choice: Mapping[str, Option]) -> dict[str, float]:
        """The error with each layer of the choice factorised and all others whole."""
        tensors = self._weights(choice)
        return self._errors({}, tensors)[1]

    def error(self, choice: Mapping[str, Option]) -> float:
        """The error with all layers of the choice factorised."""
        return self._errors(self._weights(choice), {})[0]

    def without(self, choice: Mapping[str, Option]) -> dict[str, float]:
        """The error of the choice with one of its layers whole again, for each of them."""
        return self._errors(self._weights(choice), {name: {} for name in choice})[1]

    def _errors(self, base: Mapping[str, Tensors], exchanged: Mapping[str, Tensors]) -> tuple[float, dict[str, float]]:
        """The error of a network with the layers `base`, and of each that has one of them exchanged."""
        program = self.analysis.program
        calls = [name for name, node in program.nodes.items() if node.op == "call_function"]
        held = calls if exchanged else self._outputs
        behind = {name: descendants(program, [name]) | {name} for name in exchanged}
        sums = WideSums()
        size = in_batches(len(self.samples), self._batch_that_fits())
        done, whole = 0, len(exchanged) * -(-len(self.samples) // size)
        with torch.no_grad():
            for _, batch in own(self.samples.batches(size)):
                given = bind(program, batch)
                wanted = run_until(program, self._outputs, given)
                values = run_until(program, held, given, _merged(base), free=not exchanged)
                sums.add("energy", added(squared_distance(v, v)[1] for v in wanted.values()))
                sums.add("error", _distance(wanted, values))
                for name, tensors in exchanged.items():
                    kept = {key: value for key, value in (given | values).items() if key not in behind[name]}
                    changed = run_until(program, self._outputs, kept, _merged({**base, name: tensors}))
                    sums.add(f"error {name}", _distance(wanted, changed))
                    done += 1
                    self._progress("weigh layers", done, whole)
        sizes = sums.floats()
        return _relative(sizes, "error"), {name: _relative(sizes, f"error {name}") for name in exchanged}

    def _weights(self, choice: Mapping[str, Option]) -> dict[str, Tensors]:
        """The parameters that stand for each layer's factors; those of the last choice are kept."""
        missing = {name: option for name, option in choice.items() if (name, option) not in self._tensors}
        for item in self.analysis.factors(missing):
            program, candidate = self.analysis.program, self.analysis.candidates[item.layer]
            weight = program.module.get_parameter(candidate.layer.weight)
            tensors = {candidate.layer.weight: item.dense.reshape(weight.shape).to(weight.detach())}
            if item.shift is not None:
                tensors |= shift_tensors(program, candidate.target, item.shift)
            self._tensors[item.layer, missing[item.layer]] = tensors
        self._tensors = {key: self._tensors[key] for key in choice.items()}
        return {name: self._tensors[name, option] for name, option in choice.items()}

    def _batch_that_fits(self) -> int:
        """Samples whose values, all those of the network, stay within `HELD_BYTES`; at most 32."""
        program = self.analysis.program
        nodes = [n for n in program.graph.nodes if n.op == "call_function" and is_tensor(n)]
        held = sum(4 * math.prod(program.shape(node)) for node in nodes)
        return max(1, min(32, at_most(HELD_BYTES) // max(1, held)))


def _merged(tensors: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    return {name: value for layer in tensors.values() for name, value in layer.items()}


def _distance(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return added(squared_distance(value, found[name])[0] for name, value in wanted.items())


def _relative(sums: Mapping[str, float], error: str) -> float:
    return bounded(relative_to(sums, error, "energy"))
