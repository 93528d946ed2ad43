"""Emitting: a module of our own with the model's names and signature, for inference, that says what it cannot take."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxslim
from fxslim.errors import InputError, UnsupportedModelError
from fxslim.passes.emit import CompiledModule

from architectures import ARCHITECTURES
from stacks import Feed, Stack


class _Model(nn.Module):
    """A signature with defaults, options and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.again = nn.Linear(4, 6, bias=False)
        self.again.weight = self.up.weight
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, **options: Any) -> dict[str, Tensor]:
        y = self.down(torch.relu(self.up(x)) + self.again(x)) * scale + self.shift
        return {"out": y if mask is None else y * mask[..., None]}


def _compiled(*, mask: bool = False) -> tuple[nn.Module, CompiledModule, dict[str, Tensor]]:
    model = _Model().double()
    inputs = {"x": Stack((Feed(),)).inputs()}
    if mask:
        inputs["mask"] = torch.ones(2, 5, dtype=torch.float64)
    return model, fxslim.compile(model, inputs, ffn=0.5), inputs


def test_names_aliases_buffers_and_output_are_the_models() -> None:
    model, graph, inputs = _compiled()
    assert isinstance(graph, fx.GraphModule)
    assert type(graph).__name__ == "_Model"
    assert set(graph.state_dict()) == set(model.state_dict())
    assert graph.again.weight is graph.up.weight
    assert {name for name, _ in graph.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert list(graph(**inputs)) == ["out"]


def test_calls_by_position_keyword_and_with_defaults_agree() -> None:
    _, graph, inputs = _compiled()
    x = inputs["x"]
    first = graph(x)["out"]
    for again in (graph(x=x), graph(x, None), graph(x, scale=2.0), graph(x, None, 2.0)):
        assert torch.equal(again["out"], first)


def test_options_that_were_not_traced_are_named() -> None:
    _, graph, inputs = _compiled()
    x = inputs["x"]
    with pytest.raises(InputError, match="_Model was compiled without the input 'scale', so it cannot be given now"):
        graph(x, scale=3.0)
    with pytest.raises(InputError, match="compiled without the input 'mask'"):
        graph(x, torch.ones(2, 5))
    with pytest.raises(InputError, match="compiled without the input 'colour'"):
        graph(x, colour="red")
    assert graph(x, colour=None)["out"].shape == x.shape


def test_inputs_that_do_not_fit_are_named() -> None:
    _, graph, inputs = _compiled(mask=True)
    x, mask = inputs["x"], inputs["mask"]
    with pytest.raises(InputError, match="_Model was compiled with the input 'mask'; give it"):
        graph(x)
    with pytest.raises(InputError, match=r"input 'x' has shape \(2, 5, 3\), but axis 2 was fixed at 4"):
        graph(x[..., :3], mask)
    with pytest.raises(InputError, match=r"input 'x' is torch\.int64; _Model was compiled with another kind"):
        graph(x.long(), mask)
    with pytest.raises(InputError, match=r"input 'x' must be a tensor, not int|another structure of the input 'x'"):
        graph(3, mask)


def test_it_is_for_inference() -> None:
    _, graph, _ = _compiled()
    assert not graph.training
    assert graph.eval() is graph
    with pytest.raises(UnsupportedModelError, match=r"a compiled graph is for inference.*Use fxslim\.slim"):
        graph.train()


def test_it_moves_and_casts() -> None:
    _, graph, inputs = _compiled()
    wide = graph(**inputs)["out"]
    single = graph.float()(inputs["x"].float())["out"]
    assert single.dtype == torch.float32
    assert float((single - wide).detach().abs().max()) < 1e-5
    assert graph.to("meta")(inputs["x"].float().to("meta"))["out"].device.type == "meta"


def test_it_survives_saving() -> None:
    _, graph, inputs = _compiled()
    file = io.BytesIO()
    torch.save(graph.state_dict(), file)
    file.seek(0)
    wanted = graph(**inputs)["out"]
    _, other, _ = _compiled()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(**inputs)["out"], wanted)


def test_no_export_leftovers() -> None:
    entry = ARCHITECTURES["llama_gqa"]
    graph = fxslim.compile(entry.build(), ffn=0.5)
    names = {str(node.target) for node in graph.graph.nodes}
    assert not [name for name in names if "assert" in name or "guard" in name]
    assert not [node for node in graph.graph.nodes if "cpu" in str(node.args) + str(node.kwargs)]


def test_masks_that_may_be_left_out_are_ones() -> None:
    entry = ARCHITECTURES["bert"]
    graph = fxslim.compile(entry.build(), ffn=0.5)
    ids = entry.inputs(batch=3, length=6)["input_ids"]
    given, left_out = graph(ids, attention_mask=torch.ones_like(ids)), graph(ids)
    assert torch.equal(given.last_hidden_state, left_out.last_hidden_state)
    assert type(given).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
