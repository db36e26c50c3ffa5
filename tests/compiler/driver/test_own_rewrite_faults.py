"""What a rewrite of a user's own can do wrong is said at once, and never ends in a wrong network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import foldcut
import pytest
import torch
from foldcut import Applied, Claims, Decision, Item, Program, Proposal
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.driver.plan_search import Search
from foldcut.compiler.plan.decision import read_decision
from foldcut.compiler.rewrite.checked_offer import check_decisions
from foldcut.compiler.rewrite.own_source import own_sources
from foldcut.compiler.support.strict_json import json_text
from foldcut.compiler.trial.apply_decisions import applied
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from torch import nn

OPTIONS: dict[str, Any] = {"progress": False, "cache": False, "mimic": False}
#: Those of compiles beside them: the backend, set by a fixture.
COMPILED: dict[str, Any] = {}
pytestmark = pytest.mark.usefixtures("quick_measurement")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, work_backend: Any) -> None:
    """What a test defines is not known to the next; nothing is timed."""
    monkeypatch.setitem(COMPILED, "backend", work_backend)
    assert foldcut.compile  # brings the kinds of foldcut's own
    monkeypatch.setattr(Decision, "_known", dict(Decision._known))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Block(), Block(), Block(), nn.Linear(16, 4)).eval()


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def makes() -> Callable[..., Any]:
    """A rewrite that bypasses blocks, with a field of tags in its decisions."""

    @dataclass(frozen=True, kw_only=True)
    class Bypass(Decision):
        entry: str
        exit: str
        tags: Any = None
        error: float | None = None

        kind = "own"

        @property
        def subject(self) -> str:
            return f"{self.entry}>{self.exit}"

    @dataclass(frozen=True, kw_only=True)
    class Own(foldcut.Rewrite):
        tags: Any = None

        name = "own"
        verb = "bypass"
        decides = Bypass

        def offer(self, ctx: foldcut.Context, budget: foldcut.Budget) -> foldcut.Offer:
            regions = find_regions(ctx.teacher).blocks
            cut = {r.name: (lambda r=r: drop_blocks(ctx.teacher, [r])) for r in regions}
            savings = budget.savings(cut)
            return foldcut.Offer(items=tuple(self.item(r, savings[r.name]) for r in regions))

        def item(self, region: Any, saving: float) -> Item:
            decision = self.decides(entry=region.entry, exit=region.exit, tags=self.tags)
            proposal = Proposal(error=0.01, saving=saving, decision=decision)
            return Item(kind=self.name, name=region.name, claims=Claims(removes=region.nodes), proposals=(proposal,))

        def drops(self, decisions: Sequence[Any]) -> list[foldcut.DropBlock]:
            return [foldcut.DropBlock(entry=d.entry, exit=d.exit) for d in decisions]

        def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
            return drop_blocks(program, self.drops(decisions))

        def apply(self, program: Program, decisions: Sequence[Decision], ctx: foldcut.Context) -> Applied:
            return Applied(
                program=self.shape(program, decisions),
                decisions=tuple(decisions),
                changes=changes_of_drops(self.drops(decisions)),
            )

    def made(of: type = object, **settings: Any) -> Any:
        return type(of.__name__, (of, Own), {})(**settings) if of is not object else Own(**settings)

    return made


def compiled(net: nn.Module, rows: torch.Tensor, *rewrites: Any, share: float = 0.5) -> foldcut.Compiled:
    return foldcut.compile(net, rows, goal=foldcut.Macs(share), rewrites=rewrites, **OPTIONS, **COMPILED)


def test_fields_hold_what_json_holds(
    makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor, tmp_path: Path
) -> None:
    tags = [1, 2.5, {"nested": {"a": [1]}}, "text", None]
    for other in ([1, 2], {"a": [1]}, "text"):
        decision = makes().decides(entry="a", exit="b", tags=other)
        assert read_decision(json.loads(json_text(decision.to_dict()))) == decision
    out = compiled(net, rows, makes(tags=tags))
    folder = out.save(tmp_path / "out")
    again = foldcut.apply(net, folder / "plan.json", calibration=rows, rewrites=[makes(tags=tags)], **OPTIONS)
    assert again.plan.decisions == out.plan.decisions
    assert again.program.parameter_count() == out.program.parameter_count() < 2000


def test_what_no_plan_can_hold_is_refused_before_the_work(
    makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor
) -> None:
    with pytest.raises(foldcut.RewriteError, match=r"own decides what plan\.json cannot hold"):
        compiled(net, rows, makes(tags=frozenset([1])))
    with pytest.raises(foldcut.RewriteError, match=r"own decides what plan\.json cannot hold"):
        check_decisions(makes(), [makes().decides(entry="a", exit="b", tags=1j)])


def test_tuples_come_back_as_tuples() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Sizes(Decision):
        sizes: tuple[int, ...]
        error: float | None = None

        kind = "sizes"

    assert Sizes.from_dict({"kind": "sizes", "sizes": [1, 2]}) == Sizes(sizes=(1, 2))


def test_a_kind_of_foldcut_s_own_is_taken() -> None:
    assert foldcut.PruneChannels.kind == "prune_channels"
    with pytest.raises(foldcut.PlanError, match=r"Mine\.kind is 'prune_channels', which is that of foldcut\.Prune"):
        type("Mine", (Decision,), {"kind": "prune_channels"})


def test_a_name_of_foldcut_s_own_is_taken(net: nn.Module, rows: torch.Tensor) -> None:
    mine = type("Mine", (foldcut.Rewrite,), {"name": "drop_blocks", "verb": "drop", "decides": foldcut.DropBlock})
    with pytest.raises(foldcut.CompilerError, match="'drop_blocks', which is that of a rewrite of foldcut"):
        compiled(net, rows, mine())


def test_settings_are_not_lost_to_a_name_beside_them(net: nn.Module, rows: torch.Tensor) -> None:
    with pytest.raises(foldcut.CompilerError, match="rewrites names 'prune_channels' twice"):
        compiled(net, rows, foldcut.Prune(score="l1"), "prune_channels")


class TwoOfOneName:
    def offer(self, ctx: Any, budget: Any) -> Any:
        offer = super().offer(ctx, budget)  # type: ignore[misc]
        return replace(offer, items=(offer.items[0], replace(offer.items[0])))


class NoNumber:
    def item(self, region: Any, saving: float) -> Any:
        return super().item(region, float("nan"))  # type: ignore[misc]


class OfAnotherKind:
    def item(self, region: Any, saving: float) -> Any:
        return replace(super().item(region, saving), kind="other")  # type: ignore[misc]


class ClashingStart:
    def offer(self, ctx: Any, budget: Any) -> Any:
        offer = super().offer(ctx, budget)  # type: ignore[misc]
        first = offer.items[0]
        items = (first, replace(first, name="again", proposals=(self._again(first.proposals[0]),)))
        return replace(offer, items=items, starts=({item: item.proposals[0] for item in items},))

    def _again(self, proposal: Any) -> Any:
        return replace(proposal, decision=replace(proposal.decision, exit="again"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (TwoOfOneName, "offers two items of one name"),
        (NoNumber, "offers a saving that is no number"),
        (OfAnotherKind, "offers an item of the kind 'other'"),
        (ClashingStart, "offers a plan whose changes clash"),
    ],
)
def test_an_offer_that_no_search_can_go_by(
    fault: type, says: str, makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor, contexts: Callable[..., Any]
) -> None:
    ctx = contexts(foldcut.capture(net, rows[:2]), CalibrationSet.of(rows))
    rewrite = makes(fault)
    search = Search(ctx=replace(ctx, goal=foldcut.Macs(0.5)), rewrites=[rewrite])
    with pytest.raises(foldcut.RewriteError, match=says):
        search.offer(0.5)


class BrokenErrors:
    def item(self, region: Any, saving: float) -> Any:
        item = super().item(region, saving)  # type: ignore[misc]
        return replace(item, proposals=tuple(replace(p, error=float("inf")) for p in item.proposals))


def test_an_error_that_is_no_number_counts_as_broken(
    makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor
) -> None:
    assert compiled(net, rows, makes(BrokenErrors), share=0.7).report.met


class Half:
    def apply(self, program: Program, decisions: Sequence[Decision], ctx: foldcut.Context) -> Applied:
        return super().apply(program, decisions[:1], ctx)  # type: ignore[misc,no-any-return]


def test_a_plan_is_carried_out_whole_or_not(makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor) -> None:
    out = compiled(net, rows, makes())
    assert len(out.plan.decisions) > 1
    with pytest.raises(foldcut.RewriteError, match="own left out 1 of 2 decisions"):
        foldcut.apply(net, out.plan, calibration=rows, rewrites=[makes(Half)], **OPTIONS)


class Nothing:
    def apply(self, program: Program, decisions: Sequence[Decision], ctx: foldcut.Context) -> Applied:
        return Applied(program=program, decisions=tuple(decisions))


def test_a_rewrite_that_does_less_than_its_shape_is_named(
    makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor
) -> None:
    with (
        pytest.warns(UserWarning, match=r"what `apply` of a rewrite makes is not what its `shape` promised \(own\)"),
        pytest.raises(foldcut.GoalError),
    ):
        compiled(net, rows, makes(Nothing))


class Loses:
    def apply(self, program: Program, decisions: Sequence[Decision], ctx: foldcut.Context) -> Applied:
        other = foldcut.capture(nn.Linear(9, 4).eval(), torch.randn(2, 9))
        return Applied(program=other, decisions=tuple(decisions))


def test_inputs_stay_as_they_are(makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor) -> None:
    out = compiled(net, rows, makes())
    assert out.outcome is not None
    with pytest.raises(foldcut.RewriteError, match="a rewrite may not change the inputs"):
        applied(out.outcome.ctx, [makes(Loses)], out.plan.decisions)


class Early:
    phase = 5

    def offer(self, ctx: Any, budget: Any) -> Any:
        offer = super().offer(ctx, budget)  # type: ignore[misc]
        return replace(offer, items=offer.items[:1])


def test_a_plan_that_no_shape_can_be_made_of_is_left_out(
    makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor
) -> None:
    """The blocks behind one that an earlier rewrite took away begin at a node that is not there."""
    with pytest.warns(UserWarning, match="a plan is left out, it cannot be put into effect"):
        out = compiled(net, rows, makes(Early), "drop_blocks", share=0.25)
    assert out.report.met


class Says:
    said: Any = None

    def report(self, ctx: Any, made: Any) -> Any:
        return self.said


@pytest.mark.parametrize(
    ("said", "stands"),
    [({"goal": 1, "own_stats": [1, 2]}, {"goal": 1, "own_stats": [1, 2]}), ({"a": {1j}}, None)],
)
def test_its_entries_stand_in_the_report_under_its_name(
    said: Any, stands: Any, makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor, tmp_path: Path
) -> None:
    out = compiled(net, rows, makes(type("Says", (Says,), {"said": said})))
    details = foldcut.load(out.save(tmp_path / "out")).report["details"]["own"]
    assert details == stands if stands else set(details) == {"missing"}


class Names:
    def named(self, program: Program) -> Sequence[str]:
        return list(program.nodes)


def test_what_can_be_left_alone_needs_a_field(makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor) -> None:
    with pytest.raises(foldcut.CompilerError, match="names what can be left alone, and has no field for it"):
        compiled(net, rows, makes(Names))


def test_what_a_class_must_implement() -> None:
    no_subject = type("NoSubject", (Decision,), {"kind": "bare"})
    for decides, says in ((no_subject, "NoSubject does not define subject"), (int, "is no class of decisions")):
        bare = type("Bare", (foldcut.Rewrite,), {"name": "bare", "verb": "do", "decides": decides})
        with pytest.raises(foldcut.CompilerError, match=says):
            foldcut.compile(nn.Linear(2, 2), torch.randn(4, 2), goal=foldcut.Macs(0.5), rewrites=[bare()])
    named = type("Named", (Decision,), {"kind": "bare", "subject": "x"})
    empty = type("Empty", (foldcut.Rewrite,), {"name": "bare", "verb": "do", "decides": named})
    with pytest.raises(foldcut.CompilerError, match="Empty does not implement offer, shape, apply"):
        foldcut.compile(nn.Linear(2, 2), torch.randn(4, 2), goal=foldcut.Macs(0.5), rewrites=[empty()])


def test_the_network_does_not_depend_on_the_order_of_the_list(
    makes: Callable[..., Any], net: nn.Module, rows: torch.Tensor
) -> None:
    one, other = (compiled(net, rows, *order) for order in ((makes(), "prune_channels"), ("prune_channels", makes())))
    assert one.plan.decisions == other.plan.decisions
    torch.testing.assert_close(one.module(rows), other.module(rows), rtol=0, atol=0)


SOURCE = """
import foldcut
from own_part import AMOUNT

class Bare(foldcut.Decision):
    kind = "bare_source"

class Rewrites(foldcut.Rewrite):
    name = "bare_source"
    decides = Bare

    def shape(self, program, decisions):
        return AMOUNT
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name: str, source: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        module = ModuleType(name)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, str(path), "exec"), vars(module))
        return module

    yield write


def test_kept_results_know_code_files_and_the_modules_used(written: Callable[[str, str], ModuleType]) -> None:
    part = "AMOUNT = 1\ndef amount(): return 1\n"
    written("own_part", part)
    first = own_sources([written("own_main", SOURCE.replace("AMOUNT", "amount")).Rewrites()])
    written("own_part", part.replace("1", "2"))
    second = own_sources([written("own_main", SOURCE.replace("AMOUNT", "amount")).Rewrites()])
    loaded = written("own_main", SOURCE.replace("return AMOUNT", "return amount").replace("AMOUNT", "amount"))
    assert len({tuple(texts) for texts in (first, second)}) == 2
    before = own_sources([loaded.Rewrites()])
    Path(str(loaded.__file__)).write_text("# edited since\n")
    assert own_sources([loaded.Rewrites()]) != before  # what is loaded is not what the file says


def test_a_class_without_a_file_is_known_while_it_lives() -> None:
    def cell() -> Any:
        decides = type("Cell", (Decision,), {"kind": "cell", "__module__": "no_such_module"})
        return type("Of", (foldcut.Rewrite,), {"name": "cell", "decides": decides, "__module__": "no_such_module"})

    first, again = cell(), cell()
    assert own_sources([first()]) != own_sources([again()])


def test_a_goal_of_a_user_s_own_is_known_by_its_source() -> None:
    class Mine(foldcut.Macs):
        pass

    assert own_sources([foldcut.Drop()], foldcut.Macs(0.5)) == []
    assert own_sources([foldcut.Drop()], Mine(0.5)) not in ([], own_sources([foldcut.Drop()], Mine(0.6)))
