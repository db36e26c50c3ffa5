"""What a plan would save, measured on the backend before anything is re-solved (weights do not change latency)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.export.edit_types import as_measured
from ...compiler.export.exporter import target_opset, to_onnx
from ...compiler.ir.program import Program
from ...compiler.onnx.model_file import OnnxFile, OnnxModel
from ...compiler.processes.sharing import by_first, measured_by_first
from ...compiler.store.cache_folder import default_folder
from ...compiler.support.errors import CompilerError
from ...compiler.support.memory import available_bytes
from ...compiler.support.progress import Progress, silent
from ..measure.backend import Array, Backend, NodeTime, ProfilingBackend, Regime, Runner
from ..measure.conditions import Conditions
from ..measure.fresh_loads import FULL, QUICK, Effort, measure_loads
from ..measure.loading import opened
from ..measure.measure import measure_savings, measure_single
from ..measure.measurement import Measurement
from ..measure.measurement_cache import MeasurementCache
from ..measure.timing import Timing
from ..predict.integer_kernels import IntegerKernels, probe_integers
from ..predict.latency_table import LatencyTable
from ..predict.lattice import KINDS, Lattice, probe_lattice

#: Rounds that a segment is timed in, and the block of each: what a plan saves is measured as a whole before it counts.
_TABLE_ROUNDS, _TABLE_BLOCK_MS = 12, 4.0
#: A comparison loads the original twice and the other network once, and reads their files.
_SESSIONS = 4


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """Where the time goes, node by node, in foldcut's export of the original (`model`) and in the finished model."""

    model: OnnxModel = field(repr=False)
    before: tuple[NodeTime, ...]
    after: tuple[NodeTime, ...]


class LatencyProbe:
    """The original on a backend, and variants of it, measured against it, under `conditions`: plans on the way, and
    the finished model.

    Whole networks are compared over fresh loads of both; plans on the way with less effort than the result
    (`fresh_loads.QUICK`), so their intervals are wider.

    Raises BackendError when the backend cannot build or run the original.
    """

    def __init__(
        self,
        program: Program,
        model: OnnxModel,
        backend: Backend,
        samples: CalibrationSet,
        conditions: Conditions,
        *,
        deployed: OnnxModel | None = None,
    ) -> None:
        self.program = program
        self.model = model
        #: What runs today, and what latencies are compared with.
        self.before = model if deployed is None else deployed
        self.backend = backend
        #: `opset` is that of the export, so that variants are measured as what will be delivered.
        self.conditions = replace(conditions, opset=target_opset(program, conditions.opset))
        self.regime = conditions.regime
        self.inputs = example_inputs(program, samples, conditions.batch)
        self._held: dict[int, Runner] = {}
        self._close: Callable[[], None] = lambda: None
        by_first(lambda: self._open(deployed is not None))

    def _open(self, deployed: bool) -> None:
        """Load what is compared with: of several processes the first one measures."""
        #: What the original is built to: it is loaded again for each comparison, and building may take minutes.
        self._engine = self._built(self.before)
        self._export = self._built(self.model) if deployed else self._engine
        with ExitStack() as opened_so_far:
            self._held = {id(self._engine): opened_so_far.enter_context(closing(self._loaded(self._engine)))}
            if self.one_at_a_time:
                self._held = {}  # it was loaded to see that it can be
                return
            if deployed:
                self._held[id(self._export)] = opened_so_far.enter_context(closing(self._loaded(self._export)))
            self._close = opened_so_far.pop_all().close

    @cached_property
    def one_at_a_time(self) -> bool:
        """Whether the original is so large that memory may not hold it three times: then networks are loaded when they
        are measured, each by itself."""
        return isinstance(self.before, OnnxFile) and _SESSIONS * self.before.size_bytes > available_bytes()

    @contextmanager
    def _runner(self, engine: object) -> Iterator[Runner]:
        """What was loaded of an engine, or is for now."""
        if id(engine) in self._held:
            yield self._held[id(engine)]
            return
        with closing(self._loaded(engine)) as runner:
            yield runner

    def _built(self, model: OnnxModel) -> object:
        return self.backend.build(model, self.inputs)

    def _loaded(self, engine: object) -> Runner:
        return self.backend.load(engine, self.inputs, threads=self.conditions.threads)

    def outputs(self, model: OnnxModel, inputs: Sequence[Mapping[str, Array]]) -> Iterator[list[Array]]:
        """What the backend computes from each of some inputs."""
        engine = self._built(model)
        for given in inputs:
            with closing(self.backend.load(engine, given, threads=self.conditions.threads)) as runner:
                runner.run()
                yield [np.array(value) for value in runner.outputs()]

    def original_ms(self) -> float:
        """The original's latency in milliseconds, by itself."""
        return measured_by_first(self._original_ms)

    def _original_ms(self) -> float:
        with self._runner(self._engine) as original:
            return measure_single(original, self._timing())

    def savings(self, models: Iterable[OnnxModel], *, progress: Progress = silent) -> list[float]:
        """Share of the original's latency that each of some variants of its export saves: they alternate with it in one
        run."""
        return measured_by_first(lambda: self._savings(models, progress))

    def _savings(self, models: Iterable[OnnxModel], progress: Progress) -> list[float]:
        if self.one_at_a_time:
            return [1 - self._loads(self._export, self._built(model), QUICK)[self.regime].ratio for model in models]
        engines = ((self._built(model), self.inputs) for model in models)
        with (
            self._runner(self._export) as exported,
            opened(self.backend, engines, threads=self.conditions.threads) as variants,
        ):
            measured = measure_savings(
                exported,
                variants,
                self._timing(warmup_ms=50.0),
                progress=lambda done, total: progress("measure savings", done, total),
            )
        return [1 - found.ratio for found in measured]

    def against(self, program: Program) -> Measurement:
        """Latency of a rewritten program over that of the original."""
        return measured_by_first(lambda: self._against(to_onnx(as_measured(program), opset=self.conditions.opset)))

    def _against(self, model: OnnxModel) -> Measurement:
        return self._compared(model, QUICK, both=False)[self.regime]

    def _compared(self, model: OnnxModel, effort: Effort, *, both: bool) -> Mapping[Regime, Measurement]:
        return self._loads(self._engine, self._built(model), replace(effort, both=both))

    def _loads(self, before: object, after: object, effort: Effort) -> Mapping[Regime, Measurement]:
        return measure_loads(
            lambda: self._loaded(before),
            lambda: self._loaded(after),
            replace(effort, regime=self.regime, apart=self.one_at_a_time, seed=self.conditions.seed),
            environment={
                **self.backend.environment(),
                "threads": self.conditions.threads,
                "batch": self.conditions.batch,
            },
        )

    def _timing(self, warmup_ms: float = 200.0) -> Timing:
        return Timing(warmup_ms=warmup_ms, seed=self.conditions.seed, regime=self.regime)

    def _cache(self) -> MeasurementCache:
        return MeasurementCache(self.conditions.folder or default_folder())

    def table(self) -> LatencyTable:
        """Times of single segments on the backend at this batch, kept on disk."""
        return LatencyTable(
            self.backend, self.conditions, cache=self._cache(), rounds=_TABLE_ROUNDS, block_ms=_TABLE_BLOCK_MS
        )

    def lattice(
        self,
        kinds: Collection[str] = KINDS,
        *,
        integers: IntegerKernels | None = None,
        progress: Progress = silent,
    ) -> Lattice:
        """The channel lattice of the backend at this batch, of layers in `integers` where they are given; measured once
        for each environment and kept on disk."""
        return measured_by_first(
            lambda: probe_lattice(
                self.backend,
                conditions=self.conditions,
                cache=self._cache(),
                kinds=kinds,
                integers=integers,
                progress=progress,
            )
        )

    def integers(self) -> IntegerKernels:
        """Integers that the backend computes with exactly; tried once for each environment and kept on disk. Raises
        BackendError where there are none."""
        threads, cache = self.conditions.threads, self._cache()
        return measured_by_first(lambda: probe_integers(self.backend, threads=threads, cache=cache))

    def final(self, model: OnnxModel) -> Measurement:
        """The finished model against the original in the probe's regime, with the narrowest interval that is worth its
        time."""
        return measured_by_first(lambda: self._compared(model, FULL, both=False))[self.regime]

    def final_regimes(self, model: OnnxModel) -> Mapping[Regime, Measurement]:
        """`final`, and the same loads in the other regime where the backend can."""
        return measured_by_first(lambda: self._compared(model, FULL, both=True))

    def profiles(self, model: OnnxModel) -> Profiles | None:
        """Times of single nodes before and after, for people; None where the backend does not tell them."""
        return measured_by_first(lambda: self._profiles(model))

    def _profiles(self, model: OnnxModel) -> Profiles | None:
        if not isinstance(self.backend, ProfilingBackend):
            return None
        try:
            before, after = (
                self.backend.profile(content, self.inputs, threads=self.conditions.threads)
                for content in (self.model, model)
            )
        except CompilerError:
            return None
        return Profiles(model=self.model, before=before, after=after)

    def close(self) -> None:
        self._close()


def example_inputs(program: Program, samples: CalibrationSet, batch: int) -> Mapping[str, Array]:
    """Real samples as the backend's inputs, repeated when the set is smaller than the batch."""
    count = len(samples)
    rows = np.arange(batch) % count
    return {
        spec.name: np.ascontiguousarray((leaf.to(spec.dtype) if leaf.is_floating_point() else leaf).numpy()[rows])
        for spec, leaf in zip(program.inputs, samples.leaves, strict=True)
    }
