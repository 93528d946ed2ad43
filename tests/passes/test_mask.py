"""Masks: on the consumers' inputs while the context is open, and gone without a trace afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxslim
from fxslim.errors import InputError, PlanError
from fxslim.passes.mask import masked
from fxslim.passes.narrow import narrowed_copy
from fxslim.plan import Plan
from fxslim.site import SitePlan

from stacks import Feed, Stack

STACK = Stack((Feed(hidden=6, activation="sigmoid"), Feed(hidden=3)))
KEEP = (1, 4)


def _plan(model: nn.Module, *, hooks: bool = True) -> Plan:
    site = fxslim.inspect(model, STACK.inputs()).sites[0]
    if not hooks:
        slices = tuple(piece.model_copy(update={"hook": None}) for piece in site.slices)
        site = site.model_copy(update={"slices": slices})
    return fxslim.plan(model, STACK.inputs()).model_copy(update={"sites": (SitePlan(site=site, keep=KEEP),)})


def _by_hand(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.layers[0].down.weight[:, [0, 2, 3, 5]] = 0
    return made


@pytest.mark.parametrize("hooks", [True, False])
def test_a_mask_is_a_zero_column(hooks: bool) -> None:
    """Whether the input is masked by a hook, or the columns are zeroed for the time being."""
    model, x = STACK.build(), STACK.inputs(3, 4, seed=1)
    with torch.no_grad(), masked(model, _plan(model, hooks=hooks)) as same:
        assert same is model
        assert float((model(x) - _by_hand(model)(x)).abs().max()) < 1e-14


@pytest.mark.parametrize("hooks", [True, False])
def test_nothing_is_left_afterwards_even_after_an_error(hooks: bool) -> None:
    model, x = STACK.build(), STACK.inputs()
    before, dense = copy.deepcopy(model.state_dict()), model(x)
    plan = _plan(model, hooks=hooks)
    with pytest.raises(RuntimeError, match="inside"), masked(model, plan):
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(x), dense)


def test_masked_infinities_are_gone() -> None:
    """0 * inf would be NaN: values are filled, not multiplied."""
    model, x = STACK.build(), STACK.inputs()
    with torch.no_grad():
        model.layers[0].up[0].bias[0] = float("nan")
        with masked(model, _plan(STACK.build())):
            assert bool(model(x).isfinite().all())
        assert not bool(model(x).isfinite().all())


def test_gradients_flow_to_what_is_kept_alone() -> None:
    model, x = STACK.build(), STACK.inputs()
    with masked(model, _plan(model)):
        model(x).sum().backward()
    grad = model.layers[0].up[0].weight.grad
    assert grad[[0, 2, 3, 5]].count_nonzero() == 0
    assert grad[list(KEEP)].abs().min() > 0


def test_keyword_inputs_are_masked_too() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down(input=self.up(x).sigmoid())
            return out

    model, x = Keyword().double(), STACK.inputs()
    site = fxslim.inspect(model, x).sites[0]
    plan = fxslim.plan(model, x).model_copy(update={"sites": (SitePlan(site=site, keep=KEEP),)})
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed.down.weight[:, [0, 2, 3, 5]] = 0
        with masked(model, plan):
            assert float((model(x) - zeroed(x)).abs().max()) < 1e-14


def test_a_plan_that_does_not_fit_is_refused() -> None:
    model = STACK.build()
    plan = _plan(model)
    with pytest.raises(PlanError, match="made for another model, or is already applied"):
        masked(narrowed_copy(model, plan), plan).__enter__()
    with pytest.raises(PlanError, match="which Linear does not have"):
        masked(nn.Linear(2, 2), plan).__enter__()
    with pytest.raises(InputError, match=r"^masked\(model, plan\) takes a fxslim Plan, not dict\.$"):
        fxslim.masked(model, {})  # type: ignore[arg-type]


def test_pruned_models_are_masked_like_permanent_ones() -> None:
    """The plan names the weight, which pruning computes at every call."""
    model, permanent, x = STACK.build(), STACK.build(), STACK.inputs()
    for pruned in (model, permanent):
        prune.ln_structured(pruned.layers[0].down, "weight", amount=2, n=2, dim=1)
    plan = fxslim.plan(model, x, ffn=0.5)
    prune.remove(permanent.layers[0].down, "weight")
    with torch.no_grad(), fxslim.masked(model, plan), fxslim.masked(permanent, plan):
        expected = permanent(x)
        assert float((model(x) - expected).abs().max()) < 1e-14
    small = fxslim.slim(model, x, plan=plan)
    assert float((small(x) - expected).detach().abs().max()) < 1e-12
    assert fxslim.verify(model, small, plan=plan, example_inputs=x).max_abs < 1e-12
    assert prune.is_pruned(model)


def test_parametrized_models_are_masked_too() -> None:
    model, x = STACK.build(), STACK.inputs()
    dense = copy.deepcopy(model)
    for module in (model.layers[0].down, model.layers[0].up[0]):
        parametrizations.weight_norm(module)
    plan = fxslim.plan(dense, x, ffn=0.5)
    own = fxslim.plan(model, x, ffn=0.5)
    assert [(part.site.name, part.keep) for part in own] == [(part.site.name, part.keep) for part in plan]
    with torch.no_grad(), fxslim.masked(model, own), fxslim.masked(dense, plan):
        assert float((model(x) - dense(x)).abs().max()) < 1e-13
    assert parametrize.is_parametrized(model.layers[0].down)


def test_a_computed_weight_without_a_call_of_its_own_cannot_be_masked() -> None:
    """Refusal: there is no input to mask, and zeros in a computed weight do not last."""
    model, x = STACK.build(), STACK.inputs()
    plan = _plan(model, hooks=False)
    prune.identity(model.layers[0].down, "weight")
    with pytest.raises(
        PlanError, match=r"layers\.0\.down\.weight is computed at every call \(pruned or parametrized\)"
    ):
        masked(model, plan).__enter__()
    assert not model.layers[0].up[0]._forward_pre_hooks
    assert bool(model(x).isfinite().all())
