"""Data that has to stay is gathered where it meets data that may go; where that would be unsound, all of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim

from agreement import difference, outputs, random_plan

D, F, H, S = 12, 10, 3, 6
HEAD = 8


class Block(nn.Module):
    """A feed-forward layer around a residual stream that a norm ties."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Last(nn.Module):
    """No norm behind the last layer: what the head does not read, its last product need not make."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, HEAD)

    def stream(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.stream(x))


class Written(Last):
    """The stream is written in place, and read as it was before."""

    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](self.embed(x))
        before = x.clone()
        x += self.blocks[1].inner(x)
        return self.head(x), before.sum(-1)


class WrittenLater(Last):
    """What was gathered is written to behind the sum."""

    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](self.embed(x))
        total = x + self.blocks[1].inner(x)
        x.mul_(2)
        return self.head(total), x


class Gates(nn.Module):
    """One computed value, normalised, gates the channels of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.norm = nn.Linear(D, F), nn.LayerNorm(F)
        self.gates = nn.ModuleList(nn.Linear(D, F) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(F, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        side = self.norm(self.side(x))
        for gate, down in zip(self.gates, self.downs, strict=True):
            x = x + down(gate(x).tanh() * side)
        return x


class Modulated(nn.Module):
    """What a norm returns is scaled and shifted by products of a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)
        self.up, self.down = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.mix(x.mean(1, keepdim=True)).chunk(2, dim=-1)
        return x + self.down(self.up(self.norm(x) * (1 + scale) + shift).relu())


class Shared(Last):
    """The last sum is made twice, of other lengths, for one head; every row of a batch of two has its own token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(2, 1, D))

    def forward(self, x: Tensor) -> Any:
        long = torch.cat([self.token.expand(2, 1, D), self.embed(x)], 1)
        first = self.blocks[1](self.blocks[0](long))[:, 1:]
        second = self.blocks[1](self.blocks[0](long[:, 2:]))
        return self.head(first), self.head(second.mean(1))


class Heads(nn.Module):
    """A stream that is split into heads meets their values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v, gate = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x), x))
        return self.o((((q @ k.mT).softmax(-1) @ v) * gate.sigmoid()).transpose(1, 2).flatten(-2))


class Opaque(Last):
    """The stream is returned as well: pinned, and gathered for the head all the same."""

    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](self.embed(x))
        return self.head(self.blocks[1](x)), x


class Given(nn.Module):
    """The model's own input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, HEAD)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mix(x))


class Beside(Last):
    """One product reads two streams beside each other, and so does a module whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.both, self.unread = nn.Linear(D, D), nn.Linear(2 * D, HEAD), nn.Linear(2 * D, HEAD)

    def forward(self, x: Tensor) -> Any:
        x = self.stream(x)
        beside = torch.cat([self.side(x), x], -1)
        self.unread(beside)
        return self.both(beside)


class Attention(nn.Module):
    """Two predictions share keys and values, each with a mask of its own, and a bias that mixes all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.near = nn.Linear(D, H)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        inner = self.norm(x)
        q, k, v = (part(inner).unflatten(-1, (H, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = torch.stack([q, q.flip(2)], 1) @ k.mT[:, None]
        bias = self.near(inner).softmax(-1).mT[:, None, :, None]
        weights = (scores + bias.cumsum(-1) + mask).softmax(-1)
        return x + self.o((weights @ v[:, None]).sum(1).transpose(1, 2).flatten(-2))


class Masked(nn.Module):
    """One mask of predictions and heads serves two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=x.dtype).triu(1).mul(-9.0).expand(1, 2, H, length, length)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class AlsoNormed(Last):
    """A norm reads the last sum as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Any:
        x = self.stream(x)
        return self.head(x), self.norm(x).mean(-1)


class AlsoReturned(Last):
    def forward(self, x: Tensor) -> Any:
        x = self.stream(x)
        return self.head(x), x[:, 0]


class AlsoSummed(Last):
    """The head reads what the mean of all channels is taken from."""

    def forward(self, x: Tensor) -> Any:
        x = self.stream(x)
        return self.head(x - x.mean(-1, keepdim=True))


class AlsoIndexed(Last):
    """Which channel is largest is returned."""

    def forward(self, x: Tensor) -> Any:
        x = self.stream(x)
        return self.head(x), x.argmax(-1)


class BackInto(Last):
    """The last sum flows back into the stream that was gathered."""

    def forward(self, x: Tensor) -> Any:
        stream = self.stream(x)
        total = stream * self.embed(x).tanh()
        return self.head(total), self.blocks[0].norm(stream + total)


def words(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 0.3)
    return model


INNER = ("ffn 10",) * 2
LOOSE: dict[Callable[[], nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    Last: ((*INNER, "generic 12"), ("blocks.1.down.weight",)),
    Written: ((*INNER, "generic 12"), ("blocks.1.down.weight",)),
    WrittenLater: ((*INNER, "generic 12"), ("blocks.1.down.weight",)),
    Opaque: ((*INNER, "generic 12"), ("blocks.1.down.weight",)),
    Shared: ((*INNER, "generic 12"), ("blocks.1.down.weight",)),
    Given: (("generic 12",), ("mix.weight",)),
    Beside: ((*INNER, "generic 12", "generic 12"), ("blocks.1.down.weight", "side.weight")),
    Masked: (("generic 3",) * 2, ("layers.0.q.weight", "layers.1.k.weight")),
    Gates: (("generic 10",) * 2, ("gates.0.weight", "gates.1.weight")),
    Modulated: (("ffn 10", "generic 12"), ("mix.weight",)),
    Heads: (("generic 3",), ("q.weight", "k.weight", "v.weight")),
}


@pytest.mark.parametrize("build", LOOSE, ids=lambda build: build.__name__)
def test_what_stays_is_gathered_where_it_meets_what_goes(build: Callable[[], nn.Module]) -> None:
    sites, produced = LOOSE[build]
    model = built(build)
    found = fxslim.inspect(model, words(2, S, 0))
    assert sorted(f"{site.kind} {site.units}" for site in found.sites) == sorted(sites)
    plan = random_plan(model, found.sites, seed=1)
    assert set(produced) <= {piece.tensor for part in plan for piece in part.site.slices if piece.role == "out"}
    small = fxslim.slim(model, words(2, S, 0), plan=plan)
    graph = fxslim.compile(model, words(2, S, 0), plan=plan)
    assert small.fxslim.plan.zeroed == ()
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in graph.parameters())
    for batch, length in ((2, S), (2, 8)) if build is Shared else ((2, S), (1, 4), (3, 8)):
        given = words(batch, length, 2)
        with fxslim.masked(model, plan):
            expected: dict[str, Any] = outputs(model, given)
        assert difference(expected, outputs(model, given)) > 1e-4  # the masks do something
        for form in (small, graph):
            assert difference(expected, outputs(form, given)) < 1e-12


@pytest.mark.parametrize("build", [AlsoNormed, AlsoReturned, AlsoSummed, AlsoIndexed, BackInto])
def test_what_something_else_needs_as_a_whole_stays(build: Callable[[], nn.Module]) -> None:
    model = built(build)
    found = fxslim.inspect(model, words(2, S, 0))
    assert "head.weight" not in {piece.tensor for site in found.sites for piece in site.slices}, build
    assert any("head" in note.where.split(", ") for note in found.pinned)
    plan = random_plan(model, found.sites, seed=1)
    with fxslim.masked(model, plan):
        expected: dict[str, Any] = outputs(model, words(2, S, 2))
    for make in (fxslim.slim, fxslim.compile):
        small = make(model, words(2, S, 0), plan=plan)
        assert difference(expected, outputs(small, words(2, S, 2))) < 1e-12


@pytest.mark.parametrize("make", [fxslim.slim, fxslim.compile])
def test_a_stream_is_no_constant_although_what_is_added_is(make: Callable[..., Any]) -> None:
    """Rows of zeros make the last product constant, and its channels of the stream say something all the same."""
    model: Any = built(Last)
    model.blocks[1].down.weight.data[:4] = 0
    model.head.weight.data[:, 3:6] = 0
    small = make(model, words(2, S, 0))
    site = next(part for part in small.fxslim.plan if any(p.tensor == "head.weight" for p in part.site.slices))
    assert [unit for unit in range(D) if unit not in site.keep] == [3, 4, 5]
    assert difference(outputs(model, words(2, S, 2)), outputs(small, words(2, S, 2))) < 1e-12
