"""Weights that go in one go: Wanda and SparseGPT against loops in plain numpy, and what they lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import fxslim
from fxslim.errors import InputError, RequestError


class Two(nn.Module):
    """Two linears, one behind the other."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, hidden), nn.Linear(hidden, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.second(self.first(input_ids).tanh())
        return out


def data(seed: int = 0, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    return [{"input_ids": torch.randn(4, 6, 8, generator=generator, dtype=torch.float64) @ mix} for _ in range(count)]


def sparsegpt(weight: np.ndarray, x: np.ndarray, drop: int | None, of: int, fraction: float) -> np.ndarray:
    """Solve row by row and column by column, with the inverse Hessian of what is left recomputed at every column."""
    weight = weight.copy()
    hessian = 2 * x.T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    width = weight.shape[1]
    gone = np.zeros(weight.shape, dtype=bool)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(width)]  # of the columns from j on
    scale = np.array([inverse[0, 0] for inverse in inverses])
    if drop is None:
        order = np.argsort((weight**2 / scale).ravel())
        gone.ravel()[order[: int(fraction * weight.size)]] = True
    for j in range(width):
        if drop is not None and j % of == 0:
            scores = weight[:, j : j + of] ** 2 / scale[j : j + of]
            np.put_along_axis(gone[:, j : j + of], scores.argsort(1)[:, :drop], values=True, axis=1)
        for row in range(len(weight)):
            if gone[row, j]:
                weight[row, j:] -= weight[row, j] / scale[j] * inverses[j][0]
                weight[row, j] = 0
    return weight


@pytest.mark.parametrize(("pattern", "drop", "of"), [("1x1", None, 1), ("2:4", 2, 4), ("1:4", 1, 4)])
def test_sparsegpt(pattern: str, drop: int | None, of: int) -> None:
    """Layer by layer, the second one on what the first one has become."""
    model = Two().double()
    fraction = 0.5 if drop is None else drop / of
    small: Any = fxslim.sparsify(model, pattern=pattern, fraction=fraction, calibration=data())
    x = torch.cat([batch["input_ids"] for batch in data()]).reshape(-1, 8).numpy()
    first = sparsegpt(model.first.weight.detach().numpy(), x, drop, of, fraction)
    assert np.allclose(small.first.weight.detach().numpy(), first, rtol=1e-6, atol=1e-9)
    hidden = np.tanh(x @ first.T + model.first.bias.detach().numpy())
    second = sparsegpt(model.second.weight.detach().numpy(), hidden, drop, of, fraction)
    assert np.allclose(small.second.weight.detach().numpy(), second, rtol=1e-6, atol=1e-9)
    assert (small.first.weight == 0).sum() == fraction * 96


@pytest.mark.parametrize(("pattern", "of"), [("1x1", 8), ("2:4", 4)])
def test_wanda(pattern: str, of: int) -> None:
    model = Two().double()
    small: Any = fxslim.sparsify(model, pattern=pattern, fraction=0.5, method="wanda", calibration=data())
    x = torch.cat([batch["input_ids"] for batch in data()]).reshape(-1, 8).numpy()
    weight = model.first.weight.detach().numpy()
    scores = (np.abs(weight) * np.sqrt((x**2).sum(0))).reshape(len(weight), -1, of)
    expected = np.ones_like(scores)
    np.put_along_axis(expected, scores.argsort(-1)[..., : of // 2], values=0.0, axis=-1)
    assert np.array_equal(small.first.weight.detach().numpy(), weight * expected.reshape(weight.shape))


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2:4", "channelx1", "1xchannel"])
def test_magnitude(pattern: str) -> None:
    model = Two().double()
    small: Any = fxslim.sparsify(model, fraction=0.5, pattern=pattern)
    assert (small.first.weight == 0).sum() == 48
    assert torch.equal(small.first.weight[small.first.weight != 0], model.first.weight[small.first.weight != 0])


def test_columns_beyond_one_block_are_updated() -> None:
    """Over more than 128 columns the error is still less than without any update, and the count exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 8)).double()
    mix = torch.randn(300, 300, dtype=torch.float64) / 10
    batches = [torch.randn(500, 300, dtype=torch.float64) @ mix for _ in range(4)]
    lost = {}
    for method in ("wanda", "sparsegpt"):
        small: Any = fxslim.sparsify(model, fraction=0.6, method=method, calibration=batches[:3])
        assert (small[0].weight == 0).sum() == 0.6 * 2400
        lost[method] = float((small(batches[3]) - model(batches[3])).square().sum().detach())
    magnitude: Any = fxslim.sparsify(model, fraction=0.6)
    lost["magnitude"] = float((magnitude(batches[3]) - model(batches[3])).square().sum().detach())
    assert lost["sparsegpt"] < 0.7 * lost["wanda"] < lost["magnitude"]


def test_real_models_lose_less_by_sparsegpt() -> None:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=3,
                                vocab_size=99))  # fmt: skip
    gpt = GPT2Model(GPT2Config(n_embd=32, n_head=4, n_layer=3, vocab_size=99))
    batches = [{"input_ids": torch.randint(5, 99, (8, 12))} for _ in range(10)]
    for model in (bert.double().eval(), gpt.double().eval()):
        lost = {}
        for method in ("sparsegpt", "wanda", "magnitude"):
            given: dict[str, Any] = {} if method == "magnitude" else {"calibration": batches[:8]}
            where = "h.*" if model is gpt else "encoder.*"
            small: Any = fxslim.sparsify(model, pattern="2:4", method=method, include=where, **given)
            with torch.no_grad():
                pairs = [(small(**b).last_hidden_state, model(**b).last_hidden_state) for b in batches[8:]]
            lost[method] = float(sum((a - b).square().sum() for a, b in pairs))
            for name, module in small.named_modules():
                if "attn.c_attn" in name:  # inputs come first: N of M along them, not along the outputs
                    assert ((module.weight.T.reshape(-1, 4) == 0).sum(1) == 2).all()
        assert lost["sparsegpt"] < lost["magnitude"]


def test_padding_says_nothing() -> None:
    model = Two().double()
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    batches = [{**batch, "attention_mask": mask} for batch in data()]
    other = [{**b, "input_ids": torch.where(mask[..., None] == 0, 7.0, b["input_ids"])} for b in batches]
    first, second = (fxslim.sparsify(model, fraction=0.5, calibration=own) for own in (batches, other))
    for mine, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_see_their_patches(dims: int) -> None:
    """A convolution is a linear over patches: the same zeros, the same weights."""
    torch.manual_seed(0)
    if dims == 1:
        conv: Any = nn.Conv1d(4, 6, 3, stride=2, padding=1).double()
        x = torch.randn(5, 4, 9, dtype=torch.float64)
        patches = functional.pad(x, (1, 1)).unfold(2, 3, 2).permute(0, 2, 3, 1).reshape(-1, 12)
        matrix = conv.weight.permute(0, 2, 1).reshape(6, 12)
    else:
        conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)).double()
        x = torch.randn(5, 4, 7, 6, dtype=torch.float64)
        patches = functional.pad(x, (0, 0, 1, 1)).unfold(2, 3, 2).unfold(3, 2, 1)
        patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(-1, 24)
        matrix = conv.weight.permute(0, 2, 3, 1).reshape(6, 24)
    linear = nn.Linear(matrix.shape[1], 6).double()
    with torch.no_grad():
        linear.weight.copy_(matrix)
    for method in ("wanda", "sparsegpt"):
        small: Any = fxslim.sparsify(nn.Sequential(conv), pattern="2:4", method=method, calibration=[x])
        expected: Any = fxslim.sparsify(nn.Sequential(linear), pattern="2:4", method=method, calibration=[patches])
        order = (0, 2, 1) if dims == 1 else (0, 2, 3, 1)
        found = small[0].weight.permute(order).reshape(6, -1)
        assert torch.allclose(found, expected[0].weight, rtol=1e-9, atol=1e-11)


def test_the_model_itself_is_not_changed() -> None:
    model = Two().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = fxslim.sparsify(model, fraction=0.5, calibration=data())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small.training
    assert not any(module._forward_pre_hooks for module in small.modules())


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"fraction": 0.5, "method": "wandb"}, RequestError, "Did you mean wanda"),
        ({"fraction": 0.5, "method": "wanda"}, RequestError, "calibration= is missing"),
        ({"fraction": 0.5, "method": "magnitude", "calibration": []}, RequestError, "does nothing"),
        ({"fraction": 0.5, "pattern": "4x1", "calibration": data()}, RequestError, "not pattern='4x1'"),
        ({"pattern": "1x1"}, RequestError, "say how much"),
        ({"fraction": 0.5, "calibration": []}, InputError, "no batch"),
        ({"fraction": 0.5, "include": "third"}, RequestError, "matches no layer"),
        ({"fraction": 0.5, "kinds": ("Conv",)}, RequestError, "no layer"),
    ],
)
def test_bad_requests_say_what_is_wrong(asked: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fxslim.sparsify(Two().double(), **asked)


def test_layers_that_cannot_be_seen_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)).double()
    with pytest.warns(UserWarning, match="0: weights stay: grouped"):
        small: Any = fxslim.sparsify(model, fraction=0.5, calibration=[torch.randn(2, 4, 5, 5, dtype=torch.float64)])
    assert (small[1].weight == 0).sum() == 8
    assert (small[0].weight == 0).sum() == 0
