"""Graphs in other dtypes and on other devices: what a cast graph computes is what a cast module computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.dtypes import follow
from fxslim.errors import UnsupportedModelError
from fxslim.inputs import bind
from fxslim.passes.prepare import permanent
from fxslim.trace import trace

from agreement import outputs
from architectures import ARCHITECTURES
from hard import HARD

CASTS = ["bert", "gpt2", "llama_gqa", "bart", "gpt_neox", "qwen3"]


def entry(name: str) -> Any:
    return ARCHITECTURES.get(name) or HARD[name]


def inputs(name: str) -> dict[str, Any]:
    made: dict[str, Any] = entry(name).inputs(3, 9, seed=5)
    return made | ({"use_cache": False} if entry(name).generates or entry(name).decoder else {})


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_graph_is_the_cast_module(name: str) -> None:
    """Casts that are meant (norms in float32) stay, those to the model's own dtype follow, limits of masks too."""
    model = entry(name).build(torch.float32, "eager")
    graph = fxslim.compile(model, ffn=0.4, heads=0.5)
    module = fxslim.slim(model, plan=graph.fxslim.plan)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        found, wanted = outputs(graph.to(dtype), inputs(name)), outputs(module.to(dtype), inputs(name))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert same(found[key], value), (key, dtype)


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_graph_moves_to_another_device(name: str) -> None:
    """On ``meta`` only shapes are computed, but an operation that names a device of its own would raise."""
    graph = fxslim.compile(entry(name).build(torch.float32, "eager"), ffn=0.4, heads=0.5).to("meta")
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs(name).items()}
    assert {value.device.type for value in outputs_of(graph(**given))} == {"meta"}


def same(found: Tensor, wanted: Tensor) -> bool:
    """Compare up to the order of summation: casts in the wrong place would change most elements by more than that."""
    eps = torch.finfo(wanted.dtype).eps
    near = (found - wanted).abs() <= eps * wanted.abs().max() * (64 if eps < 1e-6 else 0)
    return found.dtype == wanted.dtype and float(near.double().mean()) > 0.95


def outputs_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


class Meant(nn.Module):
    """Casts to float32 for a norm, back to what came, and masks with the smallest number of the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.up(x)
        h = h.float().pow(2).to(x.dtype).masked_fill(mask, torch.finfo(x.dtype).min)
        return x + self.down(h.clamp(min=-1.5) * torch.tensor([0.5, 2.0], dtype=torch.float32).sum())


X, MASK = torch.linspace(-1, 1, 24).reshape(2, 3, 4), torch.zeros(2, 3, 6, dtype=torch.bool)


def test_what_follows_is_told_apart_from_what_is_meant() -> None:
    model = Meant()
    program, following = follow(model, trace(permanent(model), *bind(model, (X, MASK))))
    assert following.reason == ""
    assert sorted(what for places in following.places.values() for what in places.values()) == ["dtype", "min"]
    assert following.meant == program.constants
    graph = fxslim.compile(model, (X, MASK), ffn=0.5)
    module = fxslim.slim(model, (X, MASK), plan=graph.fxslim.plan)
    for dtype in (torch.float16, torch.float64):
        assert same(graph.to(dtype)(X.to(dtype), MASK), module.to(dtype)(X.to(dtype), MASK))


class Depends(Meant):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x * 2 if x.dtype == torch.float32 else x, mask)


def test_a_model_that_depends_on_its_dtype_is_not_cast() -> None:
    graph = fxslim.compile(Depends(), (X, MASK), ffn=0.5)
    with pytest.raises(UnsupportedModelError, match=r"runs other operations than in torch\.float32; cast the"):
        graph.to(torch.bfloat16)
    assert graph(X, MASK).dtype == torch.float32


def test_a_model_of_several_dtypes_is_not_cast() -> None:
    model = Meant()
    model.down = nn.Linear(6, 4).double()
    model.forward = lambda x, mask: model.down(model.up(x).double())  # type: ignore[method-assign]
    graph = fxslim.compile(model, (X, MASK), ffn=0.5)
    with pytest.raises(UnsupportedModelError, match=r"several dtypes \(torch.float32, torch.float64\)"):
        graph.half()


class Float32Constant(nn.Module):
    """A table in float32, whatever the model's dtype is, and weights that are all narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None].float() * torch.tensor([1e5 + 0.3, 3000.7], device=x.device)
        return self.down(torch.relu(self.up(x)) + angle.cos().to(x.dtype).sum(-1)[None, :, None])


@pytest.mark.parametrize("start", [torch.bfloat16, torch.float32, torch.float64])
def test_constants_of_another_dtype_keep_it(start: torch.dtype) -> None:
    model = Float32Constant().to(start)
    graph = fxslim.compile(model, X.to(start), ffn=0.5)
    for dtype in (start, torch.float16, torch.float64):
        module = fxslim.slim(model, X.to(start), plan=graph.fxslim.plan).to(dtype)
        assert same(copy.deepcopy(graph).to(dtype)(X.to(dtype)), module(X.to(dtype)))


class OnlyLimit(nn.Module):
    """Names no dtype, but masks with the smallest number of the one it has."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.down(self.up(x).masked_fill(mask, torch.finfo(x.dtype).min).softmax(1))


def test_limits_follow_where_no_dtype_is_named() -> None:
    model = OnlyLimit()
    mask = MASK.clone()
    mask[:, 1] = True
    graph = fxslim.compile(model, (X, mask), ffn=0.5)
    module = fxslim.slim(model, (X, mask), plan=graph.fxslim.plan)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert same(graph.to(dtype)(X.to(dtype), mask), module.to(dtype)(X.to(dtype), mask))


class _CastsByItself(nn.Module):
    """Float32 around a part in bfloat16 to which it casts, so that no float32 copy runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8).bfloat16()
        self.further, self.back = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)).bfloat16()).float()
        found: torch.Tensor = self.back(torch.relu(self.further(y)))
        return found


@pytest.mark.parametrize("entry", [fxslim.slim, fxslim.compile])
def test_a_model_that_casts_by_itself_is_verified_in_its_own_dtypes(entry: Any) -> None:
    torch.manual_seed(0)
    model, x = _CastsByItself().eval(), torch.randn(2, 5, 8)
    small = entry(model, x, ffn=0.5)
    notes = [note for note in small.fxslim.report.notes if note.where == "verified less strictly"]
    assert len(notes) == 1
    assert "a float32 copy of the model does not run: RuntimeError" in notes[0].reason
    weight = small.get_parameter("down.weight")
    assert (weight.shape, weight.dtype) == ((8, 8), torch.bfloat16)
    with torch.no_grad(), fxslim.masked(model, small.fxslim.plan):
        expected = model(x)
    assert torch.allclose(small(x), expected, atol=0.01 * float(expected.abs().max()))
