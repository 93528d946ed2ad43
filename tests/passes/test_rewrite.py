"""Rewriting: the graph that is left computes what the masked one does, and the program itself never changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fxslim
from fxslim.dtypes import Following
from fxslim.errors import NarrowError
from fxslim.passes.annotate import Labels
from fxslim.passes.cut import Cut
from fxslim.passes.emit import emit
from fxslim.passes.rewrite import insert_masks, rewrite
from fxslim.program import Program, shape_of
from fxslim.text import program_lines

from traced import cut_rows, labelled, numbers

X = numbers(2, 3, 4)
SIZES = {"q": (6, 4), "k": (6, 4), "v": (6, 4), "o": (5, 6), "table": (3,)}
HEAD = {("o", 1): [2, 3]}


def _attention(m: Any, x: Tensor) -> Tensor:
    """Three heads of two, with a bias of positions (slopes computed from the head count) and a per-head table."""
    q, k, v = (functional.linear(x, w).view(x.shape[0], x.shape[1], 3, 2).transpose(1, 2) for w in (m.q, m.k, m.v))
    place = torch.arange(x.shape[1], dtype=x.dtype)
    slope = 2.0 ** -torch.arange(1, 4, dtype=x.dtype)
    bias = slope[:, None, None] * (place[None, :] - place[:, None]) + m.table[:, None, None]
    mixed = ((q @ k.transpose(-1, -2)) / 2**0.5 + bias).softmax(-1) @ v
    return functional.linear(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], 6), m.o)


def _cut(gone: dict[tuple[str, int], list[int]] | None = None) -> tuple[Program, Labels, Cut]:
    program, labels = labelled(_attention, X, **SIZES)
    return program, labels, cut_rows(program, labels, HEAD if gone is None else gone)


def _by_hand(program: Program, x: Tensor) -> Tensor:
    """Run heads 0 and 2 alone, written out."""
    t = program.tensors
    out = torch.zeros(*x.shape[:2], 5, dtype=x.dtype)
    place = torch.arange(x.shape[1], dtype=x.dtype)
    for head in (0, 2):
        rows = slice(2 * head, 2 * head + 2)
        q, k, v = (x @ t[name][rows].T for name in "qkv")
        bias = 2.0 ** -(head + 1) * (place[None, :] - place[:, None]) + t["table"][head]
        out += ((q @ k.mT) / 2**0.5 + bias).softmax(-1) @ v @ t["o"][:, rows].T
    return out


@pytest.mark.parametrize("form", ["narrowed", "masked"])
def test_what_is_left_is_what_the_kept_heads_compute(form: str) -> None:
    program, labels, cut = _cut()
    before = program_lines(program)
    made = rewrite(program, cut) if form == "narrowed" else insert_masks(program, labels, cut)
    module = emit(program, made.graph, made.tensors, name="Toy", following=Following())
    for batch, length in ((2, 3), (3, 5), (1, 4)):
        x = numbers(batch, length, 4, seed=batch)
        with torch.no_grad():
            assert float((module(x) - _by_hand(program, x)).abs().max()) < 1e-12
    assert program_lines(program) == before


def test_tensors_are_narrowed_and_untouched_ones_are_the_models_own() -> None:
    program, _, cut = _cut()
    made = rewrite(program, cut)
    kept = [0, 1, 4, 5]
    for name in "qkv":
        assert torch.equal(made.tensors[name], program.tensors[name][kept])
    assert torch.equal(made.tensors["o"], program.tensors["o"][:, kept])
    assert torch.equal(made.tensors["table"], program.tensors["table"][[0, 2]])
    nothing = rewrite(program, cut_rows(program, cut.labels, {("o", 1): []}))
    assert all(nothing.tensors[name] is tensor for name, tensor in program.tensors.items())


def test_sizes_are_rewritten_and_open_ones_stay_open() -> None:
    program, _, cut = _cut()
    made = rewrite(program, cut)
    views = [old for old in made.twin if old.op == "call_function" and str(old.target).startswith("aten.view")]
    assert {(shape_of(old)[2:], shape_of(made.twin[old])[2:]) for old in views if len(shape_of(old)) == 4} == {
        ((3, 2), (2, 2))
    }
    assert all(not isinstance(made.twin[old].args[1][0], int) for old in views)


def test_masks_change_no_size_and_no_weight() -> None:
    program, labels, cut = _cut()
    made = insert_masks(program, labels, cut)
    assert {name for name in made.tensors if name not in program.tensors} == {"fxslim_mask_0"}
    assert made.tensors["fxslim_mask_0"].tolist() == [False, False, True, True, False, False]
    assert all(made.tensors[name] is tensor for name, tensor in program.tensors.items())


def test_a_shared_size_is_rewritten_for_each_use() -> None:
    """One product B * H serves two sites that keep different heads."""

    def function(m: Any, x: Tensor) -> Tensor:
        many = x.shape[0] * 2
        for up, down in ((m.up_a, m.down_a), (m.up_b, m.down_b)):
            h = functional.linear(x, up).view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2).reshape(many, x.shape[1], 3)
            h = h.softmax(1).view(x.shape[0], 2, x.shape[1], 3).transpose(1, 2).reshape(x.shape[0], x.shape[1], 6)
            x = x + functional.linear(h, down)
        return x

    program, labels = labelled(function, X, up_a=(6, 4), down_a=(4, 6), up_b=(6, 4), down_b=(4, 6))
    cut = cut_rows(program, labels, {("down_a", 1): [0, 1, 2]})
    made = rewrite(program, cut)
    module, masked = (
        emit(program, r.graph, r.tensors, name="Toy", following=Following())
        for r in (made, insert_masks(program, labels, cut))
    )
    x = numbers(3, 5, 4, seed=1)
    with torch.no_grad():
        assert float((module(x) - masked(x)).abs().max()) < 1e-12


def test_a_cut_that_is_no_box_is_refused() -> None:
    program, _, cut = _cut({("o", 1): [0]})
    with pytest.raises(NarrowError, match="what is left of a value is not a box"):
        rewrite(program, cut)


def test_compile_counts_what_is_left() -> None:
    from stacks import Feed, Stack

    stack = Stack((Feed(hidden=6),))
    graph = fxslim.compile(stack.build(), stack.inputs(2, 5), ffn=0.5)
    assert graph.fxslim.report.macs_before == 2 * 2 * 5 * 4 * 6
    assert graph.fxslim.report.macs_after == 2 * 2 * 5 * 4 * 3
