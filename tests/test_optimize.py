"""Optimized graphs: what they compute, what is joined, folded and left out, and what is refused."""

from __future__ import annotations

import copy
import pickle
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim import count
from fxslim.errors import InputError, UnsupportedModelError
from fxslim.passes.emit import CompiledModule
from fxslim.passes.inference import prepack
from fxslim.passes.inference.fold import SMALL
from fxslim.passes.inference.optimized import PackedModule
from fxslim.passes.paths import tensors_of
from fxslim.pipeline import Facts, Pass

from architectures import ARCHITECTURES
from hard import HARD

CASES = {**ARCHITECTURES, **HARD}
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
JOINED = {
    "bert": (13, 9),  # two layers of q, k, v and three more, a pooler
    "gpt2": (9, 9),  # its q, k and v are one matrix already
    "llama_gqa": (15, 9),  # gate and up as well
    "bart": (33, 23),  # k and v of cross attention: their query reads something else
    "t5": (33, 23),
    "vit_classify": (13, 9),
}
"""Products with a weight in the graph, and in the optimized one."""


@lru_cache(maxsize=2)
def compiled(name: str, dtype: torch.dtype = torch.float64, **asked: float) -> CompiledModule:
    graph = fxslim.compile(CASES[name].build(dtype, "sdpa"), **asked)
    assert isinstance(graph, CompiledModule)
    return graph


def products(graph: CompiledModule) -> int:
    return sum(str(node.target).startswith(("aten.linear", "aten.addmm", "aten.mm")) for node in graph.graph.nodes)


def operations(graph: CompiledModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def agree(graph: nn.Module, made: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        expected, found = tensors_of(graph(**inputs)), tensors_of(made(**inputs))
    assert [t.shape for t in expected] == [t.shape for t in found]
    assert [t.dtype for t in expected] == [t.dtype for t in found]
    for want, got in zip(expected, found, strict=True):
        scale = float(want.abs().max())
        assert scale > 1e-3, "it is zero: nothing would show"
        assert float((want - got).abs().max()) <= RELATIVE[want.dtype] * scale


@pytest.mark.parametrize("name", JOINED)
def test_it_computes_the_same_at_every_size_with_fewer_products(name: str) -> None:
    graph = compiled(name)
    code, state = graph.code, {key: value.clone() for key, value in graph.state_dict().items()}
    made = fxslim.optimize(graph)
    assert (products(graph), products(made)) == JOINED[name]
    assert len(operations(made)) < len(operations(graph))
    for batch, length in ((1, 5), (4, 12)):
        inputs = CASES[name].inputs(batch, length, seed=3, dtype=torch.float64)
        agree(graph, made, inputs)
    assert graph.code == code
    assert all(torch.equal(value, state[key]) for key, value in graph.state_dict().items())
    assert type(made(**inputs)) is type(graph(**inputs))


def test_a_graph_of_the_module_forms_plan_is_optimized() -> None:
    """The plan edits integers of modules as well, which a graph does not have."""
    model = CASES["llama_gqa"].build(torch.float64, "sdpa")
    small: Any = fxslim.slim(model, heads=0.5)
    assert small.fxslim.plan.edits
    made = fxslim.optimize(fxslim.compile(model, plan=small.fxslim.plan))
    agree(small, made, CASES["llama_gqa"].inputs(2, 7, seed=3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_is_optimized_in_the_dtype_that_it_was_cast_to(dtype: torch.dtype) -> None:
    graph = copy.deepcopy(compiled("llama_gqa", torch.float32, ffn=0.5)).to(dtype)
    made = fxslim.optimize(graph)
    assert {p.dtype for p in made.parameters()} >= {dtype}
    agree(graph, made, CASES["llama_gqa"].inputs(3, 9, seed=3))
    casts = sum(".to." in name or "_to_copy" in name for name in operations(made))
    before = sum(".to." in name or "_to_copy" in name for name in operations(graph))
    assert casts < before if dtype == torch.float32 else casts > 0  # norms compute in float32


def _t5_with_wide_products(dtype: torch.dtype) -> nn.Module:
    """Build a T5 as transformers loads it in half precision: ``wo`` stays in float32."""
    model = CASES["t5"].build(dtype, "sdpa")
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_of_several_dtypes_is_optimized_in_them(dtype: torch.dtype) -> None:
    model = _t5_with_wide_products(dtype)
    graph = fxslim.compile(model, ffn=0)
    made = fxslim.optimize(graph)
    assert (products(graph), products(made)) == JOINED["t5"]
    assert {p.dtype for p in made.parameters()} == {dtype, torch.float32}
    inputs = CASES["t5"].inputs(3, 9, seed=3)
    agree(graph, made, inputs)
    with torch.no_grad():
        assert float((model(**inputs).logits - made(**inputs).logits).abs().max()) < 0.05
    assert made.to("cpu") is made
    with pytest.raises(UnsupportedModelError, match=r"stays in torch\.float"):
        made.to(dtype)


class _WideNorm(nn.Module):
    """Takes bfloat16; its norm is in float32, and so is what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.gate, self.down = (nn.Linear(*sizes).bfloat16() for sizes in ((8, 16), (8, 16), (16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.down(torch.relu(self.up(x)) * self.gate(x)).float())
        return y


def test_inputs_of_a_graph_of_several_dtypes_are_those_of_the_trace() -> None:
    torch.manual_seed(0)
    model, x = _WideNorm().eval(), torch.randn(3, 5, 8).bfloat16()
    graph = fxslim.compile(model, x, ffn=0)
    made = fxslim.optimize(graph)
    assert (products(graph), products(made)) == (3, 2)
    agree(model, made, {"x": x[:2]})


def test_a_wrong_graph_of_several_dtypes_is_found() -> None:
    """Refusal: a graph that cannot be cast is measured by a copy that computes in float32 throughout."""
    torch.manual_seed(0)
    graph = fxslim.compile(_WideNorm().eval(), torch.randn(3, 5, 8).bfloat16(), ffn=0)
    with pytest.raises(UnsupportedModelError, match="does not compute what the given one does"):
        fxslim.optimize(graph, observer=_spoiled(1.03))


def test_a_graph_that_does_not_run_is_refused_with_the_reason() -> None:
    graph, _ = _plain()
    graph = copy.deepcopy(graph)
    graph.first.half()
    with pytest.raises(UnsupportedModelError, match=r"does not run on the inputs.*RuntimeError.*same dtype"):
        fxslim.optimize(graph)


class _Plain(nn.Module):
    """Two linears of one input, one of which is tied to a third; dropout, copies, and constants of all kinds."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(4, 3)
        self.again = nn.Linear(4, 6)
        if tied:
            self.again.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(1, 4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x).clone() * self.scale.exp().expand(3, 4).sum(0)
        pieces = [self.first(x), self.second(x), self.third(x)]
        table = torch.ones(700, 700, dtype=x.dtype).cumsum(0)[: x.shape[1], 5]  # large to store, and small to read
        return torch.cat(pieces, -1) * table[:, None] + nn.functional.pad(self.again(x[..., :4] + 1), (0, 8))


def _plain(**options: bool) -> tuple[CompiledModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    graph = fxslim.compile(_Plain(**options).double().eval(), x, ffn=0)
    assert isinstance(graph, CompiledModule)
    return graph, x


@pytest.mark.parametrize(("name", "masks"), [("bert", 1), ("llama_gqa", 1), ("bart", 3), ("vit_classify", 1)])
def test_masks_become_numbers_once(name: str, masks: int) -> None:
    graph = compiled(name)
    made = fxslim.optimize(graph)
    inputs = CASES[name].inputs(3, 9, seed=3, dtype=torch.float64)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 2:] = 0
    agree(graph, made, inputs)
    fills = [node for node in made.graph.nodes if str(node.target) == "aten.masked_fill.Scalar"]
    read = {node.args[3] for node in made.graph.nodes if "scaled_dot" in str(node.target) and len(node.args) > 3}
    assert len(fills) == masks
    assert set(fills) <= read


def test_tied_weights_are_left_alone() -> None:
    for tied, left in ((False, 2), (True, 3)):
        graph, x = _plain(tied=tied)
        made = fxslim.optimize(graph)
        assert (products(graph), products(made)) == (4, left)
        agree(graph, made, {"x": x[:, :3]})
    assert any(p.data_ptr() == graph.first.weight.data_ptr() for p in made.parameters())


def test_constants_are_computed_once_and_stay_small() -> None:
    graph, _ = _plain()
    made = fxslim.optimize(graph)
    assert [name for name in operations(graph) if "exp." in name or "sum" in name]
    assert not [name for name in operations(made) if "aten.exp." in name or "sum.dim" in name or "dropout" in name]
    given = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    kept = sum(t.numel() * t.element_size() for t in made.state_dict().values())
    assert kept < given + SMALL
    assert any("cumsum" in name for name in operations(made))  # its result would be larger than what it replaces
    agree(graph, made, {"x": torch.randn(7, 9, 4, dtype=torch.float64)})


def test_the_check_of_inputs_stays() -> None:
    made = fxslim.optimize(_plain()[0])
    with pytest.raises(InputError, match=r"input 'x' has shape \(2, 5, 3\), but axis 2 was fixed at 4"):
        made(torch.randn(2, 5, 3, dtype=torch.float64))


def test_a_cast_to_the_dtype_that_it_has_changes_nothing() -> None:
    graph = copy.deepcopy(compiled("llama_gqa", torch.float32, ffn=0.5)).to(torch.bfloat16)
    made = fxslim.optimize(graph)
    before = {name: own.clone() for name, own in made.state_dict().items()}
    assert torch.float32 in {own.dtype for own in before.values()}, "no constant is kept in another dtype"
    for same in (
        made.bfloat16(),
        made.to(torch.bfloat16),
        made.to("cpu", torch.bfloat16),
        copy.deepcopy(made).bfloat16(),
    ):
        after = same.state_dict()
        assert all(after[name].dtype == own.dtype and torch.equal(after[name], own) for name, own in before.items())
    with pytest.raises(UnsupportedModelError, match=r"stays in torch\.bfloat16 on cpu"):
        made.float()
    agree(graph, made, CASES["llama_gqa"].inputs(3, 9, seed=3))


class _Casting(nn.Module):
    """Casts its input: what that does depends on the input that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x.to(torch.float32).to(torch.float32))))
        return y * mask.to(torch.int64)[..., None]


def test_casts_stay_where_other_inputs_need_them() -> None:
    model = _Casting().eval()
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 2, 0], [1, 3, 1, 1, 1]])
    made = fxslim.optimize(fxslim.compile(model, {"x": x, "mask": mask}))
    assert sum(".to." in name or "_to_copy" in name for name in operations(made)) == 2
    for other in (x, x.double()):
        for numbers in (mask, mask.to(torch.int32), mask.bool()):
            assert torch.equal(made(other, numbers), model(other, numbers))


def test_it_is_for_inference_on_one_device_in_one_dtype() -> None:
    graph, x = _plain()
    made = fxslim.optimize(graph)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    with pytest.raises(UnsupportedModelError, match=r"a compiled graph is for inference"):
        made.train()
    for change in (lambda: made.float(), lambda: made.to("meta")):
        with pytest.raises(
            UnsupportedModelError, match=r"optimized graph stays in torch\.float64 on cpu.*optimize that"
        ):
            change()
    assert made.double() is made
    agree(made, copy.deepcopy(made), {"x": x})
    with pytest.raises(UnsupportedModelError, match="stays in"):
        copy.deepcopy(made).float()


def test_what_cannot_be_optimized_is_refused() -> None:
    graph, _ = _plain()
    with pytest.raises(InputError, match=r"optimize takes what fxslim\.compile returns, not Linear"):
        fxslim.optimize(nn.Linear(3, 3))
    with pytest.raises(InputError, match="optimized already"):
        fxslim.optimize(fxslim.optimize(graph))
    with pytest.raises(UnsupportedModelError, match="on meta"):
        fxslim.optimize(copy.deepcopy(graph).to("meta"))


def _spoiled(factor: float) -> Any:
    """Return an observer that changes a joined weight."""

    def spoil(_before: Facts, step: Pass, after: Facts, _seconds: float) -> None:
        if type(step).__name__ == "FuseLinears":
            for known in after.known.values():
                next(t for name, t in known.tensors.items() if name.startswith("joined")).mul_(factor)

    return spoil


def test_a_pass_that_changes_results_is_found_and_the_graph_stays() -> None:
    """Refusal: nothing is trusted that was not compared."""
    graph, x = _plain()
    before = graph(x)

    with pytest.raises(
        UnsupportedModelError, match=r"does not compute what the given one does \(as traced: largest dif"
    ):
        fxslim.optimize(graph, observer=_spoiled(1.01))
    assert torch.equal(graph(x), before)


PACKED = {"bert": 9, "gpt2": 8, "llama_gqa": 9, "bart": 22, "t5": 22, "vit_classify": 9}
"""Products with a packed weight: heads that are tied to embeddings stay."""
needs_onednn = pytest.mark.skipif(torch.float32 not in prepack.dtypes(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("name", JOINED)
def test_prepacked_weights_compute_the_same_at_every_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "SMALL", 0)
    graph = compiled(name, torch.float32)
    state = {key: value.clone() for key, value in graph.state_dict().items()}
    made = fxslim.optimize(graph, prepack=True)
    packed = [node for node in made.graph.nodes if node.target is torch.ops.mkldnn._linear_pointwise.default]
    assert isinstance(made, PackedModule)
    assert len(packed) == len(made.packed) == PACKED[name]
    assert count.parameters(made) == count.parameters(fxslim.optimize(graph))
    for batch, length in ((1, 5), (4, 12)):
        inputs = CASES[name].inputs(batch, length, seed=3, dtype=torch.float32)
        agree(graph, made, inputs)
    copied = copy.deepcopy(made)
    assert isinstance(copied, PackedModule)
    agree(made, copied, inputs)
    assert not {*map(id, copied.packed)} & {*map(id, made.packed)}
    assert made.float() is made
    agree(graph, made, inputs)
    with pytest.raises(UnsupportedModelError, match="stays in"):
        made.double()
    assert all(torch.equal(value, state[key]) for key, value in graph.state_dict().items())


@needs_onednn
def test_prepacked_weights_are_counted_measured_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepack, "SMALL", 0)
    graph = compiled("bert", torch.float32)
    forms = {"fast": fxslim.optimize(graph), "packed": fxslim.optimize(graph, prepack=True)}
    found = fxslim.benchmark(forms, CASES["bert"].inputs(2, 6), max_seconds=0.2)
    (point,) = found.points
    assert point.macs["fast"] == point.macs["packed"] > 0
    drawn = [[op.shape for op in fxslim.draw(own, tmp_path / "graph.json").ops if "linear" in op.op]
             for own in forms.values()]  # fmt: skip
    assert drawn[0] == drawn[1]
    assert len(drawn[1]) == PACKED["bert"]


@needs_onednn
def test_what_packed_products_would_do_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "SMALL", 0)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).eval(), torch.randn(2, 5, 4)
    graph = fxslim.compile(model, x)
    made = fxslim.optimize(graph, prepack=True)
    asked = x.clone().requires_grad_()
    with pytest.raises(InputError, match="has no gradients"):
        made(asked)
    with torch.no_grad():
        agree(graph, made, {"input": asked})
    made.requires_grad_()
    assert not made(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(InputError, match="autocast does not reach it"):
            made(x)
        with pytest.raises(InputError, match="does not go together with autocast"):
            fxslim.optimize(graph, prepack=True)
    for write in (pickle.dumps, lambda own: own.state_dict()):
        with pytest.raises(UnsupportedModelError, match=r"for this process alone.*optimize that again"):
            write(made)
    for read in (fxslim.inspect, fxslim.plan, fxslim.compile):
        with pytest.raises(UnsupportedModelError, match=r"fxslim\.optimize made of another model: narrow that one"):
            read(made, x)
        with pytest.raises(UnsupportedModelError, match=r"packed_\d+ is laid out for products of oneDNN alone"):
            read(nn.Sequential(made), x)
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(UnsupportedModelError, match="nothing to prepack"):
        fxslim.optimize(graph, prepack=True)


@needs_onednn
def test_small_and_shared_weights_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = _plain()
    for match, own in (("nothing to prepack", graph), ("nothing to prepack.*oneDNN", compiled("bert", torch.float32))):
        with pytest.raises(UnsupportedModelError, match=match):
            fxslim.optimize(own, prepack=True)
    monkeypatch.setattr(prepack, "SMALL", 0)
    with pytest.raises(UnsupportedModelError, match="nothing to prepack"):  # float64
        fxslim.optimize(graph, prepack=True)
    with pytest.raises(InputError, match="do not go together"):
        fxslim.optimize(graph, prepack=True, inductor=True)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.down(torch.relu(self.up(self.words(ids))))
            return y @ self.words.weight.T

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    tied = fxslim.compile(Tied().eval(), ids)
    made = fxslim.optimize(tied, prepack=True)
    assert isinstance(made, PackedModule)
    assert len(made.packed) == 2
    agree(tied, made, {"ids": ids})


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same_at_every_size_behind_the_same_check() -> None:
    graph, x = _plain()
    made = fxslim.optimize(graph, inductor=True)
    assert [node.op for node in made.graph.nodes] == ["placeholder", "call_module", "output"]
    for inputs in (x, x[:1], torch.randn(7, 9, 4, dtype=torch.float64)):
        agree(graph, made, {"x": inputs})
    with pytest.raises(InputError, match="axis 2 was fixed at 4"):
        made(x[..., :3])
    with pytest.raises(UnsupportedModelError, match="stays in"):
        made.float()


def test_numbers_that_are_drawn_are_drawn_every_time() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(torch.relu(self.up(x)))
            return y + torch.rand(4) - torch.rand(4)

    made = fxslim.optimize(fxslim.compile(Noise().eval(), torch.randn(2, 5, 4)))
    assert sum("rand" in name for name in operations(made)) == 2
    x = torch.randn(2, 5, 4)
    assert not torch.equal(made(x), made(x))


class _Returning(nn.Module):
    """Returns what a caller may write into: a constant, a copy of the input, and the same computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.scale.exp()
        y = self.down(torch.relu(self.up(x))) * made
        twice = y.softmax(-1), self.drop(y.softmax(-1)).transpose(0, 1)
        return (y, made, made.expand(3, 4)[1:], x.clone(), self.drop(x.contiguous() * 1), *twice)


def test_results_are_the_callers_own() -> None:
    torch.manual_seed(0)
    model, x = _Returning().eval(), torch.randn(2, 5, 4)
    made = fxslim.optimize(fxslim.compile(model, x))
    given, expected = x.clone(), [value.clone() for value in model(x)]
    for place in range(len(expected)):
        results = made(x)
        same = {2: 1, 1: 2}.get(place)  # one is a view of the other in the model, too
        results[place].zero_()
        assert torch.equal(x, given)
        for other, value in enumerate(results):
            assert other in (place, same) or torch.allclose(value, expected[other], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made(x), expected, strict=True))


class _Heads(nn.Module):
    """Two heads of one value, of which one is a view; a copy whose need depends on the caller; an expanded constant."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.down(torch.relu(self.up(x)))
        y = y * (self.scale.exp().expand(3, 4) * 1).sum(0) + (y[0, :3] * self.scale.expand(3, 4)).sum()
        copies = x.clone(memory_format=torch.contiguous_format).view(x.shape[0], -1, 2)
        return self.first(y), self.second(y).unsqueeze(0), copies


def test_memory_of_results_copies_and_constants() -> None:
    from fxslim.passes.inference.optimized import through_inductor

    torch.manual_seed(0)
    graph = fxslim.compile(_Heads().eval(), torch.randn(2, 5, 4))
    made = fxslim.optimize(graph)
    for x in (torch.randn(2, 5, 4), torch.randn(2, 4, 5).mT):
        for want, got in zip(graph(x), made(x), strict=True):
            assert want.stride() == got.stride()
            assert torch.allclose(want, got, atol=1e-6)
        made(x)[0].view(-1)
    made.load_state_dict(made.state_dict())
    again = copy.deepcopy(through_inductor(made))
    assert again.get_submodule("operations")._compiled_call_impl is not None
