"""Narrowing a module: its own class, exactly the kept rows, nothing shared; and plans that do not fit."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxslim
from fxslim.edit import AttributeEdit, ConfigEdit
from fxslim.errors import PlanError
from fxslim.passes.narrow import narrowed_copy, replay
from fxslim.plan import Plan
from fxslim.site import SitePlan

from stacks import Attend, Feed, Stack

STACK = Stack((Feed(hidden=6), Attend(2, 2, 2)))


def _plan(model: nn.Module, **keeps: tuple[int, ...]) -> Plan:
    """Return a plan; kinds of sites are named by keyword."""
    sites = {site.kind: site for site in fxslim.inspect(model, STACK.inputs()).sites}
    parts = tuple(SitePlan(site=sites[kind], keep=keep) for kind, keep in keeps.items())
    return fxslim.plan(model, STACK.inputs()).model_copy(update={"sites": parts})


def test_kept_rows_are_copied_and_layers_know_their_size() -> None:
    model = STACK.build()
    before = copy.deepcopy(model.state_dict())
    small = narrowed_copy(model, _plan(model, ffn=(1, 4)))
    assert type(small) is type(model)
    up, down, old = small.layers[0].up[0], small.layers[0].down, model.layers[0]
    assert torch.equal(up.weight, old.up[0].weight[[1, 4]])
    assert torch.equal(up.bias, old.up[0].bias[[1, 4]])
    assert torch.equal(down.weight, old.down.weight[:, [1, 4]])
    assert torch.equal(down.bias, old.down.bias)
    assert (up.out_features, up.in_features, down.in_features, down.out_features) == (2, 4, 2, 4)
    assert repr(up) == "Linear(in_features=4, out_features=2, bias=True)"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (old.up[0].out_features, old.down.in_features) == (6, 6)


def test_the_copy_shares_nothing_with_the_model() -> None:
    model = STACK.build()
    small = narrowed_copy(model, _plan(model, ffn=(1, 4)))
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in small.parameters()}


def test_parameters_stay_parameters_as_frozen_as_before() -> None:
    model = STACK.build()
    model.layers[0].down.weight.requires_grad_(False)
    small = narrowed_copy(model, _plan(model, ffn=(1, 4)))
    assert isinstance(small.layers[0].down.weight, nn.Parameter)
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    assert frozen == ["layers.0.down.weight"]


def test_tied_weights_stay_tied() -> None:
    model = Stack((Feed(hidden=6), Feed(hidden=6))).build()
    model.layers[1].up[0].weight = model.layers[0].up[0].weight
    sites = fxslim.inspect(model, STACK.inputs()).sites
    assert [site.units for site in sites] == [6]  # one site: the shared rows serve both layers
    plan = fxslim.plan(model, STACK.inputs()).model_copy(update={"sites": (SitePlan(site=sites[0], keep=(0, 5)),)})
    small = narrowed_copy(model, plan)
    assert small.layers[1].up[0].weight is small.layers[0].up[0].weight
    assert small.layers[1].down.weight.shape == (4, 2)


def test_replay_narrows_in_place_and_on_meta() -> None:
    model = STACK.build()
    plan = _plan(model, ffn=(0, 3), attention=(0, 2))
    plan = plan.model_copy(update={"edits": (AttributeEdit(module="layers.1", name="group", old=2, new=1),)})
    expected = narrowed_copy(model, plan)
    skeleton = replay(copy.deepcopy(model).to("meta"), plan)
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {
        n: t.shape for n, t in expected.state_dict().items()
    }
    assert replay(model, plan) is model
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (model.layers[1].group, expected.layers[1].group) == (1, 1)


def test_zeroed_sites_keep_their_shape() -> None:
    model = STACK.build()
    plan = _plan(model, ffn=(0, 3)).model_copy(update={"zeroed": ("layers.0:ffn",)})
    small = narrowed_copy(model, plan)
    weight = small.layers[0].down.weight
    assert weight.shape == (4, 6)
    assert torch.equal(weight[:, [0, 3]], model.layers[0].down.weight[:, [0, 3]])
    assert int(weight[:, [1, 2, 4, 5]].count_nonzero()) == 0
    assert torch.equal(small.layers[0].up[0].weight, model.layers[0].up[0].weight)


def test_config_edits_overlay_one_module() -> None:
    model = STACK.build()
    model.config = model.layers[1].config = SimpleNamespace(heads=4, width=4)
    plan = _plan(model).model_copy(update={"edits": (ConfigEdit(module="layers.1", name="heads", old=4, new=2),)})
    small = narrowed_copy(model, plan)
    assert (small.layers[1].config.heads, small.config.heads, model.layers[1].config.heads) == (2, 4, 4)


def _unchanged(model: nn.Module, plan: Plan, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    for narrow in (narrowed_copy, replay):
        with pytest.raises(PlanError, match=message):
            narrow(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plan_that_is_already_applied_is_refused() -> None:
    model = STACK.build()
    plan = _plan(model, ffn=(0, 3))
    message = r"expects layers\.0\.up\.0\.weight to have 6 rows in dimension 0, but its shape is \(2, 4\): "
    _unchanged(narrowed_copy(model, plan), plan, message + "it was made for another model, or is already applied")


def test_a_plan_of_another_model_is_refused() -> None:
    plan = _plan(STACK.build(), ffn=(0, 3))
    other = Stack((Attend(2, 2, 2),)).build()
    _unchanged(other, plan, r"the plan narrows layers\.0\.up\.0\.weight, which Stacked does not have")


def test_edits_that_do_not_fit_are_refused() -> None:
    model = STACK.build()
    missing = AttributeEdit(module="layers.9", name="heads", old=4, new=2)
    wrong = AttributeEdit(module="layers.1", name="heads", old=5, new=2)
    plan = _plan(model)
    _unchanged(model, plan.model_copy(update={"edits": (missing,)}), r"edits layers\.9\.heads, which does not exist")
    _unchanged(model, plan.model_copy(update={"edits": (wrong,)}), r"expects layers\.1\.heads to be 5, found 4")
