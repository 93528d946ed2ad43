"""Models whose forward asks the data which way to go: traced, narrowed and compiled region by region."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import fxslim
import fxslim.regions as regions
from fxslim.errors import InputError, TraceError, UnsupportedModelError
from fxslim.plan import Plan
from fxslim.report import Inspection

from agreement import EXACT, difference, outputs, random_plan, same_state, state

D, HIDDEN, HEADS, VOCAB = 8, 24, 4, 13


class Feed(nn.Module):
    """A feed-forward network with an option."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x))) * scale
        return out if mask is None else out * mask[..., None]


class Attention(nn.Module):
    """Attention over heads that are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """A transformer layer that returns two things."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), Feed()

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x = x + self.attention(x, bias)
        return x + self.feed(x), {"mean": x.mean(), "nothing": None}


class Switch(nn.Module):
    """Take one branch or the other, with the same blocks in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_zeros(1, 1, x.shape[1], x.shape[1])
        order = [0, 1, 2] if x.sum() > 0 else [2, 0, 1, 1]
        for index in order:
            x, extra = self.layers[index](x, bias=bias)
            x = x + extra["mean"]
        out: Tensor = self.norm(x)
        return out


class Loop(nn.Module):
    """Call one block as often as the data says, once more with another option, and with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed()

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        for _ in range(int(steps.max().item())):
            x = x + self.feed(x)
        x = x + self.feed(x[:, 0], scale=0.5)[:, None]
        out: Tensor = self.feed(x, (x.sum(-1) > 0).to(x.dtype))
        return out


class Routing(nn.Module):
    """Send every row to the expert that the data says: none, one or many rows each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3)
        self.experts = nn.ModuleList(Feed() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == number)[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]))
        return out.view_as(x)


class Stack(nn.Module):
    """A stack that cannot be traced itself, around layers that can."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Feed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            if x.abs().max() > 1e6:
                break
        return x


class Nested(nn.Module):
    """Stacks inside a model that asks as well, a feed-forward network of its own, and a branch that is never taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(Stack() for _ in range(4))
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.rare = Feed()

    def forward(self, x: Tensor) -> Tensor:
        for stack in self.stacks:
            x = stack(x)
        x = self.down(torch.relu(self.up(x)))
        return self.rare(x) if x.abs().max() > 1e6 else x


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], int]] = {
    "switch": (Switch, lambda seed: (numbers(3, 5, D, seed=seed),), 6),
    "loop": (Loop, lambda seed: (numbers(3, 5, D, seed=seed), torch.tensor([seed % 3 + 1, 1])), 1),
    "routing": (Routing, lambda seed: (numbers(2, 5 if seed else 40, D, seed=seed),), 3),
    "nested": (Nested, lambda seed: (numbers(3, 5, D, seed=seed),), 8),
}
"""Model, inputs of a seed, number of sites."""


def numbers(*shape: int, seed: int) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in float64 with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double().eval()


@cache
def case(name: str) -> tuple[nn.Module, Inspection, Plan]:
    """Return a model, what is found in it, and a plan that removes units of every site."""
    kind, inputs, _ = CASES[name]
    model = made(kind)
    found = fxslim.inspect(model, inputs(0))
    return model, found, random_plan(model, found.sites)


@cache
def small(name: str, form: str) -> nn.Module:
    """Return a model's narrowed form."""
    model, _, plan = case(name)
    result: nn.Module = getattr(fxslim, form)(model, CASES[name][1](0), plan=plan)
    return result


def text(found: Any) -> str:
    """Return what the notes say."""
    return "\n".join(f"{note.where}: {note.reason}" for note in found.notes)


@pytest.mark.parametrize("name", CASES)
def test_sites_of_every_region_are_found(name: str) -> None:
    _, found, _ = case(name)
    assert len(found.sites) == CASES[name][2]
    assert {site.kind for site in found.sites} <= {"ffn", "attention"}
    assert re.search("the model as a whole.*: not traced: GuardOnDataDependentSymNode", text(found))


@pytest.mark.parametrize("form", ["slim", "compile"])
@pytest.mark.parametrize("name", CASES)
def test_narrowed_is_masked_whatever_the_data_says(name: str, form: str) -> None:
    model, _, plan = case(name)
    result = small(name, form)
    with fxslim.masked(model, plan):
        expected = [outputs(model, CASES[name][1](seed)) for seed in range(8)]
    found = [outputs(result, CASES[name][1](seed)) for seed in range(8)]
    assert max(difference(*pair) for pair in zip(expected, found, strict=True)) < EXACT
    shapes = {key: value.shape for key, value in result.state_dict().items()}
    assert shapes.keys() == model.state_dict().keys()
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in model.parameters())


def test_both_branches_are_taken() -> None:
    assert {bool(CASES["switch"][1](seed)[0].sum() > 0) for seed in range(8)} == {True, False}


@pytest.mark.parametrize("name", CASES)
def test_the_model_stays_as_it_is(name: str) -> None:
    model = made(CASES[name][0])
    before = state(model)
    fxslim.compile(model, CASES[name][1](0), ffn=0.5)
    assert same_state(before, state(model))


def test_the_report_names_regions_and_what_is_outside() -> None:
    model, found, _ = case("nested")
    said = text(found)
    layers = ", ".join(f"stacks.{s}.layers.{n}" for s in range(4) for n in range(2))
    assert f"traced by themselves: {layers}" in said
    assert "the model as a whole, stacks.0, stacks.1, stacks.2, stacks.3: not traced: GuardOnDataDep" in said
    assert "up, down: not traced: a single product: nothing inside it could go" in said
    assert "rare: not traced: it was not called on the example inputs" in said
    result = small("nested", "compile")
    assert "the model's own module, with a graph in the place of each region's forward" in str(result.fxslim.report)
    assert "stacks.3.layers.1" in str(result.fxslim.report)
    assert result.up.weight.shape == model.up.weight.shape


def test_look_alikes_of_what_failed_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    trace_part = regions.trace_part

    def counting(module: nn.Module, *rest: Any) -> Any:
        tried.append(type(module).__name__)
        return trace_part(module, *rest)

    monkeypatch.setattr(regions, "trace_part", counting)
    fxslim.inspect(made(Nested), CASES["nested"][1](0))
    assert tried.count("Stack") == 1
    assert tried.count("Feed") == 8
    assert len(tried) == 9


def test_every_way_in_which_a_block_is_called_is_traced() -> None:
    _, found, _ = case("loop")
    assert "traced by themselves: feed (3 ways to call it)" in text(found)


def test_a_call_that_was_not_traced_is_an_error() -> None:
    compiled = small("loop", "compile")
    with pytest.raises(InputError, match=r"feed was compiled for other calls: .*Compile with example_inputs that lead"):
        compiled.feed(numbers(3, 5, D, seed=0), scale=0.25)


def test_a_compiled_model_is_for_inference() -> None:
    compiled = copy.deepcopy(small("switch", "compile")).train()
    with pytest.raises(UnsupportedModelError, match=r"Use fxslim\.slim for a module that trains"):
        compiled(*CASES["switch"][1](0))


def test_a_compiled_model_can_be_copied_saved_and_loaded() -> None:
    compiled, inputs = small("switch", "compile"), CASES["switch"][1](3)
    again = copy.deepcopy(compiled)
    stored = io.BytesIO()
    torch.save(compiled.state_dict(), stored)
    stored.seek(0)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert not again.layers[0].feed.up.weight.any()
    assert compiled.layers[0].feed.up.weight.any()
    again.load_state_dict(torch.load(stored))
    assert torch.equal(outputs(again, inputs)[""], outputs(compiled, inputs)[""])


def test_masks_in_the_graphs_of_regions() -> None:
    model, _, plan = case("switch")
    inputs = CASES["switch"][1](5)
    compiled = fxslim.compile(model, CASES["switch"][1](0), plan=plan, narrow=False)
    with fxslim.masked(model, plan):
        expected = outputs(model, inputs)
    assert difference(expected, outputs(compiled, inputs)) < EXACT
    assert compiled.state_dict().keys() == model.state_dict().keys()


def test_verify_compares_a_compiled_model_of_regions() -> None:
    model, _, plan = case("switch")
    measured = fxslim.verify(model, small("switch", "compile"), plan=plan, example_inputs=CASES["switch"][1](0))
    assert measured.relative < EXACT


def test_zero_channels_are_taken_out_without_a_request() -> None:
    model = made(Stack)
    with torch.no_grad():
        model.layers[1].down.weight[:, 3:9] = 0
    inputs = (numbers(3, 5, D, seed=1),)
    for narrow in (fxslim.slim, fxslim.compile):
        result = narrow(model, inputs)
        assert result.layers[1].up.weight.shape == (HIDDEN - 6, D)
        assert difference(outputs(model, inputs), outputs(result, inputs)) < EXACT


class Tied(nn.Module):
    """A block whose weight something outside needs, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.feed, self.other = Feed(), Feed()
        self.head = nn.Linear(D, HIDDEN, bias=False)
        if way == "owned":
            self.head.weight = self.feed.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.feed(x))
        if x.sum() > 1e6:
            return x
        if self.way == "read":
            return functional.linear(x, self.feed.up.weight)
        if self.way == "called":
            out: Tensor = self.feed.up(x)
            return out
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("owned", "also head.weight, outside of the traced regions"),
        ("read", "read outside of the traced regions"),
        ("called", "read outside of the traced regions"),
    ],
)
def test_weights_that_something_outside_needs_stay(way: str, reason: str) -> None:
    model, inputs = made(lambda: Tied(way)), (numbers(3, 5, D, seed=0),)
    found = fxslim.inspect(model, inputs)
    assert [site.module for site in found.sites] == ["other"]
    assert reason in found.why("feed.down")
    for narrow in (fxslim.slim, fxslim.compile):
        result = narrow(model, inputs, ffn=0.5, include="*")
        assert result.feed.up.weight.shape == (HIDDEN, D)
        assert result.other.up.weight.shape == (HIDDEN // 2, D)


class Given(nn.Module):
    """A model that gives one region the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.feed, self.reader = Feed(), Reader()

    def forward(self, x: Tensor) -> Tensor:
        x = self.feed(x) if x.sum() < 1e6 else x
        out: Tensor = self.reader(x, self.feed.up.weight)
        return out


class Reader(Feed):
    """A feed-forward network that multiplies with a weight that it is given."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return functional.linear(super().forward(x), weight)


def test_a_weight_that_is_an_argument_of_a_region_stays() -> None:
    found = fxslim.inspect(made(Given), (numbers(3, 5, D, seed=0),))
    assert [site.module for site in found.sites] == ["reader"]
    assert "given to reader as an argument" in found.why("feed.down")


class Shared(nn.Module):
    """Two blocks that share a weight, and one block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Feed(), Feed()
        self.second.up.weight = self.first.up.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        out: Tensor = self.again(x if x.sum() < 1e6 else -x)
        return out


def test_tensors_that_regions_share_are_narrowed_together() -> None:
    model, inputs = made(Shared), (numbers(3, 5, D, seed=0),)
    found = fxslim.inspect(model, inputs)
    assert len(found.sites) == 1
    assert {piece.tensor for piece in found.sites[0].slices} == {
        "first.up.weight", "first.up.bias", "first.down.weight", "second.up.bias", "second.down.weight"}  # fmt: skip
    for narrow in (fxslim.slim, fxslim.compile):
        result = narrow(model, inputs, ffn=0.5)
        assert result.second.up.weight is result.first.up.weight
        assert result.again is result.first
        with fxslim.masked(model, result.fxslim.plan):
            expected = outputs(model, inputs)
        assert difference(expected, outputs(result, inputs)) < EXACT


class Inplace(Feed):
    """A block that writes into what it is given."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return x.add_(super().forward(x, mask, scale=scale))


class Writing(nn.Module):
    """A model around a block that writes into its input, and one with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.feed, self.hooked = Inplace(), Feed(), Feed()
        self.hooked.register_forward_hook(lambda module, args, out: out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        if x.sum() > 1e6:
            return x
        self.writer(x)
        out: Tensor = self.hooked(self.feed(x))
        return out


def test_what_a_graph_could_not_stand_for_is_no_region() -> None:
    found = fxslim.inspect(made(Writing), (numbers(3, 5, D, seed=0),))
    assert [site.module for site in found.sites] == ["feed"]
    assert "writer: not traced: TraceError: it changes a buffer or an input in place" in text(found)
    assert "hooked: not traced: it has forward hooks, or a forward that was replaced" in text(found)


class Drawing(nn.Module):
    """A model that draws numbers, as some do to choose patches."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.feed(x + torch.rand_like(x))
        return out if out.sum() < 1e6 else -out


def test_models_that_draw_numbers_are_verified_on_the_same_ones() -> None:
    for narrow in (fxslim.slim, fxslim.compile):
        result = narrow(made(Drawing), (numbers(3, 5, D, seed=0),), ffn=0.5)
        assert result.fxslim.report.verification.relative < EXACT


def test_a_model_that_does_not_run_says_so() -> None:
    with pytest.raises(TraceError, match="Check that the model runs on these example_inputs"):
        fxslim.inspect(made(Switch), (numbers(3, 5, D + 1, seed=0),))


def transformers_model(kind: str, config: Any) -> Any:
    """Return a model of transformers in float64 with weights that show what is taken out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def test_a_model_that_draws_its_patches_and_asks_for_their_number() -> None:
    config = transformers.ViltConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=16, image_size=12, patch_size=4, hidden_dropout_prob=0.0)  # fmt: skip
    model = transformers_model("ViltModel", config)
    inputs = {
        "input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "pixel_values": numbers(2, 3, 12, 12, seed=0)}  # fmt: skip
    found = fxslim.inspect(model, inputs)
    assert [site.name for site in found.sites] == [
        f"encoder.layer.{n}{name}" for n in range(2) for name in (".attention:attention", ":ffn")
    ]
    assert "the model as a whole" in text(found)
    for narrow in (fxslim.slim, fxslim.compile):
        result = narrow(model, inputs, ffn=0.5, heads=0.5)
        assert result.fxslim.report.verification.relative < EXACT
        assert result.encoder.layer[0].intermediate.dense.weight.shape == (12, 16)


def test_the_library_that_a_model_comes_from_can_export_more_of_it() -> None:
    from torch.utils import _pytree as pytree

    config = transformers.PixtralVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=16, patch_size=4
    )
    model = transformers_model("PixtralVisionModel", config)
    inputs = {"pixel_values": numbers(2, 3, 16, 16, seed=0), "image_sizes": torch.tensor([[16, 16], [16, 12]])}
    caches = {kind for kind in pytree.SUPPORTED_NODES if kind.__name__.endswith("Cache")}
    compiled = fxslim.compile(model, inputs, ffn=0.5, heads=0.5)
    assert caches == {kind for kind in pytree.SUPPORTED_NODES if kind.__name__.endswith("Cache")}
    assert isinstance(compiled, torch.fx.GraphModule)
    assert "image_sizes: the graph form holds for these values alone" in str(compiled.fxslim.report)
    other = inputs | {"pixel_values": numbers(2, 3, 16, 16, seed=1)}
    with fxslim.masked(model, compiled.fxslim.plan):
        expected = outputs(model, other)
    assert difference(expected, outputs(compiled, other)) < 1e-6  # angles and norms in float32
    with pytest.raises(InputError, match="was compiled with image_sizes="):
        compiled(inputs["pixel_values"], torch.tensor([[16, 16], [12, 12]]))
    slim = fxslim.slim(model, inputs, ffn=0.5, heads=0.5)
    with fxslim.masked(model, slim.fxslim.plan):
        expected = outputs(model, other)
    assert difference(expected, outputs(slim, other)) < 1e-6


class Logs(nn.Module):
    """Writes into a list that it is given: no second call is like the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, log: list[Tensor]) -> Tensor:
        log.append(x.mean())
        return self.down(torch.relu(self.up(x)))


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logs = Logs()

    def forward(self, x: Tensor) -> Tensor:
        log: list[Tensor] = []
        y = self.logs(x, log)
        return y * 2 if float(y.sum()) > 1e9 else y + sum(log)


def test_a_graph_that_no_call_leads_through_is_refused() -> None:
    model, x = Keeps().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match=r"no call leads through the parts .* use fxslim\.slim"):
        fxslim.compile(model, (x,), ffn=0.5)
    small = fxslim.slim(model, (x,), ffn=0.5)
    with fxslim.masked(model, small.fxslim.plan), torch.no_grad():
        assert float((model(x) - small(x)).abs().max()) < 1e-12
