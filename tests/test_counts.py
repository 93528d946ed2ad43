"""Queries that data picks beside a count of the heads, and results that are written to their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim

from agreement import difference, outputs, random_plan

D, H, E, S = 12, 3, 4, 6


class Sparse(nn.Module):
    """Attention for the two queries of every head whose scores stand out; all others get the mean of the values."""

    def __init__(self, count: Callable[[int], Tensor] = torch.arange, *, add: bool = False) -> None:
        super().__init__()
        self.heads, self.count, self.add = H, count, add
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """(B, S, H * E) -> (B * H, S, E)"""
        return x.unflatten(-1, (self.heads, E)).transpose(1, 2).reshape(-1, x.shape[1], E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part(x)) for part in (self.q, self.k, self.v))
        best = (q @ k.mT).amax(-1).topk(2).indices
        rows = self.count(q.shape[0]).unsqueeze(-1)
        found = (q[rows, best] @ k.mT).softmax(-1) @ v
        every = v.mean(1, keepdim=True).expand(-1, x.shape[1], -1).clone()
        every = every.index_put((rows, best), found, accumulate=self.add)
        return x + self.o(every.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(-2))


def built(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.double().eval().parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 0.3, generator=generator)
    return model


def example(batch: int, length: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.parametrize("add", [False, True])
def test_what_stays_in_its_row_keeps_its_labels(add: bool) -> None:
    model = built(Sparse(add=add))
    found = fxslim.inspect(model, example(2, S, 0))
    assert [site.units for site in found.sites] == [H]
    plan = random_plan(model, found.sites, seed=1)
    forms: list[Any] = [make(model, example(2, S, 0), plan=plan) for make in (fxslim.slim, fxslim.compile)]
    for form in forms:
        assert form.fxslim.plan.zeroed == ()
        assert form.q.weight.shape == form.v.weight.shape == (2 * E, D)
        for batch, length in ((2, S), (1, 4), (3, 8)):
            given = example(batch, length, 2)
            with fxslim.masked(model, plan):
                expected = outputs(model, given)
            assert difference(expected, outputs(model, given)) > 1e-4  # the masks do something
            assert difference(expected, outputs(form, given)) < 1e-12


COUNTS: dict[str, Callable[[int], Tensor]] = {
    "from the end": lambda size: torch.arange(size - 1, -1, -1),
    "rotated": lambda size: torch.arange(size).roll(1),
    "the first again": lambda size: torch.arange(size) // 2,
}


@pytest.mark.parametrize("name", COUNTS)
def test_other_numbers_are_no_count(name: str) -> None:
    found = fxslim.inspect(built(Sparse(COUNTS[name])), example(2, S, 0))
    assert found.sites == ()
    assert [note for note in found.pinned if note.where == "o"]
