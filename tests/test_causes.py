"""What the zoo showed, each cause as a small module: found, narrowed in both forms, equal to the masked module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxslim
from fxslim.errors import VerifyError
from fxslim.passes import narrowing

from agreement import difference, outputs, random_plan

D, H, E, S = 12, 3, 4, 6


class Attention(nn.Module):
    """Plain attention with a bias on its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = H
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, E)).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = (self.split(part(x)) for part in (self.q, self.k, self.v))
        return x + self.o(((q @ k.mT / math.sqrt(E) + bias).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class LookedUp(nn.Module):
    """Biases of all heads, summed from two tables that an input of the model looks up, for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Embedding(5, H), nn.Embedding(5, H)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        bias = (self.near(places) + self.far.weight[places]).permute(0, 3, 1, 2) / 2
        for layer in self.layers:
            x = layer(x, bias)
        return x


class PerHead(Attention):
    """A matrix of its own for each head, as one parameter, multiplies the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.empty(2, H, E))

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        scores = torch.einsum("bind,snd->bnis", self.q(x).unflatten(-1, (self.heads, E)), self.kinds)
        return super().forward(x, scores[..., :1] - scores[..., 1:])


class Pieces(Attention):
    """A mask put together of ones for all heads and of a number for each place."""

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        rows, length = x.shape[0], x.shape[1]
        ones = x.new_ones(rows, self.heads, length, 1)
        rest = torch.arange(1, length, dtype=x.dtype).sin().expand(rows, self.heads, length, length - 1)
        return super().forward(x, torch.cat([ones, rest], 3))


class Half(Attention):
    """The second part of every head, which is empty, is put behind the first one again."""

    def split(self, x: Tensor) -> Tensor:
        heads = super().split(x)
        return torch.cat([heads[..., :E] * 2, heads[..., E:]], -1)


class Grid(Attention):
    """Biases of rows of a grid, from places that are repeated for every head."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        rows = (places[:, 0].unsqueeze(1).repeat(1, self.heads, 1) // 2).to(x.dtype)
        return super().forward(x, rows[..., None] * rows[..., None, :])


class Transformed(Attention):
    """Scores that a Fourier transform over places changes."""

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        mixed = torch.fft.irfft(torch.fft.rfft(self.split(self.k(x)), dim=2), dim=2, n=x.shape[1])
        v = self.split(self.v(x))
        scores = self.split(self.q(x)) @ mixed.mT
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Cast(Attention):
    """A mask of the width of nothing that is cast to the type of the residual stream."""

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        return super().forward(x, torch.ones(x.shape[1], dtype=torch.float32).type_as(x))


class Unfolded(nn.Module):
    """Patches taken apart, scaled by channels, and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(D, 10, 1), nn.Conv2d(10, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.up(x)
        windows = functional.unfold(maps, 2, stride=2).relu()
        return x + self.down(functional.fold(windows, maps.shape[-2:], 2, stride=2))


class Sampled(nn.Module):
    """Deformable attention: every place reads a few points of a map for each head; a map and its points are one row."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width, self.points = H, E, 2
        self.offsets, self.weights = nn.Linear(D, H * 2 * self.points), nn.Linear(D, H * self.points)
        self.value, self.output = nn.Linear(D, H * E), nn.Linear(H * E, D)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows = x.flatten(2).mT
        value = self.value(rows).transpose(1, 2)
        value = value.reshape(batch * self.heads, self.width, height, width)
        grid = self.offsets(rows).tanh().view(batch, -1, self.heads, self.points, 2).transpose(1, 2).flatten(0, 1)
        read = functional.grid_sample(value, grid, align_corners=False)
        weights = self.weights(rows).view(batch, -1, self.heads, self.points).softmax(-1)
        weights = weights.transpose(1, 2).reshape(batch * self.heads, 1, -1, self.points)
        mixed = (read * weights).sum(-1).view(batch, -1, height * width)
        return x + self.output(mixed.mT).mT.reshape(x.shape)


class Upsampled(nn.Module):
    """Maps that become larger on the way, by transposed convolutions, and smaller again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.larger, self.down = (
            nn.Conv2d(D, 10, 1),
            nn.ConvTranspose2d(10, 8, 2, 2),
            nn.Conv2d(8, D, 2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.larger(self.up(x).relu()).relu())


class Crossed(nn.Module):
    """Torch's own attention over three different inputs, each from a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.inner = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.q(x), self.k(x.tanh()), self.v(x.cos()), need_weights=False)[0]


class Pooled(Attention):
    """Every second place of the keys, by a pool whose other window is one wide."""

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        fewer = functional.avg_pool2d(x[:, None], (2, 1), (2, 1))[:, 0]
        q, k, v = self.split(self.q(x)), self.split(self.k(fewer)), self.split(self.v(fewer))
        return x + self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Local(Attention):
    """Attention to the places around each, which are taken as windows of keys and values that are padded with zeros."""

    def around(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.heads, E))
        zeros = heads.new_zeros(x.shape[0], 1, self.heads, E)
        return torch.cat([zeros, heads, zeros], 1).unfold(1, 3, 1)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = self.q(x).unflatten(-1, (self.heads, E)), self.around(self.k(x)), self.around(self.v(x))
        scores = torch.einsum("bshe,bshew->bshw", q, k).softmax(-1)
        return x + self.o(torch.einsum("bshw,bshew->bshe", scores, v).flatten(-2))


class Lengths(Attention):
    """Attention inside pieces of a row of places, whose lengths an input says."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        sizes = lengths.tolist()
        q, k, v = (self.split(part(x)).split(sizes, dim=2) for part in (self.q, self.k, self.v))
        made = [(one @ key.mT).softmax(-1) @ value for one, key, value in zip(q, k, v, strict=True)]
        return x + self.o(torch.cat(made, 2).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Doubled(nn.Module):
    """Places that a linear makes two of, between which the row is filled up with zeros and with its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * 8), nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.up(x).reshape(x.shape[0], 2 * x.shape[1], -1).relu()
        rows = functional.pad(functional.pad(pairs, (0, 0, 1, 0)).mT, (0, 2), mode="replicate").mT
        return self.down(rows)


class Twice(nn.Module):
    """One layer that is called twice, in which all query heads share a key and a value head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v, self.o = nn.Linear(D, 12), nn.Linear(D, 4), nn.Linear(D, 4), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.attention(x)
        return x

    def attention(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (part(x)[:, None].expand(-1, self.heads, -1, -1) for part in (self.k, self.v))
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Returned(nn.Module):
    """Attention whose weights are returned, so that heads stay, with one row that is added to the values of each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(12, D)
        self.row = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (3, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.mT).softmax(-1)
        return x + self.o((weights @ v + self.row).tanh().transpose(1, 2).flatten(-2)), weights


class OneEnd(nn.Module):
    """Two linears whose channels one and the same linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up2, self.down = nn.Linear(D, 8), nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + self.down(self.up2(x).tanh())


class Depthwise(nn.Module):
    """A squeeze and excitation inside a block whose own channels go as well."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = (
            nn.Conv2d(D, 10, 1),
            nn.Conv2d(10, 10, 3, 1, 1, groups=10),
            nn.Conv2d(10, D, 1),
        )
        self.excite = Excite()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.excite(self.depth(self.expand(x)).relu()))


class Excite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.widen = nn.Conv2d(10, 5, 1), nn.Conv2d(5, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.widen(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Unread(nn.Module):
    """A part that returns two stages, of which the first goes no further than the next part."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Stages(), nn.Conv2d(8, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.part(x)[-1])


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(D, 10, 1), nn.Conv2d(10, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x).relu()
        return first, self.second(first).relu()


def words(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


def placed(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    places = torch.randint(0, 5, (batch, length, length), generator=torch.Generator().manual_seed(seed))
    return (*words(batch, length, seed), places)


def pieces(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return (*words(batch, S, seed), torch.tensor([1, 3 - seed, 2 + seed]))


def maps(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, D, 4, 4, dtype=torch.float64, generator=generator),)


ATTENTION = ("attention 3",)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int, int], tuple[Tensor, ...]], tuple[str, ...]]] = {
    "tables that an input looks up": (LookedUp, placed, ATTENTION * 2),
    "a parameter per head": (PerHead, words, ATTENTION),
    "a mask in pieces": (Pieces, words, ATTENTION),
    "an empty part of every head": (Half, words, ATTENTION),
    "a Fourier transform": (Transformed, words, ("generic 3",)),
    "a type from elsewhere": (Cast, words, ATTENTION),
    "windows": (Unfolded, maps, ("generic 10",)),
    "maps that become larger": (Upsampled, maps, ("generic 10", "generic 8")),
    "points of a map": (Sampled, maps, ("generic 12",)),
    "a pool along places": (Pooled, words, ATTENTION),
    "windows of keys": (Local, words, ("generic 3",)),
    "lengths that an input says": (Lengths, pieces, ATTENTION),
    "a padded row": (Doubled, words, ("ffn 8",)),
    "a layer called twice": (Twice, words, ("attention 3", "generic 4")),
    "a row for every head": (Returned, words, ("generic 4",)),
    "one end of two networks": (OneEnd, words, ("ffn 8",)),
    "rows of a grid": (Grid, placed, ATTENTION),
    "a block around another": (Depthwise, maps, ("ffn 5", "generic 10")),
    "results that nobody reads": (Unread, maps, ("ffn 10", "ffn 8")),
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 0.3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_both_forms_compute_what_the_masked_module_does(name: str) -> None:
    build, inputs, sites = CASES[name]
    model = built(build)
    found = fxslim.inspect(model, inputs(2, S, 0))
    assert sorted(f"{site.kind} {site.units}" for site in found.sites) == sorted(sites)
    plan = random_plan(model, found.sites, seed=1)
    small = fxslim.slim(model, inputs(2, S, 0), plan=plan)
    graph = fxslim.compile(model, inputs(2, S, 0), plan=plan)
    assert (small.fxslim.plan.zeroed, small.fxslim.plan.spread) == ((), ())
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in graph.parameters())
    for batch, length in ((2, S), (1, 4), (3, 8)):
        given = inputs(batch, length, 2)
        with fxslim.masked(model, plan):
            expected: dict[str, Any] = outputs(model, given)
        assert difference(expected, outputs(model, given)) > 1e-4  # the masks do something
        for form in (small, graph):
            assert difference(expected, outputs(form, given)) < 1e-12


# What two sites share ------------------------------------------------------------------------------------------------


class SharedLayer(nn.Module):
    """Two feed-forward networks over channels, between whose linears stands one and the same layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(D, 8, 3, padding=1), nn.Conv1d(8, D, 1)
        self.up2, self.down2 = nn.Conv1d(D, 8, 3, padding=1), nn.Conv1d(8, D, 1)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        return self.down(self.layer(self.up(x))) + self.down2(self.layer(self.up2(x)))


class SharedBias(nn.Module):
    """Two feed-forward networks whose first linears have one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 8), nn.Linear(8, D)
        self.up2, self.down2 = nn.Linear(D, 8), nn.Linear(8, D)
        self.up2.bias = self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x))) + self.down2(functional.gelu(self.up2(x)))


def shared_convolution_bias() -> nn.Module:
    model = SharedLayer(nn.GELU())
    model.up2.bias = model.up.bias
    return model


SHARED: dict[str, Callable[[], nn.Module]] = {
    "bias": SharedBias,
    "bias of a convolution": shared_convolution_bias,
    "prelu": lambda: SharedLayer(nn.PReLU(8)),
    "batch norm": lambda: SharedLayer(nn.BatchNorm1d(8)),
    "group norm": lambda: SharedLayer(nn.GroupNorm(4, 8)),
    "depthwise convolution": lambda: SharedLayer(nn.Conv1d(8, 8, 3, padding=1, groups=8)),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_two_sites_share_is_gathered_at_each(name: str) -> None:
    """It keeps what one of the two reads; each takes its own part, or the rows stay in place."""
    model = built(SHARED[name])
    x = torch.randn(2, S, D, dtype=torch.float64)
    found = fxslim.inspect(model, (x,))
    assert len(found.sites) == 2
    plan = random_plan(model, found.sites, seed=1)
    for form in (fxslim.slim(model, (x,), plan=plan), fxslim.compile(model, (x,), plan=plan)):
        for given in (x, torch.randn(3, S + 2, D, dtype=torch.float64)):
            with fxslim.masked(model, plan):
                expected = outputs(model, (given,))
            assert difference(expected, outputs(form, (given,))) < 1e-12


# Sizes --------------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A loop over the rows of a batch, which a trace unrolls for one number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 10), nn.Linear(10, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row + self.down(self.up(row).relu()) for row in x])


def test_a_loop_over_rows_is_traced_for_their_number_and_says_so() -> None:
    model = built(Rows)
    graph: Any = fxslim.compile(model, words(2, S, 0), ffn=0.5)
    with fxslim.masked(model, graph.fxslim.plan):
        expected = outputs(model, words(2, S, 1))
    assert difference(expected, outputs(graph, words(2, S, 1))) < 1e-12
    with pytest.raises(fxslim.errors.FxslimError, match="axis 0"):
        graph(*words(3, S, 1))
    small = fxslim.slim(model, words(2, S, 0), plan=graph.fxslim.plan)
    assert small(*words(3, S, 1)).shape == (3, S, D)


# Paths --------------------------------------------------------------------------------------------------------------


class Widened(nn.Module):
    """Adds a vector in training mode whose width is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 10), nn.Linear(10, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        if self.training:
            hidden = hidden + torch.ones(10, dtype=x.dtype)
        return x + self.down(hidden)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Rows(), Widened()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def assert_same(model: nn.Module, small: Any) -> None:
    """Compare in eval and in training mode."""
    for training in (False, True):
        with fxslim.masked(model.train(training), small.fxslim.plan):
            expected = outputs(model, words(2, S, 1))
        assert difference(expected, outputs(small.train(training), words(2, S, 1))) < 1e-12


def test_a_width_that_training_mode_knows_is_spread() -> None:
    """The trace sees eval mode alone; what training mode adds is no integer of any module."""
    model = built(Two)
    small: Any = fxslim.slim(model, words(2, S, 0), ffn=0.5)
    assert (small.fxslim.plan.spread, small.fxslim.plan.zeroed) == (("second:ffn",), ())
    assert small.second.up.weight.shape == small.first.up.weight.shape == (5, D)
    assert_same(model, small)


def test_a_site_that_fails_on_one_path_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = narrowing.compare

    seen = []

    def fails(model: Any, small: Any, plan: Any, references: Any) -> Any:
        seen.append(plan.spread)
        if "first:ffn" not in plan.zeroed:
            raise VerifyError("first:ffn", 1.0, 0.0, "a path")
        return compare(model, small, plan, references)

    monkeypatch.setattr(narrowing, "compare", fails)
    model = built(Two)
    small: Any = fxslim.slim(model, words(2, S, 0), ffn=0.5)
    assert small.fxslim.plan.zeroed == ("first:ffn",)
    assert [set(names) for names in seen] == [  # quickly, thoroughly, in the linears, in place
        {"second:ffn"}, {"second:ffn"}, {"first:ffn", "second:ffn"}, {"second:ffn"},
    ]  # fmt: skip
    assert (small.first.up.weight.shape, small.second.up.weight.shape) == ((10, D), (5, D))
    reasons = {note.where: note.reason for note in small.fxslim.report.not_done}
    assert "would not compute the same on every path" in reasons["first:ffn"]
    assert_same(model, small)


def test_what_one_call_reads_with_several_inputs_is_masked_in_its_columns() -> None:
    model = built(Crossed)
    found = fxslim.inspect(model, words(2, S, 0))
    plan = random_plan(model, found.sites, seed=1)
    graph = fxslim.compile(model, words(2, S, 0), plan=plan)
    small = fxslim.slim(model, words(2, S, 0), plan=plan)
    assert any(piece.tensor == "inner.in_proj_weight" for part in plan for piece in part.site.slices)
    with fxslim.masked(model, plan):
        expected = outputs(model, words(3, 8, 2))
    for form in (small, graph):
        assert difference(expected, outputs(form, words(3, 8, 2))) < 1e-12
