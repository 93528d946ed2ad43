"""What inspect returned stands for its model: nothing is traced twice, and nothing that changed is taken as known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxslim
from fxslim.errors import InputError

from agreement import difference, outputs, random_plan

EXACT = 1e-12


class Mixer(nn.Module):
    """A layer with what a trace may depend on: a buffer, a plain tensor, a number, a function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 6)
        self.register_buffer("shift", torch.randn(16))
        self.order = torch.arange(6)
        self.scale = 2.0
        self.act = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)) + self.scale * self.shift)[..., self.order]


def built() -> tuple[Mixer, dict[str, Tensor]]:
    return Mixer().double().eval(), {"x": torch.randn(2, 5, 6, dtype=torch.float64)}


def traces(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, int]:
    """Return what a call returns, and how often it traced."""
    seen: list[str] = []

    def observer(before: Any, step: Any, after: Any, seconds: float) -> None:
        seen.append(type(step).__name__)

    return call(*args, **options, observer=observer), seen.count("Trace")


@pytest.mark.parametrize("make", [fxslim.slim, fxslim.compile])
def test_what_was_inspected_is_not_traced_again(make: Callable[..., Any]) -> None:
    model, inputs = built()
    found = fxslim.inspect(model, inputs)
    plan, count = traces(fxslim.plan, found, ffn=0.5)
    assert count == 0
    assert plan == fxslim.plan(model, inputs, ffn=0.5)
    small, count = traces(make, found, plan=plan)
    assert count == 0
    own = make(model, inputs, plan=plan)
    assert small.fxslim.plan == own.fxslim.plan
    assert small.fxslim.report.parameters_after == own.fxslim.report.parameters_after
    assert difference(outputs(own, inputs), outputs(small, inputs)) == 0
    requested, count = traces(make, found, ffn=0.5)
    assert count == 0
    assert requested.fxslim.plan.sites == plan.sites


def test_the_mode_of_the_model_does_not_matter() -> None:
    model, inputs = built()
    found = fxslim.inspect(model, inputs)
    model.train()
    assert traces(fxslim.plan, found, ffn=0.5)[1] == 0


def weight(model: Mixer, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model.up.weight.mul_(3)


def parameter(model: Mixer, inputs: dict[str, Tensor]) -> None:
    model.up.weight = nn.Parameter(model.up.weight.detach() * 3)


def buffer(model: Mixer, inputs: dict[str, Tensor]) -> None:
    model.shift.add_(1)


def plain(model: Mixer, inputs: dict[str, Tensor]) -> None:
    model.order[:] = torch.tensor([5, 4, 3, 2, 1, 0])


def number(model: Mixer, inputs: dict[str, Tensor]) -> None:
    model.scale = -1.0


def function(model: Mixer, inputs: dict[str, Tensor]) -> None:
    model.act = torch.tanh


def submodule(model: Mixer, inputs: dict[str, Tensor]) -> None:
    model.up = nn.Linear(6, 12).double()
    model.down = nn.Linear(12, 6).double()
    model.register_buffer("shift", torch.zeros(12, dtype=torch.float64))


def hook(model: Mixer, inputs: dict[str, Tensor]) -> None:
    model.up.register_forward_hook(lambda module, args, out: out + 1)


def given(model: Mixer, inputs: dict[str, Tensor]) -> None:
    inputs["x"].add_(1)


CHANGES = (weight, parameter, buffer, plain, number, function, submodule, hook, given)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_is_traced_anew(change: Callable[[Mixer, dict[str, Tensor]], None]) -> None:
    model, inputs = built()
    found = fxslim.inspect(model, inputs)
    change(model, inputs)
    plan, count = traces(fxslim.plan, found, ffn=0.5)
    assert count == 1
    graph, count = traces(fxslim.compile, found, plan=plan)
    assert count == 1
    with fxslim.masked(model, plan):
        expected = outputs(model, inputs)
    assert difference(expected, outputs(graph, inputs)) <= EXACT
    assert difference(expected, outputs(fxslim.slim(found, plan=plan), inputs)) <= EXACT


@pytest.mark.parametrize("pruned", [False, True])
def test_numbers_are_those_of_now(pruned: bool) -> None:
    """Weights that are changed past autograd, which nothing records, are part of no trace."""
    model, inputs = built()
    if pruned:
        prune.random_unstructured(model.up, "weight", amount=0.3)
    found = fxslim.inspect(model, inputs)
    plan = random_plan(model, found.sites)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.mul_(-1.5)
    with fxslim.masked(model, plan):
        expected = outputs(model, inputs)
    for make in (fxslim.slim, fxslim.compile):
        small, count = traces(make, found, plan=plan)
        assert count == pruned  # a pruned weight is a new tensor after every forward
        assert difference(expected, outputs(small, inputs)) <= EXACT


def test_narrowing_in_place_is_a_change() -> None:
    model, inputs = built()
    found = fxslim.inspect(model, inputs)
    assert fxslim.slim(found, ffn=0.5, inplace=True) is model
    again, count = traces(fxslim.plan, found, ffn=0.5)
    assert count == 1
    assert again.sites[0].site.units == 8


def test_an_inspection_is_given_alone() -> None:
    model, inputs = built()
    found = fxslim.inspect(model, inputs)
    with pytest.raises(InputError, match="stands for its model and its example inputs"):
        fxslim.slim(found, inputs, ffn=0.5)
    bare = fxslim.Inspection(sites=found.sites, pinned=found.pinned)
    with pytest.raises(InputError, match=r"was not made by fxslim\.inspect"):
        fxslim.compile(bare, ffn=0.5)


@pytest.mark.parametrize("make", [fxslim.slim, fxslim.compile])
def test_a_change_that_cannot_be_seen_is_traced_anew_when_it_shows(make: Callable[..., Any]) -> None:
    """An attribute of the class: verification fails on what was known, and the result is that of the model itself."""

    class Scaled(Mixer):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    model, inputs = Scaled().double().eval(), {"x": torch.randn(2, 5, 6, dtype=torch.float64)}
    found = fxslim.inspect(model, inputs)
    plan = random_plan(model, found.sites, seed=1)
    Scaled.factor = 3.0
    small = make(found, plan=plan)
    other = {"x": torch.randn(3, 8, 6, dtype=torch.float64)}
    with fxslim.masked(model, plan):
        expected = outputs(model, other)
    assert difference(expected, outputs(small, other)) < EXACT
