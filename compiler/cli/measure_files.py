"""`foldcut measure`: two ONNX files on one backend, on the same inputs, in turns, over fresh loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...runtime.measure.backend import Array, Regime, check_threads, resolve_backend
from ...runtime.measure.fresh_loads import FULL, measure_loads
from ...runtime.measure.inputs import InputSpec, draw_inputs, model_specs
from ...runtime.measure.measure import self_check
from ...runtime.measure.measurement import Measurement
from ..data.calibration_set import CalibrationSet
from ..ir.program import as_arguments
from ..onnx.model_file import OnnxModel, as_model
from ..support.errors import BackendError, plural
from ..support.progress import Progress, opened_progress, silent
from ..support.strict_json import json_text
from .console import guarded, out, show_line
from .options import MeasureOptions
from .samples import sample_reader

_MOST_PAIRS = 200  # of the self-check


@dataclass(frozen=True, kw_only=True)
class MeasureWish:
    """Where and how to measure. `batch` None is 1, or the batch that a file fixes; `inputs` reads so many real samples
    at most, and where it is None they are made up, with `sizes` for dynamic dimensions; `self_check` measures the first
    file against itself before. `regime` is the one that the result is in; the other is measured in the same loads,
    where the backend can."""

    backend: str = "onnxruntime"
    batch: int | None = None
    threads: int = 1
    seed: int = 0
    inputs: Callable[[int], CalibrationSet] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    self_check: bool = False
    regime: Regime = "hot"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The second file against the first, in the regime that was wished for and in the other (None where the backend
    cannot); and the first against itself where that was wished for."""

    measurement: Measurement
    self_check: Measurement | None
    other: Measurement | None = None

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """Plain data for JSON; every pair of times with `samples`."""
        check = None if self.self_check is None else self.self_check.to_dict(samples=samples)
        return {
            **self.measurement.to_dict(samples=samples),
            "verdict": self.measurement.verdict,
            "self_check": check,
            "other_regime": None if self.other is None else self.other.to_dict(samples=samples),
        }


def measure_files(before: Path, after: Path, wish: MeasureWish, *, progress: Progress = silent) -> Measured:
    """Measure the ONNX file `after` against `before`.

    Everything that is loaded is freed again, however it ends. Raises CompilerError: a file that cannot be read, files
    that do not take the same inputs, a backend that is not there or refuses one of them, or a self-check that fails.
    """
    check_threads(wish.threads)
    backend = resolve_backend(wish.backend)
    models = [_read(path) for path in (before, after)]
    specs = common_specs(*map(model_specs, models))
    batch = _batch(specs, wish.batch)
    inputs = _made_up(specs, batch, wish) if wish.inputs is None else _real(specs, batch, wish.inputs)
    engines = []
    for index, model in enumerate(models):
        progress("build", index, len(models))
        engines.append(backend.build(model, inputs))
    progress("build", len(models), len(models))

    def environment() -> dict[str, str | int]:
        return {**backend.environment(), "threads": wish.threads, "batch": batch}

    check = None
    if wish.self_check:
        check = self_check(
            lambda: backend.load(engines[0], inputs, threads=wish.threads),
            seed=wish.seed,
            environment=environment(),
            progress=_pairs(progress, "measure before itself"),
        )
        progress("measure before itself", check.pairs, check.pairs)
    first, second = (partial(backend.load, engine, inputs, threads=wish.threads) for engine in engines)
    found = measure_loads(
        first,
        second,
        replace(FULL, regime=wish.regime, both=True, seed=wish.seed),
        environment=environment(),
        progress=lambda done, most: progress("measure fresh loads", done, most),
    )
    progress("measure fresh loads", FULL.most_loads, FULL.most_loads)
    other = next((measured for name, measured in found.items() if name != wish.regime), None)
    return Measured(measurement=found[wish.regime], self_check=check, other=other)


def _pairs(progress: Progress, stage: str) -> Callable[[Measurement], None]:
    return lambda result: progress(stage, result.pairs, _MOST_PAIRS)


def show_measured(found: Measured, console: Console) -> None:
    """Print what was found: the times, the ratio with its interval and what it allows to claim, and where it was."""
    result, check = found.measurement, found.self_check
    taken = f"{result.clock}, {plural(len(result.loads), 'fresh load')}, {plural(result.pairs, 'pair')}"
    lines = [
        f"before {result.before_ms:.3f} ms  after {result.after_ms:.3f} ms  ({taken})",
        _ratio_line(result),
    ]
    if found.other is not None:
        lines.append(_ratio_line(found.other))
    if check is not None:
        lines.append(
            f"self-check: before against itself x{check.ratio:.3f}   95 %: {check.low:.3f} to {check.high:.3f}"
        )
    if result.contended:
        lines.append("contended: something else used the machine; trust the ratio, not the milliseconds")
    lines.append(", ".join(f"{name} {value}" for name, value in result.environment.items() if value != ""))
    for line in lines:
        show_line(line, console)


def _ratio_line(result: Measurement) -> str:
    interval = f"95 %: {result.low:.3f} to {result.high:.3f}"
    return f"ratio x{result.ratio:.3f}   {interval}   {result.verdict}   ({result.regime} caches)"


def read_sizes(texts: Sequence[str]) -> dict[str, int]:
    """Read ``NAME=N`` from the command line. Raises BackendError for anything else."""
    sizes = {}
    for text in texts:
        name, _, size = text.rpartition("=")
        if not name or not size.isdecimal() or int(size) < 1:
            raise BackendError(f"--dim '{text}' is not a size", expected="NAME=N, N from 1 up", actual=text)
        sizes[name] = int(size)
    return sizes


def common_specs(before: Sequence[InputSpec], after: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """The inputs that both models take, in the order of the first; a dimension that either fixes is fixed.

    Raises BackendError where names, types or sizes differ.
    """
    others = {spec.name: spec for spec in after}
    merged = [_merged(spec, others[spec.name]) for spec in before if spec.name in others]
    if len(before) != len(after) or len(merged) != len(before) or None in merged:
        raise BackendError(
            "the two models do not take the same inputs",
            expected="; ".join(map(_text, before)) or "no inputs",
            actual="; ".join(map(_text, after)) or "no inputs",
            hint="a ratio compares networks on one and the same input; foldcut verify lists what differs",
        )
    return tuple(spec for spec in merged if spec is not None)


def _merged(one: InputSpec, other: InputSpec) -> InputSpec | None:
    """The input as both take it, None where no array fits both."""
    if one.declared != other.declared:
        return None
    shapes = [spec.shape for spec in (one, other) if spec.shape or spec.scalar]
    if len(shapes) < 2:  # a rank that a file does not declare fits any
        return one if one.shape or one.scalar else other
    if len(one.shape) != len(other.shape):
        return None
    dims = [b if isinstance(b, int) else a for a, b in zip(*shapes, strict=True)]
    clash = any(isinstance(a, int) and a != b for a, b in zip(one.shape, dims, strict=True))
    return None if clash else replace(one, shape=tuple(dims))


def _text(spec: InputSpec) -> str:
    dims = ", ".join("?" if dim is None else str(dim) for dim in spec.shape)
    shape = f"[{dims}]" if spec.shape or spec.scalar else "[...]"
    return f"{spec.name}: {spec.declared.removeprefix('tensor(').removesuffix(')')}{shape}"


def _batch(specs: Sequence[InputSpec], asked: int | None) -> int:
    """The batch asked for, 1, or the one that the files fix."""
    if asked is not None and asked < 1:
        raise BackendError("the batch starts at 1", actual=asked, hint="leave --batch out for 1")
    leading = [spec.shape[0] for spec in specs if spec.shape]
    fixed = sorted({dim for dim in leading if isinstance(dim, int)})
    if not fixed or any(not isinstance(dim, int) for dim in leading):
        return asked or 1
    if asked is not None and asked not in fixed:
        raise BackendError(
            f"a model fixes its batch at {fixed[0]}",
            expected=" or ".join(map(str, fixed)),
            actual=asked,
            hint="leave --batch out, or export the models with a dynamic batch",
        )
    return asked or fixed[0]


def _made_up(specs: tuple[InputSpec, ...], batch: int, wish: MeasureWish) -> dict[str, Array]:
    wanted = {
        spec.dimension_name(axis)
        for spec in specs
        for axis, dim in enumerate(spec.shape)
        if axis > 0 and not isinstance(dim, int) and f"{spec.name}.{axis}" not in wish.sizes
    }
    batches = {spec.dimension_name(0) for spec in specs if spec.shape}
    missing = sorted(wanted - batches - set(wish.sizes))
    if missing:
        raise BackendError(
            f"dimensions are dynamic and have no size: {', '.join(missing)}",
            hint=f"give {' '.join(f'--dim {name}=N' for name in missing)}, or real inputs with --inputs",
        )
    return draw_inputs(specs, batch, wish.seed, sizes=wish.sizes)


def _real(specs: Sequence[InputSpec], batch: int, read: Callable[[int], CalibrationSet]) -> dict[str, Array]:
    """The first samples, from the start again where there are fewer than the batch."""
    samples = read(batch)
    args, kwargs = as_arguments(samples.batch(slice(None)))
    names = [spec.name for spec in specs]
    if (set(kwargs) != set(names)) if kwargs else len(args) != len(names):
        raise BackendError(
            "the samples do not have the models' inputs",
            expected=", ".join(names) or "no inputs",
            actual=", ".join(kwargs) if kwargs else f"{len(args)} inputs",
            hint="an .npz with one array for each input, under the inputs' names",
        )
    rows = np.arange(batch) % len(samples)
    given = kwargs or dict(zip(names, args, strict=True))
    return {name: np.ascontiguousarray(given[name].numpy()[rows]) for name in names}


def _read(path: Path) -> OnnxModel:
    """The model, or its path where weights lie beside it."""
    try:
        return as_model(path)
    except OSError as cause:
        raise BackendError(f"cannot read {path}: {cause.strerror}", hint="give the path of an ONNX file") from cause


def run(options: MeasureOptions) -> None:
    """Carry it out."""

    def work() -> None:
        wish = MeasureWish(
            backend=options.backend,
            batch=options.batch,
            threads=options.threads,
            seed=options.seed,
            inputs=sample_reader(options.inputs, options),
            sizes=read_sizes(options.dim or []),
            self_check=options.self_check,
            regime="cold" if options.regime == "cold" else "hot",
        )
        with opened_progress(not (options.as_json or options.quiet), "measure") as progress:
            found = measure_files(options.before, options.after, wish, progress=progress)
        if options.as_json:
            print(json_text(found.to_dict(samples=options.samples)))
        else:
            show_measured(found, out)

    guarded(work, debug=options.debug)
