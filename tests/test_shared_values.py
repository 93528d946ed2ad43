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


class Returned(nn.Module):
    """Attention that returns the weights of its heads, so that heads stay; values go channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, H * E) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (H, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.mT).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).flatten(-2)), weights


def test_value_channels_go_where_the_weights_of_all_heads_are_returned() -> None:
    model = built(Returned)
    found = fxslim.inspect(model, example(2, 6, 0))
    (site,) = found.sites
    assert (site.units, site.group_count, site.groups_stay, site.of_values) == (H * E, H, True, True)
    reason = "part of it has to stay (an output of the model); value= takes value channels"
    assert [note.reason for note in found.pinned if note.where == site.name] == [reason]
    forms = [make(model, example(2, 6, 0), value=0.5) for make in (fxslim.slim, fxslim.compile)]
    for form in forms:
        assert form.v.weight.shape == (H * E // 2, D)
        assert_narrowed(model, form.fxslim.plan, [form])
    with pytest.raises(ValueError, match="no group may go as a whole"):
        fxslim.plan(model, example(2, 6, 0), value=0.5).sites[0].model_validate(
            {"site": site, "keep": tuple(range(E, H * E))}
        )


def test_rows_that_are_zero_go_from_every_head_alike_and_none_goes_whole() -> None:
    model = built(Returned)
    with torch.no_grad():
        model.o.weight[:, : E + 2] = 0  # all of the first head, two of the second, none of the third
        model.o.weight[:, -1] = 0
    small = fxslim.slim(model, example(2, 6, 0))
    assert small.v.weight.shape == (H * (E - 1), D)
    assert difference(outputs(model, example(2, 6, 1)), outputs(small, example(2, 6, 1))) < 1e-12
