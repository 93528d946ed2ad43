"""Channels inside experts: how many kernels can take, and which of them go."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_mm

import fxslim
from fxslim.errors import PlanError
from fxslim.passes.narrow import replay
from fxslim.passes.prepare import fingerprint
from fxslim.plan import Plan
from fxslim.site import Site, SitePlan, units_by_group
from fxslim.text import site_lines

from agreement import difference, outputs, random_plan

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
    (site,) = (site for site in fxslim.inspect(model, (x,)).sites if site.kind != "experts")
    return site


class Picked(nn.Module):
    """Experts picked token by token, as eager models and small batches do."""

    def __init__(
        self, experts: int = 3, width: int = 8, hidden: int = 10, *, interleaved: bool = False, kind: str = ""
    ) -> None:
        super().__init__()
        self.kind, self.interleaved = kind, interleaved
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, 2 * hidden, width) / 2)
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 2)
        self.down_bias = nn.Parameter(torch.randn(experts, width))
        self.scale = nn.Parameter(torch.rand(hidden) + 1) if kind == "scale" else None
        self.shared = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width)) if kind == "shared" else None

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, chosen = torch.topk(self.router(x), 2, dim=-1)
        ids, weights = chosen.reshape(-1), weights.softmax(-1).reshape(-1, 1)
        rows = x.repeat_interleave(2, dim=0)
        mixed = torch.bmm(self.up[ids], rows.unsqueeze(-1)).squeeze(-1) + self.up_bias[ids]
        gate, up = (mixed[..., ::2], mixed[..., 1::2]) if self.interleaved else mixed.chunk(2, dim=-1)
        inner = gate.sigmoid() * (up + 1)
        if self.kind == "scale":
            inner = inner * self.scale
        if self.kind == "shuffled":
            inner = inner.flip(0)
        if self.kind == "others":
            ids = chosen.flip(-1).reshape(-1)
        if self.kind == "crossed":
            out = torch.einsum("tf,sfd->tsd", inner, self.down[ids]).mean(1)
        else:
            out = torch.bmm(inner.unsqueeze(1), self.down[ids]).squeeze(1) + self.down_bias[ids]
        out = (out * weights).view(-1, 2, shape[-1]).sum(1).reshape(shape)
        return out if self.shared is None else out + self.shared(x).reshape(shape)


def given(model: nn.Module, *parts: SitePlan) -> Plan:
    return Plan(fxslim="test", torch=torch.__version__, fingerprint=fingerprint(model), sites=parts)


def agree(model: Any, plan: Plan, x: Tensor = X, tolerance: float = FLOAT32) -> tuple[Any, Any]:
    """Narrow in both forms, compare with the masked model in several sizes, and return both."""
    made = fxslim.slim(model, (x,), plan=plan), fxslim.compile(model, (x,), plan=plan)
    hidden = fxslim.compile(model, (x,), plan=plan, narrow=False)
    seen = 0.0
    for batch, length in ((2, 5), (3, 4), (5, 1)):
        own = torch.randn(batch, length, x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(batch))
        with fxslim.masked(model, plan):
            expected = outputs(model, (own,))
        seen = max(seen, difference(expected, outputs(model, (own,))))
        for small in (*made, hidden):
            assert difference(expected, outputs(small, (own,))) <= tolerance
    assert seen > 1e-3  # the masks do something
    return made


# What kernels can take ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "multiple"), [(24, 8), (12, 4), (16, 8)])
def test_grouped_products_want_a_multiple(hidden: int, multiple: int) -> None:
    assert only(seeded(Grouped, hidden=hidden)).multiple == multiple
    assert only(seeded(Picked, dtype=torch.float64), D).multiple == 1


def test_what_is_chosen_is_rounded_up_to_it() -> None:
    model = seeded(Grouped)
    (part,) = fxslim.plan(model, (X,), ffn=0.5)
    assert kept(part) == [16] * 4  # of 12
    assert not fxslim.plan(model, (X,), ffn=0.3, round_to=5).sites
    small = fxslim.slim(model, (X,), ffn=0.5)
    assert small.down.shape == (4, 8, 16)
    assert small.fxslim.plan.zeroed == ()


def kept(part: SitePlan) -> list[int]:
    """Return how many channels are left of every expert."""
    groups = np.asarray(part.site.groups)[list(part.left)]
    return np.bincount(groups, minlength=part.site.group_count).tolist()


def drawn(site: Site, count: int) -> tuple[int, ...]:
    """Return units to keep, as many of every expert."""
    generator = np.random.default_rng(0)
    every = [generator.permutation(units)[:count] for units in units_by_group(site)]
    return tuple(sorted(np.concatenate(every).tolist()))


def test_another_number_is_filled_up_with_zero_columns() -> None:
    model = seeded(Grouped)
    keep = drawn(only(model), 13)
    plan = given(model, SitePlan(site=only(model), keep=keep))
    slim, graph = agree(model, plan)
    for small in (slim, graph):
        (part,) = small.fxslim.plan
        assert (part.keep, len(part.stay), kept(part)) == (keep, 4 * 3, [16] * 4)
        assert small.fxslim.plan.zeroed == ()
        assert small.get_parameter("down").shape == (4, 8, 16)
        assert (small.get_parameter("down") == 0).all(dim=1).sum(dim=1).tolist() == [3] * 4
        said = "rows of 3 more channels of every expert stay, with zero columns: its grouped products need a multiple"
        assert f"{said} of 8" in str(small.fxslim.report)
    assert sum(p.numel() for p in slim.parameters()) == sum(p.numel() for p in model.parameters()) - 4 * 8 * 3 * 8
    again = Plan.from_json(slim.fxslim.plan.to_json())
    assert again == slim.fxslim.plan
    copy = replay(seeded(Grouped), again)
    assert all(torch.equal(a, b) for a, b in zip(copy.state_dict().values(), slim.state_dict().values(), strict=True))
    assert difference(outputs(slim, (X,)), outputs(fxslim.slim(model, (X,), plan=again), (X,))) == 0


def test_a_plan_on_top_of_a_filled_one() -> None:
    model = seeded(Grouped)
    keep = drawn(only(model), 13)
    small = fxslim.slim(model, (X,), plan=given(model, SitePlan(site=only(model), keep=keep)))
    smaller = fxslim.slim(small, (X,), ffn=0.5)
    both = smaller.fxslim.plan
    (part,) = both
    assert kept(part) == [8] * 4
    assert set(part.keep) <= set(keep)
    assert difference(outputs(smaller, (X,)), outputs(replay(seeded(Grouped), both), (X,))) == 0
    with fxslim.masked(model, both):
        masked = outputs(model, (X,))
    assert difference(masked, outputs(smaller, (X,))) <= FLOAT32


def test_what_stays_is_checked() -> None:
    site = only(seeded(Grouped))
    with pytest.raises(ValueError, match="stay must be ascending unit numbers below 96"):
        SitePlan(site=site, keep=(1, 2), stay=(96,))
    with pytest.raises(ValueError, match="a unit is kept, or its rows stay with zero columns, not both"):
        SitePlan(site=site, keep=(1, 2), stay=(2,))
    assert SitePlan(site=site, keep=(1, 25, 49, 73), stay=(2, 26, 50, 74)).left == (1, 2, 25, 26, 49, 50, 73, 74)


# Channels of every expert -------------------------------------------------------------------------------------------

D = X.double()


def test_sites_count_channels_per_expert() -> None:
    site = only(seeded(Picked, dtype=torch.float64), D)
    assert site_lines([site]) == [
        "gated_ffn [30 units in 3 groups]",
        "  out up.1 (20): 10x1@0+1 10x1@10+1 of each of 3 in dimension 0",
        "  out up_bias.1 (20): 10x1@0+1 10x1@10+1 of each of 3 in dimension 0",
        "  in  down.1 (10): 10x1@0+1 of each of 3 in dimension 0",
    ]
    assert site.groups == tuple(unit // 10 for unit in range(30))


@pytest.mark.parametrize(
    "options", [{}, {"interleaved": True}, {"kind": "shared"}], ids=["split", "every second", "shared"]
)
def test_every_expert_loses_channels_of_its_own(options: dict[str, Any]) -> None:
    model = seeded(Picked, dtype=torch.float64, **options)
    found = fxslim.inspect(model, (D,))
    plan = random_plan(model, tuple(site for site in found.sites if site.kind != "experts"))
    part = next(p for p in plan if p.site.groups_stay)
    assert kept(part) == [6] * 3
    assert len({tuple(unit - 10 * e for unit in part.keep if unit // 10 == e) for e in range(3)}) == 3
    made = agree(model, plan, D, 1e-12)
    for small in made:
        assert small.fxslim.plan.zeroed == ()
        assert tuple(small.get_parameter("up").shape) == (3, 12, 8)
        assert tuple(small.get_parameter("down").shape) == (3, 6, 8)
        gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        assert gone == 3 * 4 * (2 * 8 + 2 + 8) + (2 * (8 + 1 + 8) if options == {"kind": "shared"} else 0)
    rows = part.keep[:6]
    if not options:
        assert torch.equal(made[0].down[0], model.down[0, list(rows)])
    again = Plan.from_json(made[0].fxslim.plan.to_json())
    copy = replay(seeded(Picked, dtype=torch.float64, **options), again)
    assert difference(outputs(made[0], (D,)), outputs(copy, (D,))) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_experts_lose_channels_of_their_own(bias: bool) -> None:
    model = seeded(Grouped, bias=bias)
    plan = random_plan(model, (only(model),))
    assert kept(plan.sites[0]) == [8] * 4
    agree(model, plan)


@pytest.mark.parametrize("kind", ["scale", "shuffled", "others", "crossed"])
def test_what_is_not_read_one_expert_at_a_time_goes_alike_in_all_of_them(kind: str) -> None:
    """A scale of all experts, rows or numbers in another order, every row times every expert."""
    model = seeded(Picked, dtype=torch.float64, kind=kind)
    site = only(model, D)
    assert (site.units, site.groups, site.groups_stay) == (10, None, False)
    agree(model, random_plan(model, (site,)), D, 1e-12)


def test_the_worst_channels_of_every_expert_go() -> None:
    model = seeded(Picked, dtype=torch.float64)
    with torch.no_grad():
        for expert, channels in enumerate([(0, 1, 2), (3, 4, 5), (0, 5, 9)]):
            for channel in channels:
                model.down[expert, channel] *= 1e-3
                model.up[expert, [channel, channel + 10]] *= 1e-3
                model.up_bias[expert, [channel, channel + 10]] *= 1e-3
    (part,) = fxslim.plan(model, (D,), ffn=0.3)
    gone = sorted(set(range(30)) - set(part.keep))
    assert gone == [0, 1, 2, 13, 14, 15, 20, 25, 29]


def test_lossless_takes_as_many_zero_channels_of_every_expert_as_the_poorest_has() -> None:
    model = seeded(Picked, dtype=torch.float64)
    with torch.no_grad():
        for expert, channels in enumerate([(0, 1, 2), (3, 4), (0, 5, 7, 9)]):
            model.down[expert, list(channels)] = 0
    small = fxslim.slim(model, (D,))
    assert kept(small.fxslim.plan.sites[0]) == [8] * 3
    assert difference(outputs(model, (D,)), outputs(small, (D,))) <= 1e-12
    assert "3 zero channels stay: every expert keeps the same number of channels" in str(small.fxslim.report)
    with torch.no_grad():
        model.down.zero_()
    assert kept(fxslim.plan(model, (D,)).sites[0]) == [1] * 3


def test_no_expert_goes_as_a_whole_with_its_channels() -> None:
    site = only(seeded(Picked, dtype=torch.float64), D)
    with pytest.raises(ValueError, match="no group may go as a whole"):
        SitePlan(site=site, keep=tuple(range(10)))
    with pytest.raises(ValueError, match="every group that stays must keep the same number of units"):
        SitePlan(site=site, keep=(0, 1, 10, 11, 20))


def test_a_plan_fits_models_with_as_many_experts() -> None:
    model = seeded(Picked, dtype=torch.float64)
    plan = random_plan(model, (only(model, D),))
    with pytest.raises(PlanError, match=r"expects up to have 3 experts in dimension 0, but its shape is \(4, 20, 8\)"):
        replay(seeded(Picked, 4), plan)


def test_channels_of_a_narrowed_model_go_again() -> None:
    model = seeded(Picked, dtype=torch.float64)
    small = fxslim.slim(model, (D,), plan=random_plan(model, (only(model, D),)))
    smaller = fxslim.slim(small, (D,), ffn=0.5)
    both = smaller.fxslim.plan
    assert kept(both.sites[0]) == [3] * 3
    with fxslim.masked(model, both):
        assert difference(outputs(model, (D,)), outputs(smaller, (D,))) <= 1e-12


# Models of transformers ---------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


@functools.cache
def built(name: str, experts: str = "") -> Any:
    import transformers

    more = {"Mixtral": {"num_local_experts": 4}, "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 16},
            "GptOss": {"num_local_experts": 4, "head_dim": 8}}[name]  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    if experts:
        model.set_experts_implementation(experts)
        model.double()
    return model


@pytest.mark.parametrize(("name", "experts"), [("Mixtral", ""), ("Qwen2Moe", "batched_mm"), ("GptOss", "batched_mm")])
def test_models_lose_channels_per_expert(name: str, experts: str) -> None:
    model = built(name, experts)
    sites = [site for site in fxslim.inspect(model).sites if site.kind != "experts" and site.groups_stay]
    assert [site.kind for site in sites] == ["gated_ffn"]
    plan = random_plan(model, tuple(sites))
    small, graph = fxslim.slim(model, plan=plan), fxslim.compile(model, plan=plan)
    assert small.fxslim.plan.zeroed == ()
    for length in (7, 4):
        ids = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(length))
        with fxslim.masked(model, plan):
            expected = outputs(model, {"input_ids": ids, "use_cache": False})
        for made in (small, graph):
            found = outputs(made, {"input_ids": ids, "use_cache": False})
            assert difference(expected, found) <= (1e-6 if experts else FLOAT32)
