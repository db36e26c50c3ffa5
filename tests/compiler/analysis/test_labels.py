"""Labels and their union-find: classes, locks, free labels, and tensors that hold no more than they have to."""

import torch
from foldcut.compiler.analysis.labels import FIXED, Labels, along, compress, fixed, slim, vector
from hypothesis import given, settings
from hypothesis import strategies as st

WHY = "because"


def same(labels: Labels, first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two labels are in one class."""
    return bool((labels.find(first) == labels.find(second)).all())


def test_fresh_labels_are_classes_of_their_own() -> None:
    labels = Labels()
    one, two = labels.fresh(3), labels.fresh(2)
    assert torch.cat([one, two]).tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(labels.find(torch.cat([one, two])), torch.cat([one, two]))
    assert len(labels) == 6
    assert not labels.locked(one).any()


def test_many_fresh_labels_after_others_are_united() -> None:
    """The tables grow without forgetting."""
    labels = Labels()
    one = labels.fresh(2)
    labels.unite(one[:1], one[1:], WHY)
    labels.lock(one[:1], WHY)
    more = labels.fresh(1000, free=True)
    assert same(labels, one[0], one[1])
    assert labels.reason(int(one[1])) == WHY
    assert bool(labels.is_free(labels.find(more)).all())
    assert not bool(labels.is_free(labels.find(one)).any())


def test_uniting_goes_element_by_element() -> None:
    labels = Labels()
    one, two = labels.fresh(3), labels.fresh(3)
    assert labels.unite(one, two, WHY)
    assert same(labels, one, two)
    assert len(labels.find(torch.cat([one, two])).unique()) == 3


def test_uniting_again_changes_nothing() -> None:
    labels = Labels()
    one, two = labels.fresh(3), labels.fresh(3)
    labels.unite(one, two, WHY)
    assert not labels.unite(two, one, WHY)


def test_uniting_is_transitive_and_gives_the_least_label() -> None:
    labels = Labels()
    one = labels.fresh(4)
    labels.unite(one[2:], one[1:3], WHY)  # 3-2, 4-3
    assert labels.find(one).tolist() == [1, 2, 2, 2]
    labels.unite(one[3], one[0], WHY)
    assert labels.find(one).tolist() == [1, 1, 1, 1]


def test_uniting_broadcasts() -> None:
    labels = Labels()
    row, grid = labels.fresh(3), labels.fresh(6).view(2, 3)
    labels.unite(grid, row, WHY)
    assert same(labels, grid, row.expand(2, 3))
    assert len(labels.find(grid).unique()) == 3


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=15))
def test_classes_are_those_of_a_plain_union_find(pairs: list[tuple[int, int]]) -> None:
    labels = Labels()
    labels.fresh(12)
    classes = {i: {i} for i in range(1, 13)}
    for a, b in pairs:
        labels.unite(torch.tensor(a), torch.tensor(b), WHY)
        merged = classes[a] | classes[b]
        classes |= dict.fromkeys(merged, merged)
    assert labels.find(torch.arange(1, 13)).tolist() == [min(classes[i]) for i in range(1, 13)]


def test_fixed_locks_instead_of_merging() -> None:
    """Two channels that both meet an input have nothing else in common."""
    labels = Labels()
    one = labels.fresh(2)
    assert labels.unite(one, torch.tensor(FIXED), WHY)
    assert bool(labels.locked(one).all())
    assert not same(labels, one[0], one[1])
    assert not same(labels, one[0], torch.tensor(FIXED))
    assert not labels.unite(one, torch.tensor(FIXED), WHY)


def test_what_is_united_with_fixed_and_something_else_is_merged_and_locked() -> None:
    labels = Labels()
    one, two = labels.fresh(2), labels.fresh(2)
    labels.unite(torch.stack([one, one]), torch.stack([two, torch.zeros_like(two)]), WHY)
    assert same(labels, one, two)
    assert bool(labels.locked(two).all())


def test_fixed_is_locked() -> None:
    labels = Labels()
    assert bool(labels.locked(fixed([2, 3])).all())


def test_a_lock_spreads_over_the_class_and_keeps_the_first_reason() -> None:
    labels = Labels()
    one, two = labels.fresh(3), labels.fresh(3)
    labels.lock(one[:1], "first")
    labels.lock(one[:2], "second")
    labels.unite(one, two, WHY)
    assert labels.locked(two).tolist() == [True, True, False]
    assert [labels.reason(int(label)) for label in two] == ["first", "second", ""]


def test_tying_unites_along_the_given_dimensions_only() -> None:
    labels = Labels()
    grid = labels.fresh(6).view(2, 3)
    assert labels.tie(grid, [0], WHY)
    assert labels.find(grid).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert not labels.tie(grid, [0], WHY)
    assert labels.tie(grid, [0, 1], WHY)
    assert labels.find(grid).unique().tolist() == [1]


def test_tying_what_is_laid_along_another_dimension_changes_nothing() -> None:
    labels = Labels()
    laid = along(labels.fresh(4), 1, [2, 4, 3])
    assert not labels.tie(laid, [0, 2], WHY)
    assert labels.tie(laid, [1], WHY)


def test_varying_dimensions() -> None:
    labels = Labels()
    laid = along(labels.fresh(4), 1, [2, 4, 3])
    assert labels.varying(laid) == (1,)
    assert labels.varying(labels.fresh(6).view(1, 2, 3)) == (1, 2)
    assert labels.varying(fixed([2, 3])) == ()
    assert labels.varying(fixed([])) == ()
    labels.tie(laid, [1], WHY)
    assert labels.varying(laid) == ()


def test_free_labels_vary_with_nothing() -> None:
    """A class token in front of the patches, or padding behind the channels, is no channel of its own."""
    labels = Labels()
    patches = along(labels.fresh(4), 1, [3, 4])
    token = labels.fresh(4, free=True).view(1, 4)
    assert labels.varying(token) == ()
    assert labels.all_free(token)
    joined = torch.cat([token, patches])
    assert labels.varying(joined) == (1,)
    assert not labels.all_free(joined)


def test_free_labels_go_where_their_neighbours_go() -> None:
    labels = Labels()
    own, real = labels.fresh(3, free=True), labels.fresh(3)
    labels.unite(own, real, WHY)
    assert not bool(labels.is_free(labels.find(own)).any())
    assert labels.varying(own) == (0,)
    loose = labels.fresh(2, free=True)
    labels.unite(loose[:1], loose[1:], WHY)
    assert labels.all_free(loose)


def test_the_kept_dimension_is_the_one_with_more_classes() -> None:
    labels = Labels()
    assert labels.kept_dim(labels.fresh(10).view(2, 5), (0, 1)) == 1
    assert labels.kept_dim(labels.fresh(10).view(5, 2), (0, 1)) == 0
    assert labels.kept_dim(labels.fresh(9).view(3, 3), (0, 1)) == 1


def test_slim_cuts_what_does_not_change() -> None:
    laid = along(torch.arange(4), 1, [2, 4, 3])
    assert slim(laid).shape == (1, 4, 1)
    assert torch.equal(slim(laid).expand(2, 4, 3), laid)


def test_compress_finds_the_dimensions_that_do_not_change() -> None:
    full = along(torch.arange(4), 1, [2, 4, 3]).contiguous()
    small = compress(full)
    assert torch.equal(small, full)
    assert slim(small).shape == (1, 4, 1)
    assert small.untyped_storage().nbytes() == 4 * 8


def test_compress_keeps_what_changes() -> None:
    full = torch.arange(24).view(2, 3, 4)
    assert torch.equal(compress(full), full)
    part = compress(full[:, :1])
    assert torch.equal(part, full[:, :1])
    assert part.untyped_storage().nbytes() == 8 * 8


def test_vector_reads_what_along_laid() -> None:
    channels = torch.arange(1, 6)
    for dim in (0, 1, -1):
        shape = [5 if d == dim % 3 else 2 for d in range(3)]
        assert torch.equal(vector(along(channels, dim, shape), dim), channels)
