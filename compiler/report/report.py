"""The report of a compile: the content of ``report.json``, and its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.sampled_error import interval_words
from ..support.errors import plural
from ..support.strict_json import finite
from ..support.tally import ALGEBRA, FORWARD, GRADIENT, MOMENTS
from .words import memory_words, metric_row, scaled


@dataclass(frozen=True, kw_only=True, eq=False)  # equal to what has the same content, as mappings are
class Report(Mapping[str, Any]):
    """Everything that one compile measured.

    A part that could not be made holds a ``missing`` entry with the reason.

    Arguments:
        goal: The goal, as plain data.
        met: Whether it is met.
        backend: Name of the backend.
        batch: Batch size of the measurement.
        latency: ``ratio`` with its 95 % interval ``low`` to ``high``, ``before_ms``, ``after_ms``, ``pairs``,
            ``clock``, in the regime of the goal.
        macs: Multiply-accumulates ``before`` and ``after``, for one sample.
        parameters: Trained values ``before`` and ``after``.
        output_error: Relative mean squared error of the outputs on the test samples.
        output_errors: The same on the judging samples, after each stage.
        decisions: The decisions, as plain data.
        rejects: What was left unchanged, and why.
        onnx_difference: Largest difference between the outputs of ``model.onnx`` on the backend and those of torch,
            relative to the largest output.
        calibration: How many samples there were, and how they were divided; ``synthetic`` where they were made without
            data: how, and a picture.
        seconds: Wall and CPU time per stage, in seconds.
        environment: Machine and versions of the measurement.
        seed: Seed of all random choices.
        warnings: The warnings of the compile.
        groups: The unit groups, with units kept and in total, if channels were pruned.
        multiple_of: What channel counts were multiples of, if channels were pruned.
        errors_by_output: Relative error of each output by name, on the test samples.
        details: What else the rewrites said, by name of the rewrite.
        tried: The plans that were compared.
        aims: The latency ratios that were planned for: that of the goal, smaller ones after a miss, and a
            larger one after a network that came out far faster than its plan.
        changes: For each kind of decision, the error that it makes alone, before any re-solve. If there are several,
            also what it adds to those applied before it: ``error_added`` after a quick re-solve and, under a goal in
            latency, ``saving``, the share of the latency that the times of segments predict.
        graph: The network block by block, and what became of each layer.
        block_latency: Latency per block, before and after.
        model: Name of the file or class of the network.
        fingerprint: Fingerprint of the program that the plan was made for.
        made: When the report was made, in UTC.
        versions: Versions of foldcut and torch.
        rewrites: Names of the rewrites that were used.
        goal_words: The goal in words.
        goal_share: The latency ratio to reach, if the goal has one.
        kinds: What the rewrites are called, and how they are drawn.
        words: The decisions in words: ``what`` and ``how``.
        mimicked: Whether the result was trained on the features of the original.
        unmimicked: Why it was not, if that was asked for.
        test: The output error on the test samples with its 95 % interval: ``error``, ``low``, ``high``, ``samples``.
        regimes: The latency in both regimes, ``hot`` and ``cold``, by name.
        file_bytes: Sizes of the ONNX file ``before`` and ``after``.
        profile: For each ``stage`` its ``wall_s`` and ``cpu_s``, the multiply-accumulates that it did by what they were
            for (``forward``, ``gradient``, ``moments``, ``algebra``) in ``macs``, and in ``least_macs`` those that no
            way of doing it avoids. Stages inside others count in both.
        memory: ``peak_bytes``, the most that the process ever had in memory at once, also before the compile; and
            ``limit_bytes``, what it was allowed, None without a limit.
        metric: The metric passed as ``evaluate``: its ``name``, the value ``before`` and ``after``, the ``loss``, the
            ``most`` that is at 95 %, on how many ``samples``, and whether those test (``on_test``); how many ``calls``
            and ``seconds`` it took; the ``finalists`` of the search; and what went wrong (``told``). Empty without one.
        processes: Where several worked together, what each did: its multiply-accumulates (``macs``), CPU seconds
            (``cpu_s``), the bytes that it sent (``sent_bytes``) and its ``exchanges``. Empty for one.
        figures: Further figures that rewrites name, in words: ``label``, ``before``, ``after`` and ``note``.

    Example:
        >>> counts, latency = {"before": 4000, "after": 2000}, {"ratio": 0.6, "low": 0.58, "high": 0.62}
        >>> report = foldcut.Report(
        ...     goal={"kind": "macs", "ratio": 0.5}, met=True, backend="onnxruntime", batch=1, seed=0,
        ...     latency={**latency, "before_ms": 2.0, "after_ms": 1.2}, macs=counts, parameters=counts,
        ...     output_error=0.01, output_errors={}, onnx_difference=0.0, decisions=(), rejects=(),
        ...     calibration={}, seconds={}, environment={},
        ... )
        >>> for row in report.rows()[:3]:
        ...     print(row)
        ('latency', '2.000 ms', '1.200 ms', 'x0.600 (95 %: 0.580 to 0.620)')
        ('MACs', '0.00 M', '0.00 M', 'x0.500')
        ('parameters', '4.00 k', '2.00 k', 'x0.500')
    """

    goal: Mapping[str, Any]
    met: bool
    backend: str
    batch: int
    latency: Mapping[str, Any]
    macs: Mapping[str, int]
    parameters: Mapping[str, int]
    output_error: float
    output_errors: Mapping[str, float]
    decisions: Sequence[Mapping[str, Any]]
    rejects: Sequence[str]
    onnx_difference: float
    calibration: Mapping[str, Any]
    seconds: Mapping[str, Any]
    environment: Mapping[str, Any]
    seed: int
    warnings: Sequence[str] = ()
    groups: Sequence[Mapping[str, Any]] = ()
    multiple_of: int | None = None
    errors_by_output: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tried: Sequence[Mapping[str, Any]] = ()
    aims: Sequence[float] = ()
    changes: Sequence[Mapping[str, Any]] = ()
    graph: Mapping[str, Any] = field(default_factory=dict)
    block_latency: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    fingerprint: str = ""
    made: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    rewrites: Sequence[str] = ()
    goal_words: str = ""
    goal_share: float | None = None
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    words: Sequence[Mapping[str, str]] = ()
    mimicked: bool = False
    unmimicked: str | None = None
    test: Mapping[str, Any] = field(default_factory=dict)
    regimes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file_bytes: Mapping[str, int] = field(default_factory=dict)
    figures: Sequence[Mapping[str, str]] = ()
    profile: Sequence[Mapping[str, Any]] = ()
    memory: Mapping[str, int | None] = field(default_factory=dict)
    metric: Mapping[str, Any] = field(default_factory=dict)
    processes: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Report:
        """Read a report back. Parts that this version does not know are left out.

        Arguments:
            data: The content of ``report.json``.

        Returns:
            The report.

        Raises:
            TypeError: If a part is missing that every version had.
        """
        known = {part.name for part in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    def __getitem__(self, name: str) -> Any:
        """The part called `name` in ``report.json``."""
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the parts of ``report.json``."""
        return iter(self.to_dict())

    def __len__(self) -> int:
        """Number of parts."""
        return len(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the content of ``report.json``. Numbers that are not finite are None."""
        data = {
            "version": 1,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "made": self.made,
            "versions": dict(self.versions),
            "rewrites": list(self.rewrites),
            "kinds": {name: dict(kind) for name, kind in self.kinds.items()},
            "details": {name: dict(said) for name, said in self.details.items()},
            "words": [dict(words) for words in self.words],
            "mimicked": self.mimicked,
            "unmimicked": self.unmimicked,
            "goal": dict(self.goal),
            "goal_words": self.goal_words,
            "goal_share": self.goal_share,
            "met": self.met,
            "backend": self.backend,
            "batch": self.batch,
            "latency": dict(self.latency),
            "regimes": {name: dict(latency) for name, latency in self.regimes.items()},
            "macs": dict(self.macs),
            "parameters": dict(self.parameters),
            "file_bytes": dict(self.file_bytes),
            "figures": [dict(figure) for figure in self.figures],
            "output_error": self.output_error,
            "test": dict(self.test),
            "output_errors": dict(self.output_errors),
            "processes": {name: list(each) for name, each in self.processes.items()},
            "metric": dict(self.metric),
            "errors_by_output": dict(self.errors_by_output),
            "decisions": [dict(d) for d in self.decisions],
            "rejects": list(self.rejects),
            "groups": [dict(g) for g in self.groups],
            "multiple_of": self.multiple_of,
            "changes": [dict(c) for c in self.changes],
            "tried": [dict(t) for t in self.tried],
            "aims": list(self.aims),
            "block_latency": dict(self.block_latency),
            "graph": dict(self.graph),
            "onnx_difference": self.onnx_difference,
            "calibration": dict(self.calibration),
            "seconds": dict(self.seconds),
            "profile": [dict(stage) for stage in self.profile],
            "memory": dict(self.memory),
            "environment": dict(self.environment),
            "seed": self.seed,
            "warnings": list(self.warnings),
        }
        return {key: finite(value) for key, value in data.items()}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Rows (quantity, before, after, change) of a table, as strings."""
        own = self.latency.get("regime", "hot")
        rows = [_latency_row("latency" if own == "hot" else f"latency, {own}", self.latency)]
        others = {name: found for name, found in self.regimes.items() if name != own and "ratio" in found}
        rows += [_latency_row(f"latency, {name}", found) for name, found in others.items()]
        for name, label, scale, unit in (
            ("macs", "MACs", 1e6, " M"),
            ("parameters", "parameters", 1e3, " k"),
            ("file_bytes", "ONNX file", 1e3, " kB"),
        ):
            if not getattr(self, name):
                continue
            before, after = getattr(self, name)["before"], getattr(self, name)["after"]
            ratio = f"x{after / before:.3f}" if before else ""
            rows.append((label, f"{before / scale:.2f}{unit}", f"{after / scale:.2f}{unit}", ratio))
        rows += [(f["label"], f["before"], f["after"], f["note"]) for f in self.figures]
        note = "relative mean squared"
        if self.test:
            made = "synthetic " if self.calibration.get("synthetic") else ""
            samples = plural(self.test["samples"], f"{made}test sample")
            note = interval_words(self.test["low"], self.test["high"]) + samples
        rows.append(("output error", "0", f"{self.output_error:.4f}", note))
        if self.output_errors:
            judged = list(self.output_errors.values())[-1]
            rows.append(("  as judged on the way", "0", f"{judged:.4f}", "plans were chosen by these samples"))
        if self.metric:
            rows.append(metric_row(self.metric))
        if self.memory.get("peak_bytes"):
            rows.append(("peak memory", "", *memory_words(self.memory)))
        return rows

    def profile_rows(self) -> list[tuple[str, ...]]:
        """Rows of `profile` as strings: stage, seconds, CPU seconds, multiply-accumulates by what they were for and
        together, the least, how many times that was done, and how many were done in a CPU second."""
        rows = []
        for stage in sorted(self.profile, key=lambda stage: -stage["cpu_s"]):
            kinds = [stage["macs"].get(kind, 0) for kind in (FORWARD, GRADIENT, MOMENTS, ALGEBRA)]
            least, done = stage["least_macs"], sum(kinds)
            rows.append(
                (
                    stage["stage"],
                    f"{stage['wall_s']:.1f}",
                    f"{stage['cpu_s']:.1f}",
                    *(scaled(macs) if macs else "" for macs in (*kinds, done, least or 0)),
                    f"{done / least:.1f}" if least and done else "",
                    f"{done / stage['cpu_s'] / 1e9:.1f} G" if done and stage["cpu_s"] else "",
                )
            )
        return rows


def _latency_row(label: str, latency: Mapping[str, Any]) -> tuple[str, str, str, str]:
    spread = f"x{latency['ratio']:.3f} (95 %: {latency['low']:.3f} to {latency['high']:.3f})"
    return label, f"{latency['before_ms']:.3f} ms", f"{latency['after_ms']:.3f} ms", spread
