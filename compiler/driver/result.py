"""A compiled network: the result of a compile, of applying a plan, or of reading a saved folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

from torch import fx

from ..data.sampled_error import SampledError
from ..export.exporter import to_exported, to_onnx, to_pt2
from ..ir.program import Program
from ..onnx.model_file import WEIGHTS, OnnxModel
from ..plan.plan import Plan
from ..report.page import page_or_reason
from ..report.report import Report
from ..support.atomic_files import Content, write_folder
from ..support.errors import CompilerError
from ..support.strict_json import json_file
from .pipeline import Outcome
from .sealed import ONNX, PAGE, REPORT, Networks, networks_of, with_plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """A compiled network with its plan, and its report if there is one. Returned by `compile`, `apply` and `load`.

    Arguments:
        plan: The decisions, in the order of application.
        make_program: Builds `program` when it is first needed.
        make_networks: Builds the content of ``model.onnx`` and ``model.pt2`` when they are first needed.
        compiled_report: The report of the compile. None for a network made from a plan.
        outcome: Everything the compile measured. None for a network made from a plan or read from a folder.
        output_errors: Relative output error on the judging samples after each stage. Empty without data.
        tested: Relative output error on the test samples, with its 95 % interval. None without data.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> samples = torch.randn(40, 8)
        >>> cut = foldcut.PruneChannels(group="0", kept=tuple(range(16)), total=32)
        >>> fingerprint = foldcut.capture(net, samples[:2]).fingerprint
        >>> plan = foldcut.Plan(decisions=(cut,), goal=foldcut.Channels(0.5), fingerprint=fingerprint, predicted={})
        >>> out = foldcut.apply(net, plan, calibration=samples, mimic=False, cache=False)
        >>> out.module(samples[:3]).shape, out.program.parameter_count(), out.tested.samples
        (torch.Size([3, 4]), 212, 4)
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
        """The network as a `Program`.

        Raises:
            CaptureError: If ``model.pt2`` of a saved folder cannot be read.
            OutputError: If it has changed since the folder was loaded.
        """
        return self.make_program()

    @property
    def module(self) -> fx.GraphModule:
        """The network as a torch module, with the arguments and outputs of the original, for any batch size."""
        return self.program.module

    @property
    def report(self) -> Report:
        """The report of the compile.

        Raises:
            CompilerError: If there is none, as for a network made from its plan.
        """
        if self.compiled_report is None:
            raise CompilerError("a network made from its plan has no report", hint="the folder of the compile has it")
        return self.compiled_report

    @cached_property
    def networks(self) -> Networks:
        """The content of ``model.onnx`` and ``model.pt2``, by file name: bytes, or a stored file above 2 GB."""
        return self.make_networks()

    @property
    def onnx(self) -> OnnxModel:
        """The network as the bytes of an ONNX model. Above 2 GB it is an `OnnxFile`: ``os.fspath`` gives a path, beside
        which its weights lie."""
        return cast(OnnxModel, self.networks[ONNX])

    @cached_property
    def files(self) -> dict[str, Content]:
        """The files that `save` writes, by name."""
        files = with_plan(self.plan, self.networks)
        if self.compiled_report is None:
            return files
        report = self.compiled_report.to_dict()
        page = page_or_reason(report).encode(errors="backslashreplace")
        return {**files, REPORT: json_file(report), PAGE: page}

    def save(self, folder: str | Path) -> Path:
        """Write the network to a folder.

        Writes ``model.onnx``, beside it ``model.onnx.data`` with the weights where they are above 2 GB, ``model.pt2``
        and ``plan.json``; with a report, ``report.json`` and ``report.html``
        too. Without one, reports already in the folder are deleted. Either all files appear or none.

        Arguments:
            folder: The folder. It is made if it does not exist.

        Returns:
            The path of the folder.

        Raises:
            OutputError: If the files cannot be written.

        Example:
            >>> import tempfile
            >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
            >>> samples = torch.randn(40, 8)
            >>> cut = foldcut.PruneChannels(group="0", kept=tuple(range(16)), total=32)
            >>> goal, fingerprint = foldcut.Channels(0.5), foldcut.capture(net, samples[:2]).fingerprint
            >>> plan = foldcut.Plan(decisions=(cut,), goal=goal, fingerprint=fingerprint, predicted={})
            >>> out = foldcut.apply(net, plan, calibration=samples, mimic=False, cache=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     sorted(file.name for file in out.save(folder).iterdir())
            ['model.onnx', 'model.pt2', 'plan.json']
        """
        without = [name for name in (WEIGHTS, REPORT, PAGE) if name not in self.files]
        write_folder(Path(folder), self.files, without=without)
        return Path(folder)


#: What earlier versions called the result of `apply`, and of `load`.
Replayed = Saved = Compiled


def exported(program: Program, opset: int | None) -> Networks:
    """The files of a network, from its program."""
    found = to_exported(program)
    return networks_of(to_onnx(program, opset=opset, exported=found), to_pt2(found))
