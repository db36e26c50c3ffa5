"""Calibration samples from a network alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.live_bytes import live_bytes
from ..data.synthetic import SyntheticSet
from ..export.edit_types import in_stored_types, widened
from ..frontend.capture import Model, capture, opened
from ..frontend.model_inputs import needed_inputs
from ..ir.edit_folds import fold_parameters
from ..ir.program import Batch, Program
from ..store.analysis_store import AnalysisStore
from ..store.cache_folder import kept_in
from ..store.checkpoint import Checkpoint
from ..support.allocator import memory_at_hand
from ..support.errors import CalibrationError, first_line, plural
from ..support.memory import at_most
from ..support.one_at_a_time import alone
from ..support.progress import Progress, StageClock, WholeProgress, opened_progress
from ..support.setting_checks import check_kind
from ..support.whole import Expected, Forecast
from .descent import Aim, Descent, class_output, standing
from .disagreement import rival_of
from .input_kinds import InputKind, Kind, input_kinds
from .input_range import InputRange, found_range, in_range
from .norm_statistics import norm_targets
from .settings import SynthesisSettings

#: The stage, as progress shows it and the report counts it.
STAGE = "synthesise"
#: Weight of the agreement with another network where the settings say none: of ResNet-20 and one with half its channels
#: the disagreement rises from 0.37 to 0.82, and the statistics of the batch norms are as near within 1 %. Ten times as
#: much (0.98, 6 %) costs the next re-solve four points (docs/no_data.md).
COMPETE = 0.001
#: Bytes that the values of a batch may take while gradients go back through them.
_MOST_BYTES = 3 << 30
#: Samples that say which range of numbers the network takes.
_TRIED = 32


def synthesise(
    model: Model,
    settings: SynthesisSettings | None = None,
    *,
    against: Model | None = None,
    seed: int = 0,
    progress: bool | Progress = True,
    cache: bool | str | Path = True,
) -> SyntheticSet:
    """Make calibration samples from a network alone.

    `compile` does this itself where it is given no data. Here the samples can be looked at, kept, and mixed with real
    ones. They are the same for the same network, settings and seed on one machine. A call that was interrupted goes on
    from its cache, and the next one takes the samples from there.

    Arguments:
        model: The network, in any form that `compile` takes.
        settings: How samples are made. A module also needs the shape of one there: ``input_shape=(3, 224, 224)``.
        against: Another network with the same inputs and outputs, such as the result of a first compile without data:
            samples are then made on which the two disagree, as far as the statistics of the batch norms allow it
            (`SynthesisSettings.compete`).
        seed: Seed of all random choices, where the settings have none.
        progress: As in `compile`. Says how long it will take once one step was timed.
        cache: As in `compile`.

    Returns:
        The samples, a `CalibrationSet` whose `made` says how they were made.

    Raises:
        CalibrationError: If the shape of the inputs is not known, nobody could say what to put there, or `against` has
            other inputs or outputs.
        CaptureError: If a network cannot be captured.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> settings = foldcut.SynthesisSettings(count=8, input_shape=(3, 16, 16), iterations=2)
        >>> samples = foldcut.synthesise(net, settings, progress=False, cache=False)
        >>> samples.leaves[0].shape, samples.made["norms"]
        (torch.Size([8, 3, 16, 16]), 1)
    """
    check_kind("settings", settings, SynthesisSettings, none=True, error=CalibrationError)
    with alone(), memory_at_hand(), opened_progress(progress, STAGE) as show, kept_in(cache) as folder:
        clock = StageClock(show)
        network = opened(model)
        with clock.stage("capture"):
            program = captured(network, settings)
        watched = Watched(clock=clock, show=show, seed=seed, folder=folder)
        return made_samples(program, settings, watched, against=against)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Who counts the time and shows how far it is, the seed of the call, and where what it finds out is kept, if it
    is."""

    clock: StageClock
    show: Progress
    seed: int
    folder: Path | None


def is_asked_for(calibration: object) -> bool:
    """Whether what stands in the place of samples asks for made ones."""
    return calibration is None or isinstance(calibration, SynthesisSettings)


def captured(network: Model, settings: SynthesisSettings | None) -> Program:
    """The network as a program, its inputs as they are said to be, or as it says itself. Raises CaptureError, and
    CalibrationError where nothing says it."""
    settings = settings or SynthesisSettings()
    program = widened(fold_parameters(capture(network, _example(network, settings))))
    first = next((node for node in program.graph.nodes if node.op == "placeholder"), None)
    if settings.input_shape is not None and first is not None and program.shape(first)[1:] != settings.input_shape:
        raise CalibrationError(
            "input_shape (--input-shape) is not the shape that the network was exported with",
            expected=program.shape(first)[1:],
            actual=settings.input_shape,
            hint="leave it out: the network says it itself",
        )
    return program


def _example(network: Model, settings: SynthesisSettings) -> Batch | None:
    """Two inputs of the shape that is given; None where the network has its own. A module that looks its inputs up
    in a table is tried with indices where it does not run with numbers."""
    shape = settings.input_shape
    if shape is None:
        if isinstance(network, nn.Module):
            raise CalibrationError(
                "without data the shape of one input must be known, and a module does not say it",
                hint="pass foldcut.SynthesisSettings(input_shape=(3, 224, 224)) in the place of the data (on the "
                "command line: --input-shape 3,224,224)",
            )
        return None
    inputs = needed_inputs(network)
    if inputs is not None and len(inputs.required) > 1:
        raise CalibrationError(
            f"input_shape is that of one input, and the network takes {len(inputs.required)}",
            actual=", ".join(sorted(inputs.required)),
            hint="pass the network as a torch.export.ExportedProgram or an ONNX file, which say the shapes of all "
            "inputs, or a calibration set",
        )
    wanted = next(iter(inputs.dtypes.values()), inputs.dtype) if inputs is not None else None
    numbers = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    if wanted is not None and not wanted.is_floating_point:
        return torch.zeros(2, *shape, dtype=wanted)
    numbers = numbers.to(wanted or torch.float32)
    if inputs is None or inputs.run is None:
        return numbers
    indices = torch.zeros(2, *shape, dtype=torch.int64)
    for example in (numbers, indices):
        try:
            inputs.run(example)
        except Exception:  # a network raises what it likes when it is called with something else than it takes
            continue
        return example
    return numbers  # capture says what is wrong


def made_samples(
    program: Program, settings: SynthesisSettings | None, watched: Watched, *, against: Model | None = None
) -> SyntheticSet:
    """Samples for a program, or those that were made before. Warns of what they are worth. Raises CalibrationError
    where nobody could say what to put into an input, and where the network that they are made against does not fit."""
    settings = settings or SynthesisSettings()
    if settings.seed is None:
        settings = replace(settings, seed=watched.seed)
    if settings.compete and against is None:
        raise CalibrationError(
            f"compete={settings.compete:g} is about another network, and there is none",
            hint="pass it: foldcut.synthesise(net, settings, against=first.module), and what that makes to compile; or "
            "leave compete out",
        )
    kinds = input_kinds(program)
    _check_inputs(program, kinds)
    targets = norm_targets(program) if any(kind.kind is not Kind.INDICES for kind in kinds) else ()
    aim = Aim(program=program, kinds=kinds, targets=targets, classes=class_output(program), settings=settings)
    if against is not None:
        with watched.clock.stage("capture"):
            rival = rival_of(program, kinds, against, aim.classes is not None)
        aim = replace(aim, rival=rival, compete=COMPETE if settings.compete is None else settings.compete)
    store, inputs = AnalysisStore(watched.folder), [program, settings, aim.rival, aim.compete]

    def compute() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        making = _Making(aim, watched, store.checkpoint(STAGE, inputs))
        made = making.run()
        return made, {f"input {i}": leaf for i, leaf in enumerate(making.leaves)}

    with watched.clock.stage(STAGE):
        made, tensors = store.result(STAGE, inputs, compute)
    args, kwargs = program.structure(in_stored_types(program, [tensors[f"input {i}"] for i in range(len(kinds))]))
    for words in _warnings(made):
        warnings.warn(words, stacklevel=2)
    return SyntheticSet.from_leaves(kwargs or args, made)


def _check_inputs(program: Program, kinds: Sequence[InputKind]) -> None:
    """Raise CalibrationError for a network that no calibration set fits: a fixed batch."""
    two = [kind.drawn(2, torch.Generator().manual_seed(0)) for kind in kinds]
    args, kwargs = program.structure(two)
    SyntheticSet.from_leaves(kwargs or args, {}).check(program)


def _warnings(made: dict[str, Any]) -> Iterator[str]:
    yield (
        f"no data were given: {plural(made['count'], 'calibration sample was', 'calibration samples were')} made from "
        f"the network alone ({made['how']}); "
        "errors and tests are over such samples, so measure the result on real inputs before it is used"
    )
    if made["weak"]:
        yield made["weak"]


class _Making:
    """Samples made batch by batch; what is finished, and the batch at hand, are kept now and then."""

    def __init__(self, aim: Aim, watched: Watched, checkpoint: Checkpoint) -> None:
        self._aim, self._watched, self._checkpoint = aim, watched, checkpoint
        settings = aim.settings
        most = max(2, at_most(_MOST_BYTES) // max(1, _bytes_of_sample(aim)))
        parts = -(-settings.count // min(settings.batch, most))
        self._sizes = [len(part) for part in torch.arange(settings.count).tensor_split(parts)]
        self._failed: str | None = None
        self._told = False
        self.leaves: list[torch.Tensor] = []
        #: Of each batch how far the statistics were, and how much another network disagreed: in the beginning, in the
        #: end.
        self._figures: list[list[float]] = []

    def run(self) -> dict[str, Any]:
        """Make them all; returns what is to be known of them."""
        began = time.process_time()
        kept = self._checkpoint.read()
        first = self._drawn(0, min(_TRIED, self._aim.settings.count))
        found = found_range(self._aim, first)
        data, tensors = kept if kept is not None else ({"spent_s": 0.0, "figures": []}, {})
        self._figures = list(data["figures"])
        self.leaves = [tensors[f"finished {i}"] for i in range(len(self._aim.kinds))] if self._figures else []
        spent_s = data["spent_s"]
        for number in range(len(self._figures), len(self._sizes)):
            drawing = time.perf_counter()
            start = in_range(self._aim, self._drawn(number, self._sizes[number]), found)
            if not self._aim.has_gradient:
                left = len(self._sizes) - number - 1
                self._foresee((time.perf_counter() - drawing) * left)
                self._watched.show(STAGE, number + 1, len(self._sizes))
            descent = Descent(self._aim, start, self._seed(number))
            before = None
            if "done" in data and number == len(data["figures"]):
                before = data["before"]
                descent.go_on(data["done"], tensors)
            self._descend(number, descent, before, spent_s - began)
            self.leaves = _joined(self.leaves, descent.samples)
        return self._said(found, spent_s + time.process_time() - began)

    def _descend(self, number: int, descent: Descent, before: list[float] | None, offset_s: float) -> None:
        """All steps of one batch; `before` are its figures in the beginning, where they are known."""
        steps = self._aim.settings.iterations if self._aim.has_gradient else 0
        figures = self._figures
        if before is None:
            before = self._figured(descent)
        all_steps = steps * len(self._sizes)
        while descent.done < steps and self._failed is None:
            began = time.perf_counter()
            try:
                descent.step()
            except RuntimeError as cause:  # an operator without a gradient, or values that overflow
                self._failed = first_line(cause)
                break
            done = number * steps + descent.done
            self._foresee((time.perf_counter() - began) * (all_steps - done))
            self._watched.show(STAGE, done, all_steps)
            self._checkpoint.keep(
                lambda: standing(
                    descent,
                    self.leaves,
                    {"figures": figures, "spent_s": offset_s + time.process_time(), "before": before},
                )
            )
        self._figures.append(before + self._figured(descent))

    def _figured(self, descent: Descent) -> list[float]:
        """(distance of the statistics, disagreement), as the samples of a batch stand."""
        return [descent.distance() if self._aim.targets else 0.0, descent.disagreement()]

    def _foresee(self, seconds: float) -> None:
        """Say what is to be done and how long it takes, once, where somebody watches."""
        if isinstance(self._watched.show, WholeProgress) and not self._told:
            self._told = True
            words = f"{plural(self._aim.settings.count, 'sample')} to make without data: {self._how()}"
            self._watched.show.foresee(words, Forecast({STAGE: Expected(seconds=seconds)}))

    def _drawn(self, number: int, count: int) -> list[torch.Tensor]:
        """The beginning of so many samples of a batch."""
        generator = torch.Generator().manual_seed(self._seed(number))
        return [kind.drawn(count, generator) for kind in self._aim.kinds]

    def _seed(self, number: int) -> int:
        return ((self._aim.settings.seed or 0) * 1_000_003 + number) % 2**63

    def _how(self) -> str:
        aim = self._aim
        parts = [_begun(kind) for kind in aim.kinds]
        words = " and ".join(dict.fromkeys(parts))
        if aim.has_gradient and self._failed is None:
            words += f", changed in {plural(aim.settings.iterations, 'step')}"
            norms = plural(len(aim.targets), "batch norm")
            ends = [f"to the statistics of {norms}"] if aim.targets else []
            ends += ["to differ in class"] if aim.classes is not None and aim.settings.diverse else []
            ends += ["to be what another network disagrees on"] if aim.competes else []
            words += " " + " and ".join(ends)
        return words

    def _said(self, found: InputRange, seconds: float) -> dict[str, Any]:
        aim = self._aim
        matched = bool(aim.targets) and aim.has_gradient and self._failed is None
        before, disagreed, after, disagrees = (sum(c) / len(c) for c in zip(*self._figures, strict=True))
        return {
            "inputs": [kind.name for kind in aim.kinds],
            "count": aim.settings.count,
            "how": self._how(),
            "norms": len(aim.targets),
            "distance": {"before": before, "after": after} if aim.targets else {},
            "disagreement": {"before": disagreed, "after": disagrees} if aim.rival is not None else {},
            "range": found.name if any(kind.kind is Kind.IMAGE for kind in aim.kinds) else None,
            "seconds": round(seconds, 1),
            "weak": None if matched else self._weak(),
        }

    def _weak(self) -> str:
        if self._failed is not None:
            why = f"they could not be changed by its gradient ({self._failed})"
        elif self._aim.targets:
            why = "no steps were asked for"
        elif all(kind.kind is Kind.INDICES for kind in self._aim.kinds):
            why = "indices are not changed by gradients, so nothing in the network tells what its data were like"
        else:
            why = (
                "the network has no batch norms, or has them folded into its layers, so nothing in it tells what its "
                "data were like"
            )
        return f"samples made without data are weak here: {why}; a few real inputs are better than any number of them"


def _bytes_of_sample(aim: Aim) -> int:
    """What stays in memory of a sample while gradients go back."""
    programs = [aim.program, aim.rival.program] if aim.rival is not None and aim.competes else [aim.program]
    return sum(live_bytes(program).whole for program in programs)


def _joined(finished: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """What is finished, with one more batch behind it."""
    return [torch.cat(pair) for pair in zip(finished, leaves, strict=True)] if finished else leaves


def _begun(kind: InputKind) -> str:
    if kind.kind is Kind.INDICES:
        return f"indices up to {kind.rows - 1:,}"
    if kind.kind is Kind.IMAGE:
        return f"dead leaves of {' x '.join(map(str, kind.sizes))}"
    return "Gaussian noise"
