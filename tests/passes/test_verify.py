"""Verification is always on and able to fail: a disturbed weight is found, and the right site is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import FxslimError, InputError, VerifyError
from fxslim.passes.verify import distance

from stacks import Attend, Feed, Stack

STACK = Stack((Feed(hidden=6), Attend(2, 2, 2), Feed(hidden=4, gates=1)))
SITES = ("layers.0:ffn", "layers.1:attention", "layers.2:gated_ffn")


def _both() -> tuple[nn.Module, nn.Module]:
    model = STACK.build()
    return model, fxslim.slim(model, STACK.inputs(), ffn=0.5, heads=0.5)


def test_what_slim_made_passes() -> None:
    model, small = _both()
    found = fxslim.verify(model, small, plan=small.fxslim.plan, example_inputs=STACK.inputs(4, 6, seed=3))
    assert 0 <= found.max_abs <= 1e-12
    assert [difference.path for difference in found.differences] == ["as given", "training"]
    assert "masked = narrowed" in str(found)


WEIGHTS = [
    ("layers.0.up.0.weight", 0),
    ("layers.0.down.weight", 0),
    ("layers.0.down.bias", 0),
    ("layers.1.q.weight", 1),
    ("layers.1.k.bias", 1),
    ("layers.1.v.weight", 1),
    ("layers.1.o.weight", 1),
    ("layers.2.up.1.weight", 2),
    ("layers.2.down.weight", 2),
]


@pytest.mark.parametrize(("weight", "site"), WEIGHTS)
def test_a_disturbed_weight_names_its_site(weight: str, site: int) -> None:
    model, small = _both()
    with torch.no_grad():
        small.get_parameter(weight).mul_(1.5).add_(0.5)
    if weight.endswith("k.bias"):  # a constant in every score cancels; one that differs per channel does not
        with torch.no_grad():
            small.get_parameter("layers.1.k.weight").add_(0.5)
    with pytest.raises(VerifyError, match=f"disagree at {SITES[site]} ") as caught:
        fxslim.verify(model, small, plan=small.fxslim.plan, example_inputs=STACK.inputs())
    error = caught.value
    assert (error.site, error.where) == (SITES[site], "as given")
    assert error.max_abs > 1e-3 > error.tolerance > 0
    assert "Leave the site out with skip=" in str(error)
    assert isinstance(error, FxslimError)


def test_what_is_wrong_outside_of_sites_is_an_output() -> None:
    model = Stack((Feed(hidden=6),), residual=False).build()
    model = nn.Sequential(model, nn.LayerNorm(4).double())
    small = fxslim.slim(model, STACK.inputs(), ffn=0.5)
    with torch.no_grad():
        small[1].weight.mul_(2)
    with pytest.raises(VerifyError, match="disagree at output ") as caught:
        fxslim.verify(model, small, plan=small.fxslim.plan, example_inputs=STACK.inputs())
    assert caught.value.site == "output"


def test_a_disturbed_graph_fails_too() -> None:
    model = STACK.build()
    graph = fxslim.compile(model, STACK.inputs(), ffn=0.5)
    with torch.no_grad():
        graph.get_parameter("layers.0.down.weight").mul_(1.01)
    with pytest.raises(VerifyError, match="masked and narrowed models disagree"):
        fxslim.verify(model, graph, plan=graph.fxslim.plan, example_inputs=STACK.inputs())


BROKEN: dict[str, Callable[[nn.Module], None]] = {
    "tiny": lambda small: small.layers[0].down.weight.mul_(1 + 1e-9),
    "nan": lambda small: small.layers[0].down.weight.fill_(float("nan")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_tolerance_is_tight_and_nan_never_passes(case: str) -> None:
    model, small = _both()
    with torch.no_grad():
        BROKEN[case](small)
    with pytest.raises(VerifyError):
        fxslim.verify(model, small, plan=small.fxslim.plan, example_inputs=STACK.inputs())


def test_a_model_that_does_not_run_is_a_difference() -> None:
    model, small = _both()
    small.layers[1].group = 2
    with pytest.raises(VerifyError) as caught:
        fxslim.verify(model, small, plan=small.fxslim.plan, example_inputs=STACK.inputs())
    assert caught.value.site == "layers.1:attention"


def test_distance() -> None:
    inf, nan = float("inf"), float("nan")
    same = torch.tensor([inf, -inf, nan, 2.0])
    assert distance([same], [same.clone()]) == (0.0, 2.0)
    assert distance([torch.tensor([1.0, -3.0])], [torch.tensor([1.5, -3.0])]) == (0.5, 3.0)
    assert distance([torch.tensor([1.0])], [torch.tensor([nan])])[0] == inf  # above every tolerance
    assert distance([torch.tensor([nan])], [torch.tensor([1.0])])[0] == inf
    assert distance([torch.tensor([inf])], [torch.tensor([-inf])])[0] == inf
    assert distance([torch.zeros(0)], [torch.zeros(0)]) == (0.0, 0.0)


# Nothing passes for want of numbers ---------------------------------------------------------------------------------


class _Output(nn.Module):
    """A feed-forward network and something done to its result."""

    def __init__(self, finish: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.finish = finish
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.down(nn.functional.gelu(self.up(x))))


def _wide(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def _lowest(y: Tensor) -> Tensor:
    return y.masked_fill(torch.arange(16) == 3, torch.finfo(y.dtype).min)


def _overflow(y: Tensor) -> Tensor:
    return torch.cat([y, (y.new_full((), 300.0) * 300.0).expand(*y.shape[:-1], 1)], -1)


def _infinite(y: Tensor) -> Tensor:
    return torch.cat([y, y.new_full((*y.shape[:-1], 1), float("-inf"))], -1)


VACUOUS: dict[str, tuple[Callable[[Tensor], Any], torch.dtype]] = {
    "the lowest number of the dtype": (_lowest, torch.float32),
    "the lowest half": (_lowest, torch.float16),
    "the lowest bfloat16": (_lowest, torch.bfloat16),
    "minus infinity": (_infinite, torch.float32),
    "overflow in half precision": (_overflow, torch.float16),
    "whole numbers": (lambda y: y.argmax(-1), torch.float32),
    "whole numbers in half precision": (lambda y: y.argmax(-1), torch.bfloat16),
    "truth values": (lambda y: y > 0, torch.float32),
    "one large output": (lambda y: (y, torch.ones(2, 5, dtype=y.dtype) * 1e6), torch.float32),
    "a large output first": (lambda y: {"scale": y.new_full((1,), 1e5), "y": y}, torch.float32),
    "complex": (lambda y: torch.fft.rfft(y), torch.float32),
}


@pytest.mark.parametrize("case", VACUOUS)
def test_outputs_that_could_hide_a_difference(case: str) -> None:
    """What is right passes; a negated weight never does."""
    finish, dtype = VACUOUS[case]
    model, x = _Output(finish, dtype), _wide(dtype)
    small: Any = fxslim.slim(model, x, ffn=0.5)
    plan = small.fxslim.plan
    assert [part.site.name for part in plan] == ["ffn"]
    assert fxslim.verify(model, small, plan=plan, example_inputs=x).differences
    small.up.weight.data.mul_(-3)
    with pytest.raises(VerifyError, match="disagree at"):
        fxslim.verify(model, small, plan=plan, example_inputs=x)


def test_a_difference_in_the_small_one_of_two_outputs() -> None:
    """Each output is held to its own scale: the large one alone would allow anything in the small one."""
    large, small = torch.full((4,), 1e6, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert distance([large, small], [large, small * 1.5]) == (0.5, 1.0)
    assert distance([large, small], [large + 0.5, small]) == (0.5, 1e6)


def test_an_empty_batch_is_no_verification() -> None:
    model, x = _Output(lambda y: y), _wide()
    plan = fxslim.plan(model, x, ffn=0.5)
    small = fxslim.slim(model, x, plan=plan)
    for call in (
        lambda: fxslim.verify(model, small, plan=plan, example_inputs=x[:0]),
        lambda: fxslim.slim(model, x[:0], plan=plan),
        lambda: fxslim.compile(model, x[:0], plan=plan),
    ):
        with pytest.raises(InputError, match="nothing could be compared: the model returned no tensor with elements"):
            call()


def test_a_model_that_returns_no_tensor_cannot_be_verified() -> None:
    model, x = _Output(lambda y: y), _wide()
    small: Any = fxslim.slim(model, x, ffn=0.5)
    model.finish = small.finish = lambda y: {"nothing": None}
    with pytest.raises(InputError, match="nothing could be compared: the model returned no tensor with elements"):
        fxslim.verify(model, small, plan=small.fxslim.plan, example_inputs=x)


def test_nothing_but_nan_is_no_verification() -> None:
    """NaN equals NaN where the masked model computes it; a model that returns nothing else was not compared."""

    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()) + (x - x + torch.inf - torch.inf)

    x = (torch.randn(2, 3, 6),)
    with pytest.raises(InputError, match="is NaN"):
        fxslim.slim(Nan(), x, ffn=0.5)
    with pytest.raises(InputError, match="is NaN"):
        fxslim.compile(Nan(), x, ffn=0.5)
