"""Channels inside experts: how many kernels can take, and which of them go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_mm

import fxslim
from fxslim.passes.narrow import replay
from fxslim.passes.prepare import fingerprint
from fxslim.plan import Plan, Site, SitePlan

from agreement import difference, outputs

FLOAT32 = 1e-5


class Grouped(nn.Module):
    """Experts multiplied in groups, as transformers does by default; no float64."""

    def __init__(self, experts: int = 4, width: int = 8, hidden: int = 24, top: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.top, self.experts, self.hidden = top, experts, hidden
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * hidden, width) / 2)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / 2)
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * hidden)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, chosen = torch.topk(self.router(x).softmax(-1), self.top, dim=-1)
        ids, order = torch.sort(chosen.reshape(-1))
        ends = torch.cumsum(torch.histc(ids.float(), self.experts, 0, self.experts - 1), 0, dtype=torch.int32)
        rows = x[order // self.top]
        mixed = _grouped_mm(rows, self.up.transpose(-2, -1), offs=ends)
        if self.up_bias is not None:
            mixed = mixed + self.up_bias[ids]
        gate, up = mixed.chunk(2, dim=-1)
        out = _grouped_mm(torch.nn.functional.gelu(gate) * up, self.down.transpose(-2, -1), offs=ends)
        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        return out[torch.argsort(order)].view(-1, self.top, shape[-1]).sum(1).reshape(shape)


def seeded(make: Any, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return make(*args, **options).to(dtype).eval()


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def only(model: nn.Module, x: Tensor = X) -> Site:
    (site,) = fxslim.inspect(model, (x,)).sites
    return site


def given(model: nn.Module, *parts: SitePlan) -> Plan:
    return Plan(fxslim="test", torch=torch.__version__, fingerprint=fingerprint(model), sites=parts)


def agree(model: Any, plan: Plan, x: Tensor = X, tolerance: float = FLOAT32) -> tuple[Any, Any]:
    """Narrow in both forms, compare with the masked model in several sizes, and return both."""
    made = fxslim.slim(model, (x,), plan=plan), fxslim.compile(model, (x,), plan=plan)
    hidden = fxslim.compile(model, (x,), plan=plan, narrow=False)
    for batch, length in ((2, 5), (3, 4), (5, 1)):
        own = torch.randn(batch, length, x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(batch))
        with fxslim.masked(model, plan):
            expected = outputs(model, (own,))
        assert difference(expected, outputs(model, (own,))) > 1e-3  # the masks do something
        for small in (*made, hidden):
            assert difference(expected, outputs(small, (own,))) <= tolerance
    return made


# What kernels can take ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "multiple"), [(24, 8), (12, 4), (16, 8)])
def test_grouped_products_want_a_multiple(hidden: int, multiple: int) -> None:
    assert only(seeded(Grouped, hidden=hidden)).multiple == multiple


def test_what_is_chosen_is_rounded_up_to_it() -> None:
    model = seeded(Grouped)
    (part,) = fxslim.plan(model, (X,), ffn=0.5)
    assert left_of(part) == 16  # of 12
    (part,) = fxslim.plan(model, (X,), ffn=0.3, round_to=5).sites or [None]
    assert part is None
    small = fxslim.slim(model, (X,), ffn=0.5)
    assert small.down.shape == (4, 8, 16)
    assert small.fxslim.plan.zeroed == ()


def left_of(part: SitePlan) -> int:
    return len(part.left)


def test_another_number_is_filled_up_with_zero_columns() -> None:
    model = seeded(Grouped)
    site = only(model)
    keep = tuple(sorted(np.random.default_rng(0).permutation(24)[:13].tolist()))
    plan = given(model, SitePlan(site=site, keep=keep))
    slim, graph = agree(model, plan)
    for small in (slim, graph):
        (part,) = small.fxslim.plan
        assert (part.keep, len(part.stay), left_of(part)) == (keep, 3, 16)
        assert small.fxslim.plan.zeroed == ()
        assert small.get_parameter("down").shape == (4, 8, 16)
        zero = (small.get_parameter("down") == 0).all(dim=(0, 1))
        assert int(zero.sum()) == 3
        assert "rows of 3 more channels stay, with zero columns: its grouped products need a multiple of 8" in str(
            small.fxslim.report
        )
    assert sum(p.numel() for p in slim.parameters()) == sum(p.numel() for p in model.parameters()) - 4 * 8 * 3 * 8
    again = Plan.from_json(slim.fxslim.plan.to_json())
    assert again == slim.fxslim.plan
    copy = replay(seeded(Grouped), again)
    assert all(torch.equal(a, b) for a, b in zip(copy.state_dict().values(), slim.state_dict().values(), strict=True))
    assert difference(outputs(slim, (X,)), outputs(fxslim.slim(model, (X,), plan=again), (X,))) == 0


def test_a_plan_on_top_of_a_filled_one() -> None:
    model = seeded(Grouped)
    plan = given(model, SitePlan(site=only(model), keep=tuple(range(1, 14))))
    small = fxslim.slim(model, (X,), plan=plan)
    smaller = fxslim.slim(small, (X,), ffn=0.5)
    both = smaller.fxslim.plan
    (part,) = both
    assert left_of(part) == 8
    assert set(part.keep) <= set(range(1, 14))
    replayed = replay(seeded(Grouped), both)
    assert difference(outputs(smaller, (X,)), outputs(replayed, (X,))) == 0
    with fxslim.masked(model, both):
        masked = outputs(model, (X,))
    assert difference(masked, outputs(smaller, (X,))) <= FLOAT32


def test_what_stays_is_checked() -> None:
    site = only(seeded(Grouped))
    with pytest.raises(ValueError, match="stay must be ascending unit numbers below 24"):
        SitePlan(site=site, keep=(1, 2), stay=(24,))
    with pytest.raises(ValueError, match="a unit is kept, or its rows stay with zero columns, not both"):
        SitePlan(site=site, keep=(1, 2), stay=(2,))
    assert SitePlan(site=site, keep=(1, 5), stay=(2,)).left == (1, 2, 5)
