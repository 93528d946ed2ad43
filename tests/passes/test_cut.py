"""A cut: what is left of values, and when that is no box."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxslim.errors import NarrowError
from fxslim.labels import Components, Value
from fxslim.passes.annotate import Labels
from fxslim.passes.cut import Cut, closed

from traced import cut_rows, gone_rows, labelled, numbers


def _cut(count: int, gone: set[int]) -> Cut:
    """Labels 0..count-1, each its own component, of which some are removed."""
    components = Components(np.arange(count), np.zeros(count, dtype=bool), np.zeros((0, 2), dtype=np.int64), {})
    labels = Labels({}, {}, components, (), (), {}, {}, frozenset(), {})
    return closed(labels, sorted(gone))


def _grid(rows: int, columns: int) -> Value:
    """A value of shape (2, rows, columns) whose coordinates [:, i, j] carry label i * columns + j."""
    return Value((2, rows, columns), (torch.arange(rows * columns).reshape(1, rows, columns),))


def test_nothing_goes() -> None:
    cut, value = _cut(6, set()), _grid(2, 3)
    assert not cut.touches(value)
    assert cut.shape(value) == (2, 2, 3)
    tensor = numbers(2, 2, 3)
    assert torch.equal(cut.compress(value, tensor), tensor)


def test_one_axis_shrinks() -> None:
    value = Value((2, 4), (torch.arange(4)[None],))
    cut = _cut(4, {1, 2})
    assert cut.touches(value)
    assert cut.touches((None, value))
    assert cut.shape(value) == (2, 2)
    assert cut.kept(value.labels[0]).tolist() == [[True, False, False, True]]
    tensor = numbers(2, 4)
    assert torch.equal(cut.compress(value, tensor), tensor[:, [0, 3]])
    positions = cut.positions(value, -1)
    assert positions is not None
    assert positions.tolist() == [0, 3]
    batch = cut.positions(value, 0)
    assert batch is not None
    assert batch.tolist() == [0, 1]


def test_whole_rows_and_columns_leave_a_box() -> None:
    value, tensor = _grid(3, 4), numbers(2, 3, 4)
    rows = _cut(12, {4, 5, 6, 7})
    assert rows.shape(value) == (2, 2, 4)
    assert torch.equal(rows.compress(value, tensor), tensor[:, [0, 2]])
    cross = _cut(12, {4, 5, 6, 7, 1, 9})
    assert cross.shape(value) == (2, 2, 3)
    assert torch.equal(cross.compress(value, tensor), tensor[:, [0, 2]][:, :, [0, 2, 3]])


def test_as_many_per_row_is_a_box_with_different_positions() -> None:
    value, tensor = _grid(2, 3), numbers(2, 2, 3)
    cut = _cut(6, {0, 5})
    assert cut.shape(value) == (2, 2, 2)
    expected = torch.stack([tensor[:, 0, [1, 2]], tensor[:, 1, [0, 1]]], dim=1)
    assert torch.equal(cut.compress(value, tensor), expected)
    assert cut.positions(value, 2) is None


def test_as_many_per_column_is_a_box_too() -> None:
    value, tensor = _grid(3, 2), numbers(2, 3, 2)
    cut = _cut(6, {0, 5})  # leaves column 0: rows 1, 2; column 1: rows 0, 1
    assert cut.shape(value) == (2, 2, 2)
    expected = torch.stack([tensor[:, [1, 2], 0], tensor[:, [0, 1], 1]], dim=2)
    assert torch.equal(cut.compress(value, tensor), expected)


def test_a_group_that_goes_whole_leaves_the_others_uniform() -> None:
    value = _grid(3, 2)
    cut = _cut(6, {0, 1, 2, 5})
    assert cut.shape(value) == (2, 2, 1)
    tensor = numbers(2, 3, 2)
    assert torch.equal(cut.compress(value, tensor), torch.stack([tensor[:, 1, [1]], tensor[:, 2, [0]]], dim=1))


def test_counting_what_stays_before_a_place() -> None:
    value, cut = _grid(2, 3), _cut(6, {0, 4})
    assert [cut.before(value, -1, place) for place in range(4)] == [0, None, 1, 2]
    assert [cut.before(value, 0, place) for place in range(3)] == [0, 1, 2]
    whole = _cut(6, {0, 1, 2, 4})  # the first row is gone and has no say
    assert [whole.before(value, -1, place) for place in range(4)] == [0, 1, 1, 2]


@pytest.mark.parametrize("gone", [{0}, {0, 1, 4}, {0, 3, 4, 8}, {1, 3, 4, 6}])
def test_different_numbers_per_row_and_column_are_refused(gone: set[int]) -> None:
    cut, value = _cut(9, gone), _grid(3, 3)
    with pytest.raises(NarrowError, match="what is left of a value is not a box"):
        cut.shape(value)


def test_nothing_left_is_refused() -> None:
    with pytest.raises(NarrowError, match="nothing would be left of a value; keep at least one unit"):
        _cut(4, {0, 1, 2, 3}).shape(Value((4,), (torch.arange(4),)))


def test_size_one_axes_of_a_tensor_are_expanded_only_where_needed() -> None:
    value = Value((3, 4), (torch.arange(4)[None],))
    cut = _cut(4, {0})
    assert cut.compress(value, numbers(1, 4)).shape == (1, 3)
    assert cut.compress(value, numbers(3, 1)).shape == (3, 3)


def test_two_labelled_axes_shrink_apart() -> None:
    value = Value((3, 4), (torch.arange(3)[:, None], 3 + torch.arange(4)[None]))
    cut, tensor = _cut(7, {1, 3, 4}), numbers(3, 4)
    assert cut.shape(value) == (2, 2)
    assert torch.equal(cut.compress(value, tensor), tensor[[0, 2]][:, [2, 3]])


def _attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (functional.linear(x, w).unflatten(-1, (3, -1)).transpose(1, 2) for w in (m.q, m.k, m.v))
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return functional.linear(mixed.transpose(1, 2).flatten(-2), m.o)


def test_cuts_close_under_parents() -> None:
    """Both value channels of head 1 take its queries and keys with them; one of head 0 takes nothing."""
    sizes = {"q": (6, 4), "k": (6, 4), "v": (6, 4), "o": (5, 6)}
    program, labels = labelled(_attention, numbers(2, 3, 4), **sizes)
    cut = cut_rows(program, labels, {("o", 1): [0, 2, 3]})
    assert gone_rows(program, cut) == {("q", 0): [2, 3], ("k", 0): [2, 3], ("v", 0): [0, 2, 3], ("o", 1): [0, 2, 3]}


def test_value_channels_of_one_head_alone_are_no_box() -> None:
    program, labels = labelled(_attention, numbers(2, 3, 4), q=(6, 4), k=(6, 4), v=(6, 4), o=(5, 6))
    cut = cut_rows(program, labels, {("o", 1): [0]})
    heads = next(value for node, value in labels.values.items() if node.name == "scaled_dot_product_attention")
    with pytest.raises(NarrowError, match="not a box"):
        cut.shape(heads)
    even = cut_rows(program, labels, {("o", 1): [0, 3, 4]})
    assert even.shape(heads) == (2, 3, 3, 1)
