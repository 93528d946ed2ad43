"""Preparing: computed weights become plain ones on a copy; a fingerprint says structure and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxslim
from fxslim.errors import PlanError
from fxslim.passes.prepare import fingerprint, permanent, settle, weights_digest

from architectures import ARCHITECTURES
from stacks import Feed, Stack

STACK = Stack((Feed(hidden=6),))


def test_a_plain_model_is_taken_as_it_is() -> None:
    model = STACK.build()
    assert permanent(model) is model


def test_pruning_masks_become_zeros_on_a_copy() -> None:
    model, x = STACK.build(), STACK.inputs()
    prune.ln_structured(model.layers[0].down, "weight", amount=2, n=2, dim=1)
    dense = model(x)
    made = permanent(model)
    assert made is not model
    assert list(made.state_dict()) != list(model.state_dict())
    assert set(made.state_dict()) == set(STACK.build().state_dict())
    assert int((made.layers[0].down.weight == 0).all(0).sum()) == 2
    assert torch.equal(made(x), dense)
    assert prune.is_pruned(model)
    assert torch.equal(model(x), dense)


def test_masked_channels_are_taken_out_losslessly() -> None:
    model, x = STACK.build(), STACK.inputs()
    prune.ln_structured(model.layers[0].down, "weight", amount=2, n=2, dim=1)
    small = fxslim.slim(model, x)
    assert small.layers[0].up[0].out_features == 4
    assert float((small(x) - model(x)).detach().abs().max()) < 1e-12
    assert prune.is_pruned(model)


def test_parametrizations_become_their_values() -> None:
    model, x = STACK.build(), STACK.inputs()
    parametrizations.weight_norm(model.layers[0].up[0])
    dense = model(x)
    made = permanent(model)
    assert set(made.state_dict()) == set(STACK.build().state_dict())
    assert float((made(x) - dense).abs().max()) < 1e-14
    settle(model)
    assert set(model.state_dict()) == set(made.state_dict())


def test_fingerprints_ignore_values_dtype_and_device() -> None:
    own = fingerprint(STACK.build(0))
    assert own.model_class == "Stacked"
    assert len(own.digest) == 64
    assert fingerprint(STACK.build(1)) == own
    assert fingerprint(STACK.build().half()) == own
    assert fingerprint(STACK.build().to("meta")) == own


def _other_shape(model: nn.Module) -> None:
    model.layers[0].up[0] = nn.Linear(4, 7)


def _other_name(model: nn.Module) -> None:
    model.extra = nn.Linear(1, 1)


def _tied(model: nn.Module) -> None:
    model.norms[0].bias = model.norms[0].weight


def _buffer(model: nn.Module) -> None:
    model.register_buffer("table", torch.zeros(3))


@pytest.mark.parametrize("change", [_other_shape, _other_name, _tied, _buffer])
def test_fingerprints_tell_structures_apart(change: object) -> None:
    model = STACK.build()
    change(model)  # type: ignore[operator]
    assert fingerprint(model) != fingerprint(STACK.build())


def test_fingerprints_read_the_sizes_in_a_config() -> None:
    model = ARCHITECTURES["bert"].build()
    own = fingerprint(model)
    model.config._name_or_path = "/somewhere/else"
    model.config.hidden_act = "relu"
    assert fingerprint(model) == own
    model.config.num_attention_heads = 8
    assert fingerprint(model) != own


def test_a_plan_of_another_model_is_refused_before_anything_happens() -> None:
    model, x = STACK.build(), STACK.inputs()
    plan = fxslim.plan(model, x, ffn=0.5)
    other = Stack((Feed(hidden=8),)).build()
    before = copy.deepcopy(other.state_dict())
    message = r"the plan was made for another model \(Stacked\), not for this Stacked: names, shapes or sizes"
    for way in (fxslim.slim, fxslim.compile):
        with pytest.raises(PlanError, match=message):
            way(other, x, plan=plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_plan_is_refused_on_its_own_result() -> None:
    model, x = STACK.build(), STACK.inputs()
    small = fxslim.slim(model, x, ffn=0.5)
    with pytest.raises(PlanError, match="the plan was made for another model"):
        fxslim.slim(small, x, plan=small.fxslim.plan)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_settling_works_in_place() -> None:
    model = STACK.build()
    nn.utils.parametrize.register_parametrization(model.layers[0].down, "weight", _Doubled())
    expected = model.layers[0].down.weight.detach().clone()
    settle(model)
    assert torch.equal(model.layers[0].down.weight, expected)
    assert isinstance(model.layers[0].down.weight, nn.Parameter)


@pytest.mark.parametrize("size", [0, 1, 5, 1023, 1024, 3000, 64 * 3 * 5 + 1, 11445 * 64 * 16 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_of_weights_sees_numbers_of_every_size(size: int, dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(size).to(dtype))
    before = weights_digest(module)
    assert weights_digest(module) == before
    with torch.no_grad():
        module.weight.add_(1).mul_(2)
    assert (weights_digest(module) != before) == (size > 0)
