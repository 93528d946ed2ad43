"""Labels: which coordinates a solved set of relations removes together."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fxslim.labels import CONSTANT, Relations, axes_of, clusters, compact, merge, solve


def _relations(count: int) -> tuple[Relations, torch.Tensor]:
    relations = Relations()
    return relations, relations.fresh(count)


def _removed(relations: Relations, labels: list[int]) -> list[int]:
    """Return which labels go when some go."""
    solved = solve(relations)
    leaves = np.zeros(len(solved.pinned), dtype=bool)
    leaves[solved.of[labels]] = True
    return np.flatnonzero(solved.removed(leaves)[solved.of]).tolist()


def test_fresh_labels_are_new_and_never_constant() -> None:
    relations, first = _relations(3)
    second = relations.fresh(2)
    assert first.tolist() == [1, 2, 3]
    assert second.tolist() == [4, 5]
    assert CONSTANT not in first


def test_ties_go_together_through_each_other() -> None:
    relations, _ = _relations(6)
    relations.tie(torch.tensor([1, 2]), torch.tensor([3, 4]))
    relations.tie(torch.tensor([3]), torch.tensor([5]))
    assert _removed(relations, [1]) == [1, 3, 5]
    assert _removed(relations, [4]) == [2, 4]
    assert _removed(relations, [6]) == [6]


def test_ties_broadcast() -> None:
    relations, labels = _relations(6)
    relations.tie(labels.reshape(2, 3), labels.reshape(2, 3)[:, :1])
    assert _removed(relations, [3]) == [1, 2, 3]
    assert _removed(relations, [4]) == [4, 5, 6]


def test_tie_along_returns_what_is_left() -> None:
    relations, labels = _relations(6)
    left = relations.tie_along(labels.reshape(2, 3), [1])
    assert left.tolist() == [[1], [4]]
    assert _removed(relations, [2]) == [1, 2, 3]


def test_a_parent_goes_exactly_with_its_last_child() -> None:
    relations, _ = _relations(4)
    relations.parent(torch.tensor([1]), torch.tensor([2, 3]))
    assert _removed(relations, [2]) == [2]
    assert _removed(relations, [2, 3]) == [1, 2, 3]


def test_parents_of_parents_follow() -> None:
    relations, _ = _relations(7)
    relations.parent(torch.tensor([1, 1]), torch.tensor([2, 3]))
    relations.parent(torch.tensor([2, 2, 3, 3]), torch.tensor([4, 5, 6, 7]))
    assert _removed(relations, [4, 5]) == [2, 4, 5]
    assert _removed(relations, [4, 5, 6]) == [2, 4, 5, 6]
    assert _removed(relations, [4, 5, 6, 7]) == [1, 2, 3, 4, 5, 6, 7]


def test_a_child_of_two_parents_counts_for_both() -> None:
    relations, _ = _relations(5)
    relations.parent(torch.tensor([1, 1, 2, 2]), torch.tensor([3, 4, 4, 5]))
    assert _removed(relations, [3, 4]) == [1, 3, 4]
    assert _removed(relations, [4, 5]) == [2, 4, 5]


def test_a_pinned_parent_stays_and_some_of_its_children_may_go() -> None:
    relations, _ = _relations(3)
    relations.parent(torch.tensor([1]), torch.tensor([2, 3]))
    relations.pin(torch.tensor([1]), relations.pin_label("because", "node"))
    solved = solve(relations)
    starved = []
    for gone in ([2], [2, 3]):
        leaves = np.zeros(len(solved.pinned), dtype=bool)
        leaves[solved.of[gone]] = True
        removed = solved.removed(leaves)
        assert np.flatnonzero(removed[solved.of]).tolist() == gone
        starved.append(np.flatnonzero(solved.starved(removed)[solved.of]).tolist())
    assert starved == [[], [1]]


def test_the_only_child_of_a_parent_is_the_parent() -> None:
    relations, _ = _relations(4)
    relations.parent(torch.tensor([1, 2]), torch.tensor([2, 3]))
    assert _removed(relations, [3]) == [1, 2, 3]
    assert len(solve(relations).edges) == 0


def test_cycles_of_parents_become_one_component() -> None:
    relations, _ = _relations(4)
    relations.parent(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 1]))
    assert _removed(relations, [2]) == [1, 2, 3]
    assert len(solve(relations).edges) == 0


def test_a_tie_with_a_constant_pins() -> None:
    relations, labels = _relations(2)
    relations.tie(labels[:1], torch.tensor([CONSTANT]))
    solved = solve(relations)
    assert solved.pinned[solved.of[[0, 1, 2]]].tolist() == [True, True, False]


def test_pins_reach_ties_and_keep_the_first_reason() -> None:
    relations, _ = _relations(3)
    relations.tie(torch.tensor([1]), torch.tensor([2]))
    relations.pin(torch.tensor([2]), relations.pin_label("first", "a"))
    relations.pin(torch.tensor([1]), relations.pin_label("second", "b"))
    solved = solve(relations)
    assert solved.pinned[solved.of[[1, 2, 3]]].tolist() == [True, True, False]
    pin = solved.pins[int(solved.of[1])]
    assert (pin.reason, pin.node) == ("first", "a")


def test_without_relations_every_label_is_alone() -> None:
    relations, _ = _relations(3)
    assert _removed(relations, [2]) == [2]
    assert solve(relations).pinned.tolist() == [True, False, False, False]


def test_compact_drops_axes_without_variation() -> None:
    row = torch.tensor([[1, 2, 3]])
    assert compact(row.expand(4, 3)).tolist() == [[1, 2, 3]]
    assert compact(torch.full((2, 3), 5)).tolist() == [[5]]
    both = torch.arange(6).reshape(2, 3)
    assert compact(both) is both
    assert axes_of(both) == {0, 1}
    assert axes_of(compact(row.expand(4, 3))) == {1}


def test_clusters_join_what_shares_an_axis() -> None:
    a, b, c = torch.zeros(2, 1, 1), torch.zeros(1, 3, 1), torch.zeros(1, 1, 4)
    found = clusters([a, c, b, torch.zeros(1, 1, 1)])
    assert [axes for axes, _ in found] == [{0}, {2}, {1}]
    (axes, members), (rest, _) = sorted(clusters([a, c, torch.zeros(2, 3, 1)]), key=lambda item: -len(item[0]))
    assert axes == {0, 1}
    assert len(members) == 2
    assert rest == {2}


def test_merge_takes_the_finest_and_makes_the_others_parents() -> None:
    relations, labels = _relations(8)
    coarse, fine = labels[:2].reshape(2, 1), labels[2:].reshape(2, 3)
    assert merge(relations, frozenset({0, 1}), [coarse, fine]) is fine
    assert _removed(relations, [3, 4]) == [3, 4]
    assert _removed(relations, [3, 4, 5]) == [1, 3, 4, 5]


def test_merge_makes_combinations_of_crossing_labels() -> None:
    relations, labels = _relations(14)
    first, second = labels[:6].reshape(2, 3, 1), labels[6:].reshape(2, 1, 4)
    made = merge(relations, frozenset({0, 1, 2}), [first, second])
    assert made.shape == (2, 3, 4)
    assert made.unique().numel() == 24
    assert made.min() > 14
    removed = _removed(relations, made[0, 1].tolist())
    assert [label for label in removed if label <= 14] == [2]  # first[0, 1], and no row of second is complete
    removed = _removed(relations, made[1, :, 3].tolist())
    assert [label for label in removed if label <= 14] == [14]


def test_equal_axes_tie_in_merge() -> None:
    relations, labels = _relations(4)
    merge(relations, frozenset({0}), [labels[:2], labels[2:]])
    assert _removed(relations, [1]) == [1, 3]


_EDGES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12)


@given(ties=_EDGES, parents=_EDGES, pins=st.sets(st.integers(1, 9), max_size=2), chosen=st.sets(st.integers(1, 9)))
def test_closure_agrees_with_a_plain_fixed_point(
    ties: list[tuple[int, int]], parents: list[tuple[int, int]], pins: set[int], chosen: set[int]
) -> None:
    """An independent statement: sets of labels, saturated by hand."""
    relations, _ = _relations(9)
    for one, other in ties:
        relations.tie(torch.tensor([one]), torch.tensor([other]))
    for one, other in parents:
        relations.parent(torch.tensor([one]), torch.tensor([other]))
    for label in pins:
        relations.pin(torch.tensor([label]), relations.pin_label("kept", "node"))
    below = {label: {label} for label in range(1, 10)}  # equivalence: ties, and cycles of parents
    reach = {(one, other) for one, other in [*ties, *parents]} | {(other, one) for one, other in ties}
    for middle in range(1, 10):
        reach |= {(a, b) for a in range(1, 10) for b in range(1, 10) if {(a, middle), (middle, b)} <= reach}
    for label in below:
        below[label] |= {other for other in below if {(label, other), (other, label)} <= reach}
    stays = {label for label in below if below[label] & pins}
    children = {label: set[int]() for label in below}
    for one, other in parents:
        if other not in below[one]:
            for label in below[one]:
                children[label] |= below[other]
    leaves = {label for label in chosen if not children[label]}  # what is removed from outside has no children
    gone = {other for label in leaves for other in below[label]}
    while True:
        more = {label for label in below if children[label] and children[label] <= gone and label not in stays}
        if more <= gone:
            break
        gone |= {other for label in more for other in below[label]}
    assume(not any(children[label] and children[label] <= gone for label in stays))  # refused: see `starved`
    assert [label for label in _removed(relations, sorted(leaves)) if label <= 9] == sorted(gone)
