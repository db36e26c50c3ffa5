"""The search for the best mix of rewrites, on invented networks."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product

import pytest
from foldcut.compiler.plan.joint_search import MixSearch
from foldcut.compiler.plan.latency_target import MOST_MEASURED
from foldcut.compiler.plan.means import Means
from foldcut.compiler.plan.proposals import (
    Claims,
    Item,
    Mix,
    Proposal,
    Scale,
    choose_mix,
    excluded_pairs,
    most_saving,
    predicted_error,
    predicted_saving,
)
from foldcut.compiler.plan.search_time import SearchTime
from foldcut.compiler.support.errors import GoalError
from foldcut.passes.prune.decision import UnitCount
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = ("drop_blocks", "prune_channels", "factorize", "quantize")
PLAIN = dict.fromkeys(KINDS, Scale())
#: What a change of the last kind takes from what others save at its nodes.
OVERLAP = 0.4


def claims(kind: str, nodes: Iterable[str], makers: Iterable[str] = ()) -> Claims:
    """What a change of these nodes claims; `makers` are those that make the units of a group."""
    here = frozenset(nodes)
    if kind == "drop_blocks":
        return Claims(removes=here)
    if kind == "prune_channels":
        return Claims(resizes=here, needs=frozenset(makers) or here)
    if kind == "quantize":
        return Claims(needs=here)
    return Claims(replaces=here, needs=here)


def change(name: str, place: int) -> UnitCount:
    """A decision of which only the place matters."""
    return UnitCount(group=name, count=place, total=9)


def item(kind: str, name: str, nodes: str, *figures: tuple[float, float]) -> Item:
    """An item that concerns the nodes named by single letters; figures are (error, saving)."""
    overlap = OVERLAP if kind == "quantize" else 0.0
    proposals = tuple(
        Proposal(error=error, saving=saving, decision=change(name, place), overlap=overlap)
        for place, (error, saving) in enumerate(figures)
    )
    return Item(kind=kind, name=name, claims=claims(kind, nodes), proposals=proposals)


def allowed(items: list[Item]) -> Iterator[Mix]:
    """Every mix that the exclusions leave."""
    pairs = excluded_pairs(items)
    for taken in product(*([None, *one.proposals] for one in items)):
        if not any(taken[i] and taken[j] for i, j in pairs):
            yield {one: proposal for one, proposal in zip(items, taken, strict=True) if proposal is not None}


def some_items() -> st.SearchStrategy[list[Item]]:
    figures = st.lists(st.tuples(st.floats(0.001, 1), st.floats(0.01, 0.3)), min_size=1, max_size=2)
    one = st.tuples(st.sampled_from(KINDS), st.sets(st.sampled_from("abcd"), min_size=1, max_size=2), figures)
    return st.lists(one, min_size=1, max_size=5).map(
        lambda rows: [
            bounded(item(kind, str(i), "".join(nodes), *found)) for i, (kind, nodes, found) in enumerate(rows)
        ]
    )


def bounded(one: Item) -> Item:
    """The item, in int8 with boundaries to all nodes that are not its own."""
    if one.kind != "quantize":
        return one
    costs = {node: 0.02 for node in "abcd" if node not in one.claims.needs}
    return replace(one, proposals=tuple(replace(p, boundaries=costs) for p in one.proposals))


@settings(deadline=None)
@given(some_items(), st.floats(0.05, 0.8))
def test_the_choice_is_the_best_of_all_that_are_allowed(items: list[Item], saving: float) -> None:
    mix = choose_mix(items, saving, PLAIN)
    every = list(allowed(items))
    enough = [predicted_error(m, PLAIN) for m in every if predicted_saving(m, PLAIN) >= saving]
    if mix is None:
        assert not any(predicted_saving(m, PLAIN) >= saving + 1e-6 for m in every)
    else:
        assert predicted_saving(mix, PLAIN) >= saving - 1e-6
        assert predicted_error(mix, PLAIN) <= min(enough, default=9) * (1 + 1e-3) + 1e-9
        assert mix in every
    most = most_saving(items, PLAIN)
    assert most in every
    assert predicted_saving(most, PLAIN) == pytest.approx(max(predicted_saving(m, PLAIN) for m in every), rel=1e-3)


def test_a_layer_that_is_faster_saves_less_of_what_is_cut_off_it() -> None:
    layer, group = item("factorize", "a", "a", (0.1, 0.5)), item("prune_channels", "ab", "ab", (0.1, 0.3))
    faster = item("quantize", "a in int8", "a", (0.001, 0.2))

    def saving(*items: Item) -> float:
        return predicted_saving({one: one.proposals[0] for one in items}, PLAIN)

    assert saving(layer, faster) == pytest.approx(0.5 * (1 - OVERLAP) + 0.2)
    assert saving(group, faster) == pytest.approx(0.3 * (1 - OVERLAP / 2) + 0.2)
    assert saving(layer) + saving(faster) == pytest.approx(0.7)


def test_a_boundary_is_gone_where_the_neighbour_is_in_int8_too_or_dropped() -> None:
    layer = bounded(item("quantize", "a in int8", "a", (0.001, 0.2)))
    others = [bounded(item("quantize", f"{node} in int8", node, (0.001, 0.1))) for node in "bc"]
    block = item("drop_blocks", "cd", "cd", (0.1, 0.3))

    def saving(*items: Item) -> float:
        return predicted_saving({one: one.proposals[0] for one in items}, PLAIN)

    assert saving(layer) == pytest.approx(0.2 - 3 * 0.02)
    assert saving(layer, block) == pytest.approx(0.2 - 0.02 + 0.3)
    assert saving(layer, others[0]) == pytest.approx(0.2 + 0.1 - 4 * 0.02)
    assert saving(layer, *others) == pytest.approx(0.2 + 0.1 + 0.1 - 3 * 0.02)


def test_what_excludes_what() -> None:
    items = [
        item("drop_blocks", "block", "abc", (0.1, 0.1)),
        item("drop_blocks", "half", "bc", (0.1, 0.1)),
        item("prune_channels", "inner", "ab", (0.1, 0.1)),
        item("prune_channels", "stream", "cd", (0.1, 0.1)),
        item("factorize", "b", "b", (0.1, 0.1)),
        item("factorize", "d", "d", (0.1, 0.1)),
    ]
    pairs = {(items[i].name, items[j].name) for i, j in excluded_pairs(items)}
    assert pairs == {
        ("block", "half"), ("block", "inner"), ("block", "b"), ("half", "b"), ("inner", "b"), ("stream", "d"),
    }  # fmt: skip


def test_a_group_made_inside_a_region_goes_with_it() -> None:
    """Its consumer lies outside, and stays: in a chain, behind the convolution that is dropped."""
    region = item("drop_blocks", "conv", "ab", (0.1, 0.1))
    made_inside, read_inside = (
        replace(item("prune_channels", name, "bc", (0.1, 0.1)), claims=claims("prune_channels", "bc", makers))
        for name, makers in (("inside", "b"), ("before", "c"))
    )
    assert excluded_pairs([region, made_inside, read_inside]) == [(0, 1)]


@settings(deadline=None)
@given(some_items(), st.floats(0.05, 0.5))
def test_known_choices_do_not_come_back(items: list[Item], saving: float) -> None:
    """One after the other, the choices come in the order of their errors, and none is left out."""
    enough = sorted(predicted_error(m, PLAIN) for m in allowed(items) if predicted_saving(m, PLAIN) >= saving + 1e-6)
    known: list[Mix] = []
    for error in enough[:5]:
        mix = choose_mix(items, saving, PLAIN, known)
        assert mix is not None
        assert mix not in known
        assert predicted_error(mix, PLAIN) <= error * (1 + 1e-3) + 1e-9
        known.append(mix)


class World:
    """A network on a machine: what plans truly lose and save. Counts what it is asked."""

    def __init__(self, error: Callable[[Mix], float], saving: Callable[[Mix], float]) -> None:
        self.true_error, self.true_saving = error, saving
        self.measured = self.tried = 0

    def measure(self, mix: Mix) -> float:
        self.measured += 1
        return 1 - self.true_saving(mix)

    def trial(self, mix: Mix) -> float:
        self.tried += 1
        return self.true_error(mix)


def search(items: list[Item], ratio: float, world: World) -> MixSearch:
    return MixSearch(items, ratio, Means(measure=world.measure, trial=world.trial))


def scaled(errors: Mapping[str, float], savings: Mapping[str, float]) -> World:
    """True figures are a kind's predictions times a number."""

    def total(mix: Mix, by: Mapping[str, float], figure: Callable[[Proposal], float]) -> float:
        return sum(by[one.kind] * figure(proposal) for one, proposal in mix.items())

    return World(lambda m: total(m, errors, lambda p: p.error), lambda m: total(m, savings, lambda p: p.saving))


def family(kind: str, letters: str, error: float, saving: float) -> list[Item]:
    """Items of growing error."""
    return [
        item(kind, x, x, ((1 + i) * error, saving), (3 * (1 + i) * error, 2 * saving)) for i, x in enumerate(letters)
    ]


ALL = [
    *family("drop_blocks", "abcdef", 0.01, 0.08),
    *family("prune_channels", "ghijkl", 0.01, 0.08),
    *family("factorize", "mnopqr", 0.01, 0.08),
]


def test_kinds_whose_predictions_are_off_are_put_right() -> None:
    """Dropping loses five times what was predicted, low rank saves half of it: the mix knows."""
    world = scaled(
        {"drop_blocks": 5, "prune_channels": 1, "factorize": 1},
        {"drop_blocks": 1, "prune_channels": 1, "factorize": 0.5},
    )
    found = search(ALL, 0.6, world).run()
    assert found.met
    assert found.scales["drop_blocks"].error / found.scales["prune_channels"].error == pytest.approx(5, rel=0.3)
    assert found.scales["factorize"].saving == pytest.approx(0.5, rel=0.3)
    reaching = [m for m in allowed(ALL[6:12]) if world.true_saving(m) >= 0.4]
    assert found.best.error <= min(world.true_error(m) for m in reaching)
    assert len(found.best.kinds) > 1


def test_never_worse_than_one_kind_alone() -> None:
    """Two kinds together make each other far worse than alone."""

    def error(mix: Mix) -> float:
        kinds = {one.kind for one in mix}
        return sum(p.error for p in mix.values()) * (10 if len(kinds) > 1 else 1)

    world = World(error, lambda mix: sum(p.saving for p in mix.values()))
    found = search(ALL, 0.6, world).run()
    singles = [plan for plan in found.tried if len(plan.kinds) == 1]
    assert len(singles) == 3
    assert found.best in singles
    assert found.best.error == min(plan.error for plan in singles)


def test_a_goal_that_no_single_kind_reaches() -> None:
    world = scaled(dict.fromkeys(KINDS, 1), dict.fromkeys(KINDS, 1))
    items = [item(kind, letter, letter, (0.1, 0.2)) for kind, letter in zip(KINDS[:3], "abc", strict=True)]
    found = search(items, 0.5, world).run()
    assert found.met
    assert len(found.best.mix) == 3


def test_a_goal_out_of_reach_gives_the_fastest() -> None:
    world = scaled(dict.fromkeys(KINDS, 1), dict.fromkeys(KINDS, 1))
    items = [item(kind, letter, letter, (0.1, 0.1)) for kind, letter in zip(KINDS[:3], "abc", strict=True)]
    found = search(items, 0.5, world).run()
    assert not found.met
    assert found.best.ratio == pytest.approx(0.7)


def test_items_that_save_less_and_less_do_not_keep_the_goal_out_of_reach() -> None:
    """The dearer an item, the less of its prediction it saves: each correction by what the plan saved falls short."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    items = [item("prune_channels", x, x, (0.02 + 0.001 * i, 0.02)) for i, x in enumerate(letters)]

    def saving(mix: Mix) -> float:
        return sum(p.saving * (1 - 0.03 * letters.index(one.name)) for one, p in mix.items())

    found = search(items, 0.68, World(lambda m: sum(p.error for p in m.values()), saving)).run()
    assert found.met
    assert all(plan.rounds <= MOST_MEASURED for plan in found.tried)


def test_without_time_each_kind_has_its_turn() -> None:
    items = [*family("drop_blocks", "abcdef", 0.02, 0.08), *family("factorize", "ghijkl", 0.03, 0.08)]
    world, hurried = (scaled({"drop_blocks": 3, "factorize": 0.5}, {"drop_blocks": 1, "factorize": 1}) for _ in "ab")
    whole = search(items, 0.7, world).run()
    time = SearchTime(0)
    found = MixSearch(items, 0.7, Means(measure=hurried.measure, trial=hurried.trial, time=time)).run()
    assert time.ran_out
    assert hurried.tried < world.tried
    assert found.met
    assert {plan.kinds for plan in found.tried} == {("drop_blocks",), ("factorize",)}
    assert whole.best.error <= found.best.error


def test_without_time_a_goal_that_no_single_kind_reaches() -> None:
    """The plan that reaches it is looked for all the same."""
    items = [*family("drop_blocks", "ab", 0.02, 0.1), *family("factorize", "gh", 0.03, 0.1)]
    world = scaled({"drop_blocks": 1, "factorize": 1}, {"drop_blocks": 1, "factorize": 1})
    assert MixSearch(items, 0.7, Means(measure=world.measure, trial=world.trial, time=SearchTime(0))).run().met


def test_a_time_that_is_none() -> None:
    with pytest.raises(GoalError, match="from 0 on"):
        SearchTime(-1)
    forever = SearchTime()
    assert forever.left()
    assert not forever.ran_out


def test_nothing_to_change() -> None:
    found = search([], 0.5, scaled({}, {})).run()
    assert not found.met
    assert found.best.mix == {}


def test_single_items_whose_predictions_are_off_are_put_right() -> None:
    """Items lose between a third and ten times what they should: no figure for a whole kind can say so. Not every item
    can be learnt in so few trials, so this is about the mean of a dozen networks."""
    rng, gaps, before = random.Random(1), [], []
    for _ in range(12):
        factors = {one.name: rng.choice([0.3, 0.5, 1, 1, 2, 4, 10]) for one in ALL}

        def error(mix: Mix, factors: Mapping[str, float] = factors) -> float:
            return sum(factors[one.name] * proposal.error for one, proposal in mix.items())

        world = World(error, lambda mix: sum(proposal.saving for proposal in mix.values()))
        found = search(ALL, 0.6, world).run()
        right = [
            replace(one, proposals=tuple(replace(p, error=factors[one.name] * p.error) for p in one.proposals))
            for one in ALL
        ]
        best = choose_mix(right, 0.4, PLAIN)
        assert best is not None
        assert found.met
        assert world.tried <= 48
        assert world.measured <= 24
        gaps.append(found.best.error / predicted_error(best, PLAIN) - 1)
        before.append(min(plan.error for plan in found.tried[:4]) / predicted_error(best, PLAIN) - 1)
    assert min(gaps) >= -1e-3
    assert sum(before) / 12 > 0.6  # one plan for each kind, and the first of all kinds
    assert sum(gaps) / 12 < 0.2


def test_a_plan_that_saves_less_than_it_should_does_not_stand() -> None:
    """Two items of the best plan save next to nothing together."""
    together: list[float] = []

    def saving(mix: Mix) -> float:
        names = {one.name for one in mix}
        if {"a", "b"} <= names:
            together.append(sum(p.error for p in mix.values()))
        return sum(p.saving for p in mix.values()) * (0.5 if {"a", "b"} <= names else 1.0)

    world = World(lambda mix: sum(p.error for p in mix.values()), saving)
    found = search(ALL, 0.6, world).run()
    assert together  # it was fallen for
    assert found.met
    assert found.best.ratio <= 0.6
    assert not {"a", "b"} <= {one.name for one in found.best.mix}
    right = min(sum(p.error for p in mix.values()) for mix in allowed(ALL[:6]) if saving(mix) >= 0.4)
    assert found.best.error <= right * (1 + 1e-6)


def test_a_prediction_of_no_error_is_put_right() -> None:
    """What is predicted to lose nothing is taken by every plan, until it is known better."""
    items = [item("drop_blocks", x, x, (0.0 if x == "a" else 0.01, 0.1)) for x in "abcdefgh"]
    world = World(
        lambda mix: sum(0.5 if one.name == "a" else 0.0115 for one in mix),
        lambda mix: sum(p.saving for p in mix.values()),
    )
    found = search(items, 0.6, world).run()
    assert found.met
    assert found.best.error == pytest.approx(4 * 0.0115)


def test_a_plan_that_was_tried_is_measured_when_it_may_be_the_best() -> None:
    """One of the two items reaches the goal alone: no prediction says so, and it was tried alone all the same."""
    items = [item("drop_blocks", "a", "a", (0.1, 0.33)), item("drop_blocks", "b", "b", (0.12, 0.12))]
    truth = {"a": 0.41, "b": 0.05}
    world = World(
        lambda mix: sum(p.error for p in mix.values()),
        lambda mix: sum(truth[one.name] for one in mix),
    )
    found = search(items, 0.6, world).run()
    assert found.met
    assert {one.name for one in found.best.mix} == {"a"}


@pytest.mark.parametrize("broken", [1e6, 3.0])
def test_a_plan_that_is_broken_does_not_end_the_search(broken: float) -> None:
    world = World(
        lambda mix: broken if any(one.name == "c" for one in mix) else sum(p.error for p in mix.values()),
        lambda mix: sum(p.saving for p in mix.values()),
    )
    found = search(ALL, 0.6, world).run()
    assert found.met
    assert found.best.error < 1.0
    assert all(one.name != "c" for one in found.best.mix)


def test_a_mix_that_reaches_the_goal_comes_before_one_that_does_not() -> None:
    """The first mixes miss it, and lose less for that."""
    world = World(
        lambda mix: sum(p.error for p in mix.values()),
        lambda mix: sum(p.saving for p in mix.values()) * (0.9 if len({one.kind for one in mix}) > 1 else 1.0),
    )
    found = search(ALL, 0.55, world).run()
    assert found.met
    assert found.best.ratio <= 0.55


def test_plans_as_plain_data() -> None:
    found = search(ALL, 0.6, scaled(dict.fromkeys(KINDS, 1), dict.fromkeys(KINDS, 0.7))).run()
    rows = found.plans()
    assert len(rows) == len(found.tried)
    (chosen,) = [row for row in rows if row.chosen]
    assert chosen.error == found.best.error
    assert sum(chosen.counts.values()) == len(found.best.mix)
    assert rows[0].rounds == 2  # the first plan of a kind saves 0.7 of what it should


def test_plans_are_few() -> None:
    """Each costs a measurement or a re-solve."""
    world = scaled({"drop_blocks": 2, "prune_channels": 1, "factorize": 3}, dict.fromkeys(KINDS, 0.8))
    found = search(ALL, 0.5, world).run()
    assert found.met
    assert world.measured <= 20
    assert world.tried <= 16


def test_a_plan_that_saves_too_much_is_made_again() -> None:
    world = scaled({"drop_blocks": 1}, {"drop_blocks": 2})
    items = [item("drop_blocks", x, x, (0.1, 0.05)) for x in "abcdefgh"]
    found = search(items, 0.6, world).run()
    assert found.met
    assert len(found.best.mix) == 4


def test_what_saves_nothing_beside_int8_is_found_out() -> None:
    """Layers in two parts are faster by themselves, and no faster in int8; dropped blocks save what they always did."""
    faster = [item("quantize", f"{node} in int8", node, (0.001, 0.1)) for node in "abcd"]
    parts = [item("factorize", node, node, (0.004, 0.14)) for node in "abcd"]
    blocks = [item("drop_blocks", node, node, (0.02, 0.06)) for node in "efgh"]

    def saving(mix: Mix) -> float:
        in_int8 = {node for one in mix if one.kind == "quantize" for node in one.claims.needs}
        useless = [one for one in mix if one.kind == "factorize" and one.claims.needs <= in_int8]
        return sum(p.saving for one, p in mix.items() if one not in useless)

    def error(mix: Mix) -> float:
        return sum(p.error for p in mix.values())

    items = [*faster, *parts, *blocks]
    found = search(items, 0.5, World(error, saving)).run()
    best = min(error(mix) for mix in allowed(items) if saving(mix) >= 0.5)
    assert found.met and found.best.error == pytest.approx(best)
    assert found.scales["factorize"].overlap == pytest.approx(1 / OVERLAP, rel=0.05)


def test_a_mix_is_tried_whatever_the_time() -> None:
    """One kind alone reaches the goal, at a price that nobody wants to pay."""
    items = [
        *(item("quantize", f"{node} in int8", node, (0.001, 0.1)) for node in "abcd"),
        *(item("drop_blocks", node, node, (0.1 * place, 0.14)) for place, node in enumerate("efgh", 1)),
    ]
    error, saving = (lambda mix: sum(p.error for p in mix.values())), (lambda mix: sum(p.saving for p in mix.values()))
    world = World(error, saving)
    means = Means(measure=world.measure, trial=world.trial, time=SearchTime(0))
    found = MixSearch(items, 0.5, means).run()
    assert found.met and found.best.error == pytest.approx(0.004 + 0.1)


def test_a_kind_that_need_not_reach_the_goal_alone_is_not_judged_by_that() -> None:
    """int8 saves half at next to no error. What is cut loses with the square of how much is: all of the groups at once
    lose everything, two of them hardly anything; a block lies in between."""
    cuts = [item("prune_channels", node, node, (0.1, 0.06), (0.2, 0.12)) for node in "abcdef"]
    items = [
        *(item("quantize", f"{node} in int8", node, (0.0005, 0.1)) for node in "ghijk"),
        *(item("drop_blocks", node, node, (0.05, 0.12)) for node in "lm"),
        *cuts,
    ]

    def error(mix: Mix) -> float:
        cut = sum(p.error for one, p in mix.items() if one.kind == "prune_channels")
        return sum(p.error for one, p in mix.items() if one.kind != "prune_channels") + 0.3 * cut**2

    world = World(error, lambda mix: sum(p.saving for p in mix.values()))
    found = search(items, 0.38, world).run()
    best = min(error(mix) for mix in allowed(items) if world.true_saving(mix) >= 0.62)
    assert found.met and found.best.error == pytest.approx(best)
    by_alone, by_milder = [plan for plan in found.tried if len(plan.kinds) > 1][:2]
    assert by_milder.error < 2 * best < by_alone.error
    alone = [plan.ratio for plan in found.tried if plan.kinds == ("prune_channels",)]
    assert len(alone) == 2 and alone[1] > alone[0]
    # on a busy machine, a search that is out of time by then ends with the better judgement all the same
    hurried = World(error, lambda mix: sum(p.saving for p in mix.values()))
    found = MixSearch(items, 0.38, Means(measure=hurried.measure, trial=hurried.trial, time=SearchTime(0))).run()
    assert found.met and found.best.error < 2 * best
    assert hurried.tried < world.tried


def test_the_search_ends_with_a_plan_that_is_good_enough() -> None:
    """The first kind reaches the goal and hardly loses anything: no other is measured or tried."""
    items = [*family("quantize", "abcd", 1e-5, 0.1), *family("drop_blocks", "efgh", 0.1, 0.1)]
    world = scaled({"quantize": 1.0, "drop_blocks": 1.0}, {"quantize": 1.0, "drop_blocks": 1.0})
    means = Means(measure=world.measure, trial=world.trial, enough=1e-3)
    found = MixSearch(items, 0.7, means).run()
    assert found.met and found.best.kinds == ("quantize",) and len(found.tried) == 1
    more = MixSearch(items, 0.7, replace(means, enough=1e-6)).run()
    assert len(more.tried) > 1 and more.best.error <= found.best.error


def test_what_is_no_search_takes_none_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    time = SearchTime(10)
    with time.paused():
        now[0] += 100  # before a search has begun
    assert time.left()
    now[0] += 9
    with time.paused():
        now[0] += 100
    assert time.left()
    now[0] += 2
    assert not time.left() and time.ran_out
