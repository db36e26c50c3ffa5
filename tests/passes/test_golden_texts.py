"""What each rewrite and each edit makes of a small graph, as text: the file beside this one says what it was and is.

`FOLDCUT_GOLDEN=write` writes the files anew; then look at what has changed in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit import Call, bypass, replace_calls, set_tensors
from foldcut.compiler.ir.edit_chain import Link, replace_layers
from foldcut.compiler.ir.edit_folds import fold_batch_norms, fold_parameters
from foldcut.compiler.ir.program import Program
from foldcut.compiler.ir.segments import find_segments
from foldcut.compiler.plan.decision import Decision
from foldcut.compiler.trial.apply_decisions import applied, finished
from foldcut.runtime.predict.edit_extract import extract_segments
from torch import nn
from torch.nn import functional as F

FOLDER = Path(__file__).parent / "golden"
aten = torch.ops.aten


class Small(nn.Module):
    """A stem, one residual branch of two convolutions with a batch norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.one, self.norm, self.two = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.norm(self.one(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Small().eval(), torch.randn(2, 3, 8, 8))


def drop(program: Program) -> Decision:
    region = find_regions(program).blocks[0]
    return foldcut.DropBlock(entry=region.entry, exit=region.exit, path=region.path)


def prune(program: Program) -> Decision:
    group = next(g for g in foldcut.find_units(program).prunable if len(g) == 6)
    return foldcut.PruneChannels(group=group.name, kept=(0, 2, 5), total=6)


def factorise(program: Program) -> Decision:
    *_, last = (n.name for n in program.graph.nodes if n.target is aten.conv2d.default)
    return foldcut.FactorizeLayer(layer=last, scheme="channel", ranks=(2,), full=(4,))


def quantise(program: Program) -> Decision:
    *_, last = (n.name for n in program.graph.nodes if n.target is aten.conv2d.default)
    return foldcut.QuantizeLayer(layer=last)


def convolution(program: Program) -> Any:
    return next(n for n in program.graph.nodes if n.target is aten.conv2d.default)


def chained(program: Program) -> Program:
    links = [
        Link(name="first", target=aten.conv2d.default, weight=torch.ones(2, 3, 1, 1)),
        Link(name="last", target=aten.conv2d.default, weight=torch.ones(4, 2, 1, 1)),
    ]
    return replace_layers(program, {convolution(program).name: links}, note="a chain")


def recalled(program: Program) -> Program:
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    call = Call(target=aten.silu.default, args=relu.args, kwargs={})
    return replace_calls(program, {relu.name: call}, {}, note="another activation")


REWRITES: dict[str, tuple[foldcut.Rewrite, Callable[[Program], Decision]]] = {
    "drop_blocks": (foldcut.Drop(), drop),
    "prune_channels": (foldcut.Prune(resolve=False), prune),
    "factorize": (foldcut.Factorize(resolve=False), factorise),
    "quantize": (foldcut.Quantize(ranges="minmax"), quantise),
}
EDITS: dict[str, Callable[[Program], Program]] = {
    "bypass": lambda p: bypass(p, drop(p).entry, drop(p).exit, note="a bypass"),  # type: ignore[attr-defined]
    "replace_calls": recalled,
    "replace_layers": chained,
    "fold_parameters": fold_parameters,
    "set_tensors": lambda p: set_tensors(p, {"head.bias": torch.zeros(2)}, note="a bias of zeros"),
    "fold_batch_norms": lambda p: fold_batch_norms(p)[0],
    "extract_segments": lambda p: extract_segments(p, find_segments(p)[:1], batch=2),
}


def compared(name: str, before: Program, after: Program) -> None:
    """With the file of that name."""
    text = f"before\n\n{before.text()}\nafter ({after.history[-1] if after.history else ''})\n\n{after.text()}"
    path = FOLDER / f"{name}.txt"
    if os.environ.get("FOLDCUT_GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("name", REWRITES)
def test_a_rewrite_makes_of_a_small_graph(name: str, small: Program, contexts: Any) -> None:
    rewrite, decide = REWRITES[name]
    decisions: Sequence[Decision] = [decide(small)]
    samples = foldcut.CalibrationSet.of(torch.randn(4, 3, 8, 8))
    ctx = contexts(small, samples)
    made = applied(ctx, [rewrite], decisions, exactly=True)
    made = finished(ctx, [rewrite], made, decisions, exactly=True)
    shaped = rewrite.shape(small, decisions)
    # the scales of values are data; what they are scales of is the graph
    compared(name, small, shaped if rewrite.comes_last else made.program)
    assert [d.change for d in made.decisions] == [d.change for d in decisions]
    assert [n.name for n in shaped.graph.nodes] == [n.name for n in made.program.graph.nodes]


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_makes_of_a_small_graph(name: str, small: Program) -> None:
    compared(name, small, EDITS[name](small))
