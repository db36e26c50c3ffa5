"""What a compile reports: the content of report.json, and the table that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import Decision, PruneChannels
from .provenance import Provenance


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything measured about one compile. `to_dict()` is report.json.

    `latency` has ratio, low, high (95 % interval), pairs, clock, before_ms, after_ms; `macs` and `parameters` before
    and after, at batch 1; `output_error` the relative mean squared error of the outputs on held-out calibration
    samples at each stage and at the end; `groups` the unit groups, kept and total, and `multiple_of` what channel
    counts went to multiples of, where channels were pruned;
    `plans` the mixes of rewrites that were tried under a latency goal: how many changes of each kind, the output error
    after a quick re-solve, the latency ratio (upper end), in how many rounds of measurement, and which was chosen;
    `seconds` wall and CPU seconds per stage.
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
    plans: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "version": 1,
            "goal": dict(self.goal),
            "met": self.met,
            "backend": self.backend,
            "batch": self.batch,
            "latency": dict(self.latency),
            "macs": dict(self.macs),
            "parameters": dict(self.parameters),
            "output_error": self.output_error,
            "output_errors": dict(self.output_errors),
            "decisions": [dict(d) for d in self.decisions],
            "rejects": list(self.rejects),
            "groups": [dict(g) for g in self.groups],
            "multiple_of": self.multiple_of,
            "plans": [dict(p) for p in self.plans],
            "onnx_difference": self.onnx_difference,
            "calibration": dict(self.calibration),
            "seconds": dict(self.seconds),
            "environment": dict(self.environment),
            "seed": self.seed,
            "warnings": list(self.warnings),
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(quantity, before, after, change) for a table."""
        latency = self.latency
        spread = f"x{latency['ratio']:.3f} (95 %: {latency['low']:.3f} to {latency['high']:.3f})"
        rows = [("latency", f"{latency['before_ms']:.3f} ms", f"{latency['after_ms']:.3f} ms", spread)]
        for name, label, scale, unit in (
            ("macs", "MACs", 1e6, " M"),
            ("parameters", "parameters", 1e3, " k"),
        ):
            before, after = getattr(self, name)["before"], getattr(self, name)["after"]
            ratio = f"x{after / before:.3f}" if before else ""
            rows.append((label, f"{before / scale:.2f}{unit}", f"{after / scale:.2f}{unit}", ratio))
        rows.append(("output error (held out)", "0", f"{self.output_error:.4f}", "relative mean squared"))
        return rows


def unit_groups(provenance: Provenance, decisions: Sequence[Decision] = ()) -> list[dict[str, Any]]:
    """The unit groups of a program as plain data: sizes, what makes and consumes them, kept and total, why locked."""
    kept = {d.group: len(d.kept) for d in decisions if isinstance(d, PruneChannels)}
    return [
        {
            "group": g.name,
            "kept": kept.get(g.name, len(g)),
            "total": len(g),
            "widths": list(g.widths),
            "producers": [name for name, _ in g.producers],
            "consumers": [name for name, _ in g.consumers],
            "locked": g.reason,
        }
        for g in provenance.groups
    ]
