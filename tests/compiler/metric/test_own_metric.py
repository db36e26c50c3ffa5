"""A user's own metric: what it gets, when it is read, what it says in the report, and what is refused."""

import functools
import json
import math
import warnings
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from foldcut.compiler.data.synthetic import SyntheticSet
from foldcut.compiler.driver.plan_search import Search
from foldcut.compiler.metric.metric import Metric, check_evaluate
from foldcut.compiler.plan.tried import Found, Tried
from foldcut.compiler.report.page import report_page
from foldcut.compiler.support.progress import StageClock
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")
STEPS = foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=2))
OPTIONS: Any = {
    "mimic": False,
    "progress": False,
    "cache": False,
    "settings": foldcut.PipelineSettings(channels=STEPS),
}


@pytest.fixture(scope="module")
def net(nets: SimpleNamespace) -> nn.Module:
    return nets.seeded(lambda: nets.ResNet(3), seed=5)


@pytest.fixture(scope="module")
def labels(net: nn.Module, nets: SimpleNamespace) -> torch.Tensor:
    """What the network itself says of `nets.images(60)`."""
    with torch.no_grad():
        return net(nets.images(60)).argmax(1)


class Recorded:
    """A metric that remembers what it got; the value falls with every network."""

    def __init__(self, *values: Any) -> None:
        self.values = list(values)
        self.modules: list[nn.Module] = []

    def __call__(self, module: nn.Module) -> Any:
        self.modules.append(module)
        value = self.values[min(len(self.modules), len(self.values)) - 1]
        if isinstance(value, BaseException):
            raise value
        return value


def compiled(net: Any, samples: Any, evaluate: Any, goal: Any = None, **options: Any) -> foldcut.Compiled:
    goal = goal or foldcut.Channels(0.5)
    return foldcut.compile(net, samples, goal=goal, evaluate=evaluate, **(OPTIONS | options))


def test_it_gets_networks_that_are_called_as_the_original(net: nn.Module, nets: SimpleNamespace) -> None:
    """The original and the result, each once, and what is done to them is done to nothing else."""
    images = nets.images(6, seed=3)
    seen: list[torch.Tensor] = []

    def evaluate(module: nn.Module) -> float:
        assert isinstance(module, nn.Module) and not module.training and not torch.is_grad_enabled()
        seen.append(module.eval()(images))
        torch.randn(3)
        for parameter in module.parameters():
            parameter.data.zero_()
        return float(seen[-1].abs().sum())

    state = torch.get_rng_state()
    made = compiled(net, nets.images(60), evaluate)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 2
    with torch.no_grad():
        torch.testing.assert_close(seen[0], net(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[1], made.module(images), rtol=1e-6, atol=1e-6)
    metric = made.report.metric
    assert metric["name"] == "evaluate" and metric["calls"] == 2 and 0 < metric["seconds"] < 60
    assert metric["loss"] == pytest.approx(metric["before"] - metric["after"])
    assert made.report.seconds["evaluate"]["wall"] > 0


def test_the_same_result_with_and_without(net: nn.Module, nets: SimpleNamespace, without: Any) -> None:
    """One that draws and calls, and then says nothing that matters."""
    with_one = compiled(net, nets.images(60), lambda module: float(module(torch.randn(2, 3, 8, 8)).sum()))
    plain = without[str(with_one.plan.goal)]
    assert with_one.program.fingerprint == plain.program.fingerprint and plain.report.metric == {}
    assert with_one.report.metric["name"] == "own metric"


def test_several_inputs_and_named_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 32), nn.Linear(4, 32), nn.Linear(32, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.out(torch.relu(self.a(a) + self.b(b)))}

    a, b = torch.randn(40, 8), torch.randn(40, 4)
    made = compiled(Pair().eval(), (a, b), lambda module: float(module(a[:3], b=b[:3])["logits"].sum()))
    assert made.report.metric["told"] == [] and made.report.metric["after"] is not None


def test_onnx_files_are_modules_too(net: nn.Module, nets: SimpleNamespace, tmp_path: Any) -> None:
    first = foldcut.compile(net, nets.images(60), goal=foldcut.Channels(0.75), **OPTIONS)
    first.save(tmp_path / "net")
    images = nets.images(6, seed=3)
    made = compiled(tmp_path / "net" / "model.onnx", nets.images(60), lambda module: float(module(images).sum()))
    assert made.report.metric["before"] == pytest.approx(first.module(images).sum().item(), rel=1e-4)


PRUNED: Any = {"goal": foldcut.Latency(0.7), "rewrites": ("prune_channels",)}


@pytest.fixture(scope="module")
def without(net: nn.Module, nets: SimpleNamespace, work_backend: Any) -> Any:
    """The networks of two goals where there is no metric."""
    goals = {str(options["goal"]): options for options in ({"goal": foldcut.Channels(0.5)}, PRUNED)}
    return {
        goal: foldcut.compile(net, nets.images(60), backend=work_backend, **(OPTIONS | options))
        for goal, options in goals.items()
    }


@pytest.mark.parametrize(
    ("values", "told", "options"),
    [
        ([ValueError("no targets\nhere")], "failed: ValueError: no targets", {}),
        ([1.0, math.nan], "is not finite", {}),
        (["0.5"], "and not a number", {}),
        ([0.5, RuntimeError("late")], "failed: RuntimeError: late", PRUNED),
        ([SystemExit(2)], "failed: SystemExit: 2", {}),
    ],
    ids=["raises", "nan", "text", "raises later", "exits"],
)
def test_what_goes_wrong_ends_nothing(
    values: Any, told: str, options: Any, net: nn.Module, nets: SimpleNamespace, work_backend: Any, without: Any
) -> None:
    """It is told once, and the error decides as without."""
    with pytest.warns(UserWarning, match=f"{told}.*the output error decides instead"):
        made = compiled(net, nets.images(60), Recorded(*values), backend=work_backend, **options)
    assert made.program.fingerprint == without[str(made.plan.goal)].program.fingerprint
    assert made.report.metric["loss"] is None and len(made.report.metric["told"]) == 1
    assert next(row for row in made.report.rows() if row[0] == "Recorded")[3].startswith("it could not be read")
    assert any(told in warning for warning in made.report.warnings)
    assert "it could not be read" in report_page(made.report.to_dict())


def test_a_metric_that_fails_on_the_original_is_not_asked_again(net: nn.Module, nets: SimpleNamespace) -> None:
    evaluate = Recorded(ValueError("no"))
    with pytest.warns(UserWarning, match="no"):
        compiled(net, nets.images(60), evaluate)
    assert len(evaluate.modules) == 1


def two_arguments(module: nn.Module, data: Any) -> float:
    return float(data)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (two_arguments, "two_arguments cannot be called with the network alone: missing a required argument: 'data'"),
        (lambda: 1.0, "cannot be called with the network alone: too many positional"),
        (0.5, "evaluate=float cannot be called"),
        (torch.zeros(3), "evaluate=Tensor cannot be called"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_is_done(evaluate: Any, words: str) -> None:
    samples: Any = object()  # would be refused as well, later
    with pytest.raises(foldcut.CompilerError, match=words):
        foldcut.compile(nn.Linear(2, 2), samples, goal=foldcut.Blocks(1), evaluate=evaluate)
    with pytest.raises(foldcut.CompilerError, match=words):
        foldcut.sweep(nn.Linear(2, 2), samples, goals=[foldcut.Blocks(1)], evaluate=evaluate)


@pytest.mark.parametrize(
    "evaluate",
    [functools.partial(two_arguments, data=1), lambda module, share=0.5: share, lambda *modules: 1.0, max, Recorded(1)],
)
def test_what_can_be_called_with_a_module_is_taken(evaluate: Any) -> None:
    check_evaluate(evaluate)


def test_top_1_is_read_on_samples_that_only_test(net: nn.Module, nets: SimpleNamespace, labels: torch.Tensor) -> None:
    """Two fifths of them, whatever order they come in; the original is right about all, since they are its own."""
    made = compiled(net, nets.images(60), foldcut.Top1(labels))
    test = made.outcome.ctx.sets.test
    metric = made.report.metric
    assert len(test) == metric["samples"] == 24 and made.report.calibration["fit"] == 30
    with torch.no_grad():
        right = made.module(test.leaves[0]).argmax(1) == net(test.leaves[0]).argmax(1)
    assert metric["before"] == 100 and metric["after"] == pytest.approx(100 * right.double().mean().item())
    order = torch.randperm(60)
    again = compiled(net, nets.images(60)[order], foldcut.Top1(labels[order].numpy()))
    assert again.report.metric["after"] == metric["after"]
    less = foldcut.PipelineSettings(channels=STEPS, tested=0.2)
    assert compiled(net, nets.images(60), foldcut.Top1(labels), settings=less).report.metric["samples"] == 12


def test_equal_samples_keep_a_label_each(net: nn.Module, nets: SimpleNamespace) -> None:
    """The original is right about one of two equal samples whose labels differ."""
    images = nets.images(30).repeat(2, 1, 1, 1)
    with torch.no_grad():
        right = net(images[:30]).argmax(1)
    made = compiled(net, images, foldcut.Top1(torch.cat([right, (right + 1) % 4])))
    assert made.report.metric["before"] == 50


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda labels: labels[:59], "not as many labels as samples"),
        (lambda labels: torch.cat([labels, labels]), "not as many labels as samples"),
        (lambda labels: labels.float(), "labels are not whole numbers"),
        (lambda labels: labels > 1, "labels are not whole numbers"),
        (lambda labels: [str(label) for label in labels.tolist()], "labels are not whole numbers"),
        (lambda labels: nn.functional.one_hot(labels), "labels are one number for each sample"),
        (lambda labels: labels - 9, "a label is -"),
        (lambda labels: labels + 4, "has 4 classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    made: Any, words: str, net: nn.Module, nets: SimpleNamespace, labels: torch.Tensor, monkeypatch: Any
) -> None:
    """Before anything is analysed."""
    monkeypatch.setattr("foldcut.compiler.driver.api.run_pipeline", None)
    with pytest.raises(foldcut.CalibrationError, match=words):
        compiled(net, nets.images(60), foldcut.Top1(made(labels)))


@pytest.mark.parametrize("run", ["compile", "sweep"])
def test_labels_of_another_number_are_refused_before_the_capture(
    run: str, net: nn.Module, nets: SimpleNamespace, labels: torch.Tensor, monkeypatch: Any
) -> None:
    """The network may take minutes to capture."""
    for module in ("api", "sweep"):
        monkeypatch.setattr(f"foldcut.compiler.driver.{module}.capture", lambda *_: pytest.fail("it is captured"))
    options: dict[str, Any] = {"progress": False, "cache": False, "evaluate": foldcut.Top1(labels[1:])}
    ignored = foldcut.RankSettings(ignore=("head",))  # a sweep captures the network for it
    options["settings"] = foldcut.PipelineSettings(ranks=ignored)
    goals: list[foldcut.Goal] = [foldcut.Channels(0.5), foldcut.Ranks(keep=0.5)]
    with pytest.raises(foldcut.CalibrationError, match="not as many labels as samples"):
        if run == "compile":
            foldcut.compile(net, nets.images(60), goal=goals[0], **options)
        else:
            foldcut.sweep(net, nets.images(60), goals=goals, **options)


def test_classes_that_are_not_there_are_refused_before_samples_are_compared(
    net: nn.Module, nets: SimpleNamespace, labels: torch.Tensor, monkeypatch: Any
) -> None:
    monkeypatch.setattr(foldcut.PipelineSettings, "context", lambda *_: pytest.fail("the samples are divided"))
    with pytest.raises(foldcut.CalibrationError, match="has 4 classes"):
        compiled(net, nets.images(60), foldcut.Top1(labels + 4))


def test_labels_need_an_output_of_classes() -> None:
    net = nn.Conv2d(3, 4, 3).eval()
    with pytest.raises(foldcut.CalibrationError, match="top-1 needs an output with a number for each class"):
        compiled(net, torch.randn(20, 3, 8, 8), foldcut.Top1([0] * 20))


@pytest.mark.parametrize("tested", [0, 0.6, True, "half"])
def test_shares_that_test(tested: Any) -> None:
    with pytest.raises(foldcut.CompilerError, match="tested="):
        foldcut.PipelineSettings(tested=tested)


def test_max_loss_without_a_metric_says_what_to_pass() -> None:
    with pytest.raises(foldcut.GoalError, match=r"metric loss at most 0\.5 is about a metric") as caught:
        foldcut.compile(nn.Linear(2, 2), torch.zeros(4, 2), goal=foldcut.MaxLoss(0.5))
    assert "evaluate=" in str(caught.value) and "Top1(labels)" in str(caught.value) and "--labels" in str(caught.value)
    with pytest.raises(foldcut.GoalError, match="is about a metric"):
        foldcut.sweep(nn.Linear(2, 2), torch.zeros(4, 2), goals=[foldcut.MaxLoss(0.5)])


def test_a_sweep_reads_it_for_every_goal(net: nn.Module, nets: SimpleNamespace, labels: torch.Tensor) -> None:
    goals = [foldcut.Channels(0.75), foldcut.Channels(0.5)]
    points = foldcut.sweep(net, nets.images(60), goals=goals, evaluate=foldcut.Top1(labels), **OPTIONS).points
    found = [point.compiled.report.metric for point in points if point.compiled is not None]
    assert [metric["before"] for metric in found] == [100, 100]


def scored(values: dict[str, Any], programs: Any) -> Metric:
    """A metric that gives so much for each of some programs, the first of which is the original."""
    known = {id(program): value for program, value in zip(programs, values.values(), strict=True)}
    return Metric("scored", lambda program: known[id(program)], programs[0], StageClock())


def programs(count: int) -> Any:
    """In place of networks."""
    return [SimpleNamespace(fingerprint=str(number)) for number in range(count)]


def test_the_better_of_networks_by_more_than_chance() -> None:
    some = programs(4)
    assert scored({"t": 9.0, "a": 1.0, "b": 2.0, "c": 1.5}, some).best(some[1:]) == 1
    assert scored({"t": 9.0, "a": 2.0, "b": 2.0, "c": 1.5}, some).best(some[1:]) == 0
    ones, most = [1.0] * 100, [1.0] * 99 + [0.0]
    half = [1.0] * 50 + [0.0] * 50
    assert scored({"t": ones, "a": half, "b": most, "c": ones}, some).best(some[1:]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scored({"t": 9.0, "a": 1.0, "b": math.nan, "c": 1.5}, some).best(some[1:]) == 2


#: (error, ratio) of plans.
FIGURES = [(1.0, 0.7), (1.2, 0.6), (1.3, 0.9), (1.4, 0.65), (1.45, 0.6), (9, 0.5)]


def test_a_search_lets_it_pick_among_plans_that_are_alike(contexts: Any, residual: Any, nets: SimpleNamespace) -> None:
    """Three of those that reach the goal and lose about the least are made and read; the best by the metric stands."""
    plans = [
        Tried(mix={"plan": number}, error=error, ratio=ratio)  # type: ignore[dict-item]
        for number, (error, ratio) in enumerate(FIGURES)
    ]
    some = programs(7)
    metric = scored({"t": 9.0, "0": 1.0, "1": 2.0, "2": 8.0, "3": 1.5, "4": 8.0, "5": 8.0}, some)
    samples = foldcut.CalibrationSet.of(nets.images(8))

    class Made(Search):
        def made(self, found: Found) -> foldcut.Applied:
            program = some[1 + found.best.mix["plan"]]  # type: ignore[index]
            return foldcut.Applied(program=program, errors={"re-solved": found.best.error})

    found = Found(best=plans[0], met=True, tried=tuple(plans), scales={})

    def picked(metric: Any, found: Found) -> Any:
        search = Made(ctx=contexts(residual, samples, metric=metric), rewrites=[])
        return search.best_made(found, 0.7).program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldcut.compiler.driver.plan_search.keyed", lambda mix: mix)
        assert picked(metric, found) is some[2]
        assert picked(None, found) is some[1]
    assert metric.calls == 4 and [f["ratio"] for f in metric.finalists] == [0.7, 0.6, 0.65]


def test_the_report_says_what_it_found(net: nn.Module, nets: SimpleNamespace, labels: torch.Tensor) -> None:
    made = compiled(net, nets.images(60), foldcut.Top1(labels))
    report = json.loads(json.dumps(made.report.to_dict()))
    assert report["metric"] == made.report.metric
    row = next(row for row in made.report.rows() if row[0] == "top-1 (%)")
    assert row[1] == "100.0" and "on 24 samples; 2 calls" in row[3]
    assert "top-1 (%)" in report_page(report) and row[3] in report_page(report)
    assert "24, by which nothing was chosen but what the metric chose" in report_page(report)
    del report["metric"]  # of an earlier version
    assert "top-1" not in report_page(report) and "24, by which nothing was chosen<" in report_page(report)


def test_labels_of_samples_that_are_made_are_refused(net: nn.Module, nets: SimpleNamespace) -> None:
    top1, goal = foldcut.Top1(torch.zeros(8, dtype=torch.long)), foldcut.MaxLoss(1.0)
    made = SyntheticSet.from_leaves([nets.images(8)], {"how": "by hand"})
    for samples in (None, foldcut.SynthesisSettings(count=8, input_shape=(3, 8, 8)), made):
        with pytest.raises(foldcut.CalibrationError, match="made from the network alone"):
            foldcut.compile(net, samples, goal=goal, evaluate=top1, progress=False, cache=False)
    with pytest.raises(foldcut.CalibrationError, match="made from the network alone"):
        foldcut.sweep(net, None, goals=[goal], evaluate=top1, progress=False, cache=False)
