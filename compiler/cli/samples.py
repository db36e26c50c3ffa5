"""Models, samples, shapes and settings as the command line gives them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...passes.quantize.dequantize import dequantize
from ..data.calibration_set import CalibrationSet, read_calibration
from ..data.sample_files import read_arrays, read_shards
from ..data.sample_paths import check_optional, says_none, shard_files
from ..data.shards import Sharded
from ..driver.pipeline_settings import PipelineSettings
from ..frontend.capture import Model
from ..frontend.model_source import load_evaluate, load_model
from ..metric.metric import Evaluate, check_evaluate, metric_name
from ..metric.top1 import Top1
from ..processes.launching import rank_given
from ..support.errors import CaptureError, CompilerError
from ..synthesis.settings import SynthesisSettings
from .options import ApplyOptions, ImageOptions, InspectOptions, RunOptions, SynthesiseOptions

if TYPE_CHECKING:
    from torch import nn

#: Reads so many samples, or all of them where None is given.
Reader = Callable[[int | None], CalibrationSet]


def read_model(options: RunOptions | ApplyOptions | InspectOptions | SynthesiseOptions) -> Model:
    """The model of a command's options, in floating point where they ask for it."""
    model = load_model(options.model, options.weights)
    return dequantize(model) if options.dequantize else model


def read_evaluate(options: RunOptions) -> Evaluate | Top1 | None:
    """The metric of a command's options. Raises CompilerError for one that cannot be imported or called,
    CalibrationError for what are no labels."""
    if options.labels is not None:
        return Top1(read_arrays(options.labels, None))
    if options.evaluate is None:
        return None
    evaluate = load_evaluate(options.evaluate)
    check_evaluate(evaluate)
    return _beside_json(evaluate) if options.as_json else evaluate


def _beside_json(evaluate: Evaluate) -> Evaluate:
    """A metric whose prints go to stderr, since nothing but JSON goes to stdout."""

    def evaluated(module: nn.Module) -> Any:
        with redirect_stdout(sys.stderr):
            return evaluate(module)

    evaluated.__name__ = metric_name(evaluate)
    return evaluated


def read_samples(
    path: Path, options: ImageOptions, *, limit: int | None = None, input_shape: str | None = None
) -> CalibrationSet:
    """The calibration set of the command line. Raises CalibrationError and CompilerError."""
    size, mean, std = _pair(options.size), _floats(options.mean), _floats(options.std)
    samples = read_calibration(path, key=options.key, size=size, mean=mean, std=std, limit=limit)
    if input_shape is not None and list(samples.leaves[0].shape[1:]) != read_shape(input_shape):
        raise CompilerError(
            "--input-shape is not the shape of the calibration samples",
            expected=input_shape,
            actual=list(samples.leaves[0].shape[1:]),
            hint="leave it out, or resize the samples",
        )
    return samples


def read_or_none(options: RunOptions) -> CalibrationSet | SynthesisSettings | Sharded:
    """The calibration set of a compile, or how it is made where there are no data. Raises CalibrationError and
    CompilerError."""
    files, rank = shard_files(options.calib), rank_given()
    if files and rank is not None:  # each of several processes reads its own
        mine = files[rank :: int(os.environ["WORLD_SIZE"])]
        return Sharded(CalibrationSet.of(read_shards(mine, options.key)) if mine else None, options.limit, once=False)
    if not says_none(options.calib):
        return read_samples(options.calib, options, limit=options.limit, input_shape=options.input_shape)
    return made_settings(options.limit, options.input_shape)


def made_settings(count: int | None, input_shape: str | None, iterations: int | None = None) -> SynthesisSettings:
    """How samples are made without data, as far as the command line says it."""
    given = {
        "count": count,
        "input_shape": None if input_shape is None else tuple(read_shape(input_shape)),
        "iterations": iterations,
    }
    return SynthesisSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def with_reference(settings: PipelineSettings, options: RunOptions) -> PipelineSettings:
    """The settings with the samples that the calibration set is compared with, where some are named."""
    if options.reference is None:
        return settings
    return replace(settings, reference=read_samples(options.reference, options, limit=options.limit))


def sample_reader(path: Path | None, options: ImageOptions, *, input_shape: str | None = None) -> Reader | None:
    """What reads samples where a command need not be given any, None where it is not. Raises CalibrationError when
    nothing is to be read, and yet something is said about how."""
    check_optional(path, vars(options))
    if path is None:
        return None
    return lambda limit: read_samples(path, options, limit=limit, input_shape=input_shape)


def read_cache(cache: Path | None, fresh: bool) -> bool | Path:
    """The `cache` argument of `compile`."""
    return False if fresh else cache or True


def read_shape(shape: str) -> list[int]:
    """The sizes in "3,224,224". Raises CaptureError."""
    sizes = _sizes(shape)
    if not sizes:
        raise CaptureError(f"--input-shape {shape!r} is not a shape", expected="numbers from 1 on such as 3,224,224")
    return sizes


def _sizes(text: str) -> list[int]:
    """Whole numbers from 1 on between commas; none for anything else."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(p.strip().isdecimal() and int(p) > 0 for p in parts) else []


def _floats(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise CompilerError(
            f"{text!r} is not one number per channel", expected="three numbers such as 0.485,0.456,0.406"
        )
    return values


def _pair(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sizes = _sizes(text)
    if len(sizes) != 2:
        raise CompilerError(f"--size {text!r} is not a size", expected="two numbers from 1 on such as 224,224")
    return sizes[0], sizes[1]
