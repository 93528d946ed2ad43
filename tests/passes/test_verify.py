"""Verification is always on and able to fail: a disturbed weight is found, and the right site is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import FxslimError, VerifyError
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
    assert [difference.path for difference in found.differences] == ["as given"]
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
    assert not distance([torch.tensor([1.0])], [torch.tensor([nan])])[0] <= inf  # above every tolerance
    assert distance([torch.tensor([inf])], [torch.tensor([-inf])])[0] == inf
    assert distance([torch.zeros(0)], [torch.zeros(0)]) == (0.0, 0.0)
