"""Emitting: a module of our own with the model's names and signature, for inference, that says what it cannot take."""

from __future__ import annotations

import inspect
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


class _Branching(nn.Module):
    """Computes something else for long sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y * 2 if x.shape[1] > 16 else y


def test_defaults_that_cannot_be_written_down_may_be_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor, limit: float = float("inf"), shift: tuple[float, ...] = (1.0, 2.0)) -> Tensor:
            y: Tensor = self.down(torch.relu(self.up(x)))
            return y.clamp(max=limit) + shift[0]

    model = Odd().double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    graph = fxslim.compile(model, x)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(graph(x, limit=float("inf"), shift=(1.0, 2.0)), model(x))
    with pytest.raises(InputError, match="limit"):
        graph(x, limit=1.0)
    with pytest.raises(InputError, match="shift"):
        graph(x, shift=(3.0, 2.0))


def test_a_graph_is_held_to_the_sizes_it_was_traced_for() -> None:
    """Beyond them the model takes another branch, of which the graph knows nothing."""
    model = _Branching().double().eval()
    short, long = Stack((Feed(),)).inputs(3, 16), Stack((Feed(),)).inputs(3, 17)
    graph = fxslim.compile(model, Stack((Feed(),)).inputs())
    assert float((graph(short) - model(short)).detach().abs().max()) < 1e-12
    with pytest.raises(InputError, match=r"input 'x' has size 17 along axis 1; this graph of _Branching holds for siz"):
        graph(long)
    assert [note.where for note in graph.fxslim.report.notes] == ["graph"]
    (note,) = graph.fxslim.report.notes
    assert "16" in note.reason
    assert "x" in note.reason
    small = fxslim.slim(model, short)
    assert torch.equal(small(long), model(long))


def test_a_graph_traced_beyond_a_branch_holds_there_only() -> None:
    model = _Branching().double().eval()
    long = Stack((Feed(),)).inputs(2, 20)
    graph = fxslim.compile(model, long)
    assert float((graph(long) - model(long)).detach().abs().max()) < 1e-12
    with pytest.raises(
        InputError, match=r"has size 16 along axis 1; this graph of _Branching holds for sizes of at least 17"
    ):
        graph(Stack((Feed(),)).inputs(2, 16))


def test_a_graph_of_a_model_that_does_not_branch_has_nothing_to_say() -> None:
    _, graph, inputs = _compiled()
    assert [note.where for note in graph.fxslim.report.notes] == ["method"]  # that it was chosen by magnitude
    assert graph(torch.cat([inputs["x"]] * 20, 1))["out"].shape == (2, 100, 4)


class _Optional(nn.Module):
    """An option that changes the result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, residual: bool = True, power: int = 1) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x))) ** power
        return x + y if residual else y


def test_an_option_that_was_left_out_of_the_trace_keeps_its_default() -> None:
    model, x = _Optional().double().eval(), Stack((Feed(),)).inputs()
    graph = fxslim.compile(model, x)
    for way in (graph(x), graph(x, True), graph(x, residual=True), graph(x, power=1)):
        assert float((way - model(x)).detach().abs().max()) < 1e-12
    with pytest.raises(InputError, match=r"_Optional was compiled without the input 'residual', so it cannot be given"):
        graph(x, residual=False)
    with pytest.raises(InputError, match=r"_Optional was compiled without the input 'power'"):
        graph(x, power=2)
    with pytest.raises(InputError, match=r"_Optional was compiled without the input 'residual'"):
        graph(x, False)


def test_an_option_of_the_trace_has_to_be_given_again() -> None:
    """Refusal: left out, it would be the model's default to everyone who reads the call."""
    model, x = _Optional().double().eval(), Stack((Feed(),)).inputs()
    graph = fxslim.compile(model, {"x": x, "residual": False})
    assert float((graph(x, residual=False) - model(x, residual=False)).detach().abs().max()) < 1e-12
    for wrong in (graph, lambda x: graph(x, True)):
        with pytest.raises(InputError, match=r"_Optional was compiled with residual=False; it cannot take True"):
            wrong(x)


def test_the_signature_shows_the_models_defaults() -> None:
    model, x = _Optional().double().eval(), Stack((Feed(),)).inputs()
    for inputs in (x, {"x": x, "residual": False}):
        parameters = inspect.signature(fxslim.compile(model, inputs).forward).parameters
        assert list(parameters) == ["x", "residual", "power", "options"]
        assert (parameters["residual"].default, parameters["power"].default) == (True, 1)


def test_options_of_transformers_that_say_what_a_graph_does_anyway() -> None:
    """No cache, nothing extra, a dict: what cannot be asked for is the opposite."""
    entry = ARCHITECTURES["gpt2"]
    graph = fxslim.compile(entry.build(), ffn=0.5)
    ids = entry.inputs(batch=2, length=6)["input_ids"]
    plain = graph(ids).logits
    for option in ({"use_cache": False}, {"return_dict": True}, {"output_attentions": False, "return_dict": None}):
        assert torch.equal(graph(ids, **option).logits, plain)
    for name, value in (("return_dict", False), ("use_cache", True), ("output_hidden_states", True)):
        with pytest.raises(InputError, match=f"was compiled without the input '{name}', so it cannot be given now"):
            graph(ids, **{name: value})
