"""Pruners on data, against the formulas computed by hand, and retrain-free against every choice there is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxslim.errors import InputError, RequestError
from fxslim.inc import WeightPruningConfig, model_slim, parse_auto_slim_config, prepare_compression, prepare_pruning
from fxslim.inc.retrain_free import rearranged


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return out


def net() -> Net:
    return Net().double()


def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(6, n, dtype=torch.float64, generator=generator) for _ in range(4) for n in (8, 3)]
    return list(zip(draw[::2], draw[1::2], strict=True))


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def prune(model: nn.Module, data: Any, loss_func: Any = None, **keys: Any) -> None:
    conf = WeightPruningConfig([{"op_names": ["up"], "pattern": "1x1", **keys}], target_sparsity=0.5)
    prepare_pruning(model, conf, dataloader=data, loss_func=loss_func)


def test_wanda_is_weight_times_norm_of_input() -> None:
    model, dense = net(), net()
    prune(model, pairs(), pruning_type="wanda")
    norms = torch.cat([x for x, _ in pairs()]).norm(dim=0)
    scores = dense.up.weight.detach().abs() * norms
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :4], value=True)
    assert torch.equal(model.up.weight == 0, expected)
    assert torch.equal(model.up.weight[~expected], dense.up.weight[~expected])
    assert torch.equal(model.down.weight, dense.down.weight)


def test_sparse_gpt_is_optimal_brain_surgeon_column_by_column() -> None:
    """H = 2XXᵀ + 0.01·mean(diag)·I; an update of all that is right of a column, by inverses of what is left of H."""
    model, dense = net(), net()
    prune(model, [x for x, _ in pairs()], pruning_type="sparse_gpt", pattern="2:4")
    x = torch.cat([x for x, _ in pairs()])
    h = 2 * x.T @ x
    h = h + 0.01 * h.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    weight, gone = dense.up.weight.detach().clone(), torch.zeros(12, 8, dtype=torch.bool)
    for j in range(8):
        if j % 4 == 0:  # scores within four columns by the inverse of what is left when each comes
            scale = torch.stack([torch.linalg.inv(h[k:, k:])[0, 0] for k in range(j, j + 4)])
            order = (weight[:, j : j + 4].square() / scale).argsort(1)[:, :2]
            gone[:, j : j + 4].scatter_(1, order, value=True)
        inverse = torch.linalg.inv(h[j:, j:])
        error = weight[:, j].masked_fill(~gone[:, j], 0) / inverse[0, 0]
        weight[:, j:] -= torch.outer(error, inverse[0])
    assert torch.equal(model.up.weight == 0, gone)
    assert torch.allclose(model.up.weight.detach(), weight.masked_fill(gone, 0), rtol=0, atol=1e-10)


def test_rearranging_ends_where_one_swap_would_not_help() -> None:
    """By hand: the greedy loop of Kwon et al. 2022, section 4.2, with every candidate tried in full."""
    generator = np.random.default_rng(0)
    for count in range(7):
        gradients = generator.normal(size=(7, 3))
        order = (gradients**2).sum(1).argsort(kind="stable").tolist()
        chosen = order[:count]
        for index in order[count:] if count else []:
            trial = [*chosen, index]
            sums = [((gradients[[i for i in trial if i != out]].sum(0)) ** 2).sum() for out in trial]
            trial.remove(trial[int(np.argmin(sums))])
            chosen = trial
        assert set(np.flatnonzero(rearranged(gradients, count))) == set(chosen)


def test_retrain_free_goes_by_gradients_of_masks() -> None:
    model, dense = net(), net()
    pruners = parse_auto_slim_config(model, pairs(), ffn2_sparsity=0.5)
    prepare_pruning(model, WeightPruningConfig(pruners, pruning_type="retrain_free"), None, pairs(), loss)
    masks = []
    for x, y in pairs():  # ∂L/∂m of masks that are really there
        mask = torch.ones(12, dtype=torch.float64, requires_grad=True)
        output = dense.head(x + dense.down(torch.relu(dense.up(x)) * mask))
        masks.append(torch.autograd.grad(loss(output, y), mask)[0].numpy())
    gone = rearranged(np.stack(masks, axis=1), 6)
    assert torch.equal((model.down.weight == 0).all(0), torch.from_numpy(gone))
    kept = torch.from_numpy(~gone)
    assert torch.equal(model.down.weight[:, kept], dense.down.weight[:, kept])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    before = [model(x) for x, _ in pairs()]
    model_slim(model, pairs(), 1)
    assert model.up.weight.shape == (6, 8)
    assert all(torch.allclose(model(x), one, rtol=0, atol=1e-12) for (x, _), one in zip(pairs(), before, strict=True))


def test_data_may_come_when_training_begins() -> None:
    model = net()
    conf = WeightPruningConfig([{"op_names": ["up"], "pattern": "1x1", "pruning_type": "wanda"}], target_sparsity=0.25)
    callbacks = prepare_compression(model, conf).callbacks
    assert (model.up.weight != 0).all()
    callbacks.on_train_begin(pairs())
    assert (model.up.weight == 0).sum() == 24
    callbacks.on_train_end()
    with pytest.warns(UserWarning, match="wanda has seen no data"):
        prepare_compression(net(), conf).callbacks.on_train_end()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pruning_type": "wanda", "pattern": "mha"}, "take pattern='1x1' or 'N:M'"),
        ({"pruning_type": "sparse_gpt", "pattern": "4x1"}, "single weights or N of every M"),
        ({"pruning_type": "retrain_free", "pattern": "1x1"}, "whole channels and heads"),
        ({"pruning_type": "retrain_free", "pattern": "channelx1", "op_names": ["down"]}, "needs a loss"),
    ],
)
def test_what_does_not_go_together_is_refused_and_changes_nothing(keys: dict[str, Any], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((RequestError, InputError), match=message):
        prune(model, [x for x, _ in pairs()], **keys)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
