"""Masks of weights while a model trains: patterns, counts and scores against loops in plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxslim
from fxslim.errors import InputError, RequestError
from fxslim.training.lasso import shrink
from fxslim.training.lowest import lowest, lowest_of_all
from fxslim.training.patterns import pattern_of


class Net(nn.Module):
    """Linears, a Conv1D of transformers (inputs first) and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.up = nn.Linear(8, 16)
        self.turned = Conv1D(12, 16)
        self.down = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        out: Tensor = self.down(self.turned(self.up(x).relu()).tanh())
        return out


def net() -> Net:
    return Net().double()


def images(seed: int) -> Tensor:
    return torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrices(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the weights as (out, in), a convolution's input channels last."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module.weight.detach().numpy()
        elif isinstance(module, Conv1D):
            found[name] = module.weight.detach().numpy().T
        elif isinstance(module, nn.Conv2d):
            weight = module.weight.detach().numpy()
            found[name] = np.stack([kernel.transpose(1, 2, 0).ravel() for kernel in weight])
    return {name: value.copy() for name, value in found.items()}


def train(model: nn.Module, steps: int = 6, optimizer: Any = None, **asked: Any) -> fxslim.Pruner:
    given = {"start": 1, "end": 4, "every": 1, "score": "magnitude", **asked}
    own = torch.optim.AdamW(model.parameters(), lr=0.01) if optimizer is None else optimizer
    pruner = fxslim.Pruner(model, fxslim.PruningConfig(**given), optimizer=own)
    for step in range(steps):
        own.zero_grad()
        model(images(step)).square().mean().backward()
        pruner.before_step()
        own.step()
        pruner.after_step()
    return pruner


def gone(pruner: fxslim.Pruner) -> dict[str, np.ndarray]:
    assert pruner.weights is not None
    return {own.layer.path: own.gone.numpy() for own in pruner.weights.layers}


BLOCKS = {"1x1": (1, 1), "4x1": (4, 1), "1x4": (1, 4), "2x4": (2, 4), "channelx1": (0, 1), "1xchannel": (1, 0)}


@pytest.mark.parametrize("pattern", BLOCKS)
def test_whole_blocks_go_in_exact_numbers(pattern: str) -> None:
    model = net()
    pruner = train(model, weights=fxslim.WeightMasks(fraction=0.6, pattern=pattern))
    pruner.finish()
    for name, weight in matrices(model).items():
        rows, columns = (size or weight.shape[i] for i, size in enumerate(BLOCKS[pattern]))
        blocks = [
            not weight[i : i + rows, j : j + columns].any()
            for i in range(0, weight.shape[0], rows)
            for j in range(0, weight.shape[1], columns)
        ]
        assert sum(blocks) == math.floor(0.6 * len(blocks) + 1e-9), name
        assert (weight == 0).sum() == sum(blocks) * rows * columns
        assert ((weight == 0) == gone(pruner)[name]).all()


@pytest.mark.parametrize(("pattern", "drop", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:4", 3, 4), ("1:2", 1, 2)])
@pytest.mark.parametrize("score", ["magnitude", "snip_momentum"])
@pytest.mark.parametrize("portions", [1, 3])
def test_n_of_every_m_inputs_go(pattern: str, drop: int, of: int, score: str, portions: int) -> None:
    model = net()
    masks = fxslim.WeightMasks(pattern=pattern, portions=portions)
    pruner = train(model, 10, weights=masks, score=score)
    assert pruner.settled
    pruner.finish()
    for name, weight in matrices(model).items():
        counts = (weight.reshape(len(weight), -1, of) == 0).sum(-1)
        assert (counts == drop).all(), name
    if score == "magnitude" and portions == 1:  # one step at once: the smallest of each M
        model = net()
        before = matrices(model)
        pruner = fxslim.Pruner(model, fxslim.PruningConfig(weights=masks, score=score, start=1, end=1))
        pruner.before_step()
        pruner.after_step()
        for name, weight in before.items():
            groups = np.abs(weight).reshape(-1, of)
            expected = np.zeros_like(groups, dtype=bool)
            np.put_along_axis(expected, groups.argsort(1)[:, :drop], values=True, axis=1)
            assert (gone(pruner)[name].reshape(-1, of) == expected).all(), name


@pytest.mark.parametrize("score", ["gradient", "snip", "snip_momentum", "taylor", "fisher", "block_mask"])
def test_scores_of_blocks(score: str) -> None:
    """Means over a block; the derivative by a block's mask is a sum."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = fxslim.PruningConfig(weights=fxslim.WeightMasks(fraction=0.5, pattern="2x2"), score=score, start=9, end=9)
    pruner = fxslim.Pruner(model, config, optimizer=optimizer)
    total: dict[str, np.ndarray] = {}
    for step in range(3):
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        weight, gradient = model.up.weight.detach().numpy(), model.up.weight.grad.numpy()  # type: ignore[union-attr]
        blocks = np.zeros((8, 4))
        for i in range(8):
            for j in range(4):
                w, g = (x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for x in (weight, gradient))
                blocks[i, j] = {
                    "gradient": np.abs(g).mean(), "snip": np.abs(w * g).mean(),
                    "snip_momentum": np.abs(w * g).mean(), "taylor": abs((w * g).sum()),
                    "fisher": (w * g).sum() ** 2 / 4, "block_mask": abs((w * g).sum()),
                }[score]  # fmt: skip
        before = total.get(score, np.zeros_like(blocks))
        if score in ("taylor", "fisher"):
            total[score] = 0.85 * before + 0.15 * blocks
        else:
            total[score] = blocks + (0.9 * before if score in ("snip_momentum", "block_mask") else 0)
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
    assert pruner.weights is not None
    (own,) = (own for own in pruner.weights.layers if own.layer.path == "up")
    assert np.allclose(own.score.numpy(), total[score], rtol=1e-10)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_blocks_of_different_sizes_are_compared_by_what_is_asked(reduce: str) -> None:
    model = net()
    weights = matrices(model)
    masks = fxslim.WeightMasks(fraction=0.5, pattern="channelx1", reduce=reduce)
    config = fxslim.PruningConfig(weights=masks, scope="global", score="magnitude", start=1, end=1)
    pruner = fxslim.Pruner(model, config)
    pruner.before_step()
    pruner.after_step()
    scores = [(float(getattr(np.abs(own[:, j]), reduce)()), name, j) for name, own in weights.items()
              for j in range(own.shape[1])]  # fmt: skip
    left, expected = sum(own.size for own in weights.values()) // 2, set()
    for _, name, j in sorted(scores):
        if len(weights[name]) <= left:
            expected.add((name, j))
            left -= len(weights[name])
    found = {(name, int(j)) for name, own in gone(pruner).items() for j in np.flatnonzero(own.all(0))}
    assert found == expected


def test_one_threshold_over_all_layers() -> None:
    model = net()
    weights = matrices(model)
    config = fxslim.PruningConfig(
        weights=fxslim.WeightMasks(fraction=0.5), scope="global", score="magnitude", start=1, end=1
    )
    pruner = fxslim.Pruner(model, config)
    pruner.before_step()
    pruner.after_step()
    every = np.sort(np.concatenate([np.abs(own).ravel() for own in weights.values()]))
    threshold = every[len(every) // 2 - 1]
    for name, own in weights.items():
        assert (gone(pruner)[name] == (np.abs(own) <= threshold)).all()


def test_limits_of_layers() -> None:
    model = net()
    with torch.no_grad():
        model.up.weight.mul_(1e-3)
        model.down.weight.mul_(1e3)
    config = fxslim.PruningConfig(
        weights=fxslim.WeightMasks(fraction=0.5), scope="global", limits=(0.1, 0.75), score="magnitude", start=1, end=1
    )
    pruner = fxslim.Pruner(model, config)
    pruner.before_step()
    pruner.after_step()
    found = gone(pruner)
    assert found["up"].mean() == 0.75
    assert found["down"].sum() == 5  # a tenth of 48, rounded up
    assert sum(own.sum() for own in found.values()) == sum(own.size for own in found.values()) // 2
    config = fxslim.PruningConfig(weights=0.9, scope="global", limits=(0.0, 0.5), start=1, end=1)
    with pytest.raises(RequestError, match="limits="):
        fxslim.Pruner(net(), config)


def test_what_is_masked_stays_zero_and_is_forgotten() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = train(model, optimizer=optimizer, weights=fxslim.WeightMasks(fraction=0.7))
    assert pruner.weights is not None
    for own in pruner.weights.layers:
        stored = own.layer.stored(own.gone)
        assert own.layer.weight[stored].count_nonzero() == 0
        assert optimizer.state[own.layer.weight]["exp_avg"][stored].count_nonzero() == 0
        assert optimizer.state[own.layer.weight]["exp_avg"][~stored].count_nonzero() > 0


def test_zeros_that_are_there_are_kept() -> None:
    model = net()
    with torch.no_grad():
        model.up.weight[::2, 1] = 0
        model.turned.weight[3] = 0
    before = {name: own == 0 for name, own in matrices(model).items()}
    pruner = train(model, weights=fxslim.WeightMasks(lock=True))
    assert pruner.figures().sparsity["weights"] == pytest.approx(
        sum(own.sum() for own in before.values()) / sum(own.size for own in before.values())
    )
    pruner.finish()
    for name, own in matrices(model).items():
        assert ((own == 0) == before[name]).all(), name


def test_portions_go_step_by_step() -> None:
    model = net()
    config = fxslim.PruningConfig(
        weights=fxslim.WeightMasks(fraction=0.5, pattern="4x1", portions=4), score="magnitude", start=1, end=1
    )
    pruner = fxslim.Pruner(model, config)
    counts = []
    for _ in range(5):
        pruner.before_step()
        pruner.after_step()
        counts.append(int(gone(pruner)["up"].sum()))
    assert counts == [16, 32, 48, 64, 64]
    pruner = fxslim.Pruner(net(), config)
    pruner.before_step()
    pruner.after_step()
    with pytest.warns(UserWarning, match="before masks"):
        pruner.finish()
    assert gone(pruner)["up"].sum() == 64


def test_masks_and_portions_are_resumed(tmp_path: Any) -> None:
    asked: dict[str, Any] = {
        "weights": fxslim.WeightMasks(fraction=0.5, pattern="2x1", portions=3), "start": 1, "end": 9, "every": 4,
    }  # fmt: skip
    whole, part = net(), net()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (whole, part)]
    pruners = [fxslim.Pruner(model, fxslim.PruningConfig(**asked, score="snip_momentum"), optimizer=own)
               for model, own in zip((whole, part), optimizers, strict=True)]  # fmt: skip
    for step in range(12):
        if step == 6:  # in the middle of a portion
            pruners[1].save(tmp_path)
            pruners[1].release()
            fresh = net()
            fresh.load_state_dict(part.state_dict())
            state, part = optimizers[1].state_dict(), fresh
            optimizers[1] = torch.optim.AdamW(part.parameters(), lr=0.01)
            optimizers[1].load_state_dict(state)
            pruners[1] = fxslim.Pruner(part, fxslim.PruningConfig(**asked, score="snip_momentum"),
                                       optimizer=optimizers[1])  # fmt: skip
            pruners[1].load(tmp_path)
        for model, optimizer, pruner in zip((whole, part), optimizers, pruners, strict=True):
            optimizer.zero_grad()
            model(images(step)).square().mean().backward()
            pruner.before_step()
            optimizer.step()
            pruner.after_step()
    for mine, theirs in zip(whole.state_dict().values(), part.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_units_and_weights_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = fxslim.PruningConfig(ffn=0.5, weights=fxslim.WeightMasks(pattern="2:4"), start=1, end=3, every=1)
    pruner = fxslim.Pruner(model, config, example_inputs=x, optimizer=optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
    pruner.finish()
    assert pruner.figures().sparsity == {"ffn": 0.5, "weights": 0.5}
    assert fxslim.slim(model, x)[0].weight.shape[0] <= 8  # type: ignore[index, union-attr]


def test_layers_that_do_not_fit_are_named() -> None:
    model = net()
    pruner = fxslim.Pruner(model, fxslim.PruningConfig(weights=fxslim.WeightMasks(fraction=0.5, pattern="1x8"),
                                                       score="magnitude", start=1, end=1))  # fmt: skip
    assert {note.where for note in pruner.notes} == {"conv", "down"}
    assert all("no multiple of 1 by 8" in note.reason for note in pruner.notes)
    asked: dict[str, Any] = {"weights": 0.5, "start": 1, "end": 1}
    with pytest.raises(RequestError, match="matches no layer"):
        fxslim.Pruner(model, fxslim.PruningConfig(**asked, include="nothing"))
    with pytest.raises(RequestError, match="no layer whose weights"):
        fxslim.Pruner(nn.LayerNorm(3), fxslim.PruningConfig(**asked))
    model.up.weight.requires_grad_(requires_grad=False)
    with pytest.raises(InputError, match=r"up\.weight, which is frozen"):
        fxslim.Pruner(model, fxslim.PruningConfig(**asked))
    pruner = fxslim.Pruner(model, fxslim.PruningConfig(**asked, skip=["up", "conv"]))
    assert set(gone(pruner)) == {"turned", "down"}


def test_tied_weights_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.words.weight

    config = fxslim.PruningConfig(weights=0.5, score="magnitude", start=1, end=1)
    pruner = fxslim.Pruner(Tied(), config)
    assert set(gone(pruner)) == {"inner"}
    assert "that of words as well" in pruner.notes[0].reason


def test_locked_zeros_need_no_schedule_and_are_never_late(recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    with torch.no_grad():
        model.up.weight[:, 1] = 0
    pruner = fxslim.Pruner(model, fxslim.PruningConfig(weights=fxslim.WeightMasks(lock=True)))
    assert pruner.settled
    pruner.finish()
    assert not recwarn.list
    assert (model.up.weight == 0).sum() == 16


# Group lasso ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1x1", "2x2", "channelx1", "1xchannel", "2:4"])
def test_the_proximal_step(pattern: str) -> None:
    matrix = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = pattern_of(pattern).block(matrix.shape)
    found = shrink(matrix, pattern_of(pattern), 0.3).numpy()
    for i in range(0, 4, rows):
        for j in range(0, 8, columns):
            block = matrix.numpy()[i : i + rows, j : j + columns]
            norm = np.sqrt((block**2).sum())
            expected = block * max(0.0, 1 - 0.3 * math.sqrt(rows * columns) / norm)
            assert np.allclose(found[i : i + rows, j : j + columns], expected, rtol=1e-12)
    assert shrink(torch.zeros(4, 8), pattern_of(pattern), 0.3).count_nonzero() == 0


def test_it_converges_to_the_minimum_and_never_explodes() -> None:
    """Of ``½‖W - A‖² + strength·Σ √size·‖block‖``, which is known in closed form: one proximal step from A."""
    target = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(8, 4, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    masks = fxslim.WeightMasks(fraction=0.5, pattern="2x2", lasso=0.4)
    config = fxslim.PruningConfig(weights=masks, score="magnitude", start=400, end=400)
    pruner = fxslim.Pruner(layer, config, optimizer=optimizer)
    norms = []
    for _ in range(399):
        optimizer.zero_grad()
        (0.5 * (layer.weight - target).square().sum()).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        norms.append(layer.weight.norm().item())
    assert torch.allclose(layer.weight, shrink(target, pattern_of("2x2"), 0.4), atol=1e-12)
    assert max(norms) < 2 * float(target.norm())
    pruner = fxslim.Pruner(nn.Linear(8, 4), config)
    with pytest.raises(InputError, match="learning rate"):
        pruner.after_step()


# Lowest scores -------------------------------------------------------------------------------------------------------


def test_the_lowest_are_counted_exactly_among_equals() -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, -torch.inf, 1.0, 3.0])
    for count, expected in ((0, []), (1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (6, [0, 1, 2, 3, 4, 5])):
        assert lowest(scores, count).nonzero().squeeze(1).tolist() == expected


def test_lists_of_different_sizes_never_exceed_the_total() -> None:
    scores = [torch.tensor([1.0, 5.0, 2.0]), torch.tensor([3.0, 4.0])]
    taken = lowest_of_all(scores, [4, 3], 10, [(0, 3), (0, 2)])
    assert [own.tolist() for own in taken] == [[True, False, True], [False, False]]
    taken = lowest_of_all(scores, [4, 3], 11, [(0, 3), (0, 2)])
    assert [own.tolist() for own in taken] == [[True, False, True], [True, False]]
    taken = lowest_of_all(scores, [1, 1], 3, [(0, 1), (0, 2)])
    assert [own.tolist() for own in taken] == [[True, False, False], [True, True]]
