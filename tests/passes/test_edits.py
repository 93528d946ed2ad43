"""Edits: the integers that a narrowed module still holds are found by running it, or its units stay in place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxslim
from fxslim.edit import AttributeEdit, ConfigEdit

from architectures import ARCHITECTURES
from stacks import Attend, Feed, Stack

X = Stack((Feed(),)).inputs()


def _edits(small: Any) -> set[tuple[str, str, str, int, int]]:
    return {(edit.edit, edit.module, edit.name, edit.old, edit.new) for edit in small.fxslim.plan.edits}


EXPECTED: dict[str, set[tuple[str, str, int, int]]] = {
    "bert": set(),
    "gpt_neox": set(),
    "llama": set(),
    "llama_gqa": {("attribute", "model.layers.{}.self_attn.num_key_value_groups", 2, 1)},
    "gpt2": {("attribute", "transformer.h.{}.attn.split_size", 32, 16)},
    "opt": {("attribute", "model.decoder.layers.{}.self_attn.num_heads", 4, 2)},
    "phi3": {
        ("config", "model.layers.{}.self_attn.config.num_attention_heads", 4, 2),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_integers_that_had_to_change(name: str) -> None:
    """As known from reading the models."""
    model = ARCHITECTURES[name].build()
    small = fxslim.slim(model, heads=0.5)
    assert small.fxslim.plan.zeroed == ()
    found = {
        (kind, f"{module}.{'config.' if kind == 'config' else ''}{field}", old, new)
        for kind, module, field, old, new in _edits(small)
    }
    expected = {(kind, path.format(i), old, new) for kind, path, old, new in EXPECTED[name] for i in (0, 1)}
    if name == "phi3":
        assert {edit for edit in found if "num_attention_heads" in edit[1]} == expected
    else:
        assert found == expected


def test_nothing_is_edited_outside_the_sites_own_module() -> None:
    model = ARCHITECTURES["phi3_gqa"].build()
    small = fxslim.slim(model, heads=0.5)
    assert small.config.num_attention_heads == model.config.num_attention_heads == 4
    assert all(".self_attn" in edit.module for edit in small.fxslim.plan.edits)
    assert any(isinstance(edit, ConfigEdit) for edit in small.fxslim.plan.edits)


class _Plain(nn.Module):
    """Attention that reads its head count from a plain config object."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[0], x.shape[1], 3, self.config.heads, 2
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed)
        return out


def test_a_config_of_any_class_is_overlaid() -> None:
    model = nn.Sequential(_Plain(SimpleNamespace(heads=4, name="plain"))).double()
    small = fxslim.slim(model, X, heads=0.5)
    assert _edits(small) == {("config", "0", "heads", 4, 2)}
    assert (small[0].config.heads, small[0].config.name, model[0].config.heads) == (2, "plain", 4)


class _Stubborn(nn.Module):
    """Attention with its head count written into the code: no integer to change."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed)
        return out


def test_what_no_integer_expresses_is_narrowed_in_its_linears() -> None:
    model = nn.Sequential(_Stubborn(), nn.LayerNorm(4)).double()
    small = fxslim.slim(model, X, heads=0.5)
    plan = small.fxslim.plan
    assert (plan.spread, plan.zeroed) == (("0:attention",), ())
    assert [(e.edit, e.module, e.name, e.size) for e in plan.edits] == [
        ("spread", "0.qkv", "output", 24), ("spread", "0.out", "input", 8),
    ]  # fmt: skip
    reasons = {note.where: note.reason for note in small.fxslim.report.not_done}
    assert "zeros stand between them" in reasons["0:attention"]
    assert (small[0].qkv.weight.shape, small[0].out.weight.shape) == ((12, 4), (4, 4))
    assert small.fxslim.report.parameters_after == sum(p.numel() for p in small.parameters())
    with fxslim.masked(model, plan), torch.no_grad():
        expected = model(X)
    assert torch.allclose(small(X), expected, rtol=0, atol=1e-13)
    again = fxslim.slim(small, X, heads=0.5)  # narrowed once more: one head is left
    assert again[0].out.weight.shape == (4, 2)
    assert again.fxslim.plan.zeroed == ()
    small(X).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


class _Unlinear(_Stubborn):
    """The same with weights that no linear of its own reads."""

    def forward(self, x: Tensor) -> Tensor:
        fused = functional.linear(x, self.qkv.weight, self.qkv.bias).view(x.shape[0], x.shape[1], 3, 4, 2)
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return functional.linear(mixed, self.out.weight, self.out.bias)


def test_what_no_edit_expresses_stays_in_place_and_is_reported() -> None:
    """Refusal: masked = narrowed still holds, with zero columns; the graph form takes the heads out."""
    model = nn.Sequential(_Unlinear(), nn.LayerNorm(4)).double()
    small = fxslim.slim(model, X, heads=0.5)
    plan = small.fxslim.plan
    assert plan.edits == ()
    assert plan.zeroed == ("0:attention",)
    reasons = {note.where: note.reason for note in small.fxslim.report.not_done}
    assert "units stay in place, with zero columns" in reasons["0:attention"]
    assert small[0].qkv.weight.shape == (24, 4)
    assert int((small[0].out.weight == 0).all(0).sum()) == 4
    assert small.fxslim.report.parameters_after == small.fxslim.report.parameters_before
    assert fxslim.compile(model, X, heads=0.5).get_parameter("0.qkv.weight").shape == (12, 4)


def test_searching_leaves_the_model_as_it_was() -> None:
    stack = Stack((Attend(2, 2, 2, layout="contiguous"), Feed()))
    model, x = stack.build(), stack.inputs()
    kinds = [type(module) for module in model.modules()]
    held = {name: dict(vars(module)) for name, module in model.named_modules()}
    dense = model(x)
    small = fxslim.slim(model, x, heads=0.5)
    assert {e[1:3] for e in _edits(small)} == {("layers.0", "heads"), ("layers.0", "group")}
    assert [type(module) for module in model.modules()] == kinds
    for name, module in model.named_modules():
        assert {k: v for k, v in vars(module).items() if isinstance(v, int)} == {
            k: v for k, v in held[name].items() if isinstance(v, int)
        }
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(model(x), dense)
    assert isinstance(small.fxslim.plan.edits[0], AttributeEdit)
