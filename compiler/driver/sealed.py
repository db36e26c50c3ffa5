"""The files of an output folder, and how they know each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..onnx.model_file import MODEL, WEIGHTS, OnnxFile, OnnxModel
from ..plan.plan import Plan
from ..support.atomic_files import Content, digest
from ..support.errors import OutputError
from ..support.strict_json import json_file, json_text, read_json

#: The files of an output folder. The page is for people: it is written, and never read.
ONNX, PT2, PLAN, REPORT, PAGE = MODEL, "model.pt2", "plan.json", "report.json", "report.html"
#: The files of a network: model.onnx, with model.onnx.data where its weights lie there, and model.pt2.
Networks = Mapping[str, Content]


def networks_of(onnx: OnnxModel, pt2: Content) -> Networks:
    """The files of a network, by name."""
    return {ONNX: onnx, **(onnx.beside() if isinstance(onnx, OnnxFile) else {}), PT2: pt2}


def with_plan(plan: Plan, networks: Networks) -> dict[str, Content]:
    """The files of a network with its plan.json, which holds their digests and its own: so that one of another run, of
    a save that was cut off, or one that was damaged since, is not taken for one of them."""
    read = Plan.from_dict(read_json(json_text(plan.to_dict())))  # as it will be read: numbers have one form
    sealed = replace(
        plan,
        # what the weights beside model.onnx are is part of what that is known again by
        files={**{n: digest(content) for n, content in networks.items() if n != WEIGHTS}, PLAN: _own_digest(read)},
    )
    return {**networks, PLAN: json_file(sealed.to_dict())}


def check_file(plan: Plan, name: str, content: Content) -> None:
    """Raise OutputError unless the file is the one that was saved with the plan. One that the plan does not know, as
    those of earlier versions do not, passes."""
    if plan.files.get(name, found := digest(content)) != found:
        raise OutputError(
            f"{name} is not the one that {PLAN} was saved with",
            hint="copy the whole folder again, or compile again: a save was cut off, or files of two runs were mixed",
        )


def check_plan(plan: Plan) -> None:
    """Raise OutputError when a plan's decisions are not the ones that its network was saved with."""
    if plan.files.get(PLAN, found := _own_digest(plan)) != found:
        raise OutputError(
            f"{PLAN} is not as it was saved with {PT2}",
            hint="copy the whole folder again; to have an edited plan carried out, give a calibration set",
        )


def _own_digest(plan: Plan) -> str:
    return digest(json_file(replace(plan, files={}).as_read()))
