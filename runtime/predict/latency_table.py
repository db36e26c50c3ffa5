"""Predicted latency of a program on a backend: the sum of its segments' times, each measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.export.edit_device import on_cpu
from ...compiler.export.edit_types import as_measured
from ...compiler.export.exporter import to_onnx_model
from ...compiler.ir.cost import node_macs
from ...compiler.ir.program import Program
from ...compiler.ir.segments import Segment, find_segments, is_dequantized, segment_key
from ...compiler.onnx.model_file import OnnxModel
from ...compiler.processes.sharing import measured_by_first
from ...compiler.support.progress import Progress, silent
from ..measure.backend import Array, Backend
from ..measure.bootstrap import median_interval
from ..measure.conditions import Conditions
from ..measure.environment import lasting
from ..measure.inputs import draw_inputs, model_specs
from ..measure.loading import loaded
from ..measure.measure import measure_savings
from ..measure.measurement import Measurement
from ..measure.measurement_cache import MeasurementCache
from ..measure.timing import Timing
from .edit_extract import extract_segments
from .reference_network import reference_network
from .repeated_model import repeated

if TYPE_CHECKING:
    import onnx

#: A segment's time is that of this many copies less that of one, divided by one less.
COPIES = 4
#: Weights, in bytes, above which a segment is timed with two copies: all of them are in memory at once.
_HEAVY_BYTES = 100_000_000
#: Segments timed in one go, and how many rounds they get.
_TOGETHER, _ROUNDS = 8, 24
#: Milliseconds of the block that a segment is timed in, once a round.
_BLOCK_MS = 10.0
#: Segments that are timed again with each batch.
_ANCHORS = 4
#: Of what is kept for a segment: another protocol gets another number.
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class SegmentTime:
    """What one segment takes, in units of the reference network's latency, with the half width of its 95 % interval;
    `integers` where all that it multiplies are integers."""

    name: str
    units: float
    half_width: float
    integers: bool = False


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted latency of a program in units of the reference network's latency.

    It is the sum of the segments and of what one call costs (`call`), times the table's scales. `half_width` is what
    the segments' own intervals add up to if they err apart from each other; that a network is not quite the sum of its
    segments is not in it. `measured` counts the segments that were not known before.
    """

    units: float
    half_width: float
    call: float
    segments: tuple[SegmentTime, ...]
    measured: int

    def ratio_to(self, before: Prediction) -> float:
        """This latency over another's."""
        return self.units / before.units


@dataclass(frozen=True, kw_only=True)
class _Anchor:
    """A segment whose time is known, to be timed again."""

    model: onnx.ModelProto
    units: float


class LatencyTable:
    """Times of segments on one backend at one batch size and number of threads.

    Each is kept under operations, settings, shapes, dtypes, batch, threads, backend, versions, device and the `opset`
    that is asked for (an operator may be one node or several), so that a
    table on disk serves every network, and a program that shares segments with one seen before costs only the rest.
    Nothing of the whole network is built. Drops, narrower groups and factorised layers are predicted alike,
    by the segments of the rewritten Program (`drop_blocks`, `prune_channels` and so on make it without solving
    anything).

    A segment is exported on its own at a fixed batch, and timed as several copies less one (`repeated`), against the
    reference network in the same rounds. A few segments timed before (the longest) are timed again with every batch of
    new ones, and the new times scaled by what became of theirs: what disturbs the machine does not slow every kind of
    layer alike, so the reference alone does not make times of different minutes comparable.

    Biased: weights of one segment may lie in a cache that the whole network would have emptied, and a runtime may fuse
    across a cut. `fit` takes out what whole networks show of that.
    """

    def __init__(
        self,
        backend: Backend,
        conditions: Conditions | None = None,
        *,
        cache: MeasurementCache | None = None,
        rounds: int = _ROUNDS,
        block_ms: float = _BLOCK_MS,
    ) -> None:
        conditions = conditions or Conditions()
        self.backend = backend
        self.batch, self.threads = conditions.batch, conditions.threads
        self.seed, self.opset = conditions.seed, conditions.opset
        self.rounds, self.block_ms = rounds, block_ms
        self.cache = cache if cache is not None else MeasurementCache(None)
        self.scale = self.integer_scale = 1.0
        self._anchors: list[_Anchor] = []
        self._where = lasting(backend.environment())

    def predict(self, program: Program, *, progress: Progress = silent) -> Prediction:
        """Predict the latency of a program, measuring those of its segments that are not known yet.

        Raises ExportError when a segment has no ONNX form, BackendError when the backend does not take it.
        """
        program = as_measured(program)
        segments = find_segments(program)
        keys, known, measured = self._looked_up(program, segments, progress)
        times = _times(program, segments, keys, known)
        call = float(np.median([known[key]["call"] for key in keys]))
        shared: dict[str, float] = {}  # equal segments err together
        units = self.scale * call
        for key, time in zip(keys, times, strict=True):
            scale = self.integer_scale if time.integers else self.scale
            shared[key] = shared.get(key, 0.0) + scale * time.half_width
            units += scale * time.units
        return Prediction(
            units=max(units, np.finfo(float).tiny),
            half_width=float(np.sqrt(sum(width**2 for width in shared.values()))),
            call=self.scale * call,
            segments=times,
            measured=measured,
        )

    def time_segments(
        self, program: Program, segments: Sequence[Segment], *, progress: Progress = silent
    ) -> tuple[SegmentTime, ...]:
        """What segments take, any parts of a program with one place to go in and out, measuring those that are not
        known yet. No scale is applied.

        Raises ExportError when a segment has no ONNX form, BackendError when the backend does not take it.
        """
        measured = as_measured(program)
        if measured.nodes.keys() == program.nodes.keys():  # no casts that lie in none of the segments
            program = measured
        keys, known, _ = self._looked_up(program, segments, progress)
        return _times(program, segments, keys, known)

    def _looked_up(
        self, program: Program, segments: Sequence[Segment], progress: Progress
    ) -> tuple[list[str], dict[str, Any], int]:
        """Keys of the segments, what is known under them by now, and how many had to be measured."""
        keys = [self._key(segment_key(program, segment, self.batch)) for segment in segments]
        known, missing = measured_by_first(
            lambda: self._known(program, dict(zip(keys, segments, strict=True)), progress)
        )
        return keys, known, missing

    def _known(self, program: Program, wanted: Mapping[str, Segment], progress: Progress) -> tuple[dict[str, Any], int]:
        """What is known of segments once those that are missing are timed, and how many these were."""
        keys = list(wanted)
        known = self.cache.get(keys)
        missing = {key: segment for key, segment in wanted.items() if key not in known}
        if missing and not self._anchors:
            there = {key: segment for key, segment in wanted.items() if key in known}
            if there:
                self._take_anchors(program, there, known)
        return known | self._measure(program, missing, progress), len(missing)

    def fit(self, measured: Sequence[tuple[Program, float]]) -> float:
        """Set `scale` and `integer_scale` from whole networks, pairs of a program and what `measure_networks` gave for
        it; return `scale`, the median of measured over predicted latency of those that compute in floating point.

        It takes out what all segments have in common that the reference network has not: weights that stay in a cache
        between the copies, a machine that was slowed in another way while they were timed. The original alone will do.
        Segments all of whose layers are in integers have a scale of their own where a network with such segments is
        among those given, the median of what the others leave of its latency over their sum; else the same.
        """
        self.scale = self.integer_scale = 1.0
        plain: list[tuple[float, float, float]] = []
        mixed: list[tuple[float, float, float]] = []
        for program, units in measured:
            found = self.predict(program)
            integers = sum(time.units for time in found.segments if time.integers)
            (mixed if integers else plain).append((units, found.units - integers, integers))
        self.scale = _median_ratio([(units, floats + integers) for units, floats, integers in plain or mixed])
        left = [(units - self.scale * floats, integers) for units, floats, integers in mixed]
        found_scale = _median_ratio(left) if plain and mixed else self.scale
        self.integer_scale = found_scale if found_scale > 0 else self.scale
        return self.scale

    @property
    def _timing(self) -> Timing:
        return Timing(warmup_ms=50.0, seed=self.seed)

    def measure_network(self, model: OnnxModel, inputs: Mapping[str, Array] | None = None) -> float:
        """Measure a whole network, in units of the reference network's latency. Made-up inputs serve where none are
        given. Raises BackendError."""
        return self.measure_networks([model], inputs)[0]

    def measure_networks(self, models: Sequence[OnnxModel], inputs: Mapping[str, Array] | None = None) -> list[float]:
        """`measure_network` of several of the same inputs, in turn in the same rounds: what disturbs the machine in one
        minute and not in the next does not come between them."""
        return measured_by_first(lambda: self._measured(models, inputs))

    def _measured(self, models: Sequence[OnnxModel], inputs: Mapping[str, Array] | None) -> list[float]:
        given = [(model, inputs if inputs is not None else self._drawn(model)) for model in models]
        with loaded(self.backend, [self._reference, *given], threads=self.threads) as (reference, *runners):
            found = measure_savings(reference, runners, self._timing, pairs=self.rounds)
        return [measurement.ratio for measurement in found]

    def _key(self, segment: str) -> str:
        key = f"segment {_FORMAT} {segment} | batch {self.batch} | threads {self.threads} | {self._where}"
        return key if self.opset is None else f"{key} | opset {self.opset}"

    def _measure(self, program: Program, missing: Mapping[str, Segment], progress: Progress) -> dict[str, Any]:
        if not missing:
            return {}
        found: dict[str, Any] = {}
        models = _segment_models(program, list(missing.values()), self.batch, self.opset)
        keys = list(missing)
        for start in range(0, len(keys), _TOGETHER):
            stop = min(start + _TOGETHER, len(keys))

            def show(done: int, total: int, start: int = start, stop: int = stop) -> None:
                progress("time segments", start * total + done * (stop - start), len(keys) * total)

            timed = self._time([*models[start:stop], *(anchor.model for anchor in self._anchors)], show)
            fresh = dict(zip(keys[start:stop], self._aligned(timed, stop - start), strict=True))
            self.cache.put(fresh)  # at once: Ctrl-C loses the batch under way, no more
            found |= fresh
            if not self._anchors:
                self._choose_anchors(list(zip(models[start:stop], fresh.values(), strict=True)))
        return found

    def _take_anchors(self, program: Program, known: Mapping[str, Segment], times: Mapping[str, Any]) -> None:
        """Anchors from segments of the program that were timed in another session."""
        longest = sorted(known, key=lambda key: times[key]["units"], reverse=True)[:_ANCHORS]
        models = _segment_models(program, [known[key] for key in longest], self.batch, self.opset)
        self._choose_anchors([(model, times[key]) for model, key in zip(models, longest, strict=True)])

    def _choose_anchors(self, timed: Sequence[tuple[onnx.ModelProto, Mapping[str, float]]]) -> None:
        """The longest of the segments timed: their own noise is least."""
        found = [_Anchor(model=m, units=t["units"]) for m, t in timed if t["units"] > 0]
        light = [anchor for anchor in found if _weight_bytes(anchor.model) <= _HEAVY_BYTES]
        self._anchors = sorted(light, key=lambda anchor: anchor.units, reverse=True)[:_ANCHORS]

    def _aligned(self, timed: Sequence[dict[str, float]], count: int) -> list[dict[str, float]]:
        """The first `count` times in the units of the anchors' own session: the rest are the anchors, timed again."""
        known, now = sum(a.units for a in self._anchors), sum(t["units"] for t in timed[count:])
        drift = known / now if known > 0 and now > 0 else 1.0
        return [{name: value * drift for name, value in time.items()} for time in timed[:count]]

    def _time(self, models: Sequence[onnx.ModelProto], show: Callable[[int, int], None]) -> list[dict[str, float]]:
        """Units and half width of each segment."""
        copies = [2 if _weight_bytes(model) > _HEAVY_BYTES else COPIES for model in models]
        timed: list[tuple[OnnxModel, Mapping[str, Array]]] = [self._reference]
        for model, count in zip(models, copies, strict=True):
            one, many = (bytes(repeated(model, n).SerializeToString()) for n in (1, count))
            inputs = self._drawn(one)
            timed += [(one, inputs), (many, inputs)]
        with loaded(self.backend, timed, threads=self.threads) as (reference, *runners):
            on_device = reference.clock == "cuda"  # whose clocks take their own time to settle
            how = self._timing if on_device else _in_blocks(self._timing, self.block_ms)
            measured = measure_savings(reference, runners, how, pairs=self.rounds, environment={}, progress=show)
        return [
            _difference(one, many, count - 1)
            for one, many, count in zip(measured[::2], measured[1::2], copies, strict=True)
        ]

    @cached_property
    def _reference(self) -> tuple[bytes, Mapping[str, Array]]:
        model = reference_network()
        return model, self._drawn(model)

    def _drawn(self, model: OnnxModel) -> dict[str, Array]:
        """Made-up inputs at the table's batch; what a model fixes stays."""
        return draw_inputs(model_specs(model), self.batch, self.seed)


def _times(
    program: Program, segments: Sequence[Segment], keys: Sequence[str], known: Mapping[str, Any]
) -> tuple[SegmentTime, ...]:
    return tuple(
        SegmentTime(
            name=segment.name,
            units=known[key]["units"],
            half_width=known[key]["half_width"],
            integers=_in_integers(program, segment),
        )
        for key, segment in zip(keys, segments, strict=True)
    )


def _in_blocks(how: Timing, block_ms: float) -> Timing:
    """In blocks of so many milliseconds, after a warm-up of five."""
    return replace(how, min_block_ms=block_ms, warmup_ms=5 * block_ms)


def _in_integers(program: Program, segment: Segment) -> bool:
    """Whether all that a segment multiplies is read back from integers."""
    nodes = [program.nodes[name] for name in segment.nodes]
    contractions = [node for node in nodes if node_macs(program, node)]
    return bool(contractions) and all(any(map(is_dequantized, node.all_input_nodes)) for node in contractions)


def _median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return float(np.median([part / whole for part, whole in pairs]))


def _difference(one: Measurement, many: Measurement, copies: int) -> dict[str, float]:
    """In units: time of a copy, the median over rounds of (many - one) / copies / reference; its interval's half width;
    and the rest of the time of one, which is what a call costs. None is below zero."""
    single = np.array([after / reference for reference, after in one.samples])
    several = np.array([after / reference for reference, after in many.samples])
    interval = median_interval((several - single) / copies)
    units = max(0.0, interval.estimate)
    return {
        "units": units,
        "half_width": (interval.high - interval.low) / 2,
        "call": max(0.0, float(np.median(single)) - units),
    }


def _segment_models(
    program: Program, segments: Sequence[Segment], batch: int, opset: int | None
) -> list[onnx.ModelProto]:
    """The segments as ONNX models. They are exported together: most of an export's time is spent whatever its size."""
    import onnx

    together = to_onnx_model(extract_segments(on_cpu(program), segments, batch=batch), opset=opset)
    extractor = onnx.utils.Extractor(together)
    return [
        extractor.extract_model([f"s{i}_{n}" for n in segment.entries], [f"s{i}_{n}" for n in segment.exits])
        for i, segment in enumerate(segments)
    ]


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(tensor.ByteSize() for tensor in model.graph.initializer)
