"""Each hard construct as a small module of its own: named, narrowed in both forms, equal to the masked module."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxslim

from agreement import difference, outputs, random_plan

WIDTH, HEADS, HEAD, HIDDEN = 12, 3, 4, 10
INNER = HEADS * HEAD


class Attention(nn.Module):
    """Plain attention; constructs change a step of it."""

    def __init__(self, heads: int = HEADS, inner: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * HEAD if inner is None else inner
        self.q, self.k, self.v = (nn.Linear(WIDTH, inner) for _ in range(3))
        self.o = nn.Linear(inner, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, HEAD)).transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / math.sqrt(HEAD)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.weights(self.scores(q, k)) @ v).transpose(1, 2).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.mixed(*(self.split(part(x)) for part in (self.q, self.k, self.v))))


class Biased(Attention):
    """Take a bias for every head from outside."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (self.split(part(x)) for part in (self.q, self.k, self.v))
        return x + self.o(((self.scores(q, k) + bias).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class SharedBias(nn.Module):
    """A table of relative positions, looked up once for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, HEADS)
        self.layers = nn.ModuleList(Biased() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        bias = self.table((position[:, None] - position).clamp(-3, 3) + 3).permute(2, 0, 1)[None]
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Slopes(nn.Module):
    """Slopes that follow from the number of heads, and are not to be recomputed from fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.layers = nn.ModuleList(Biased() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(self.heads)], dtype=x.dtype)
        bias = slopes[:, None, None] * torch.arange(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return x


class OwnSlopes(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(self.heads)], dtype=q.dtype)
        return super().scores(q, k) + slopes[:, None, None] * torch.arange(k.shape[-2])


class Temperature(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT * self.scale.clamp(max=2).exp()


class Sinks(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def weights(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


class HeadNorms(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.LayerNorm(HEAD)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.q_norm(q), self.k_norm(k))


class WholeNorms(Attention):
    """Queries are normalised over all heads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(INNER)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in (self.norm(self.q(x)), self.k(x), self.v(x)))
        return x + self.o(self.heard(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))

    def heard(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.weights(self.scores(q, k)) @ v


class WholeNormsEinsum(WholeNorms):
    def heard(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhst,bhte->bhse", self.weights(self.scores(q, k)), v)


class WholeNormsKernel(WholeNorms):
    def heard(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)


class MultiQuery(nn.Module):
    """One key and value for all heads, behind the queries in one linear, taken by lists of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.o = nn.Linear(WIDTH, (HEADS + 2) * HEAD), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).view(*x.shape[:2], self.heads + 2, HEAD)
        q, k, v = (part.transpose(1, 2) for part in (fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]))
        mixed = (q @ k.mT).softmax(-1) @ v
        return x + self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], self.heads * HEAD))


class Grouped(nn.Module):
    """Groups of queries, a key and a value, side by side in one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.heads = 2, 6
        self.qkv, self.o = nn.Linear(WIDTH, 2 * 5 * HEAD), nn.Linear(6 * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        each = self.heads // self.groups
        fused = self.qkv(x).view(*x.shape[:2], self.groups, each + 2, HEAD)
        q, k, v = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        k, v = (part.expand(-1, -1, -1, each, -1) for part in (k, v))
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(mixed.transpose(1, 2).flatten(-2))


class BatchTimesHeads(Attention):
    """Batch and heads in one axis, whose size all views share, and a bias that is added in the product."""

    def forward(self, x: Tensor) -> Tensor:
        many, length = x.shape[0] * self.heads, x.shape[1]
        bias = (torch.arange(self.heads, dtype=x.dtype)[:, None, None] * torch.arange(length)).repeat(x.shape[0], 1, 1)
        q, k, v = (self.split(part(x)).reshape(many, length, HEAD) for part in (self.q, self.k, self.v))
        mixed = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.3).softmax(-1) @ v
        mixed = mixed.view(x.shape[0], self.heads, length, HEAD)
        return x + self.o(mixed.transpose(1, 2).reshape(x.shape[0], length, self.heads * HEAD))


class Blocks(nn.Module):
    """A fused projection in two blocks, each with queries, values and keys of its heads; the number is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qvk, self.o = nn.Linear(WIDTH, 3 * 4 * HEAD), nn.Linear(4 * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.qvk(x).reshape(*x.shape[:2], 2, -1)
        parts = torch.split(blocks, HEAD * self.heads // 2, dim=-1)
        q, v, k = (part.reshape(*x.shape[:2], self.heads, HEAD).transpose(1, 2) for part in parts)
        mixed = (q @ k.mT).softmax(-1) @ v
        return x + self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class Latent(nn.Module):
    """Keys and values from a small space; a key for positions that all heads share; both written into one tensor."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.heads, self.write = HEADS, write
        self.q, self.down = nn.Linear(WIDTH, HEADS * (HEAD + 2)), nn.Linear(WIDTH, 5 + 2)
        self.up, self.o = nn.Linear(5, HEADS * 2 * HEAD), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        small, place = self.down(x).split([5, 2], -1)
        q = self.q(x).view(*x.shape[:2], self.heads, HEAD + 2).transpose(1, 2)
        k, v = self.up(small).view(*x.shape[:2], self.heads, 2 * HEAD).transpose(1, 2).chunk(2, -1)
        place = place[:, None].expand(-1, self.heads, -1, -1)
        if self.write:
            both = q.new_empty(q.shape)
            both[..., :HEAD], both[..., HEAD:] = k, place
        else:
            both = torch.cat([k, place], -1)
        mixed = (q @ both.mT).softmax(-1) @ v
        return x + self.o(mixed.transpose(1, 2).flatten(-2))


class Gated(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part(x)) for part in (self.q, self.k, self.v))
        return x + self.o(self.mixed(q, k, v) * self.gate(x).sigmoid())


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class Shared(nn.Module):
    """One layer, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.feed(self.attention(x))
        return x


class Cross(Attention):
    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(1)[:, ::2] * 0.5
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        return x + self.o(self.mixed(q, k, v))


class Front(nn.Module):
    """Convolutions along the sequence, then linears, then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(WIDTH, 8, 3, padding=1), nn.Conv1d(8, WIDTH, 3, padding=1)
        self.feed, self.attention = Feed(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.second(functional.gelu(self.first(x.mT)))).mT
        return self.attention(self.feed(h))


class Pool(Attention):
    """A learned probe asks for the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.repeat(x.shape[0], 1, 1)
        return self.o(self.mixed(self.split(self.q(probe)), self.split(self.k(x)), self.split(self.v(x))))


class Experts(nn.Module):
    """Every token picks the matrices of one expert; gate and up channels are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up, self.bias = nn.Parameter(torch.randn(4, WIDTH, 2 * HIDDEN)), nn.Parameter(torch.randn(4, 2 * HIDDEN))
        self.down = nn.Parameter(torch.randn(4, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, expert = self.router(rows).softmax(-1).topk(1)
        expert = expert[:, 0]
        both = torch.bmm(rows[:, None], self.up[expert])[:, 0] + self.bias[expert]
        gate, up = both[..., ::2], both[..., 1::2]
        made = torch.bmm((functional.silu(gate) * up)[:, None], self.down[expert])[:, 0]
        return x + (made * weight).view(x.shape)


class Windows(Attention):
    """Attention inside shifted windows, with a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, HEADS))
        position = torch.arange(4)
        self.register_buffer("index", position[:, None] - position + 3)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)  # type: ignore[operator]
        return super().scores(q, k) + bias[None]

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = x[:, :4].roll(-1, 1).repeat(1, 2, 1).view(batch * 2, 4, WIDTH)
        return super().forward(x).view(batch, 8, WIDTH).roll(1, 1)


class Relative(Attention):
    """Scores against projected relative positions, gathered per query."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(7, WIDTH))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        many, length = q.shape[0] * self.heads, q.shape[2]
        place = self.k(self.places).view(7, self.heads, HEAD).transpose(0, 1).repeat(q.shape[0], 1, 1)
        position = torch.arange(length)
        index = ((position[:, None] - position).clamp(-3, 3) + 3).expand(many, length, length)
        extra = torch.gather(q.reshape(many, length, HEAD) @ place.mT, -1, index)
        return super().scores(q, k) + extra.view(q.shape[0], self.heads, length, length)


@dataclass(frozen=True)
class Case:
    """A construct: how to build it, ``kind units[/groups]`` of its sites, the edits it needs, what is spread."""

    build: Callable[[], nn.Module]
    sites: tuple[str, ...]
    edits: tuple[str, ...] = ("attribute heads",)
    spread: int = 0


GATHERED = ("attribute heads", "gather bias")
SPREAD = ("spread output", "spread input")
CASES: dict[str, Case] = {
    "a bias that layers share": Case(SharedBias, ("attention 3", "attention 3"), GATHERED),
    "slopes from outside": Case(Slopes, ("attention 3", "attention 3"), GATHERED),
    "slopes of its own": Case(OwnSlopes, ("attention 3",), SPREAD, 1),
    "a temperature per head": Case(Temperature, ("attention 3",)),
    "sinks": Case(Sinks, ("attention 3",)),
    "norms over a head": Case(HeadNorms, ("attention 3",)),
    "a norm over all heads": Case(WholeNorms, ("generic 12/3",), SPREAD, 1),
    "multi-query by indices": Case(MultiQuery, ("attention 3",)),
    "fused groups": Case(Grouped, ("attention 6/2",)),
    "batch times heads": Case(BatchTimesHeads, ("attention 3",), SPREAD, 1),
    "blocks": Case(Blocks, ("attention 4/2",)),
    "latent keys, written": Case(lambda: Latent(True), ("generic 5", "attention 3"), ("attribute heads", *SPREAD), 1),
    "latent keys, joined": Case(lambda: Latent(False), ("generic 5", "attention 3"), ("attribute heads", *SPREAD), 1),
    "a gated output": Case(Gated, ("attention 3",)),
    "a shared layer": Case(Shared, ("attention 3", "ffn 10")),
    "cross attention": Case(Cross, ("attention 3",)),
    "a convolutional front": Case(Front, ("generic 8", "ffn 10", "attention 3")),
    "a probe": Case(Pool, ("attention 3",)),
    "experts": Case(Experts, ("experts 4", "gated_ffn 40/4"), ()),
    "windows": Case(Windows, ("attention 3",)),
    "relative positions": Case(Relative, ("attention 3",)),
}


def built(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.build().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 0.3)
    return model


def example(batch: int, length: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.parametrize("name", CASES)
def test_both_forms_compute_what_the_masked_module_does(name: str) -> None:
    case = CASES[name]
    model = built(case)
    found = fxslim.inspect(model, example(2, 7, 0))
    written = [f"{s.kind} {s.units}" + (f"/{s.group_count}" if s.groups is not None else "") for s in found.sites]
    assert written == list(case.sites)
    plan = random_plan(model, found.sites, seed=1)
    small = fxslim.slim(model, example(2, 7, 0), plan=plan)
    graph = fxslim.compile(model, example(2, 7, 0), plan=plan)
    narrowed = small.fxslim.plan
    assert {f"{edit.edit} {edit.name}" for edit in narrowed.edits} == set(case.edits)
    assert (len(narrowed.spread), narrowed.zeroed) == (case.spread, ())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for seed, (batch, length) in enumerate(((1, 5), (4, 9))):
        given = example(batch, length, seed)
        with fxslim.masked(model, plan):
            expected: dict[str, Any] = outputs(model, given)
        assert difference(expected, outputs(model, given)) > 1e-3  # the masks do something
        for form in (small, graph):
            assert difference(expected, outputs(form, given)) < 1e-12


def test_a_norm_over_all_heads_says_so_and_offers_value_channels() -> None:
    model = built(CASES["a norm over all heads"])
    reason = "its heads all go together (tied by aten.rms_norm.default in norm); value= takes value channels"
    found = fxslim.inspect(model, example(2, 7, 0))
    assert reason in [note.reason for note in found.pinned]
    (site,) = found.sites
    assert site.roles == {"v": ("v.weight",), "out": ("o.weight",)}
    graph = fxslim.compile(model, example(2, 7, 0), value=0.5, heads=0.5)
    (part,) = graph.fxslim.plan.sites
    assert [sum(unit // HEAD == head for unit in part.keep) for head in range(HEADS)] == [2, 2, 2]
    assert [(note.where, note.reason) for note in graph.fxslim.report.not_done] == [(site.name, reason)]
    assert graph.v.weight.shape == (HEADS * 2, WIDTH)
    nothing = fxslim.plan(model, example(2, 7, 0), heads=0.5)
    assert nothing.sites == ()
    few = fxslim.plan(model, example(2, 7, 0), value=0.1)
    assert "value=0.1 of 4 channels is less than one" in [note.reason for note in few.notes]


@pytest.mark.parametrize("form", [WholeNorms, WholeNormsEinsum, WholeNormsKernel])
def test_a_head_that_is_not_heard_goes_where_a_norm_ties_all_heads(form: Callable[[], nn.Module]) -> None:
    """Its queries and keys stay for the norm; the graph leaves its attention weights out of the product."""
    model = built(Case(form, ()))
    with torch.no_grad():
        model.o.weight[:, HEAD : 2 * HEAD] = 0  # type: ignore[union-attr, index]
    graph = fxslim.compile(model, example(2, 7, 0))
    assert (graph.v.weight.shape, graph.q.weight.shape) == ((INNER - HEAD, WIDTH), (INNER, WIDTH))
    assert difference(outputs(model, example(4, 9, 1)), outputs(graph, example(4, 9, 1))) < 1e-12


def test_value_channels_where_heads_can_go_are_not_offered() -> None:
    plan = fxslim.plan(built(CASES["sinks"]), example(2, 7, 0), value=0.5)
    assert plan.sites == ()
    assert {note.reason for note in plan.notes} == {
        "no attention was found whose value channels can go by themselves",
    } | {note.reason for note in plan.notes if note.where != "value"}


def test_channels_of_experts_leave_the_experts() -> None:
    """Experts themselves stay unless they are asked for."""
    graph = fxslim.compile(built(CASES["experts"]), example(2, 7, 0), ffn=0.5)
    assert graph.up.shape == (4, WIDTH, HIDDEN)
    assert graph.bias.shape == (4, HIDDEN)
    assert graph.down.shape == (4, HIDDEN // 2, WIDTH)
