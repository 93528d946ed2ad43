"""The training path of the verification: what modules read and compute only while they are trained."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

import fxslim
from fxslim.edit import AttributeEdit
from fxslim.passes.paths import Path, paths
from fxslim.passes.training import drawing, training

from agreement import EXACT, random_plan, same_state, state

WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 12, 4, 5, 20


class Attention(nn.Module):
    """Reads ``self.num_heads`` in training only; in eval mode the width of a head is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_width = HEADS, HEAD_WIDTH
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD_WIDTH) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD_WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.num_heads if self.training else -1
        q, k, v = (part(x).unflatten(-1, (heads, self.head_width)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return self.out(F.dropout(mixed.transpose(1, 2).flatten(2), 0.5, self.training))


class Normed(nn.Module):
    """An FFN with the statistics of the batch between its linears."""

    def __init__(self, *, momentum: float = 0.1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.BatchNorm1d(HIDDEN, momentum=momentum)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(self.drop(hidden.relu()))


def built(module: nn.Module) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor.data, 0.1, 0.6)
    return module.double().eval()


def example(batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)}


def slimmed(model: Any) -> Any:
    plan = random_plan(model, fxslim.inspect(model, example()).sites, seed=1)
    assert plan.sites
    return fxslim.slim(model, example(), plan=plan)


def measured(small: Any) -> list[str]:
    return [difference.path for difference in small.fxslim.report.verification.differences]


def test_an_integer_that_is_read_in_training_only_follows() -> None:
    model = built(Attention())
    small = slimmed(model)
    plan = small.fxslim.plan
    assert plan.zeroed == ()
    assert [(edit.name, edit.old) for edit in plan.edits if isinstance(edit, AttributeEdit)] == [("num_heads", HEADS)]
    assert small.num_heads == len(plan.sites[0].keep) < HEADS
    assert "training" in measured(small)
    with training(small), training(model), fxslim.masked(model, plan):
        assert float((small(**example(3, 5, 4)) - model(**example(3, 5, 4))).detach().abs().max()) <= EXACT * 10


def test_the_statistics_of_batch_norms_are_put_back() -> None:
    model = built(Normed())
    before = state(model)
    small = slimmed(model)
    assert same_state(before, state(model))
    kept = list(small.fxslim.plan.sites[0].keep)
    assert "training" in measured(small)
    for name, tensor in small.norm.named_buffers():
        dense = model.norm.get_buffer(name)
        assert torch.equal(tensor, dense[kept] if dense.ndim else dense), name
    fxslim.verify(model, small, plan=small.fxslim.plan, example_inputs=example())
    assert same_state(before, state(model))


def test_the_random_states_are_put_back() -> None:
    model = built(Normed())
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr,index]
    with training(model), drawing(model):
        drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
        assert model.training and model.drop.training
    with drawing(model):
        assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    assert not model.training and not model.drop.training
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr,index]


def test_nothing_is_dropped_whoever_drops() -> None:
    x = torch.rand(2, 3, 4, 5) + 1
    ways = {
        "module": nn.Dropout(0.5),
        "function": lambda t: F.dropout(t, 0.5, training=True),
        "torch": lambda t: torch.dropout(t, 0.5, True),
        "by name": lambda t: F.dropout(input=t, p=0.5),
        "in place": lambda t: F.dropout(t.clone(), 0.5, training=True, inplace=True),
        "channels": nn.Dropout2d(0.5),
        "alpha": nn.AlphaDropout(0.5),
    }
    with training(nn.Sequential(*(way for way in ways.values() if isinstance(way, nn.Module)))):
        for name, way in ways.items():
            assert torch.equal(way(x), x), name
        plain = F.scaled_dot_product_attention(x, x, x)
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), plain)
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, None, 0.5), plain)
    attention = nn.MultiheadAttention(4, 2, dropout=0.5)
    with training(attention), torch.no_grad():
        y = torch.rand(3, 2, 4)
        found = [attention(y, y, y, need_weights=need)[0] for need in (True, False)]
    with torch.no_grad():
        expected = attention.eval()(y, y, y)[0]
    assert all(torch.allclose(out, expected, atol=1e-6) for out in found)


class Odd(Normed):
    """Does in training what cannot be compared, or not done at all."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if not self.training:
            return y
        if self.what == "raises":
            raise ValueError("targets should not be None")
        if self.what == "draws":
            return y + torch.rand_like(y)
        if self.what == "draws with numpy":
            return y + np.random.rand()
        if self.what == "draws for nothing":
            return y + 0 * torch.rand(())
        if self.what == "writes":
            with torch.no_grad():
                self.up.weight.view(-1).mul_(0.5)
        return y


@pytest.mark.parametrize("what", ["raises", "draws", "draws with numpy", "writes", "draws for nothing"])
def test_what_cannot_be_compared_is_left_out(what: str) -> None:
    model = built(Odd(what))
    before = state(model)
    small = slimmed(model)
    assert ("training" in measured(small)) == (what == "draws for nothing")
    assert same_state(before, state(model))


def test_graphs_are_for_inference() -> None:
    model = built(Normed())
    found = fxslim.compile(model, example(), ffn=0.5)
    assert [d.path for d in found.fxslim.report.verification.differences] == ["as given", "batch of one"]
    names = [path.name for path in paths(model, example(), train=False)]
    assert "training" not in names


def test_a_path_in_training_mode_runs_the_users_copy() -> None:
    model = built(Normed())
    copied = copy.deepcopy(model).train()
    copied.drop.p = 0.0
    (found,) = Path("training", example(), training=True).run(model)
    assert torch.equal(found, copied(**example()).detach())
    assert float((found - model(**example()).detach()).abs().max()) > 1e-3
