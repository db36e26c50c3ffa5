"""What a compile reports: the content of report.json, and the table that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.sampled_error import interval_words
from ..support.strict_json import finite


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything measured about one compile. `to_dict()` is report.json.

    `model` is the name of the network's file or class and `fingerprint` what its plan knows it by; `made` when the
    report was made (UTC), `versions` of what made it; `rewrites` those that were allowed, `kinds` what they are called
    and how they are drawn, `words` the decisions in words (`what`, `how`), in their order, and `mimicked` whether the
    result has been trained to mimic the original.

    `latency` has ratio, low, high (95 % interval), pairs, clock, before_ms, after_ms, and the regime that the goal
    names; `regimes` the same by regime (``hot``, ``cold``), measured in the same loads, with a `missing` where the
    backend cannot; `macs` and `parameters` before and after, at batch 1; `output_error` the relative mean squared error
    of the outputs on the test samples, which nothing was chosen by, and `test` the same with its 95 % interval (error,
    low, high, samples); `output_errors` that on the judging samples after each stage, which plans were compared by;
    `groups` the unit groups, kept and total, and `multiple_of` what channel counts went to
    multiples of, where channels were pruned; `calibration` how many samples there were and how they were divided;
    `seconds` wall and CPU seconds per stage.

    `errors_by_output` is the final error of each output by name, on the test samples; `tried` the plans that were
    compared on the way (`TriedPlan`), `aims` the latency ratios that they were made for: the goal, and less where the
    finished network missed it; `changes` what each kind of decision costs by itself (`errors_by_class`); `graph` the
    network block by block with what became of each layer (`describe_graph`); `block_latency` where the time went before
    and after. A part that is not there has a `missing` with the reason.
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
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    words: Sequence[Mapping[str, str]] = ()
    mimicked: bool = False
    test: Mapping[str, Any] = field(default_factory=dict)
    regimes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Report:
        """The report that report.json holds. What this version does not know is left out. Raises TypeError when a part
        is missing that every version had."""
        known = {part.name for part in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    def __getitem__(self, name: str) -> Any:
        """A part by its name in report.json."""
        return self.to_dict()[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; a figure that is not finite is None."""
        data = {
            "version": 1,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "made": self.made,
            "versions": dict(self.versions),
            "rewrites": list(self.rewrites),
            "kinds": {name: dict(kind) for name, kind in self.kinds.items()},
            "words": [dict(words) for words in self.words],
            "mimicked": self.mimicked,
            "goal": dict(self.goal),
            "goal_words": self.goal_words,
            "met": self.met,
            "backend": self.backend,
            "batch": self.batch,
            "latency": dict(self.latency),
            "regimes": {name: dict(latency) for name, latency in self.regimes.items()},
            "macs": dict(self.macs),
            "parameters": dict(self.parameters),
            "output_error": self.output_error,
            "test": dict(self.test),
            "output_errors": dict(self.output_errors),
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
            "environment": dict(self.environment),
            "seed": self.seed,
            "warnings": list(self.warnings),
        }
        return {key: finite(value) for key, value in data.items()}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(quantity, before, after, change) for a table."""
        own = self.latency.get("regime", "hot")
        rows = [_latency_row("latency" if own == "hot" else f"latency, {own}", self.latency)]
        others = {name: found for name, found in self.regimes.items() if name != own and "ratio" in found}
        rows += [_latency_row(f"latency, {name}", found) for name, found in others.items()]
        for name, label, scale, unit in (
            ("macs", "MACs", 1e6, " M"),
            ("parameters", "parameters", 1e3, " k"),
        ):
            before, after = getattr(self, name)["before"], getattr(self, name)["after"]
            ratio = f"x{after / before:.3f}" if before else ""
            rows.append((label, f"{before / scale:.2f}{unit}", f"{after / scale:.2f}{unit}", ratio))
        note = "relative mean squared"
        if self.test:
            note = f"{interval_words(self.test['low'], self.test['high'])}{self.test['samples']} test samples"
        rows.append(("output error", "0", f"{self.output_error:.4f}", note))
        if self.output_errors:
            judged = list(self.output_errors.values())[-1]
            rows.append(("  as judged on the way", "0", f"{judged:.4f}", "plans were chosen by these samples"))
        return rows


def _latency_row(label: str, latency: Mapping[str, Any]) -> tuple[str, str, str, str]:
    spread = f"x{latency['ratio']:.3f} (95 %: {latency['low']:.3f} to {latency['high']:.3f})"
    return label, f"{latency['before_ms']:.3f} ms", f"{latency['after_ms']:.3f} ms", spread
