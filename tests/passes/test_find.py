"""Finding sites: units, groups and slices of stacks, and why everything else stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxslim.passes.annotate import annotate
from fxslim.passes.family import Found
from fxslim.passes.find import find

from stacks import Attend, Feed, Layer, Stack
from traced import Function, numbers, traced

X = numbers(2, 3, 4)


def _found(model: Any, x: Tensor) -> Found:
    program = traced(model, x)
    return find(program, annotate(program))


LAYERS: dict[str, Layer] = {
    "plain": Feed(),
    "gated": Feed(gates=1, activation="silu", bias=False),
    "several gates": Feed(gates=3, scale=True),
    "heads": Attend(3, 1, 2, form="by hand"),
    "grouped, expanded": Attend(2, 2, 3, form="einsum"),
    "grouped, repeated": Attend(2, 2, 3, share="repeat_interleave"),
    "grouped, enable_gqa": Attend(2, 3, 2, share="enable_gqa", bias=False),
    "one key and value": Attend(1, 4, 2),
    "fused": Attend(2, 2, 2, layout="contiguous"),
    "interleaved": Attend(2, 3, 2, layout="interleaved"),
    "cross": Attend(2, 1, 2, cross=True),
}


@pytest.mark.parametrize("case", LAYERS)
def test_slices_are_the_rows_of_every_unit(case: str) -> None:
    """What goes with any single unit, and with any whole group, is what the layer itself says."""
    stack = Stack((LAYERS[case],))
    family, *across = _found(stack.build(), stack.inputs()).families
    layer = LAYERS[case]
    assert [(own.across, own.units) for own in across] == ([(True, layer.head)] if case == "one key and value" else [])
    assert family.units == layer.units
    assert family.scored == isinstance(layer, Attend)
    grouped = layer.groups not in (1, layer.units)
    width = layer.units // layer.groups
    assert family.groups == (tuple(unit // width for unit in range(layer.units)) if grouped else None)
    removals = [{unit} for unit in range(layer.units)] + [
        set(range(g * width, (g + 1) * width)) for g in range(layer.groups if layer.groups > 1 else 0)
    ]
    for gone in removals:
        expected = {}
        for tensor, (dim, role, rows) in stack.rows(0).items():
            needed = {row for unit, own in enumerate(rows) if unit not in gone for row in own}
            expected[tensor, dim, role] = sorted({row for own in rows for row in own} - needed)
        mask = np.isin(np.arange(layer.units), list(gone))
        found: dict[tuple[str, int, str], set[int]] = {key: set() for key in expected}
        for piece in family.slices:
            found[piece.tensor, piece.dim, piece.role] |= set(np.flatnonzero(piece.removed(mask)).tolist())
        assert {key: sorted(rows) for key, rows in found.items()} == expected


def test_consumers_say_which_module_can_be_masked() -> None:
    stack = Stack((Feed(),))
    (family,) = _found(stack.build(), stack.inputs()).families
    assert {piece.tensor: piece.hook for piece in family.slices if piece.role == "in"} == {
        "layers.0.down.weight": "layers.0.down"
    }
    assert {piece.hook for piece in family.slices if piece.role == "out"} == {None}


def _mlp(body: Any) -> Function:
    return Function(lambda m, x: functional.linear(body(functional.linear(x, m.up)), m.down), up=(6, 4), down=(5, 6))


REFUSED = {
    "a norm between": (lambda h: functional.layer_norm(h, (6,)),
                       "all its channels go together (tied by aten.layer_norm.default)"),
    "a norm by hand": (lambda h: h / h.pow(2).mean(-1, keepdim=True).sqrt(),
                       "all its channels go together (tied by aten.mean.dim)"),
    "a softmax": (lambda h: h.softmax(-1), "all its channels go together (tied by aten.softmax.int)"),
    "a roll": (lambda h: h.roll(2, -1), "aten.roll over a narrowed axis"),
    "an index": (lambda h: h[..., torch.cat([(h.sum(-1)[0] > 0).long()] * 2)], "indexed by data"),
    "a sort": (lambda h: h.sort(-1).values, "selected by value (aten.sort.default)"),
}  # fmt: skip


@pytest.mark.parametrize("body", [lambda h: torch.cat([h[..., ::2], h[..., 1::2]], -1),
                                  lambda h: h[..., [5, 4, 3, 2, 1, 0]],
                                  lambda h: torch.zeros_like(h).slice_scatter(h[..., 2:], -1, 2).contiguous() + h,
                                  lambda h: torch.stack([h, h], -1).select_scatter(h, -1, 0).sum(-1)])  # fmt: skip
def test_reordered_and_written_channels_are_free(body: Any) -> None:
    (family,) = _found(_mlp(body), X).families
    assert (family.units, family.groups) == (6, None)


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_says_why(case: str) -> None:
    body, reason = REFUSED[case]
    found = _found(_mlp(body), X)
    assert found.families == ()
    assert {refusal.tensor: refusal.reason for refusal in found.refusals}["down"] == reason
    assert {refusal.tensor: refusal.channels for refusal in found.refusals} == {"up": 4, "down": 6}


def test_single_value_channels_are_no_units() -> None:
    """They are free by themselves, but what is left of the heads would be no box."""
    stack = Stack((Attend(2, 1, 3),))
    (family,) = _found(stack.build(), stack.inputs()).families
    assert len(family.leaves) == 6
    assert family.unit_of.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_model_of_one_linear_has_no_site() -> None:
    found = _found(Function(lambda m, x: functional.linear(x, m.weight), weight=(5, 4)), X)
    assert found.families == ()
    assert [(refusal.tensor, refusal.reason) for refusal in found.refusals] == [("weight", "input 'x' of the model")]
