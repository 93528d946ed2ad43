"""Resizing: every operation that carries a size gets one that fits what is left, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxslim.errors import NarrowError
from fxslim.labels import Value
from fxslim.passes.annotate import Labels, operation
from fxslim.passes.cut import Cut
from fxslim.passes.resize import check, resized, spelled
from fxslim.program import Program

from traced import cut_rows, labelled, numbers

X = numbers(2, 3, 4)
Body = Callable[[Any, Tensor], Tensor]


def _case(body: Body, gone: list[int], width: int = 6, rows: int = 6) -> tuple[Program, Labels, Cut]:
    """Trace x -> up -> body -> down and cut rows of up."""

    def function(m: Any, x: Tensor) -> Tensor:
        return functional.linear(body(m, functional.linear(x, m.up)), m.down)

    program, labels = labelled(function, X, up=(rows, 4), down=(5, width))
    return program, labels, cut_rows(program, labels, {("up", 0): gone})


def _node(program: Program, name: str) -> Any:
    return next(node for node in program.graph.nodes if node.op == "call_function" and operation(node) == name)


def _run(program: Program, cut: Cut, name: str) -> tuple[Tensor, Tensor]:
    """Return what the resized operation makes of a narrowed value, and the narrowed result of the dense one."""
    node = _node(program, name)
    source: Value = cut.labels.values[node.args[0]]
    result: Value = cut.labels.values[node]
    dense = numbers(*source.shape)
    wanted = cut.compress(result, resized_dense(node, dense, cut))
    return resized(node, cut).run(cut.compress(source, dense)), wanted


def resized_dense(node: Any, dense: Tensor, cut: Cut) -> Tensor:
    """Run the operation as it was traced, on the example's sizes."""
    from fxslim.passes.rules.walk import concrete

    args = [concrete(argument) for argument in spelled(node.args[1:], cut)]
    made: Tensor = node.target(dense, *args, **{name: concrete(value) for name, value in node.kwargs.items()})
    return made


HALF = [0, 1, 2]  # the first half of six channels: one of two heads of three
KEPT: dict[str, tuple[Body, list[int], int, str]] = {
    "view": (lambda m, h: h.view(2, 3, 2, 3).flatten(-2), HALF, 6, "aten.view"),
    "view with an open batch": (lambda m, h: h.view(h.shape[0], h.shape[1], 2, 3).flatten(-2), HALF, 6, "aten.view"),
    "view with a hole": (lambda m, h: h.view(h.shape[0], -1, 2, 3).flatten(-2), HALF, 6, "aten.view"),
    "reshape": (lambda m, h: h.mT.reshape(2, 6, 3).mT, [1, 4], 6, "aten.reshape"),
    "unflatten": (lambda m, h: h.unflatten(-1, (2, 3)).flatten(-2), HALF, 6, "aten.unflatten"),
    "slice": (lambda m, h: h[..., 2:], [0, 4], 4, "aten.slice"),
    "slice inside": (lambda m, h: h[..., 1:4], [2], 3, "aten.slice"),
    "strided slice": (lambda m, h: h[..., ::2], [2, 3], 3, "aten.slice"),
    "strided slice from one": (lambda m, h: h[..., 1::2], [0, 3], 3, "aten.slice"),
    "index by constants": (lambda m, h: h[..., [5, 1, -2]], [1, 2, 3], 3, "aten.index"),
    "index_select by constants": (lambda m, h: h.index_select(-1, torch.tensor([5, 4, 0])), [4, 1], 3,
                                  "aten.index_select"),
    "narrow": (lambda m, h: h.narrow(-1, 3, 3), [0, 5], 3, "aten.narrow"),
    "select": (lambda m, h: h.unflatten(-1, (3, 2)).select(2, 2), [0, 1], 2, "aten.select"),
    "expand": (lambda m, h: h.unsqueeze(-1).expand(-1, -1, -1, 2).flatten(-2), [], 12, "aten.expand"),
    "flip": (lambda m, h: h.flip(-1), [0, 4], 6, "aten.flip"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_operations_commute_with_a_cut(case: str) -> None:
    """Narrow, then run resized = run as traced, then narrow."""
    body, gone, width, name = KEPT[case]
    program, _, cut = _case(body, gone, width)
    found, wanted = _run(program, cut, name)
    assert torch.equal(found, wanted)
    for node in program.graph.nodes:
        check(node, cut)


@pytest.mark.parametrize("body", [lambda m, h: torch.cat(h.chunk(2, -1)[::-1], -1),
                                  lambda m, h: torch.cat(h.split(4, -1)[::-1], -1)])  # fmt: skip
def test_splits_get_sizes(body: Body) -> None:
    program, _, cut = _case(body, [0, 5])
    node = next(n for n in program.graph.nodes if operation(n) in ("aten.chunk", "aten.split"))
    call = resized(node, cut)
    parts = [value.shape[-1] for value in cut.labels.values[node]]
    assert call.target is torch.ops.aten.split_with_sizes.default
    assert call.args[1:] == ([parts[0] - 1, parts[1] - 1], -1)
    check(node, cut)


def test_splits_that_lose_nothing_stay() -> None:
    program, _, cut = _case(lambda m, h: torch.cat([c * 2 for c in h.chunk(2, 1)], 1), [0])
    node = _node(program, "aten.chunk")
    assert resized(node, cut).target is node.target


def test_copies_per_head_follow_the_heads_that_are_left() -> None:
    """Six copies of a key/value head's row; two query heads of each group of three stay."""

    def function(m: Any, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, m.up).repeat_interleave(3, -1), m.down)

    program, labels = labelled(function, X, up=(2, 4), down=(5, 6))
    cut = cut_rows(program, labels, {("down", 1): [1, 3]})
    node = _node(program, "aten.repeat_interleave")
    assert resized(node, cut).args[1:] == (2, -1)
    check(node, cut)
    cut = cut_rows(program, labels, {("down", 1): [0, 1, 2, 5]})
    assert resized(node, cut).args[1:] == (2, -1)
    check(node, cut)


def test_repeats_follow_too() -> None:
    program, labels = labelled(
        lambda m, x: functional.linear(functional.linear(x, m.up).repeat(1, 1, 3), m.down), X, up=(2, 4), down=(5, 6)
    )
    node = _node(program, "aten.repeat")
    cut = cut_rows(program, labels, {("down", 1): [0, 1]})  # the first copy goes
    call = resized(node, cut)
    assert call.run(numbers(2, 3, 2)).shape == (2, 3, 4)
    check(node, cut)


def test_created_tensors_shrink() -> None:
    program, _, cut = _case(lambda m, h: h * torch.ones(6).double() + h.new_zeros(6), [0, 3])
    call = resized(_node(program, "aten.ones"), cut)
    assert torch.ones(call.args[0][0].old * call.args[0][0].kept // call.args[0][0].total).shape == (4,)
    call = resized(_node(program, "aten.new_zeros"), cut)
    assert call.run(torch.empty(0)).shape == (4,)


def test_a_depthwise_convolution_keeps_a_group_per_channel() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = functional.conv1d(functional.linear(x, m.up).mT, m.kernel, padding=1, groups=6).mT
        return functional.linear(h, m.down)

    program, labels = labelled(function, X, up=(6, 4), kernel=(6, 1, 3), down=(5, 6))
    cut = cut_rows(program, labels, {("up", 0): [1, 2]})
    assert resized(_node(program, "aten.conv1d"), cut).args[6] == 4


REFUSED: dict[str, tuple[Body, list[int], int, str, str]] = {
    "slice of nothing": (lambda m, h: h[..., :2], [0, 1], 2, "aten.slice", "nothing would be left of a value"),
    "roll": (lambda m, h: h.roll(1, -1), [0], 6, "aten.roll", "aten.roll over a narrowed axis"),
    "half a head": (lambda m, h: h.view(2, 3, 2, 3).flatten(-2), [0], 6, "aten.view", "is not a box"),
    "a selected head that goes": (lambda m, h: h.unflatten(-1, (3, 2)).select(2, 2), [4, 5], 2, "aten.select",
                                  "nothing would be left of a value"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rewritten_is_refused(case: str) -> None:
    body, gone, width, name, message = REFUSED[case]
    program, _, cut = _case(body, gone, width)
    with pytest.raises(NarrowError, match=message):
        check(_node(program, name), cut)


def _grouped(m: Any, h: Tensor) -> Tensor:
    """Two groups of four channels, in each of which the halves change places."""
    grouped = h.unflatten(-1, (2, 4))
    return torch.cat([grouped[..., 2:], grouped[..., :2]], -1).flatten(-2)


def test_groups_may_lose_different_coordinates_between_the_same_slices() -> None:
    """As query heads do that lie in front of their group's key and value."""
    program, _, cut = _case(_grouped, [0, 5], 8, 8)
    found, wanted = _run(program, cut, "aten.slice")
    assert torch.equal(found, wanted)
    assert wanted.shape[-1] == 2
    for node in program.graph.nodes:
        check(node, cut)


def test_what_is_selected_may_come_after_different_coordinates_in_every_group() -> None:
    program, _, cut = _case(lambda m, h: h.unflatten(-1, (2, 4)).select(-1, 3), [0, 5], 2, 8)
    found, wanted = _run(program, cut, "aten.select")
    assert torch.equal(found, wanted)


def test_a_slice_that_different_coordinates_come_before_is_refused() -> None:
    """Channel 1 stays in both groups, but only in the first does another one stay before it."""
    program, _, cut = _case(lambda m, h: h.unflatten(-1, (2, 4))[..., 1:3].flatten(-2), [2, 3, 4, 6], 4, 8)
    with pytest.raises(NarrowError, match="a slice cuts through an axis on which different coordinates stay"):
        check(_node(program, "aten.slice"), cut)


def test_uneven_groups_are_refused() -> None:
    program, _, cut = _case(lambda m, h: h.view(h.shape[0], -1, 2, 3).flatten(-2), [0, 1, 3])
    with pytest.raises(NarrowError, match="what is left of a value is not a box"):
        check(_node(program, "aten.view"), cut)


def test_copies_that_keep_different_coordinates_are_refused() -> None:
    program, labels = labelled(
        lambda m, x: functional.linear(functional.linear(x, m.up).repeat_interleave(3, -1), m.down),
        X, up=(2, 4), down=(5, 6),
    )  # fmt: skip
    cut = cut_rows(program, labels, {("down", 1): [1]})
    with pytest.raises(NarrowError, match="copies of an axis keep different coordinates"):
        check(_node(program, "aten.repeat_interleave"), cut)


def test_sizes_that_divide_but_mix_coordinates_are_refused() -> None:
    """Four of six copies stay, two to one: the new factor of two would be wrong, and running it on labels shows it."""
    program, labels = labelled(
        lambda m, x: functional.linear(functional.linear(x, m.up).repeat_interleave(3, -1), m.down),
        X, up=(2, 4), down=(5, 6),
    )  # fmt: skip
    cut = cut_rows(program, labels, {("down", 1): [0, 1]})
    node = _node(program, "aten.repeat_interleave")
    assert resized(node, cut).args[1:] == (2, -1)
    with pytest.raises(NarrowError, match=r"what is left does not pass through aten\.repeat_interleave in order"):
        check(node, cut)


def test_heads_that_share_keys_and_values_stay_equally_many() -> None:
    """Two key/value heads, each for two query heads; the kernel pairs them by number."""

    def function(m: Any, x: Tensor) -> Tensor:
        q, k, v = (functional.linear(x, w).unflatten(-1, (-1, 2)).transpose(1, 2) for w in (m.q, m.k, m.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return functional.linear(mixed.transpose(1, 2).flatten(-2), m.o)

    program, labels = labelled(function, X, q=(8, 4), k=(4, 4), v=(4, 4), o=(5, 8))
    node = _node(program, "aten.scaled_dot_product_attention")
    for heads in ([1, 2], [0, 1], [0, 1, 2]):  # one of each group; a whole group; all but one head
        check(node, cut_rows(program, labels, {("o", 1): [2 * head + i for head in heads for i in (0, 1)]}))
    cut = cut_rows(program, labels, {("o", 1): [0, 1]})
    with pytest.raises(NarrowError, match="the heads that share keys and values are not equally many"):
        check(node, cut)
