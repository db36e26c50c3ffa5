"""Settings of each stage of a compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from ...passes.drop.recoverability import RecoverabilitySettings
from ...passes.factorize.select_ranks import RankSettings
from ...passes.mimic.settings import MimicSettings
from ...passes.prune.settings import ChannelSettings
from ...passes.solve.least_memory import least_bytes
from ...passes.solve.resolve_network import ResolveSettings
from ...runtime.measure.cache_eviction import eviction_bytes
from ..data.calibration_set import CalibrationData, CalibrationSet, View
from ..data.data_distance import data_distance, warn_if_far
from ..data.input_binding import ForwardInputs
from ..data.live_bytes import live_bytes
from ..data.sample_kinds import check_samples
from ..data.sample_sets import SampleSets, divided, warn_of_shared
from ..devices.chosen import check_device, chosen_device
from ..export.edit_device import moved
from ..export.exporter import NEWEST_OPSET
from ..frontend.capture import Model
from ..frontend.model_inputs import needed_inputs
from ..frontend.module_state import device_of_model
from ..ir.program import Program
from ..onnx.file import OLDEST_OPSET
from ..plan.goal import Goal
from ..plan.search_time import SearchTime
from ..processes.team import team
from ..rewrite.context import Context
from ..rewrite.instruments import Instruments
from ..store.analysis_store import AnalysisStore
from ..support.errors import CalibrationError, CompilerError, GoalError
from ..support.memory import agree_on_memory, bytes_in_words, settle_memory
from ..support.progress import Progress, StageClock
from ..support.setting_checks import Allowed, check_functions, check_kind, check_number, check_whole, refuse, settled
from ..synthesis.settings import SynthesisSettings
from ..trial.quick_trial import Executor

#: The largest share that judges: as many samples test, and some have to be left to fit with.
MOST_HELD_OUT = 0.45
#: ... and the largest that tests where it is set by itself.
MOST_TESTED = 0.5


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Settings of each stage of a compile.

    Arguments of `compile`, `sweep` and `apply` with the name of a setting come before it: batch, threads, seed, views
    and device where they are not None, mimic where it is not True.

    Arguments:
        resolve: How layers are re-solved.
        channels: How channels are chosen.
        ranks: How layers are factorised. Blocks with a layer that its `ignore` names are not dropped either.
        recoverability: How the loss of a block is predicted.
        mimic: How the result is trained on the features of the original. None leaves that out.
        held_out: Share of the samples that judge, and the same share again that test, above 0 and at most 0.45. At
            most 64 samples judge and 256 test.
        tested: Another share that tests, without a limit. If None, two fifths where there are labels (`Top1`), else as
            `held_out` says.
        views: Functions of a batch. Each adds a changed copy of the samples to fit with.
        reference: Samples of the data that the network meets in use, in one of the forms of calibration samples. The
            report says how far the samples are from them. If None, from what batch norms keep of the training. A
            generator is used up by one compile or sweep.
        solve_samples: Largest number of samples that the re-solve reads, originals before views.
        batch: Batch size of the measurement.
        threads: Number of CPU threads of the measurement.
        seed: Seed of all random choices.
        opset: ONNX opset of the export. If None, the exporter decides.
        device: Where networks run and layers are solved, one of torch's devices such as ``"cuda:1"``; ``"auto"`` is the
            accelerator of the machine, where there is one. If None, where the network is. Sums are in the device's own
            float64, or compensated; Gram matrices are not multiplied in TF32.
        processes: Whether the processes of ``torch.distributed``'s group work together. If None, where there are
            several; True asks for them, False works with one.
        executor: Where plans are tried that do not depend on each other: a `concurrent.futures.Executor`, or what has
            its ``submit``, as those of Ray and Dask. Its workers get the network, samples and rewrites by pickle. If
            None, in this process, or in those that work together.
        search_seconds: Time after which the search for better plans ends, in seconds. The result is then not
            repeatable. If None, it ends when no better plan is found.
        memory_bytes: What the process may have in memory at once. Batches, and what is kept for later, shrink to stay
            under it; the last bits of a result may follow from it. If None, the machine, its container and the limits
            of the process say.
        device_memory_bytes: What values on their way through the networks may take on a device other than the CPU,
            beside the weights: batches shrink to it, and what is kept for later goes to host memory, then to disk. Not
            used on the CPU. If None, what the device has free.
        save_temps: Folder for the program after every pass, as text and as ``.pt2``; in a sweep, one below it per goal.

    Raises:
        CompilerError: If a setting is out of range or of the wrong type; CalibrationError for a reference that holds
            no samples.

    Example:
        >>> limits = foldcut.ChannelLimits(multiple_of=4, ignore=("head*",))
        >>> settings = foldcut.PipelineSettings(channels=foldcut.ChannelSettings(limits=limits), held_out=0.2)
        >>> settings.channels.limits.multiple, settings.with_mimic(False).mimic
        (4, None)
    """

    resolve: ResolveSettings = field(default_factory=ResolveSettings)
    channels: ChannelSettings = field(default_factory=ChannelSettings)
    ranks: RankSettings = field(default_factory=RankSettings)
    recoverability: RecoverabilitySettings = field(default_factory=RecoverabilitySettings)
    mimic: MimicSettings | None = field(default_factory=MimicSettings)
    held_out: float = 0.1
    tested: float | None = None
    views: tuple[View, ...] = ()
    reference: CalibrationData | None = None
    solve_samples: int = 512
    batch: int = 1
    threads: int = 1
    seed: int = 0
    opset: int | None = None
    device: str | torch.device | None = None
    processes: bool | None = None
    executor: Executor | None = field(default=None, repr=False)
    search_seconds: float | None = None
    memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    save_temps: str | Path | None = None

    def __post_init__(self) -> None:
        check_kind("resolve", self.resolve, ResolveSettings)
        check_kind("channels", self.channels, ChannelSettings)
        check_kind("ranks", self.ranks, RankSettings)
        check_kind("recoverability", self.recoverability, RecoverabilitySettings)
        check_kind("mimic", self.mimic, MimicSettings, none=True)
        share = f"a share above 0 and at most {MOST_HELD_OUT}: that much judges, as much tests, the rest is fitted with"
        check_number("held_out", self.held_out, Allowed(above=0, most=MOST_HELD_OUT, words=share))
        left = Allowed(above=0, most=MOST_TESTED, none=True)
        check_number("tested", self.tested, left)
        check_functions("views", self.views, "foldcut.horizontal_flip")
        _check_reference(self.reference)
        check_whole("solve_samples", self.solve_samples, Allowed(least=1))
        _check_run(self.batch, self.threads, self.seed)
        if self.save_temps is not None and not isinstance(self.save_temps, (str, Path)):
            refuse("save_temps", self.save_temps, "the path of a folder, or None")
        check_device(self.device)
        if self.processes not in (None, True, False):
            refuse("processes", self.processes, "True, False or None")
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            refuse("executor", self.executor, "a concurrent.futures.Executor, or what has its submit, or None")
        check_whole("opset", self.opset, Allowed(least=OLDEST_OPSET, most=NEWEST_OPSET, none=True))
        for name in ("memory_bytes", "device_memory_bytes"):
            check_whole(name, getattr(self, name), Allowed(least=1, none=True))
        seconds = self.search_seconds  # the range is `SearchTime`'s
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, Real)):
            refuse("search_seconds", seconds, "a number of seconds from 0 on, or None", error=GoalError)
        settled(self)

    def with_arguments(
        self,
        *,
        batch: int | None = None,
        threads: int | None = None,
        seed: int | None = None,
        views: Sequence[View] | None = None,
        device: str | torch.device | None = None,
    ) -> PipelineSettings:
        """Set what the arguments of `compile` say otherwise.

        Arguments:
            batch: Batch size of the measurement. None keeps the setting, here and for the others.
            threads: Number of CPU threads of the measurement.
            seed: Seed of all random choices.
            views: Functions of a batch.
            device: Where networks run and layers are solved.

        Returns:
            The settings.

        Raises:
            CompilerError: If an argument is out of range or of the wrong type.
        """
        if views is not None:
            check_functions("views", views, "foldcut.horizontal_flip")
            views = tuple(views)
        given: dict[str, Any] = {"batch": batch, "threads": threads, "seed": seed, "views": views, "device": device}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def with_executor(self, executor: Executor | None) -> PipelineSettings:
        """Set where plans are tried. None keeps the setting."""
        return self if executor is None else replace(self, executor=executor)

    def with_mimic(self, mimic: MimicSettings | bool | None) -> PipelineSettings:
        """Set the training as an argument of `compile` asks for it.

        Arguments:
            mimic: True keeps the setting, False and None leave training out, a `MimicSettings` replaces it.

        Returns:
            The settings.
        """
        if mimic is True:
            return self
        return replace(self, mimic=mimic or None)

    def split(self, samples: CalibrationSet, program: Program) -> SampleSets:
        """Divide the samples into those that fit, judge and test. Warns if there are too few.

        Arguments:
            samples: The calibration set.
            program: The network that takes them.

        Returns:
            The three parts. Views are added to the samples to fit with only.

        Raises:
            CalibrationError: If the samples do not fit the inputs of the program.
        """
        samples = samples.aligned(program)
        samples.check(program)
        sets = divided(samples, self.seed, self.held_out, self.tested)
        warn_of_shared(sets, len(samples))
        return sets.with_views(self.views)

    @staticmethod
    def _aligned(reference: CalibrationData, program: Program) -> CalibrationSet:
        """The reference as the network takes it. Raises CalibrationError, which says whose it is."""
        dtypes = {spec.name: spec.dtype for spec in program.inputs}
        known = ForwardInputs(names=tuple(dtypes), required=frozenset(dtypes), dtypes=dtypes, chosen=True)
        try:
            read = CalibrationSet.of(reference, inputs=known)
            if len(read.leaves) == len(known.names) == 1:  # by whichever name
                read = CalibrationSet.of(read.leaves[0], inputs=known)
            found = read.aligned(program)
            found.check(program)
        except CalibrationError as cause:
            raise cause.about("reference") from cause
        return found

    def settle_memory(self, ctx: Context, *, measured: bool) -> None:
        """Find out how much memory there is for the rest of a compile, and check that it is enough.

        Arguments:
            ctx: The context, with the original network and the samples.
            measured: Whether latency is measured as well.

        Raises:
            CompilerError: If a limit leaves less than is needed at the least.
        """
        least = least_bytes(
            ctx.teacher,
            views=ctx.fit.most_views,
            rows_per_column=self.resolve.rows_per_column,
            trained=self.mimic is not None,
            measuring_bytes=eviction_bytes() if measured else 0,
        )
        budget = None if self.computes_on.type == "cpu" else self.device_memory_bytes
        needed = 2 * live_bytes(ctx.teacher).most * ctx.fit.most_views
        if budget is not None and budget < needed:
            raise CompilerError(
                f"a device memory limit of {bytes_in_words(budget)} is too little: one sample takes about "
                f"{bytes_in_words(needed)} on its way through both networks",
                hint="allow more, or compile with smaller samples",
            )
        settle_memory(least, budget)
        agree_on_memory(lambda working: min(team().objects(working)))

    @property
    def computes_on(self) -> torch.device:
        """The device that the settings say: the CPU where they say none."""
        return chosen_device(self.device, torch.device("cpu"))

    @property
    def told(self) -> dict[str, object]:
        """What processes that work together have to have in common: not the number of a device, nor a folder."""
        return {"settings": replace(self, device=None, reference=None, save_temps=None, executor=None)}

    @property
    def where(self) -> list[str]:
        """What results that are kept depend on besides their inputs: sums round otherwise on another kind of device."""
        kind = self.computes_on.type
        return [] if kind == "cpu" else [f"computed on {kind}"]

    def at_home(self, model: Model) -> PipelineSettings:
        """Say where to compute, if nothing does: where a network is.

        Arguments:
            model: The network, as it was given.

        Returns:
            The settings, with a `torch.device`.

        Raises:
            CompilerError: If the parts of the network are on several devices.
        """
        return replace(self, device=chosen_device(self.device, device_of_model(model)))

    def context(
        self,
        program: Program,
        samples: CalibrationSet,
        goal: Goal,
        store: AnalysisStore,
        clock: StageClock,
        progress: Progress,
    ) -> Context:
        """Make the context that rewrites work with.

        Arguments:
            program: The original network.
            samples: The calibration set.
            goal: The goal.
            store: Where results of analyses are kept.
            clock: Counts the time of each stage.
            progress: Gets (stage, done, total).

        Returns:
            The context, without a latency to measure. Warns where the samples are far from the data of the network.

        Raises:
            CalibrationError: If the samples do not fit the inputs of the program.
        """
        program = moved(program, self.computes_on)
        sets = self.split(samples, program)
        with clock.stage("compare data"):
            reference = None if self.reference is None else self._aligned(self.reference, program)
            distance = data_distance(program, sets.fit, reference)
            warn_if_far(distance, len(samples))
        return Context(
            teacher=program,
            goal=goal,
            sets=sets,
            distance=distance,
            latency=None,
            store=store,
            clock=clock,
            progress=progress,
            time=SearchTime(self.search_seconds),
            resolve=self.resolve,
            solve_samples=self.solve_samples,
            seed=self.seed,
            executor=self.executor,
            instruments=Instruments(folder=Path(self.save_temps) if self.save_temps and team().first else None),
        )


def with_reference_read(model: Model, settings: PipelineSettings) -> PipelineSettings:
    """The settings with a reference that was read as calibration samples of the network are, and can be read again.
    Raises CalibrationError, which says whose it is."""
    if settings.reference is None:
        return settings
    try:
        return replace(settings, reference=CalibrationSet.of(settings.reference, inputs=needed_inputs(model)))
    except CalibrationError as cause:
        raise cause.about("reference") from cause


def _check_reference(reference: object) -> None:
    """Raise CalibrationError for what is no reference: samples made from the network alone say nothing of its data."""
    if reference is None or isinstance(reference, CalibrationSet):
        return
    if isinstance(reference, SynthesisSettings):
        raise CalibrationError(
            "reference: samples that are made from the network alone say no more of its data than the network does",
            actual="SynthesisSettings",
            hint="pass samples of the data that the network meets in use, or leave reference out: the statistics of "
            "batch norms then stand for them",
        )
    try:
        check_samples(reference)
    except CalibrationError as cause:
        raise cause.about("reference") from cause


def _check_run(batch: object, threads: object, seed: object) -> None:
    """Raise CompilerError for an invalid batch size, number of threads or seed."""
    for name, value in (("batch", batch), ("threads", threads)):
        check_whole(name, value, Allowed(least=1, words="a whole number: batch and threads start at 1"))
    # torch takes others, what draws inputs does not
    check_whole("seed", seed, Allowed(least=0, most=2**63 - 1, words="a whole number from 0 on, below 2 ** 63"))


def check_options(
    mimic: MimicSettings | bool | None,
    progress: bool | Progress,
    cache: bool | str | Path,
    settings: PipelineSettings | None,
) -> None:
    """Raise CompilerError for options that `compile` does not take."""
    if mimic is not None and not isinstance(mimic, (bool, MimicSettings)):
        refuse("mimic", mimic, "True, False, None or a foldcut.MimicSettings")
    if not isinstance(progress, bool) and not callable(progress):
        refuse("progress", progress, "True, False or a function of (stage, done, total)")
    if not isinstance(cache, (bool, str, Path)):
        refuse("cache", cache, "True, False or the path of a folder")
    check_kind("settings", settings, PipelineSettings, none=True)
    if settings is not None:
        SearchTime(settings.search_seconds)
