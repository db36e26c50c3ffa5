"""`foldcut apply`."""

from __future__ import annotations

from typing import Any

import torch

from ..data.calibration_set import horizontal_flip
from ..driver.pipeline_settings import PipelineSettings
from ..driver.replay import apply
from ..driver.result import Compiled
from ..frontend.capture import Model
from ..support.atomic_files import check_writable
from ..support.errors import CalibrationError, CaptureError
from ..support.progress import Progress, opened_progress
from ..support.strict_json import json_text
from .console import FIRST, after_interrupt, guarded, out, show_json, show_line
from .goals import read_mimic, read_size
from .options import ApplyOptions
from .samples import read_cache, read_model, read_shape, sample_reader


def run(options: ApplyOptions) -> None:
    """Carry it out."""

    def work() -> None:
        check_writable(options.output)
        with opened_progress(not (options.as_json or options.quiet), "apply") as progress:
            made = _applied(options, progress)
            if FIRST:
                made.save(options.output)
        if options.as_json:
            show_json(json_text(_described(made)))
        elif not options.quiet:
            for decision in made.plan.decisions:
                show_line(str(decision), out)
            for stage, error in made.output_errors.items():
                show_line(f"output error (judged), {stage}: {error:.4f}", out)
            if made.tested is not None:
                show_line(f"output error: {made.tested}", out)
            show_line(f"wrote {options.output}/ ({', '.join(made.files)})", out)

    guarded(work, debug=options.debug, by="all together", interrupted=after_interrupt(options.fresh))


def _applied(options: ApplyOptions, progress: Progress) -> Compiled:
    memory, on_device = read_size(options.memory), read_size(options.device_memory)
    settings = PipelineSettings(memory_bytes=memory, device_memory_bytes=on_device)
    read = sample_reader(options.calib, options, input_shape=options.input_shape)
    samples = None if read is None else read(options.limit)
    if options.mimic_seconds is not None and (options.calib is None or options.solved is not None):
        raise CalibrationError("--mimic-seconds: weights that were saved are not trained", hint="give --calib alone")
    loaded: Model = read_model(options)
    if options.calib is None and options.input_shape is None and isinstance(loaded, torch.nn.Module):
        raise CaptureError(
            "the input shape is not known",
            hint="give --input-shape C,H,W, or --solved model.pt2 and --calib DATA; --calib alone solves again",
        )
    return apply(
        loaded,
        options.plan,
        weights=options.solved,
        calibration=samples,
        example=None if options.input_shape is None else torch.zeros(2, *read_shape(options.input_shape)),
        mimic=read_mimic(options),
        views=(horizontal_flip,) if options.flip else (),
        seed=options.seed,
        device=options.device,
        settings=settings,
        progress=progress,
        cache=read_cache(options.cache, options.fresh),
    )


def _described(made: Compiled) -> dict[str, Any]:
    tested = None if made.tested is None else made.tested.to_dict()
    return {"plan": made.plan.to_dict(), "output_errors": dict(made.output_errors), "test": tested}
