"""Value channels that all query heads share: a site beside that of the heads, on the same columns of the output."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.plan import Plan

from agreement import difference, outputs, random_plan

D, H, E = 12, 3, 4


class Shared(nn.Module):
    """Attention whose query heads share one key and one value head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = H
        self.q, self.k, self.v, self.o = nn.Linear(D, H * E), nn.Linear(D, E), nn.Linear(D, E), nn.Linear(H * E, D)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = q @ self.k(x).mT[:, None] / math.sqrt(E)
        return x + self.o((scores.softmax(-1) @ self.v(x)[:, None]).transpose(1, 2).flatten(-2))


class Fused(Shared):
    """Keys and values in one product, and a kernel that is given copies of them."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(D, 2 * E)
        del self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], self.heads, E).transpose(1, 2)
        k, v = self.kv(x)[:, None].expand(-1, self.heads, -1, -1).split((E, E), dim=-1)
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(made.transpose(1, 2).reshape(*x.shape[:2], self.heads * E))


def built(form: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return form().double().eval()


def example(batch: int, length: int, seed: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, length, D, dtype=torch.float64, generator=generator),)


def assert_narrowed(model: nn.Module, plan: Plan, forms: Iterable[Any]) -> None:
    for form in forms:
        assert form.fxslim.plan.zeroed == ()
        for given in (example(2, 5, 1), example(3, 7, 2)):
            with fxslim.masked(model, plan):
                expected = outputs(model, given)
            assert difference(expected, outputs(model, given)) > 1e-3  # the masks do something
            assert difference(expected, outputs(form, given)) < 1e-12


@pytest.mark.parametrize("form", [Shared, Fused])
@pytest.mark.parametrize("which", [("attention",), ("generic",), ("attention", "generic")])
def test_heads_and_the_channels_that_they_share_go_alone_and_at_once(form: type, which: tuple[str, ...]) -> None:
    model = built(form)
    found = fxslim.inspect(model, example(2, 6, 0))
    assert [(site.kind, site.units) for site in found.sites] == [("attention", H), ("generic", E)]
    plan = random_plan(model, tuple(site for site in found.sites if site.kind in which))
    forms = [make(model, example(2, 6, 0), plan=plan) for make in (fxslim.slim, fxslim.compile)]
    kept = {part.site.kind: len(part.keep) for part in plan}
    heads, channels = kept.get("attention", H), kept.get("generic", E)
    for narrowed in forms:
        assert narrowed.o.weight.shape == (D, heads * channels)
        values = narrowed.v.weight if form is Shared else narrowed.kv.weight[E:]
        assert values.shape == (channels, D)
    assert_narrowed(model, plan, forms)


def test_requests_reach_heads_and_the_channels_that_they_share() -> None:
    model = built(Shared)
    small = fxslim.slim(model, example(2, 6, 0), heads=0.34, value=0.5)
    assert {part.site.kind: len(part.keep) for part in small.fxslim.plan} == {"attention": 2, "generic": 2}
    assert not [note for note in small.fxslim.report.not_done if "value" in note.reason]
    assert_narrowed(model, small.fxslim.plan, [small])


def test_two_plans_one_after_the_other_are_one() -> None:
    """Heads first, then the channels that those share which are left, and a third time heads."""
    model = built(Shared)
    first = fxslim.slim(model, example(2, 6, 0), heads=0.34)
    second = fxslim.slim(first, example(2, 6, 0), value=0.5)
    third = fxslim.compile(second, example(2, 6, 0), heads=0.5)
    assert third.o.weight.shape == (D, E // 2)
    again = fxslim.slim(model, example(2, 6, 0), plan=second.fxslim.plan)
    assert_narrowed(model, second.fxslim.plan, [second, again])
    assert_narrowed(second, third.fxslim.plan, [third])


def test_constants_are_folded_once() -> None:
    """Values that are nothing but a bias: every head and every channel is constant, and each column counts once."""
    model = built(Shared)
    with torch.no_grad():
        model.v.weight.zero_()
    for form in (fxslim.slim, fxslim.compile):
        small = form(model, example(2, 6, 0))
        assert small.o.weight.shape == (D, 1)
        for given in (example(2, 5, 1), example(3, 7, 2)):
            assert difference(outputs(model, given), outputs(small, given)) < 1e-12
