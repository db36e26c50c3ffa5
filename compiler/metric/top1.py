"""Top-1 accuracy on labelled calibration samples."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.calibration_set import CalibrationSet
from ..ir.compare import flatten_outputs
from ..ir.program import Program
from ..support.errors import CalibrationError, plural

#: Share of labelled samples that test, where no setting says otherwise: what can be said of a metric goes by how many
#: samples it was read on, and these are read for nothing else.
TESTED = 0.4
#: Samples that go through a network at once.
_BATCH = 64
_HINT = "give the class of each sample as a whole number from 0 on, in the order of the samples"


@dataclass(frozen=True, eq=False)
class Top1:
    """Metric: top-1 accuracy in percent, by labels of the calibration samples.

    Pass it as `evaluate` of `compile`. It is read on the test samples, which choose and fit nothing else: two fifths of
    all, unless `PipelineSettings.tested` says otherwise. `MaxLoss` is then in points of a percent, with the sampling
    error of those samples. The classes are the last dimension of the network's first output. Take samples that the
    network was not trained on: of others a network loses less than of new ones.

    Arguments:
        labels: The class of each sample, whole numbers from 0 on, in the order of the samples.

    Raises:
        CalibrationError: If the labels are not whole numbers, one for each sample.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> samples = torch.randn(60, 8)
        >>> labels = net(samples).argmax(1)
        >>> options = {"progress": False, "cache": False, "mimic": False}
        >>> out = foldcut.compile(
        ...     net, samples, goal=foldcut.Channels(0.75), evaluate=foldcut.Top1(labels), **options
        ... )
        >>> out.report.metric["name"], out.report.metric["before"], out.report.metric["calls"]
        ('top-1 (%)', 100.0, 2)
    """

    labels: Any

    def __post_init__(self) -> None:
        found = self.labels
        values = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found)
        if values.ndim != 1:
            raise CalibrationError(
                "labels are one number for each sample", expected="[samples]", actual=list(values.shape), hint=_HINT
            )
        if values.dtype.kind not in "iu":
            raise CalibrationError(
                "labels are not whole numbers", expected="int64", actual=str(values.dtype), hint=_HINT
            )
        if values.size and values.min() < 0:
            raise CalibrationError(f"a label is {int(values.min())}", expected="classes from 0 on", hint=_HINT)
        object.__setattr__(self, "labels", torch.from_numpy(values.astype(np.int64)))

    @property
    def name(self) -> str:
        """What a report calls it."""
        return "top-1 (%)"

    def check_count(self, samples: CalibrationSet) -> None:
        """Raise CalibrationError for labels of another number than the samples."""
        if len(self.labels) != len(samples):
            raise CalibrationError(
                "there are not as many labels as samples",
                expected=plural(len(samples), "label"),
                actual=plural(len(self.labels), "label"),
                hint=_HINT,
            )

    def check_classes(self, program: Program) -> None:
        """Raise CalibrationError for labels that a network has no output for."""
        output = program.outputs[0]
        if len(output.shape) != 2:
            raise CalibrationError(
                "top-1 needs an output with a number for each class",
                expected="[samples, classes]",
                actual=str(output),
                hint="pass evaluate= a function of your own, module -> number",
            )
        classes = output.shape[1]
        if not isinstance(classes, str) and len(self.labels) and int(self.labels.max()) >= classes:
            raise CalibrationError(
                f"a label is {int(self.labels.max())}, and output {output.name!r} has {classes} classes",
                expected=f"0 to {classes - 1}",
                hint="number the classes as the network does, from 0 on",
            )

    def bound(self, program: Program, samples: CalibrationSet, test: CalibrationSet) -> Callable[[Program], Any]:
        """What scores a network on `test`, samples out of `samples`, whose labels these are: 100 or 0 for each. The
        labels have been checked."""
        labels = self._of(samples.aligned(program), test)

        def scores(network: Program) -> Any:
            right = []
            for start, batch in zip(range(0, len(test), _BATCH), test.batches(_BATCH), strict=True):
                found = flatten_outputs(network(batch))[0].argmax(1)
                wanted = labels[start : start + _BATCH].to(found.device, non_blocking=True)
                right.append(found == wanted)
            return 100 * torch.cat(right).cpu().double()

        return scores

    def _of(self, samples: CalibrationSet, test: CalibrationSet) -> torch.Tensor:
        """The labels of the samples in `test`, which are known again by their contents."""
        known: dict[bytes, deque[int]] = defaultdict(deque)
        for digest, label in zip(samples.digests, self.labels.tolist(), strict=True):
            known[digest].append(label)
        return torch.tensor([known[digest].popleft() for digest in test.digests], dtype=torch.long, device="cpu")
