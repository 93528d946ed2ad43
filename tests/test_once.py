"""Models share a trace in these tests only where nothing that a trace may depend on differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.passes import planning

from architectures import ARCHITECTURES
from once import one_trace_each


class Halves(nn.Module):
    def __init__(self, times: float = 2.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.times = times
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()) * self.times + self.shift


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the models that are really traced."""
    from fxslim.trace import trace

    made: list[Any] = []

    def noting(model: nn.Module, *candidates: Any, **options: Any) -> Any:
        made.append(model)
        return trace(model, *candidates, **options)

    monkeypatch.setattr(planning, "trace", noting)
    return made


def example() -> dict[str, torch.Tensor]:
    return {"x": torch.arange(8.0).reshape(2, 4)}


def test_other_weights_share_a_trace_and_keep_their_own_numbers(traces: list[Any]) -> None:
    with one_trace_each():
        for _ in range(3):
            model = Halves()
            small = fxslim.compile(model, example(), ffn=0.5)
            x = torch.randn(3, 4)
            with torch.no_grad(), fxslim.masked(model, small.fxslim.plan):
                assert torch.allclose(small(x), model(x), atol=1e-5)
    assert len(traces) == 2  # the model, and what `follow` makes of it in another dtype


def test_models_of_transformers_share_a_trace(traces: list[Any]) -> None:
    with one_trace_each():
        found = [fxslim.inspect(ARCHITECTURES["bert"].build(torch.float32)).sites for _ in range(2)]
    assert len(traces) == 1
    assert found[0] == found[1]


def _hook(model: Halves) -> None:
    model.up.register_forward_hook(lambda module, args, out: out * 2)


def _other_buffer(model: Halves) -> None:
    with torch.no_grad():
        model.shift.fill_(2)


def _other_activation(model: Halves) -> None:
    model.forward = lambda x: model.down(model.up(x).tanh())  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Halves], object]] = {
    "an attribute": lambda model: setattr(model, "times", 3.0),
    "a hook": _hook,
    "a buffer's numbers": _other_buffer,
    "another forward": _other_activation,
    "a dtype": lambda model: model.double(),
    "a frozen weight": lambda model: model.up.weight.requires_grad_(requires_grad=False),
    "a class": lambda model: setattr(model, "__class__", type("Halves", (Halves,), {})),
    "a module more": lambda model: model.add_module("more", nn.Identity()),
    "a list of numbers": lambda model: setattr(model, "sizes", [1, 2]),
    "an object of its own": lambda model: setattr(model, "thing", object()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_differs_is_traced_again(what: str, traces: list[Any]) -> None:
    model = Halves()
    other = copy.deepcopy(model)
    CHANGES[what](other)
    given = {name: tensor.to(next(other.parameters()).dtype) for name, tensor in example().items()}
    with one_trace_each():
        fxslim.inspect(model, example())
        fxslim.inspect(other, given)
    assert len(traces) == 2


def test_a_class_that_has_changed_is_traced_again(traces: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with one_trace_each():
        fxslim.inspect(Halves(), example())
        monkeypatch.setattr(Halves, "sign", -1, raising=False)
        fxslim.inspect(Halves(), example())
        monkeypatch.setattr(Halves, "forward", lambda self, x: self.down(self.up(x).tanh()))
        fxslim.inspect(Halves(), example())
    assert len(traces) == 3


@pytest.mark.parametrize("mode", [torch.inference_mode, partial(torch.autocast, "cpu"), torch.no_grad])
def test_what_is_switched_on_counts(mode: Callable[[], AbstractContextManager[Any]], traces: list[Any]) -> None:
    model = Halves()
    with one_trace_each():
        fxslim.inspect(model, example())
        with mode():
            fxslim.inspect(model, example())
    assert len(traces) == 2


def test_inputs_and_constants_are_nobody_elses(traces: list[Any]) -> None:
    class Shifted(Halves):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.ones(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.more

    first, second, inputs = Shifted(), Shifted(), example()
    with one_trace_each():
        fxslim.inspect(first, inputs)
        first.more.fill_(100)
        inputs["x"].fill_(100)
        small = fxslim.compile(second, example())
        x = torch.randn(3, 4)
        with torch.no_grad():
            assert torch.allclose(small(x), second(x), atol=1e-5)


def test_what_may_change_unseen_is_traced_every_time(traces: list[Any]) -> None:
    model = Halves()
    model.options = SimpleNamespace(times=1)  # type: ignore[assignment]
    with one_trace_each():
        fxslim.inspect(model, example())
        fxslim.inspect(model, example())
    assert len(traces) == 2


def test_other_inputs_are_traced_again(traces: list[Any]) -> None:
    model = Halves()
    with one_trace_each():
        fxslim.inspect(model, example())
        fxslim.inspect(model, example())
        fxslim.inspect(model, {"x": torch.ones(2, 4)})
        fxslim.inspect(model, {"x": torch.ones(2, 3, 4)})
    assert len(traces) == 3
