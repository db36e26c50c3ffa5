"""What torch.onnx does once in the place of once an export: the same bytes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.export import exporter, shortcuts
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.export.shortcuts import nothing_twice
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from onnxscript.rewriter._rewrite_rule import RewriteRule
from torch import nn
from torch.nn import functional as F
from torch.onnx._internal.exporter import _decomp
from torch.onnx._internal.fx.passes import type_promotion


class Promoted(nn.Module):
    """Types that meet, in chains: integers and floats, halves and floats, numbers and integers, sums of integers."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = x.half() * 2.5
        mixed = (x * i + half) / 3
        return mixed.relu(), i / 2 + 1, (i + 1.5) * i, i.float().sum(1) + i.sum(1), torch.where(x > 0, half, x)


class Rewritten(nn.Module):
    """What the optimiser's rules match: slices side by side, clips behind each other, transposes, reshapes, casts."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left, right = x[:, :2], x[:, 2:4]
        clipped = F.relu(torch.clamp(F.relu(x), -1.0, 2.0))
        turned = x.transpose(1, 2).transpose(2, 1).reshape(-1, 2).reshape(-1, 4)
        return left + right, clipped, turned, x.unsqueeze(1).unsqueeze(2) + 0.0, x.double().float() * 1.0


class Decomposed(nn.Module):
    """What has no translation before it is decomposed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x, (3, 3)) + torch.std(x)


def programs(nets: SimpleNamespace) -> dict[str, Program]:
    ints = torch.ones(2, 3, dtype=torch.long)
    return {
        "promoted": capture(Promoted().eval(), (torch.randn(2, 3), ints)),
        "rewritten": capture(Rewritten().eval(), torch.randn(2, 4, 4)),
        "decomposed": capture(Decomposed().eval(), torch.randn(2, 3, 6, 6)),
        "transformer": capture(nets.seeded(nets.Transformer), nets.tokens(2)),
        "densenet": capture(nets.seeded(nets.DenseNet), nets.images(2)),
    }


def test_the_same_bytes_as_without(nets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = programs(nets)
    short = {name: to_onnx(program) for name, program in made.items()}
    monkeypatch.setattr(exporter, "nothing_twice", nullcontext)
    assert short == {name: to_onnx(program) for name, program in made.items()}


def test_it_is_less_work(residual: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """No node is run for its type, no rule looks at a node that it cannot match, no table is made anew."""
    tables, tried, run = [], [], []
    table, rewrite, node = (
        _decomp.create_onnx_friendly_decomposition_table,
        RewriteRule.try_rewrite,
        torch.fx.Interpreter,
    )
    monkeypatch.setattr(
        _decomp, "create_onnx_friendly_decomposition_table", lambda operators: tables.append(1) or table(operators)
    )

    def counted_rewrite(*args: Any, **options: Any) -> Any:
        tried.append(1)
        return rewrite(*args, **options)

    called = node.call_function
    monkeypatch.setattr(RewriteRule, "try_rewrite", counted_rewrite)
    monkeypatch.setattr(node, "call_function", lambda *args, **options: run.append(1) or called(*args, **options))
    shortcuts._tables.cache_clear()
    for _ in range(2):
        to_onnx(residual)
    with_shortcuts = len(tried)
    assert len(tables) == 1
    assert not run
    monkeypatch.setattr(exporter, "nothing_twice", nullcontext)
    tried.clear()
    for _ in range(2):
        to_onnx(residual)
    assert len(tables) == 3
    assert len(run) == 2 * sum(n.op == "call_function" for n in residual.graph.nodes)
    assert with_shortcuts < len(tried) / 5


def places() -> list[Any]:
    return [
        _decomp.create_onnx_friendly_decomposition_table,
        type_promotion._TypePromotionInterpreter.run_node,
        RewriteRule.try_rewrite,
    ]


def test_everything_is_put_back_after_an_error_too() -> None:
    before = places()
    with pytest.raises(ValueError, match="inside"), nothing_twice():
        assert not any(one is two for one, two in zip(before, places(), strict=True))
        raise ValueError("inside")
    assert all(one is two for one, two in zip(before, places(), strict=True))


@pytest.mark.parametrize(
    "place", [("no.such.module", "", "name"), ("onnxscript.rewriter._rewrite_rule", "NoSuchRule", "try_rewrite")]
)
def test_where_a_library_has_it_elsewhere_nothing_is_shortened(
    place: tuple[str, str, str], residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = to_onnx(residual)
    missing = [(*place, lambda original: pytest.fail("replaced")), ("onnxscript.rewriter", "", "no_such_name", list)]
    monkeypatch.setattr(shortcuts, "_replacements", lambda: missing)
    assert to_onnx(residual) == wanted
