"""Goals and plans as data."""

import json
from pathlib import Path
from typing import Any

import pytest
from foldcut.compiler.goals.counted import Macs
from foldcut.compiler.goals.latency import Latency
from foldcut.compiler.plan.goal import read_goal
from foldcut.compiler.plan.plan import Plan
from foldcut.compiler.support.errors import GoalError, PlanError
from foldcut.passes.drop.decision import Blocks, DropBlock
from foldcut.passes.factorize.decision import FactorizeLayer, Ranks
from foldcut.passes.prune.decision import Channels, PruneChannels
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
DECISIONS = st.builds(
    DropBlock, entry=NAMES, exit=NAMES, path=NAMES, error=st.none() | NUMBERS, saving=st.none() | NUMBERS
) | st.builds(
    PruneChannels,
    group=NAMES,
    kept=st.sets(st.integers(0, 99), min_size=1, max_size=5).map(lambda kept: tuple(sorted(kept))),
    total=st.integers(100, 200),
    error=st.none() | NUMBERS,
)
DECISIONS |= st.builds(
    FactorizeLayer,
    layer=NAMES,
    scheme=NAMES.filter(bool),
    ranks=st.lists(st.integers(2, 99), min_size=1, max_size=2).map(tuple),
    full=st.lists(st.integers(2, 99), min_size=1, max_size=2).map(tuple),
    path=NAMES,
    error=st.none() | NUMBERS,
)
GOALS = (
    st.builds(Latency, st.floats(0.01, 0.99))
    | st.builds(Blocks, st.integers(1, 1000))
    | st.builds(Channels, st.floats(0.01, 1))
    | st.builds(Macs, st.floats(0.01, 0.99))
    | st.builds(Ranks, rank=st.integers(2, 99))
    | st.sampled_from(["keep", "energy", "error", "macs"]).flatmap(
        lambda key: st.floats(0.01, 1).map(lambda value: Ranks(**{key: value}))
    )
)
PLANS = st.builds(
    Plan,
    decisions=st.lists(DECISIONS, max_size=4, unique_by=lambda d: (d.kind, d.subject)).map(tuple),
    goal=GOALS,
    fingerprint=NAMES,
    predicted=st.dictionaries(NAMES, NUMBERS, max_size=3),
)


def plan() -> Plan:
    drop = DropBlock(entry="relu", exit="relu_2", path="layer1.0", error=0.01, saving=0.1)
    return Plan(decisions=(drop,), goal=Latency(0.7), fingerprint="abc", predicted={"latency_ratio": 0.9})


@given(PLANS)
def test_json_round_trip(made: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan().to_dict()))
    assert Plan.load(path) == Plan.load(str(path)) == plan()


def test_a_decision_says_what_it_is() -> None:
    assert plan().to_dict()["decisions"] == [
        {
            "kind": "drop_blocks",
            "region": "relu>relu_2",
            "entry": "relu",
            "exit": "relu_2",
            "path": "layer1.0",
            "error": 0.01,
            "saving": 0.1,
        }
    ]
    assert str(plan().decisions[0]) == "drop layer1.0"
    assert str(DropBlock(entry="a", exit="b")) == "drop a>b"


def test_another_version_is_refused() -> None:
    with pytest.raises(PlanError, match="another version") as caught:
        Plan.from_dict({**plan().to_dict(), "version": 99})
    assert (caught.value.expected, caught.value.actual) == (2, 99)


@pytest.mark.parametrize(
    "damage",
    [
        {"decisions": None},
        {"decisions": [{"kind": "drop_blocks"}]},
        {"decisions": [{"kind": 3}]},
        {"decisions": ["relu"]},
        {"goal": {"kind": "speed"}},
        {"goal": None},
        {"goal": {"kind": "blocks", "count": 0}},
        {"predicted": 3},
        {"predicted": ["a"]},
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        Plan.from_dict({**plan().to_dict(), **damage})


PRUNE = PruneChannels(group="conv", kept=(0, 2, 3), total=4, error=0.1).to_dict()
FACTORISE = FactorizeLayer(layer="conv", scheme="channel", ranks=(2,), full=(4,), error=0.1).to_dict()
DROP = DropBlock(entry="relu", exit="relu_2", error=0.1).to_dict()


@pytest.mark.parametrize(
    ("decision", "damage"),
    [
        *(
            (PRUNE, {"kept": kept})
            for kept in ([], [-1, -2], [-1], [0, 4], [2, 0], [1, 1], [0.5], ["0"], [True], None, 3)
        ),
        *((PRUNE, {"total": total}) for total in (0, -4, 3, "4", None)),
        *((FACTORISE, {"ranks": ranks}) for ranks in ([], [0], [-1], [2.5], ["2"], None, 2)),
        *((FACTORISE, {"full": full}) for full in ([], [0])),
        *((FACTORISE, {"scheme": scheme}) for scheme in ("", None, 3)),
        *((decision, {"error": "little"}) for decision in (PRUNE, FACTORISE, DROP)),
        (DROP, {"saving": [1]}),
    ],
    ids=str,
)
def test_a_damaged_decision_is_refused(decision: dict[str, Any], damage: dict[str, Any]) -> None:
    made = {**plan().to_dict(), "decisions": [decision]}
    assert Plan.from_dict(made).to_dict()["decisions"] == [decision]
    with pytest.raises(PlanError, match="not a plan") as caught:
        Plan.from_dict({**made, "decisions": [{**decision, **damage}]})
    assert caught.value.hint


@pytest.mark.parametrize("missing", ["version", "decisions", "goal", "fingerprint", "predicted"])
def test_a_plan_with_a_field_missing_is_refused(missing: str) -> None:
    data = plan().to_dict()
    del data[missing]
    with pytest.raises(PlanError, match=missing):
        Plan.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'"text"', b"null", b"3"], ids=repr)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_belongs_to_one_network() -> None:
    plan().check("abc")
    with pytest.raises(PlanError, match="another network") as caught:
        plan().check("abd")
    assert (caught.value.expected, caught.value.actual) == ("abc", "abd")
    assert caught.value.hint


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan"), float("inf"), "0.7", None, True])
def test_latency_goals_out_of_range(ratio: object) -> None:
    with pytest.raises(GoalError, match="is not a goal") as caught:
        Latency(ratio)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True])
def test_block_goals_out_of_range(count: object) -> None:
    with pytest.raises(GoalError, match="is not a goal"):
        Blocks(count)  # type: ignore[arg-type]


def test_goals_as_text_and_data() -> None:
    assert str(Latency(0.7)) == "latency ratio 0.7"
    assert str(Latency(ms=2.5)) == "latency 2.5 ms"
    assert [str(Blocks(n)) for n in (1, 2)] == ["1 block dropped", "2 blocks dropped"]
    assert read_goal(Blocks(3).to_dict()) == Blocks(3)
    assert read_goal(Latency(0.5).to_dict()) == Latency(0.5)
    assert read_goal(Latency(ms=3).to_dict()) == Latency(ms=3)


def test_milliseconds_become_a_ratio() -> None:
    assert Latency(ms=2).relative(8) == Latency(0.25)
    assert Latency(0.5).relative(8) == Latency(0.5)
    with pytest.raises(GoalError, match=r"the original takes 1\.500 ms here"):
        Latency(ms=2).relative(1.5)


@pytest.mark.parametrize("given", [{}, {"ms": 0}, {"ms": -1}, {"ms": "2"}, {"ms": True}, {"ratio": 0.5, "ms": 2}])
def test_latencies_that_are_no_goal(given: dict[str, Any]) -> None:
    with pytest.raises(GoalError, match="is not a goal"):
        Latency(**given)


@pytest.mark.parametrize("decision", [PRUNE, FACTORISE, DROP], ids=lambda d: str(d["kind"]))
def test_two_decisions_about_one_thing_are_refused(decision: dict[str, Any]) -> None:
    """With data the last one would count, without data both."""
    with pytest.raises(PlanError, match="two decisions are about"):
        Plan.from_dict({**plan().to_dict(), "decisions": [decision, {**decision, "error": 0.2}]})
    with pytest.raises(PlanError, match="no list"):
        Plan.from_dict({**plan().to_dict(), "decisions": {}})
