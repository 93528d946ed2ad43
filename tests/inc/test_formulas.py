"""Scores, schedules, scopes and patterns of the old tool, against a loop in plain numpy that trains beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxslim.inc import WeightPruningConfig, prepare_compression, prepare_pruning

RATE, STEPS = 0.3, 9


class Net(nn.Module):
    """Two layers that are pruned, and one that is left alone as the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return out


def net() -> Net:
    return Net().double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(6, n, dtype=torch.float64, generator=generator) for n in (8, 3))
    return (model(x) - y).square().mean()


FRACTION: dict[str, Callable[[float, float], float]] = {
    "exp": lambda t, s: 1 - (1 - s) ** t,
    "linear": lambda t, s: s * t,
    "cube": lambda t, s: s * t**3,
    "cos": lambda t, s: s * (1 - math.cos(math.pi * t / 2)),
}


def blocks_of(values: np.ndarray, pattern: str, reduce: str) -> np.ndarray:
    rows, columns = (
        size if part == "channel" else int(part) for part, size in zip(pattern.split("x"), values.shape, strict=True)
    )
    apart = values.reshape(values.shape[0] // rows, rows, values.shape[1] // columns, columns)
    return np.array(getattr(apart.swapaxes(1, 2).reshape(*apart.shape[::2], -1), reduce)(-1))


def by_hand(criterion: str, pattern: str, decay: str, scope: str, reduce: str = "mean", **keys: Any) -> Net:
    """Train with the formulas as PEERS of the old tool wrote them; what is masked stays so."""
    start, end, every, target = keys["start_step"], keys["end_step"], keys["pruning_frequency"], keys["target_sparsity"]
    model = net()
    total = (end - start) // every
    layers = {"up": model.up, "down": model.down}
    scores: dict[str, np.ndarray] = {}
    gone = {name: np.zeros_like(one.weight.detach().numpy(), dtype=bool) for name, one in layers.items()}
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step).backward()
        for name, one in layers.items():
            assert one.weight.grad is not None
            w, g = one.weight.detach().numpy(), one.weight.grad.numpy()
            if criterion == "block_mask":
                now = np.abs(blocks_of(w * g, pattern, "sum"))
            else:
                now = blocks_of({"gradient": np.abs(g)}.get(criterion, np.abs(w * g)), pattern, reduce)
            if criterion in ("snip_momentum", "block_mask"):
                now = now + 0.9 * scores.get(name, 0.0)
            scores[name] = now
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
            done = step + 1
            for name, one in layers.items():
                one.weight[torch.from_numpy(gone[name])] = 0
                if criterion == "magnitude":
                    scores[name] = blocks_of(np.abs(one.weight.numpy()), pattern, reduce)
            if start <= done <= end and (done - start) % every == 0:
                part = FRACTION[decay]((done - start) // every / total, target)
                took = {name: gone[name].all() | np.asarray(blocks_of(gone[name], pattern, "all")) for name in layers}
                ranked = {name: np.where(took[name], -1.0, scores[name]) for name in layers}
                every_score = np.concatenate([one.ravel() for one in ranked.values()])
                for name, one in layers.items():
                    own = every_score if scope == "global" else ranked[name].ravel()
                    count = int(part * own.size + 1e-9)
                    chosen = ranked[name] <= np.sort(own)[count - 1] if count else np.zeros_like(took[name])
                    size = [a // b for a, b in zip(gone[name].shape, chosen.shape, strict=True)]
                    gone[name] |= chosen.repeat(size[0], 0).repeat(size[1], 1)
                    one.weight[torch.from_numpy(gone[name])] = 0
    return model


def pruned(conf: WeightPruningConfig, *, hooked: bool) -> Net:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    manager = prepare_pruning(model, conf, optimizer) if hooked else prepare_compression(model, conf).callbacks
    if not hooked:
        manager.on_train_begin()
    for step in range(STEPS):
        if not hooked:
            manager.on_step_begin(step)
        model.zero_grad()
        loss_of(model, step).backward()
        if not hooked:
            manager.on_before_optimizer_step()
        optimizer.step()
        if not hooked:
            manager.on_after_optimizer_step()
    manager.on_train_end()
    return model


def same(first: nn.Module, second: nn.Module) -> None:
    zeros = 0
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0), name
        assert torch.allclose(one, other, rtol=0, atol=1e-12), name
        zeros += int((one == 0).sum())
    assert zeros


TIMES = {"start_step": 1, "end_step": 7, "pruning_frequency": 2, "target_sparsity": 0.7}


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "snip", "snip_momentum", "block_mask"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_criteria(criterion: str, scope: str) -> None:
    conf = WeightPruningConfig(pruning_type=criterion, pruning_scope=scope, **TIMES)  # type: ignore[arg-type]
    same(pruned(conf, hooked=True), by_hand(criterion, "4x1", "exp", scope, **TIMES))


@pytest.mark.parametrize(
    ("pattern", "reduce"), [*itertools.product(["1x1", "2x4"], ["mean", "sum", "max"]), ("1x4", "mean"), ("4x1", "max")]
)
def test_patterns_and_reductions(pattern: str, reduce: str) -> None:
    conf = WeightPruningConfig(pattern=pattern, criterion_reduce_type=reduce, **TIMES)  # type: ignore[arg-type]
    same(pruned(conf, hooked=False), by_hand("snip_momentum", pattern, "exp", "global", reduce, **TIMES))


@pytest.mark.parametrize("pattern", ["channelx1", "1xchannel"])
def test_whole_inputs_and_outputs(pattern: str) -> None:
    conf = WeightPruningConfig(pattern=pattern, pruning_scope="local", **TIMES)  # type: ignore[arg-type]
    same(pruned(conf, hooked=True), by_hand("snip_momentum", pattern, "exp", "local", **TIMES))


@pytest.mark.parametrize("decay", FRACTION)
@pytest.mark.parametrize("hooked", [True, False])
def test_decays(decay: str, hooked: bool) -> None:
    times = {**TIMES, "start_step": 0, "end_step": 8, "pruning_frequency": 3}
    conf = WeightPruningConfig(pattern="1x1", sparsity_decay_type=decay, **times)  # type: ignore[arg-type]
    same(pruned(conf, hooked=hooked), by_hand("snip_momentum", "1x1", decay, "global", **times))


def test_n_of_every_m() -> None:
    conf = WeightPruningConfig(pattern="2:4", pruning_type="magnitude")
    model, dense = net(), net()
    prepare_pruning(model, conf, torch.optim.SGD(model.parameters(), lr=RATE)).on_train_end()
    for one, other in ((model.up, dense.up), (model.down, dense.down)):
        groups = other.weight.detach().abs().reshape(-1, 4)
        expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.argsort(1)[:, :2], value=True)
        assert torch.equal((one.weight == 0).reshape(-1, 4), expected)
    assert torch.equal(model.head.weight, dense.head.weight)


def test_one_shot_goes_before_the_first_step() -> None:
    """``start_step=end_step=0``, the defaults, with a score that needs no gradients."""
    model = net()
    callbacks = prepare_compression(
        model, WeightPruningConfig(target_sparsity=0.6, pruning_type="magnitude", pattern="1x1")
    ).callbacks
    assert not (model.up.weight == 0).any()
    callbacks.on_train_begin()
    dense = net()
    every = torch.cat([dense.up.weight.detach().abs().ravel(), dense.down.weight.detach().abs().ravel()]).sort().values
    threshold = every[int(0.6 * len(every)) - 1]
    for one, other in ((model.up, dense.up), (model.down, dense.down)):
        assert torch.equal(one.weight == 0, other.weight.abs() <= threshold)
    callbacks.on_train_end()


def test_limits_of_layers() -> None:
    model = net()
    with torch.no_grad():
        model.up.weight *= 1e-4
    conf = WeightPruningConfig(pruning_type="magnitude", pattern="1x1", target_sparsity=0.5,
                               min_sparsity_ratio_per_op=0.25, max_sparsity_ratio_per_op=0.75)  # fmt: skip
    prepare_pruning(model, conf, torch.optim.SGD(model.parameters(), lr=RATE)).on_train_end()
    zeros = [(layer.weight == 0).sum().item() for layer in (model.up, model.down)]
    assert zeros == [96, 160 - 96]  # three quarters of 128; half of all 320 in all


@pytest.mark.parametrize("target", [0.98, 0.99])
def test_nearly_everything_goes_up_to_the_limit_of_every_layer(target: float) -> None:
    """The default limit is 0.98 of a layer: more than that never went, and layers round it down."""
    model = net()
    conf = WeightPruningConfig(pruning_type="magnitude", pattern="1x1", target_sparsity=target)
    prepare_pruning(model, conf, torch.optim.SGD(model.parameters(), lr=RATE)).on_train_end()
    zeros = [(layer.weight == 0).sum().item() for layer in (model.up, model.down)]
    assert zeros == [math.floor(0.98 * 128), math.floor(0.98 * 192)]


def test_zeros_that_are_there_are_kept_and_no_others() -> None:
    model = net()
    with torch.no_grad():
        model.up.weight[:, ::3] = 0
        model.down.weight[1] = 0
    before = {name: value == 0 for name, value in model.named_parameters() if "weight" in name}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    lock = prepare_pruning(model, WeightPruningConfig(pruning_type="pattern_lock", end_step=3), optimizer)
    for step in range(5):
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    lock.on_train_end()
    for name, value in model.named_parameters():
        if "weight" in name:
            assert torch.equal(value == 0, before[name])


def test_group_lasso_shrinks_norms_of_weights() -> None:
    """The old one used norms of gradients, and exploded to 4e20 in four steps."""
    model = net()
    conf = WeightPruningConfig(pruning_type="magnitude", end_step=6, reg_type="group_lasso",
                               parameters={"reg_coeff": 0.4})  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = prepare_pruning(model, conf, optimizer)
    model.zero_grad()
    loss_of(model, 0).backward()
    weight = model.up.weight.detach() - 0.1 * model.up.weight.grad  # type: ignore[operator]
    optimizer.step()
    norms = weight.reshape(4, 4, 8).norm(dim=1, keepdim=True)
    shrunk = (weight.reshape(4, 4, 8) * (1 - 0.1 * 0.4 * 2 / norms).clamp_min(0)).reshape(16, 8)
    stays = model.up.weight.detach() != 0
    assert stays.any() and torch.allclose(model.up.weight.detach()[stays], shrunk[stays], rtol=1e-12)
    for step in range(1, 40):
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    callbacks.on_train_end()
    assert all(float(layer.weight.detach().norm()) <= float(dense.weight.detach().norm())
               for layer, dense in ((model.up, net().up), (model.down, net().down)))  # fmt: skip


def test_progressive_takes_the_same_in_portions() -> None:
    model = net()
    conf = WeightPruningConfig(pruning_type="magnitude_progressive", pattern="channelx1", target_sparsity=0.5,
                               start_step=1, end_step=1, pruning_scope="local")  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    callbacks = prepare_pruning(model, conf, optimizer)
    seen = []
    for step in range(5):
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        seen.append(int((model.up.weight == 0).sum()))
    callbacks.on_train_end()
    assert seen == [16, 32, 48, 64, 64]
    columns = net().up.weight.detach().abs().mean(0)
    assert torch.equal((model.up.weight == 0).all(0), columns <= columns.sort().values[3])
