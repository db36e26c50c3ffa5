"""A rewrite of one's own: costly activations (SiLU, GELU, Hardswish) become ReLU where the network recovers from it.

It takes part in a plan like the rewrites that foldcut brings: offered, priced by the backend, solved afterwards,
written to plan.json, carried out again by `foldcut.apply`, worded in the report. Nothing is registered anywhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import foldcut
import torch
from foldcut import Applied, Decision, Program
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.ir.edit import Call, replace_calls
from torch import nn

aten = torch.ops.aten
COSTLY = {aten.silu.default: "SiLU", aten.gelu.default: "GELU", aten.hardswish.default: "Hardswish"}
LEAST_SAVING = 0.001


@dataclass(frozen=True, kw_only=True)
class ToRelu(Decision):
    """Put a ReLU in the place of one activation."""

    node: str
    was: str
    path: str = ""
    error: float | None = None

    kind = "to_relu"
    nouns = ("activation exchanged", "activations exchanged")

    @property
    def subject(self) -> str:
        return self.node

    @property
    def what(self) -> str:
        return self.path or self.node

    @property
    def how(self) -> str:
        return f"{self.was} exchanged for ReLU"


@dataclass(frozen=True, kw_only=True)
class ExchangeActivations(foldcut.Rewrite):
    """Exchange costly activations for ReLU. `samples` of the judging samples say what each exchange loses."""

    samples: int = 16

    name = "to_relu"
    verb = "exchange activations"
    decides = ToRelu
    phase = 15  # behind dropped blocks, in front of what looks at activations
    solves_before_next = True

    def offer(self, ctx: foldcut.Context, budget: foldcut.Budget) -> foldcut.Offer:
        """Each activation alone: what the outputs lose before anything is solved, and what the backend gains."""
        program, few = ctx.teacher, ctx.judge.take(slice(0, self.samples))
        costly = [node for node in program.graph.nodes if node.target in COSTLY]
        changes = [ToRelu(node=n.name, was=COSTLY[n.target], path=program.path(n)) for n in costly]
        savings = budget.savings({change.node: partial(self.shape, program, [change]) for change in changes})
        items = []
        for change in changes:
            if savings[change.node] >= LEAST_SAVING:
                error = output_error(program, self.shape(program, [change]), few)
                claims = foldcut.Claims(replaces=frozenset([change.node]), needs=frozenset([change.node]))
                proposals = (foldcut.Proposal(error=error, saving=savings[change.node], decision=change),)
                items.append(foldcut.Item(kind=self.name, name=change.node, claims=claims, proposals=proposals))
        return foldcut.Offer(items=tuple(items))

    def requires(self, program: Program, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            if decision.subject not in program.nodes:
                raise foldcut.RewriteError("no such activation", node=decision.subject)

    def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
        nodes = [program.nodes[decision.subject] for decision in decisions]
        calls = {node.name: Call(target=aten.relu.default, args=node.args[:1], kwargs={}) for node in nodes}
        return replace_calls(program, calls, {}, note=f"{len(calls)} activations to ReLU")

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: foldcut.Context) -> Applied:
        del ctx  # what the layers behind need is solved by foldcut
        changes = foldcut.Changes(replaced=tuple(decision.subject for decision in decisions))
        return Applied(program=self.shape(program, decisions), decisions=tuple(decisions), changes=changes)


def main() -> None:
    torch.manual_seed(0)
    blocks = [part for _ in range(4) for part in (nn.Conv2d(16, 16, 1), nn.GELU())]
    ends = nn.Conv2d(3, 16, 3, padding=1), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
    net = nn.Sequential(ends[0], *blocks, *ends[1])
    images = torch.randn(200, 3, 24, 24)
    out = foldcut.compile(
        net.eval(),
        images,
        goal=foldcut.Latency(0.6),
        rewrites=("prune_channels", ExchangeActivations()),
        mimic=False,
        progress=False,
    )
    for decision in out.plan.decisions:
        print(decision.what, decision.how)
    print(f"x{out.report.latency['ratio']:.3f} of the latency at an output error of {out.report.output_error:.4f}")
    with tempfile.TemporaryDirectory() as folder:
        out.save(folder)
        again = foldcut.apply(net, Path(folder) / "plan.json", example=images[:2], rewrites=[ExchangeActivations()])
        print("carried out again:", bool(torch.allclose(out.module(images[:4]), again.module(images[:4]), atol=1e-4)))


if __name__ == "__main__":
    main()
