"""Layers of which a part cannot be traced: the part is one operation, and everything around it is found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxslim
from fxslim.errors import InputError
from test_regions import HIDDEN, D, Feed, made, numbers, text

from agreement import EXACT, difference, outputs, random_plan


class Asking(nn.Module):
    """Mix rows as the data says, with products of its own, and hand on what it was given as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.feed = nn.Linear(D, D), nn.Linear(D, D), Feed()

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        chosen = torch.nonzero(mask.any(0))[:, 0]
        mixed = (x[:, chosen] if len(chosen) > 2 else x).mean(1, keepdim=True)
        y = self.second(self.first(mixed).tanh()) * (2 if twice else 1)
        return y.expand_as(x).clone(), None, self.feed(y)


class Layer(nn.Module):
    """A layer with two products of its own around a part that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Asking()
        self.norm = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Tensor:
        mixed, _, fed = self.attention(x, mask, twice=twice)
        x = self.norm(x + mixed)
        return x + fed.sum(1, keepdim=True) + self.down(functional.gelu(self.up(x)))


class Model(nn.Module):
    """Layers that cannot be traced whole, in a model that asks as well."""

    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mask = x.sum(-1) > 0
        for layer in self.layers:
            x = layer(x, mask, twice=bool(x.sum() > 0))
            if x.abs().max() > 1e6:
                break
        return x


@pytest.mark.parametrize("form", ["slim", "compile"])
def test_what_lies_around_an_untraced_part_is_narrowed(form: str) -> None:
    model, inputs = made(Model), (numbers(3, 5, D, seed=0),)
    found = fxslim.inspect(model, inputs)
    own = {f"layers.{n}:ffn" for n in range(2)}
    assert {site.name for site in found.sites} == own | {f"layers.{n}.attention.feed:ffn" for n in range(2)}
    assert "layers.0.attention, layers.1.attention: not traced: GuardOnDataDep" in text(found)
    plan = random_plan(model, found.sites)
    small = getattr(fxslim, form)(model, inputs, plan=plan)
    for seed, (rows, length) in enumerate([(3, 5), (3, 5), (2, 5), (1, 5), (4, 9), (2, 3)]):
        x = (numbers(rows, length, D, seed=seed),)
        with fxslim.masked(model, plan):
            expected = outputs(model, x)
        assert difference(expected, outputs(small, x)) < EXACT
        assert difference(expected, outputs(copy.deepcopy(small), x)) < EXACT
    for n, layer in enumerate(model.layers):
        assert small.layers[n].up.weight.shape[0] < layer.up.weight.shape[0]
        assert small.layers[n].attention.first.weight.shape == layer.attention.first.weight.shape


def test_both_values_of_the_option_are_seen() -> None:
    assert {bool(numbers(3, 5, D, seed=seed).sum() > 0) for seed in range(2)} == {True, False}


class Back(Asking):
    """Reads a weight of the layer around it, through no name of its own."""

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Any:
        y, none, fed = super().forward(x, mask, twice=twice)
        return y + functional.linear(x, self.around[0].up.weight).mean(-1, keepdim=True), none, fed


class Owner(Asking):
    """Owns a weight of the layer around it, and does not read it."""


class Writer(Asking):
    """Writes into what it is given."""

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Any:
        return super().forward(x.mul_(2), mask, twice=twice)


class Counter(Asking):
    """Counts its calls, and the layer reads the number."""

    count = 0

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Any:
        self.count += 1
        return super().forward(x, mask, twice=twice)


class Buffer(Asking):
    """Keeps a mean in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Any:
        self.mean.lerp_(x.mean(), 0.5)
        return super().forward(x, mask, twice=twice)


class Peeking(Asking):
    """Reads what the layer around it has left in a list."""

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Any:
        y, none, fed = super().forward(x, mask, twice=twice)
        return y + self.around[0].notes[0], none, fed


class Same(Asking):
    """Returns what it was given, where the data says so."""

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Any:
        y, none, fed = super().forward(x, mask, twice=twice)
        return (x if mask.all() else y), none, fed


class Around(Layer):
    """A layer around one of these."""

    def __init__(self, part: type[Asking]) -> None:
        super().__init__()
        self.attention = part()
        self.notes: list[Tensor] = []
        self.attention.around = [self]  # type: ignore[assignment]
        if part is Owner:
            self.attention.extra = nn.Linear(D, HIDDEN)
            self.attention.extra.weight = self.up.weight

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Tensor:
        self.notes[:] = [x.mean()]
        mixed, _, fed = self.attention(x + 0, mask)
        if isinstance(self.attention, Same):
            mixed += 1
        x = self.norm(x + mixed)
        return x + fed.sum(1, keepdim=True) + self.down(functional.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("part", "reason"), [(Back, "read outside of the traced regions"), (Owner, "also layers.0.attention.extra.weight")]
)
def test_weights_that_an_untraced_part_needs_stay(part: type[Asking], reason: str) -> None:
    model, inputs = made(lambda: Model(lambda: Around(part))), (numbers(3, 5, D, seed=0),)
    found = fxslim.inspect(model, inputs)
    assert {site.module for site in found.sites} == {f"layers.{n}.attention.feed" for n in range(2)}
    assert reason in found.why("layers.0.down")
    for narrow in (fxslim.slim, fxslim.compile):
        assert narrow(model, inputs, ffn=0.5).layers[0].up.weight.shape == (HIDDEN, D)


@pytest.mark.parametrize("part", [Writer, Counter, Buffer, Peeking, Same])
def test_a_part_that_does_more_than_compute_leaves_the_layer_untraced(part: type[Asking]) -> None:
    model, inputs = made(lambda: Model(lambda: Around(part))), (numbers(3, 5, D, seed=0),)
    found = fxslim.inspect(model, inputs)
    assert {site.module for site in found.sites} == {f"layers.{n}.attention.feed" for n in range(2)}
    for narrow in (fxslim.slim, fxslim.compile):
        small = narrow(model, inputs, ffn=0.5)
        with fxslim.masked(model, small.fxslim.plan):
            expected = outputs(copy.deepcopy(model), (numbers(2, 5, D, seed=1),))
        assert difference(expected, outputs(small, (numbers(2, 5, D, seed=1),))) < EXACT


class Lookup(nn.Module):
    """Turns whole numbers into features: what it returns looks computed from constants, and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) if int(ids.max()) > 2 else self.table(ids) * 2


class Gated(nn.Module):
    """Multiplies hidden channels with what an untraced part makes of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = Lookup()
        self.up, self.down, self.feed = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D), Feed()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.feed(x + self.down(self.up(x) * self.lookup(ids)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gated = Gated()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.gated(x, ids)
        return y if y.abs().max() < 1e6 else x


def test_what_an_untraced_part_returns_is_no_constant() -> None:
    inputs = (numbers(3, 5, D, seed=0), torch.arange(15).view(3, 5) % 7)
    found = fxslim.inspect(made(Outer), inputs)
    assert [site.module for site in found.sites] == ["gated.feed"]
    assert "comes out of gated.lookup, which cannot be traced" in found.why("gated.down")


class Fickle(Asking):
    """Returns weights where the mask is empty."""

    def forward(self, x: Tensor, mask: Tensor, *, twice: bool = False) -> Any:
        y, _, fed = super().forward(x, mask, twice=twice)
        return y, None if mask.any() else x[..., 0], fed


def test_a_part_that_returns_something_else_is_an_error_in_the_graph() -> None:
    model, inputs = made(lambda: Model(lambda: Around(Fickle))), (numbers(3, 5, D, seed=0),)
    compiled = fxslim.compile(model, inputs, ffn=0.5)
    with pytest.raises(InputError, match=r"attention, which was not traced, returns something else .* fxslim\.slim"):
        compiled(-inputs[0].abs())
