"""The label rules: for every kind of operation, which weight rows must go together, follow, or stay.

Every case says by hand what follows what; rows of ``up`` produce channels, columns of ``down`` consume them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxslim.passes.annotate import Labels

from traced import components, follows, labelled, numbers, pinned_because

X = numbers(2, 3, 4)
Body = Callable[[Any, Tensor], Tensor]
Map = dict[int, set[int]]


def _together(labels: Labels, rows: np.ndarray, columns: np.ndarray) -> Map:
    """Return row of up -> columns of down with the same component."""
    return {i: set(np.flatnonzero(columns == row).tolist()) for i, row in enumerate(rows)}


def _mlp(body: Body, width: int = 6, **sizes: tuple[int, ...]) -> tuple[Any, Labels]:
    """Trace x -> up -> body -> down."""

    def function(self: Any, x: Tensor) -> Tensor:
        return functional.linear(body(self, functional.linear(x, self.up)), self.down)

    return labelled(function, X, up=(6, 4), down=(5, width), **sizes)


IDENTITY = {i: {i} for i in range(6)}
MOVED: dict[str, tuple[Body, int, Map]] = {
    "view": (lambda m, h: h.view(2, -1, 2, 3).reshape(2, -1, 6), 6, IDENTITY),
    "transpose": (lambda m, h: h.view(2, -1, 2, 3).transpose(2, 3).reshape(2, -1, 6), 6,
                  {3 * a + b: {2 * b + a} for a in range(2) for b in range(3)}),
    "permute": (lambda m, h: h.view(2, -1, 2, 3).permute(0, 3, 1, 2).reshape(2, 3, -1, 2).permute(0, 2, 3, 1)
                .flatten(2), 6, IDENTITY),
    "flip": (lambda m, h: h.flip(-1), 6, {i: {5 - i} for i in range(6)}),
    "roll": (lambda m, h: h.roll(1, -1), 6, {i: {(i + 1) % 6} for i in range(6)}),
    "slice": (lambda m, h: h[..., 1:5], 4, {0: set(), 1: {0}, 2: {1}, 3: {2}, 4: {3}, 5: set()}),
    "strided slice": (lambda m, h: h[..., ::2], 3, {0: {0}, 1: set(), 2: {1}, 3: set(), 4: {2}, 5: set()}),
    "narrow": (lambda m, h: h.narrow(-1, 4, 2), 2, {0: set(), 1: set(), 2: set(), 3: set(), 4: {0}, 5: {1}}),
    "unsqueeze": (lambda m, h: h.unsqueeze(2).squeeze(2), 6, IDENTITY),
    "unflatten": (lambda m, h: h.unflatten(-1, (3, 2)).flatten(-2), 6, IDENTITY),
    "movedim": (lambda m, h: h.unflatten(-1, (3, 2)).movedim(-1, -2).flatten(-2), 6,
                {2 * a + b: {3 * b + a} for a in range(3) for b in range(2)}),
    "chunk": (lambda m, h: torch.cat(h.chunk(2, -1)[::-1], -1), 6, {i: {(i + 3) % 6} for i in range(6)}),
    "split": (lambda m, h: torch.cat(h.split([2, 4], -1)[::-1], -1), 6, {i: {(i + 4) % 6} for i in range(6)}),
    "unbind": (lambda m, h: torch.cat(h.unflatten(-1, (2, 3)).unbind(2)[::-1], -1), 6,
               {i: {(i + 3) % 6} for i in range(6)}),
    "select": (lambda m, h: h.unflatten(-1, (2, 3)).select(2, 1), 3, {0: set(), 1: set(), 2: set(),
                                                                   3: {0}, 4: {1}, 5: {2}}),
    "cat": (lambda m, h: torch.cat([h, h], -1), 12, {i: {i, i + 6} for i in range(6)}),
    "stack": (lambda m, h: torch.stack([h, -h], -1).flatten(-2), 12, {i: {2 * i, 2 * i + 1} for i in range(6)}),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
def test_data_movement_moves_labels_like_values(case: str) -> None:
    body, width, expected = MOVED[case]
    program, labels = _mlp(body, width)
    rows, columns = components(program, labels, "up", 0), components(program, labels, "down", 1)
    assert _together(labels, rows, columns) == expected
    assert len(np.unique(rows)) == 6
    assert not labels.components.pinned[rows].any()


PICKED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "select": (lambda m, h: h[..., 2], "aten.select.int"),
    "slice": (lambda m, h: h[..., 2:3], "aten.slice.Tensor"),
    "split": (lambda m, h: h.split([2, 1, 3], -1)[1], "aten.split_with_sizes.default"),
    "number": (lambda m, h: h.new_ones(1) * h[0, 0, 2].item(), "aten.select.int"),
}


@pytest.mark.parametrize("case", PICKED)
def test_a_channel_that_is_picked_alone_stays(case: str) -> None:
    """The axis it lay on is gone, and so would be its label: random keeps would find out only by luck."""
    pick, name = PICKED[case]

    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.linear(x, m.up).relu()
        return functional.linear(hidden, m.down), pick(m, hidden)

    program, labels = labelled(function, X, up=(6, 4), down=(5, 6))
    reasons: list[str | None] = [None] * 6
    reasons[2] = f"one channel of it is picked by {name}"
    assert pinned_because(program, labels, "up", 0) == reasons
    assert pinned_because(program, labels, "down", 1) == reasons


def test_coordinates_that_are_joined_by_a_new_axis_tie() -> None:
    """What is left of a stack must be a box."""
    program, labels = _mlp(lambda m, h: torch.stack(h.chunk(2, -1), -1).flatten(-2))
    assert follows(program, labels, {("up", 0): [4]}) == {("up", 0): [1, 4], ("down", 1): [2, 3]}


def test_padding_stays() -> None:
    program, labels = _mlp(lambda m, h: functional.pad(h, (1, 2)), 9)
    rows, columns = components(program, labels, "up", 0), components(program, labels, "down", 1)
    assert _together(labels, rows, columns) == {i: {i + 1} for i in range(6)}
    assert labels.components.pinned[columns].tolist() == [True] + [False] * 6 + [True] * 2


COPIES: dict[str, tuple[Body, int, Callable[[int], set[int]]]] = {
    "expand": (lambda m, h: h.unsqueeze(-1).expand(-1, -1, -1, 2).flatten(-2), 12, lambda i: {2 * i, 2 * i + 1}),
    "repeat_interleave": (lambda m, h: h.repeat_interleave(2, -1), 12, lambda i: {2 * i, 2 * i + 1}),
    "repeat": (lambda m, h: h.repeat(1, 1, 2), 12, lambda i: {i, i + 6}),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_are_children_of_the_original(case: str) -> None:
    body, width, copies = COPIES[case]
    program, labels = _mlp(body, width)
    for i in range(6):
        columns = sorted(copies(i))
        assert follows(program, labels, {("down", 1): columns[:1]}) == {("down", 1): columns[:1]}
        assert follows(program, labels, {("down", 1): columns}) == {("up", 0): [i], ("down", 1): columns}


POINTWISE: dict[str, Body] = {
    "relu": lambda m, h: torch.relu(h),
    "gelu": lambda m, h: functional.gelu(h),
    "silu": lambda m, h: functional.silu(h),
    "tanh": lambda m, h: h.tanh(),
    "square": lambda m, h: h.square(),
    "dropout": lambda m, h: functional.dropout(h, 0.5, training=False),
    "sum of itself": lambda m, h: h + h.sigmoid() * 3,
    "cast": lambda m, h: h.float().double(),
    "masked_fill": lambda m, h: h.masked_fill(h > 0, 0),
    "where": lambda m, h: torch.where(h > 0, h, 0.5 * h),
    "clamp": lambda m, h: h.clamp(-1, 1),
}


@pytest.mark.parametrize("case", POINTWISE)
def test_pointwise_operations_tie_element_by_element(case: str) -> None:
    program, labels = _mlp(POINTWISE[case])
    for i in range(6):
        assert follows(program, labels, {("up", 0): [i]}) == {("up", 0): [i], ("down", 1): [i]}


def test_pointwise_operands_tie() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        return h * m.scale + m.shift

    program, labels = _mlp(body, scale=(6,), shift=(6,))
    expected = {("up", 0): [2], ("down", 1): [2], ("scale", 0): [2], ("shift", 0): [2]}
    assert follows(program, labels, {("up", 0): [2]}) == expected


def test_a_second_projection_ties_with_the_first() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        hidden = functional.silu(functional.linear(x, m.gate)) * functional.linear(x, m.up)
        return functional.linear(hidden, m.down)

    program, labels = labelled(function, X, gate=(6, 4), up=(6, 4), down=(5, 6))
    expected = {("gate", 0): [1, 4], ("up", 0): [1, 4], ("down", 1): [1, 4]}
    assert follows(program, labels, {("up", 0): [4, 1]}) == expected


def test_what_is_broadcast_is_a_parent() -> None:
    """A per-head table of 2 heads with 3 channels each: the table's row goes with the last channel of its head."""

    def body(m: Any, h: Tensor) -> Tensor:
        return (h.unflatten(-1, (2, 3)) * m.table[:, None]).flatten(-2)

    program, labels = _mlp(body, table=(2,))
    assert follows(program, labels, {("up", 0): [3, 4]}) == {("up", 0): [3, 4], ("down", 1): [3, 4]}
    expected = {("up", 0): [3, 4, 5], ("down", 1): [3, 4, 5], ("table", 0): [1]}
    assert follows(program, labels, {("up", 0): [3, 4, 5]}) == expected


def test_a_weight_shared_by_all_heads_is_a_parent_of_each() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        return (h.unflatten(-1, (2, 3)) * m.scale).flatten(-2)

    program, labels = _mlp(body, scale=(3,))
    assert follows(program, labels, {("up", 0): [1]}) == {("up", 0): [1], ("down", 1): [1]}
    assert follows(program, labels, {("up", 0): [1, 4]}) == {("up", 0): [1, 4], ("down", 1): [1, 4], ("scale", 0): [1]}


def test_an_input_is_gathered_where_it_is_added() -> None:
    program, labels = labelled(
        lambda m, x: functional.linear(functional.linear(x, m.up) + x, m.down), X, up=(4, 4), down=(5, 4)
    )
    assert follows(program, labels, {("up", 0): [1]}) == {("up", 0): [1], ("down", 1): [1]}
    assert pinned_because(program, labels, "up", 1) == ["input 'x' of the model"] * 4


def test_adding_the_input_to_what_a_norm_reads_pins_with_its_name() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return functional.linear(functional.layer_norm(functional.linear(x, m.up) + x, (4,)), m.down)

    program, labels = labelled(function, X, up=(4, 4), down=(5, 4))
    assert pinned_because(program, labels, "up", 0) == ["input 'x' of the model"] * 4


def test_halves_of_glu_tie() -> None:
    program, labels = _mlp(lambda m, h: functional.glu(h), 3)
    assert follows(program, labels, {("down", 1): [1]}) == {("up", 0): [1, 4], ("down", 1): [1]}


REDUCED: dict[str, Body] = {
    "softmax": lambda m, h: h.softmax(-1),
    "log_softmax": lambda m, h: h.log_softmax(-1),
    "cumsum": lambda m, h: h.cumsum(-1),
    "layer_norm": lambda m, h: functional.layer_norm(h, (6,)),
    "rms_norm by hand": lambda m, h: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6),
    "sum": lambda m, h: h - h.sum(-1, keepdim=True),
    "amax": lambda m, h: h - h.amax(-1, keepdim=True),
    "var": lambda m, h: h / h.var(-1, keepdim=True),
    "vector_norm": lambda m, h: h / torch.linalg.vector_norm(h, dim=-1, keepdim=True),
    "group_norm": lambda m, h: functional.group_norm(h.transpose(1, 2), 1).transpose(1, 2),
}


@pytest.mark.parametrize("case", REDUCED)
def test_reductions_tie_along_their_axis(case: str) -> None:
    program, labels = _mlp(REDUCED[case])
    every = list(range(6))
    assert follows(program, labels, {("up", 0): [0]}) == {("up", 0): every, ("down", 1): every}


def test_a_group_norm_ties_the_channels_of_each_group() -> None:
    program, labels = _mlp(lambda m, h: functional.group_norm(h.transpose(1, 2), 2).transpose(1, 2))
    assert follows(program, labels, {("up", 0): [4]}) == {("up", 0): [3, 4, 5], ("down", 1): [3, 4, 5]}


def test_reductions_over_other_axes_tie_nothing() -> None:
    program, labels = _mlp(lambda m, h: h.softmax(1) - h.mean(1, keepdim=True))
    assert follows(program, labels, {("up", 0): [5]}) == {("up", 0): [5], ("down", 1): [5]}


def test_a_norm_inside_a_head_ties_the_head_alone_and_its_weight_is_shared() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        return functional.layer_norm(h.unflatten(-1, (2, 3)), (3,), m.weight, m.bias).flatten(-2)

    program, labels = _mlp(body, weight=(3,), bias=(3,))
    assert follows(program, labels, {("up", 0): [4]}) == {("up", 0): [3, 4, 5], ("down", 1): [3, 4, 5]}


def test_a_batch_norm_scales_each_channel() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        normed = functional.batch_norm(h.transpose(1, 2), m.mean, m.var.abs(), m.weight, m.bias)
        return normed.transpose(1, 2)

    program, labels = _mlp(body, mean=(6,), var=(6,), weight=(6,), bias=(6,))
    every = ("up", 0), ("down", 1), ("mean", 0), ("var", 0), ("weight", 0), ("bias", 0)
    assert follows(program, labels, {("up", 0): [3]}) == {key: [3] for key in every}


def test_topk_pins_what_it_selects_from() -> None:
    program, labels = _mlp(lambda m, h: h.topk(2, -1).values, 2)
    assert pinned_because(program, labels, "up", 0) == ["selected by value (aten.topk.default)"] * 6


def _copied(x: Tensor, weight: Tensor) -> Tensor:
    return weight.expand(x.shape[0], -1, -1)


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: functional.linear(functional.linear(x, m.up, m.bias), m.down),
    "matmul": lambda m, x: (x @ m.up.T + m.bias) @ m.down.T,
    "addmm": lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.up.T) @ m.down.T,
    "einsum": lambda m, x: torch.einsum("bsf,of->bso", torch.einsum("bsi,fi->bsf", x, m.up) + m.bias, m.down),
    "batched": lambda m, x: torch.bmm(torch.baddbmm(_copied(x, m.bias[None]), x, _copied(x, m.up.T)),
                                      _copied(x, m.down.T)),
    "convolution": lambda m, x: functional.conv1d(functional.conv1d(x.mT, m.up[..., None], m.bias), m.down[..., None]),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_tie_the_summed_axis_coordinate_by_coordinate(case: str) -> None:
    program, labels = labelled(PRODUCTS[case], X, up=(6, 4), bias=(6,), down=(5, 6))
    for i in range(6):
        assert follows(program, labels, {("up", 0): [i]}) == {("up", 0): [i], ("bias", 0): [i], ("down", 1): [i]}
    assert pinned_because(program, labels, "down", 0) == ["an output of the model"] * 5
    assert pinned_because(program, labels, "up", 1) == ["input 'x' of the model"] * 4


def test_a_depthwise_convolution_is_pointwise_in_its_channels() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        return functional.conv1d(h.mT, m.kernel, m.bias, padding=1, groups=6).mT

    program, labels = _mlp(body, kernel=(6, 1, 3), bias=(6,))
    expected = {("up", 0): [2], ("down", 1): [2], ("kernel", 0): [2], ("bias", 0): [2]}
    assert follows(program, labels, {("up", 0): [2]}) == expected
    assert pinned_because(program, labels, "kernel", 2) == ["kernel of a convolution"] * 3


def test_a_grouped_convolution_is_refused() -> None:
    program, labels = _mlp(lambda m, h: functional.conv1d(h.mT, m.kernel, groups=2).mT, kernel=(6, 3, 1))
    assert pinned_because(program, labels, "up", 0) == ["a convolution in 2 groups mixes its channels"] * 6


HEAD = ("q", 0), ("k", 0), ("v", 0), ("o", 1)


def _heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    return functional.linear(x, weight).unflatten(-1, (heads, -1)).transpose(1, 2)


def _explicit(m: Any, x: Tensor) -> Tensor:
    q, k, v = (_heads(x, w, 3) for w in (m.q, m.k, m.v))
    mixed = ((q @ k.transpose(-1, -2)) / 2**0.5).softmax(-1) @ v
    return functional.linear(mixed.transpose(1, 2).flatten(-2), m.o)


def _fused(m: Any, x: Tensor) -> Tensor:
    mixed = functional.scaled_dot_product_attention(*(_heads(x, w, 3) for w in (m.q, m.k, m.v)))
    return functional.linear(mixed.transpose(1, 2).flatten(-2), m.o)


def _einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (functional.linear(x, w).unflatten(-1, (3, -1)) for w in (m.q, m.k, m.v))
    scores = torch.einsum("bshe,bthe->bhst", q, k).softmax(-1)
    return functional.linear(torch.einsum("bhst,bthe->bshe", scores, v).flatten(-2), m.o)


ATTENTION = {"explicit": _explicit, "sdpa": _fused, "einsum": _einsum}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_gives_value_channels_and_heads(case: str) -> None:
    """A value channel may go alone; with its last one the head's queries and keys go, all of them."""
    program, labels = labelled(ATTENTION[case], X, q=(6, 4), k=(6, 4), v=(6, 4), o=(5, 6))
    assert follows(program, labels, {("o", 1): [2]}) == {("v", 0): [2], ("o", 1): [2]}
    head = {key: [2, 3] for key in HEAD}
    assert follows(program, labels, {("o", 1): [2, 3]}) == head
    assert follows(program, labels, {("q", 0): [2]}) == {("q", 0): [2, 3], ("k", 0): [2, 3]}
    scored = components(program, labels, "q", 0)
    assert set(scored.tolist()) == labels.scores


def _by_expand(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, -1, 2)


GROUPED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "expand": lambda m, x: functional.scaled_dot_product_attention(
        _heads(x, m.q, 4), _by_expand(_heads(x, m.k, 2)), _by_expand(_heads(x, m.v, 2))),
    "repeat_interleave": lambda m, x: functional.scaled_dot_product_attention(
        _heads(x, m.q, 4), *(_heads(x, w, 2).repeat_interleave(2, 1) for w in (m.k, m.v))),
    "enable_gqa": lambda m, x: functional.scaled_dot_product_attention(
        _heads(x, m.q, 4), _heads(x, m.k, 2), _heads(x, m.v, 2), enable_gqa=True),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPED)
def test_key_value_heads_are_parents_of_their_query_heads(case: str) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return functional.linear(GROUPED[case](m, x).transpose(1, 2).flatten(-2), m.o)

    program, labels = labelled(function, X, q=(8, 4), k=(4, 4), v=(4, 4), o=(5, 8))
    one = follows(program, labels, {("o", 1): [4, 5]})
    assert one == {("q", 0): [4, 5], ("o", 1): [4, 5]}
    both = follows(program, labels, {("o", 1): [4, 5, 6, 7]})
    assert both == {("q", 0): [4, 5, 6, 7], ("k", 0): [2, 3], ("v", 0): [2, 3], ("o", 1): [4, 5, 6, 7]}


def test_a_bias_of_positions_is_gathered_and_pins_no_head() -> None:
    """Slopes are computed from parameters and positions alone (one of them a per-head table)."""

    def function(m: Any, x: Tensor) -> Tensor:
        q, k, v = (_heads(x, w, 3) for w in (m.q, m.k, m.v))
        distance = torch.arange(x.shape[1]).double()
        bias = m.slope[:, None, None] * (distance[None, :] - distance[:, None])
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return functional.linear(mixed.transpose(1, 2).flatten(-2), m.o)

    program, labels = labelled(function, X, q=(6, 4), k=(6, 4), v=(6, 4), o=(5, 6), slope=(3,))
    gone = follows(program, labels, {("o", 1): [4, 5]})
    assert gone == {("q", 0): [4, 5], ("k", 0): [4, 5], ("v", 0): [4, 5], ("o", 1): [4, 5], ("slope", 0): [2]}


def test_rotary_tables_tie_the_channels_of_a_head() -> None:
    """cos and sin have one entry per channel: computed from positions, no labels, and nothing is pinned by them."""

    def function(m: Any, x: Tensor) -> Tensor:
        q, k, v = (_heads(x, w, 3) for w in (m.q, m.k, m.v))
        angle = torch.outer(torch.arange(x.shape[1]).double(), torch.tensor([1.0, 0.1], dtype=torch.float64))
        q, k = q * angle.cos(), k * angle.cos()
        return functional.linear((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(-2), m.o)

    program, labels = labelled(function, X, q=(6, 4), k=(6, 4), v=(6, 4), o=(5, 6))
    gone = follows(program, labels, {("o", 1): [0, 1]})
    assert gone == {key: [0, 1] for key in HEAD}


def test_embedding_rows_stay_and_columns_pass() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(functional.embedding(x, m.table), m.up), m.down)

    program, labels = labelled(function, torch.tensor([[1, 2, 3], [4, 5, 6]]), table=(9, 4), up=(6, 4), down=(5, 6))
    assert pinned_because(program, labels, "table", 0) == ["indexed by data"] * 9
    assert follows(program, labels, {("table", 1): [2]}) == {("table", 1): [2], ("up", 1): [2]}


@pytest.mark.parametrize("take", [lambda h, axis, index: h.index_select(axis, index),
                                  lambda h, axis, index: h.movedim(axis, 0)[index].movedim(0, axis)])  # fmt: skip
def test_indexing_by_constants_moves_and_by_data_pins(take: Any) -> None:
    program, labels = _mlp(lambda m, h: take(h, 1, torch.tensor([0, 2])))
    assert follows(program, labels, {("up", 0): [3]}) == {("up", 0): [3], ("down", 1): [3]}
    program, labels = _mlp(lambda m, h: take(h, -1, torch.tensor([0, -1, 3])), 3)
    assert follows(program, labels, {("up", 0): [3, 5]}) == {("up", 0): [3, 5], ("down", 1): [1, 2]}
    program, labels = _mlp(lambda m, h: take(h, -1, (h.sum(-1)[0, :2] > 0).long()), 2)
    assert pinned_because(program, labels, "up", 0) == ["indexed by data"] * 6


def test_gather_pins_its_axis() -> None:
    program, labels = _mlp(lambda m, h: h.gather(-1, torch.zeros(2, 3, 2, dtype=torch.int64)), 2)
    assert pinned_because(program, labels, "up", 0) == ["indexed by data"] * 6


def test_labelled_indices_stay() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        return functional.embedding((h > 0).long(), m.table).flatten(-2)

    program, labels = _mlp(body, 12, table=(2, 2))
    assert pinned_because(program, labels, "up", 0) == ["used as an index"] * 6


def test_writing_at_places_given_by_data_stays() -> None:
    index = torch.zeros(2, 3, 6, dtype=torch.int64)
    program, labels = _mlp(lambda m, h: torch.zeros(2, 3, 6, dtype=h.dtype).scatter(-1, index, h))
    assert pinned_because(program, labels, "up", 0) == ["written at places given by data (aten.scatter.src)"] * 6


@torch.library.custom_op("fxslim_tests::mystery", mutates_args=())
def _mystery(x: Tensor) -> Tensor:
    return x.flip(-1).clone()


@_mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_operation_pins_and_is_reported() -> None:
    program, labels = _mlp(lambda m, h: torch.ops.fxslim_tests.mystery(h))
    assert pinned_because(program, labels, "up", 0) == ["no rule for fxslim_tests.mystery"] * 6
    assert pinned_because(program, labels, "down", 1) == ["no rule for fxslim_tests.mystery"] * 6
    assert list(labels.unknown) == ["fxslim_tests.mystery"]


def test_an_unknown_operation_on_data_pins_what_it_meets_later() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        return h * torch.ops.fxslim_tests.mystery(h.detach())

    program, labels = _mlp(body)
    assert pinned_because(program, labels, "up", 0) == ["no rule for fxslim_tests.mystery"] * 6


def test_created_axes_get_labels_of_their_own() -> None:
    """A mask expanded to the head count pins no head, and shrinks with them."""

    def function(m: Any, x: Tensor) -> Tensor:
        q, k, v = (_heads(x, w, 3) for w in (m.q, m.k, m.v))
        mask = (x[..., 0] > -9)[:, None, None, :].expand(-1, 3, x.shape[1], -1)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return functional.linear(mixed.transpose(1, 2).flatten(-2), m.o)

    program, labels = labelled(function, X, q=(6, 4), k=(6, 4), v=(6, 4), o=(5, 6))
    gone = follows(program, labels, {("o", 1): [2, 3]})
    assert gone == {key: [2, 3] for key in HEAD}


def test_outputs_stay() -> None:
    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.linear(x, m.up)
        return functional.linear(hidden, m.down), hidden

    program, labels = labelled(function, X, up=(6, 4), down=(5, 6))
    assert pinned_because(program, labels, "up", 0) == ["an output of the model"] * 6


def test_labels_say_who_tied_them() -> None:
    program, labels = _mlp(lambda m, h: h.softmax(-1))
    row = int(components(program, labels, "up", 0)[0])
    assert labels.tied_by(row) == " (tied by aten.softmax.int)"
    assert labels.tied_by(0) == ""


@pytest.mark.parametrize("where", ["channels", "sequence"])
def test_one_slope_per_channel_follows_its_channel(where: str) -> None:
    """PReLU reads its slopes along axis 1: they follow channels there, and nothing where axis 1 is the sequence."""

    def function(m: Any, x: Tensor) -> Tensor:
        h = functional.linear(x, m.up)
        h = functional.prelu(h.mT, m.slope).mT if where == "channels" else functional.prelu(h, m.slope)
        return functional.linear(h, m.down)

    program, labels = labelled(function, numbers(2, 6, 4), up=(6, 4), slope=(6,), down=(5, 6))
    up, slope = components(program, labels, "up", 0), components(program, labels, "slope", 0)
    assert _together(labels, up, components(program, labels, "down", 1)) == IDENTITY
    assert _together(labels, up, slope) == (IDENTITY if where == "channels" else {i: set() for i in range(6)})


MIXED: dict[str, tuple[Body, int, str]] = {
    "reflect": (lambda m, h: functional.pad(h, (2, 2), mode="reflect"), 10,
                "padding a labelled axis with its own values"),
    "circular": (lambda m, h: functional.pad(h, (2, 2), mode="circular"), 10,
                 "padding a labelled axis with its own values"),
    "tril": (lambda m, h: h.tril(), 6, "aten.tril.default over labelled axes"),
    "triu": (lambda m, h: h.triu(1), 6, "aten.triu.default over labelled axes"),
    "tril inside": (lambda m, h: h.unflatten(-1, (3, 2)).tril().flatten(-2), 6,
                    "aten.tril.default over labelled axes"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_what_depends_on_the_position_of_a_channel_pins_it(case: str) -> None:
    """Refusal: a channel that moves up would be cut, or copied, elsewhere."""
    body, width, reason = MIXED[case]
    program, labels = _mlp(body, width)
    assert pinned_because(program, labels, "up", 0) == [reason] * 6


def test_triangles_over_other_axes_leave_channels_free() -> None:
    program, labels = _mlp(lambda m, h: h.permute(2, 0, 1).tril().permute(1, 2, 0))
    up, down = components(program, labels, "up", 0), components(program, labels, "down", 1)
    assert _together(labels, up, down) == IDENTITY
