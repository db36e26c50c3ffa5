"""A compiled network, however it came about: compiled now, made again from a plan, or read from its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import fx

from ..data.sampled_error import SampledError
from ..export.exporter import to_exported, to_onnx, to_pt2
from ..ir.program import Program
from ..plan.plan import Plan
from ..report.page import page_or_reason
from ..report.report import Report
from ..support.atomic_files import write_folder
from ..support.errors import CompilerError
from ..support.strict_json import json_file
from .pipeline import Outcome
from .sealed import ONNX, PAGE, PT2, REPORT, with_plan

#: The files of a network: model.onnx and model.pt2.
Networks = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """A compiled network: `.program` and `.module` (which runs any batch size), `.onnx` (bytes), `.plan`, `.report`,
    and `.save(folder)`.

    `output_errors` are the relative output errors after each stage on the samples that judge, and `tested` that of the
    result on samples that nothing was chosen by; without data, as where a plan was applied with its weights, there are
    none. `outcome` has all that a compile measured on the way, where one just ran. The report is that of the compile;
    a network made again from its plan has none.
    """

    plan: Plan
    make_program: Callable[[], Program] = field(repr=False)
    make_networks: Callable[[], Networks] = field(repr=False)
    compiled_report: Report | None = None
    outcome: Outcome | None = field(default=None, repr=False)
    output_errors: Mapping[str, float] = field(default_factory=dict)
    tested: SampledError | None = None

    @cached_property
    def program(self) -> Program:
        """Of a folder, read when it is first asked for. Raises CaptureError when model.pt2 cannot be read, OutputError
        when it has changed since the folder was."""
        return self.make_program()

    @property
    def module(self) -> fx.GraphModule:
        """The network as a torch module; arguments and outputs as the original's."""
        return self.program.module

    @property
    def report(self) -> Report:
        """What the compile measured and decided. Raises CompilerError where there was none."""
        if self.compiled_report is None:
            raise CompilerError("a network made from its plan has no report", hint="the folder of the compile has it")
        return self.compiled_report

    @cached_property
    def networks(self) -> Networks:
        """model.onnx and model.pt2, by name."""
        return self.make_networks()

    @property
    def onnx(self) -> bytes:
        """The network as an ONNX model."""
        return self.networks[ONNX]

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The content of the output folder by file name."""
        files = with_plan(self.plan, self.networks)
        if self.compiled_report is None:
            return files
        report = self.compiled_report.to_dict()
        page = page_or_reason(report).encode(errors="backslashreplace")
        return {**files, REPORT: json_file(report), PAGE: page}

    def save(self, folder: str | Path) -> Path:
        """Write model.onnx, model.pt2, plan.json, and, of a compile, report.json and report.html; all or none appear. A
        report that was there of another network goes. Raises OutputError when they cannot be written."""
        without = () if self.compiled_report is not None else (REPORT, PAGE)
        write_folder(Path(folder), self.files, without=without)
        return Path(folder)


#: What earlier versions called the result of `apply`, and of `load`.
Replayed = Saved = Compiled


def exported(program: Program, opset: int | None) -> Networks:
    """A program as the files of a network."""
    found = to_exported(program)
    return {ONNX: to_onnx(program, opset=opset, exported=found), PT2: to_pt2(found)}
