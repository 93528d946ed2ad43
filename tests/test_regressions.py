"""What a review of the whole found: the model that is given stays as it is, and odd models are taken or refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxslim
from fxslim.errors import RequestError, UnsupportedModelError

from agreement import EXACT, INNER_FLOAT32, difference, outputs, random_plan, same_state, state
from architectures import ARCHITECTURES

D, HIDDEN = 16, 32
FORMS: dict[str, Callable[..., Any]] = {"slim": fxslim.slim, "compile": fxslim.compile}


class Feed(nn.Module):
    """A feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


def made(kind: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Return a model in float64 with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args, **kwargs).double().eval()


def given(batch: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(model: nn.Module, plan: fxslim.Plan, inputs: Any, *others: nn.Module, tolerance: float = EXACT) -> None:
    """Compare with the masked model, without asking fxslim whether they agree."""
    with fxslim.masked(model, plan):
        expected = outputs(model, inputs)
    for other in others:
        assert difference(expected, outputs(other, inputs)) <= tolerance


# The model that is given stays as it is -----------------------------------------------------------------------------


class Counting(Feed):
    """Changes a buffer, a number and what it keeps, at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.calls += 1
        self.seen.append(x.shape[-1])
        self.last = super().forward(x)
        return self.last


class Renormalising(nn.Module):
    """An embedding that rescales its own weight in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.feed = nn.Embedding(50, D, max_norm=1.0), Feed()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.feed(self.table(ids))
        return out


class Drawing(Feed):
    """Draws a random number that does not matter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand(())


@pytest.mark.parametrize("form", FORMS)
def test_what_a_forward_changes_stays_unchanged(form: str) -> None:
    model = made(Counting)
    before = state(model)
    FORMS[form](model, given(), ffn=0.5)
    assert same_state(before, state(model))
    assert (float(model.steps), model.calls, model.seen) == (0.0, 0, [])
    assert not hasattr(model, "last")
    model(given())
    assert (float(model.steps), model.calls, model.seen) == (1.0, 1, [D])


def test_the_result_counts_on_its_own() -> None:
    model = made(Counting)
    small = fxslim.slim(model, given(), ffn=0.5)
    small(given())
    assert (float(model.steps), model.calls, model.seen) == (0.0, 0, [])
    assert small.steps is not model.steps


@pytest.mark.parametrize("form", FORMS)
def test_an_embedding_with_a_largest_norm_is_not_rescaled(form: str) -> None:
    model = made(Renormalising)
    weight = model.table.weight.detach().clone()
    assert float(weight.norm(dim=1).max()) > 1
    FORMS[form](model, torch.randint(0, 50, (2, 5)), ffn=0.5)
    assert torch.equal(model.table.weight, weight)


@pytest.mark.parametrize("form", FORMS)
def test_random_numbers_go_on_as_if_nothing_had_happened(form: str) -> None:
    model = made(Drawing)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        before = torch.get_rng_state()
        FORMS[form](model, given(), ffn=0.5)
        assert torch.equal(torch.get_rng_state(), before)


def test_towers_keep_their_own_attention() -> None:
    model: Any = ARCHITECTURES["clip"].build()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    kinds = model.config.text_config, model.config.vision_config
    small: Any = fxslim.slim(model, ffn=0.5)
    assert [kind._attn_implementation for kind in kinds] == ["sdpa", "eager"]
    assert small.config.text_config._attn_implementation == "sdpa"
    assert small.config.vision_config._attn_implementation == "eager"


def test_in_place_keeps_what_a_forward_changes() -> None:
    model = made(Counting)
    assert fxslim.slim(model, given(), ffn=0.5, inplace=True) is model
    assert model.up.out_features == HIDDEN // 2
    assert (float(model.steps), model.calls, model.seen) == (0.0, 0, [])


# Narrowing twice ----------------------------------------------------------------------------------------------------


def test_a_model_that_was_narrowed_twice_loads_back(tmp_path: Path) -> None:
    entry = ARCHITECTURES["bert_classify"]
    model = entry.build()
    once: Any = fxslim.slim(model, ffn=0.5, heads=0.25)
    twice: Any = fxslim.slim(once, ffn=0.5, heads=0.34)
    widths = {part.site.name: (len(part.keep), part.site.units) for part in twice.fxslim.plan}
    assert sorted(set(widths.values())) == [(2, 4), (12, 48)]
    folder = fxslim.save_pretrained(twice, tmp_path / "twice")
    loaded: Any = fxslim.from_pretrained(folder, dtype="auto")
    assert loaded.fxslim.plan == twice.fxslim.plan
    inputs = entry.inputs(3, 9, 2)
    expected, stored = outputs(twice, inputs), loaded.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in twice.state_dict().items())
    assert difference(expected, outputs(loaded, inputs)) <= EXACT
    assert len(once.fxslim.plan.sites) == len(twice.fxslim.plan.sites)
    again: Any = fxslim.slim(model, plan=twice.fxslim.plan.model_copy(update={"edits": ()}))
    assert difference(expected, outputs(again, inputs)) <= EXACT


def test_narrowing_twice_at_different_places() -> None:
    entry = ARCHITECTURES["gpt2"]
    model = entry.build()
    once: Any = fxslim.slim(model, heads=0.5)
    twice: Any = fxslim.slim(once, ffn=0.5)
    plan = twice.fxslim.plan
    assert {part.site.kind for part in plan} == {"attention", "ffn"}
    inputs = {**entry.inputs(3, 9, 2), "use_cache": False}
    agree(model, plan, inputs, twice)
    from_dense: Any = fxslim.slim(model, plan=fxslim.Plan.from_json(plan.to_json()))
    assert difference(outputs(twice, inputs), outputs(from_dense, inputs)) <= EXACT


@pytest.mark.parametrize("name", ["opt", "llama_gqa", "phi3", "gpt_neox"])
def test_heads_twice(name: str) -> None:
    """Edits of integers chain: what the first one made is what the second one finds."""
    entry = ARCHITECTURES[name]
    model = entry.build()
    once: Any = fxslim.slim(model, heads=0.25 if name != "llama_gqa" else 0.5)
    twice: Any = fxslim.slim(once, ffn=0.5) if name == "llama_gqa" else fxslim.slim(once, heads=0.34)
    plan = twice.fxslim.plan
    kept = {len(part.keep) for part in plan if part.site.kind == "attention"}
    assert kept == {2}
    inputs = {**entry.inputs(3, 9, 2), "use_cache": False}
    agree(model, plan, inputs, twice, tolerance=INNER_FLOAT32)
    again: Any = fxslim.slim(model, plan=plan)
    assert difference(outputs(twice, inputs), outputs(again, inputs)) <= INNER_FLOAT32


# Odd models ---------------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    """Attention that calls its number of heads either way."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        setattr(self, name, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.n_heads if hasattr(self, "n_heads") else self.heads
        q, k, v = (part.view(*part.shape[:2], heads, 4).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = x + self.o(mixed)
        return out


def test_modules_that_look_alike_with_other_attributes() -> None:
    model = made(lambda: nn.Sequential(Attend("n_heads"), Attend("heads"), Attend("n_heads")))
    small = fxslim.slim(model, given(), heads=0.5)
    assert (small[0].n_heads, small[1].heads, small[2].n_heads) == (2, 2, 2)
    assert not hasattr(small[1], "n_heads")
    assert small.fxslim.plan.zeroed == ()
    agree(model, small.fxslim.plan, (given(3, 7, 1),), small)


@pytest.mark.parametrize("call", [fxslim.inspect, fxslim.plan, fxslim.slim, fxslim.compile])
def test_models_that_cannot_be_copied_are_refused(call: Callable[..., Any]) -> None:
    locked, keeping = made(Feed), made(Feed)
    locked.lock = threading.Lock()
    keeping.kept = [keeping.up(given())]
    for model in (locked, keeping):
        with pytest.raises(UnsupportedModelError, match=r"^Feed cannot be copied \(.*\); take what copy\.deepcopy"):
            call(model, given())


def test_a_stored_activation_of_its_own_is_no_obstacle() -> None:
    model = made(Feed)
    model.last = model.up(given())
    small = fxslim.slim(model, given(), ffn=0.5)
    agree(model, small.fxslim.plan, (given(3, 7, 1),), small)


@pytest.mark.parametrize("wrong", [3, 0.5, [3], ("up", None)])
def test_what_is_no_glob_is_refused(wrong: Any) -> None:
    for name in ("skip", "include"):
        with pytest.raises(RequestError, match=r"^include= and skip= take globs over module paths, not "):
            fxslim.plan(made(Feed), given(), **{name: wrong})


def test_the_same_tensor_twice_as_example() -> None:
    """Export takes one tensor for one input; a graph has two all the same."""
    model = made(nn.TransformerDecoderLayer, D, 4, HIDDEN, batch_first=True)
    x = given()
    graph = fxslim.compile(model, (x, x), ffn=0.5)
    agree(model, graph.fxslim.plan, (given(3, 7, 1), given(3, 6, 2)), graph)
    small = fxslim.slim(model, (x, x), ffn=0.5)
    agree(model, small.fxslim.plan, (given(3, 7, 1), given(3, 6, 2)), small)


class Hidden(Feed):
    """Does something to the hidden value; ``parts`` hold what it needs."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], wide: int = HIDDEN, **parts: nn.Module) -> None:
        super().__init__()
        self.between = between
        self.down = nn.Linear(wide, D)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.between(self, functional.gelu(self.up(x))))
        return out


BETWEEN: dict[str, Callable[[], Hidden]] = {
    "PReLU over the sequence": lambda: Hidden(lambda m, h: m.act(h), act=nn.PReLU(HIDDEN)),
    "PReLU over channels": lambda: Hidden(lambda m, h: m.act(h.mT).mT, act=nn.PReLU(HIDDEN)),
    "one PReLU": lambda: Hidden(lambda m, h: m.act(h), act=nn.PReLU()),
    "reflected": lambda: Hidden(lambda m, h: functional.pad(h, (2, 2), mode="reflect"), HIDDEN + 4),
    "replicated": lambda: Hidden(lambda m, h: functional.pad(h, (2, 2), mode="replicate"), HIDDEN + 4),
    "padded": lambda: Hidden(lambda m, h: functional.pad(h, (2, 2)), HIDDEN + 4),
    "lower triangle": lambda: Hidden(lambda m, h: h.tril()),
    "upper triangle": lambda: Hidden(lambda m, h: h.triu(-2)),
    "triangle inside channels": lambda: Hidden(lambda m, h: h.mT.unflatten(1, (4, 8)).transpose(1, 3).tril()
                                                  .transpose(1, 3).flatten(1, 2).mT),
}  # fmt: skip

STAYS = {
    "reflected": "padding a labelled axis with its own values",
    "replicated": "padding a labelled axis with its own values",
    "lower triangle": "aten.tril.default over labelled axes",
    "upper triangle": "aten.triu.default over labelled axes",
    "triangle inside channels": "aten.tril.default over labelled axes",
}


@pytest.mark.parametrize("case", BETWEEN)
def test_operations_on_hidden_values(case: str) -> None:
    """Whatever sites are found: random keeps of them hold, in both forms."""
    model = made(BETWEEN[case])
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    length = HIDDEN if case == "PReLU over the sequence" else 5
    x = given(2, length)
    found = fxslim.inspect(model, x)
    assert [site.name for site in found.sites] == ([] if case in STAYS else ["ffn"])
    assert [note.reason for note in found.pinned if note.where == "down"] == ([STAYS[case]] if case in STAYS else [])
    plan = random_plan(model, found.sites)
    other = given(3, length, 1)
    agree(model, plan, (other,), fxslim.slim(model, x, plan=plan), fxslim.compile(model, x, plan=plan))
    for form in FORMS.values():
        narrowed = form(model, x, ffn=0.5)
        agree(model, narrowed.fxslim.plan, (other,), narrowed)
