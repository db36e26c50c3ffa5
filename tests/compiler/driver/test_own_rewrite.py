"""A rewrite of a user's own, that of examples/own_rewrite.py, is to the driver what the built-in ones are."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import foldcut
import onnx
import pytest
import torch
from foldcut.compiler.driver.ignore_patterns import sorted_ignores
from foldcut.compiler.rewrite.own_source import own_sources
from torch import nn

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_rewrite.py"


@pytest.fixture(scope="module")
def own() -> Iterator[ModuleType]:
    assert foldcut.compile  # brings the kinds of foldcut's own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foldcut.Decision, "_known", dict(foldcut.Decision._known))
        spec = importlib.util.spec_from_file_location("own_rewrite", EXAMPLE)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "own_rewrite", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [part for _ in range(3) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.Hardswish())]
        return nn.Sequential(nn.Conv2d(3, 8, 3), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backend(work_backend: Any) -> Any:
    """Each Hardswish costs as much as a quarter of the network."""

    class Costly(type(work_backend)):  # type: ignore[misc]
        name = "costly"

        def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
            runner = super().load(engine, inputs, threads=threads)
            graph = onnx.load_model_from_string(engine).graph
            runner.time_ms += 8.0 * sum(node.op_type == "HardSwish" for node in graph.node)
            return runner

    return Costly()


@pytest.fixture(scope="module")
def made(own: ModuleType, net: nn.Module, images: torch.Tensor, backend: Any, quick_measurement: None) -> Any:
    return foldcut.compile(
        net,
        images,
        goal=foldcut.Latency(0.6),
        backend=backend,
        rewrites=("prune_channels", own.ExchangeActivations()),
        mimic=False,
        progress=False,
        cache=False,
    )


def test_it_takes_part_where_it_pays(made: foldcut.Compiled, own: ModuleType) -> None:
    taken = [decision for decision in made.plan.decisions if isinstance(decision, own.ToRelu)]
    assert taken and made.report.met
    names = {node.name: str(node.target) for node in made.program.graph.nodes}
    assert all(names[decision.node] == "aten.relu.default" for decision in taken)
    assert sum(target == "aten.hardswish.default" for target in names.values()) == 3 - len(taken)


def test_it_is_in_the_plan_and_worded_in_the_report(made: foldcut.Compiled, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "out")
    report = made.report.to_dict()
    assert "to_relu" in report["rewrites"]
    assert [d["kind"] for d in foldcut.load(folder).plan.to_dict()["decisions"]].count("to_relu") >= 1
    assert "Hardswish exchanged for ReLU" in (folder / "report.html").read_text()


@pytest.mark.parametrize("with_data", [False, True])
def test_it_is_applied_again(
    with_data: bool, made: foldcut.Compiled, own: ModuleType, net: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    path = made.save(tmp_path / "out") / "plan.json"
    again = foldcut.apply(
        net,
        path,
        calibration=images if with_data else None,
        example=images[:2],
        rewrites=["prune_channels", own.ExchangeActivations()],
        mimic=False,
        cache=False,
    )
    torch.testing.assert_close(again.module(images[:4]), made.module(images[:4]), rtol=1e-3, atol=1e-4)


def test_a_plan_that_was_read_before_its_rewrite_is_applied(
    made: foldcut.Compiled, own: ModuleType, net: nn.Module, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = made.outcome.ctx.teacher  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.delitem(foldcut.Decision._known, "to_relu")
        early = foldcut.Plan.from_dict(made.plan.to_dict())
    assert early.decisions != made.plan.decisions
    with pytest.raises(foldcut.PlanError, match="to_relu, which is not there"):
        foldcut.apply_plan(program, early)
    applied = foldcut.apply_plan(program, early, [own.ExchangeActivations()])
    wanted = foldcut.apply_plan(program, made.plan, [own.ExchangeActivations()])
    assert applied.text() == wanted.text() != program.text()


def test_names_that_are_left_alone_do_not_concern_it(own: ModuleType, made: foldcut.Compiled) -> None:
    """It has no setting for them: those of others pass it by."""
    limits = foldcut.ChannelLimits(ignore=("1",))
    rewrites = [foldcut.Prune(limits=limits), own.ExchangeActivations()]
    assert sorted_ignores(made.outcome.ctx.teacher, rewrites)[1] is rewrites[1]  # type: ignore[union-attr]


def test_two_of_one_name_are_refused(own: ModuleType, net: nn.Module, images: torch.Tensor) -> None:
    twice = (own.ExchangeActivations(samples=8), own.ExchangeActivations(samples=16))
    with pytest.raises(foldcut.CompilerError, match="rewrites names 'to_relu' twice"):
        foldcut.compile(net, images, goal=foldcut.Latency(0.6), rewrites=twice)


@pytest.mark.parametrize(
    ("bare", "says"),
    [
        (False, "name is 'other', and its decisions are of the kind 'to_relu'"),
        (True, "Bad does not set verb, decides"),
    ],
)
def test_what_a_class_must_say_is_asked_for_at_once(
    bare: bool, says: str, own: ModuleType, net: nn.Module, images: torch.Tensor
) -> None:
    bad = type("Bad", (foldcut.Rewrite if bare else own.ExchangeActivations,), {"name": "other"})
    with pytest.raises(foldcut.CompilerError, match=says):
        foldcut.compile(net, images, goal=foldcut.Latency(0.6), rewrites=[bad()])


def test_what_is_kept_of_it_is_its_source_s(own: ModuleType, tmp_path: Path) -> None:
    """A store that knew the rewrite before it was changed is not asked for it."""
    assert own_sources([foldcut.Drop(), foldcut.Prune(), foldcut.Factorize()]) == []
    before = own_sources([own.ExchangeActivations()])
    assert before == own_sources([own.ExchangeActivations()]) != own_sources([own.ExchangeActivations(samples=2)])
    changed = tmp_path / "own_rewrite.py"
    changed.write_text(EXAMPLE.read_text() + "\n# changed\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "__file__", str(changed))
        assert own_sources([own.ExchangeActivations()]) != before
