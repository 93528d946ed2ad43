"""Nothing asked for: what is already zero goes, nothing else does, and the outputs stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

import fxslim
from fxslim.errors import VerifyError
from fxslim.passes import narrowing, planning
from fxslim.pipeline import Pipeline
from fxslim.plan import Plan

from agreement import EXACT, INNER_FLOAT32, difference, outputs, random_plan, same_state, state
from architectures import ARCHITECTURES

D, HIDDEN, V = 8, 64, 5


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def mlp(hidden: int = HIDDEN, act: nn.Module | None = None) -> Any:
    """Return a small MLP in float64; biases are not zero, and sigmoid(0) is not either."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(D, hidden), act or nn.Sigmoid(), nn.Linear(hidden, V))
    return layers.double().eval()


def given(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zero(weight: Tensor, dim: int, rows: list[int]) -> None:
    with torch.no_grad():
        weight.index_fill_(dim, torch.tensor(rows), 0)


def gone(plan: Plan) -> dict[str, list[int]]:
    return {part.site.name: [unit for unit in range(part.site.units) if unit not in part.keep] for part in plan}


def unchanged(model: Any, inputs: Any, *others: Any, tolerance: float = EXACT) -> None:
    """Compare with the dense model itself: no masks are needed where everything removed is zero."""
    expected = outputs(model, inputs)
    for other in others:
        assert difference(expected, outputs(other, inputs)) <= tolerance


# What goes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.ReLU(), nn.Tanh()], ids=["sigmoid", "relu", "tanh"])
def test_zero_columns_go_whatever_their_producers_hold(act: nn.Module) -> None:
    model = mlp(act=act)
    zero(model[2].weight, 1, [0, 7, 63])
    model[0].weight.data[7] = 1e3
    small, graph = fxslim.slim(model, given()), fxslim.compile(model, given())
    assert gone(small.fxslim.plan) == gone(graph.fxslim.plan) == {"ffn": [0, 7, 63]}
    assert small[0].weight.shape == (HIDDEN - 3, D)
    unchanged(model, (given(7, 1),), small, graph)


def test_zero_producers_alone_do_not_go_without_a_bias() -> None:
    """Refusal: sigmoid(0) is 0.5, so the hidden channel is a constant, not zero, and nothing can take it up."""
    model = mlp()
    model[2].register_parameter("bias", None)
    zero(model[0].weight, 0, [3])
    zero(model[0].bias, 0, [3])
    plan = fxslim.plan(model, given())
    assert plan.sites == ()
    assert [(note.where, note.reason) for note in plan.notes] == [("ffn", "1 constant channels stay: 2 has no bias")]
    unchanged(model, (given(7, 1),), fxslim.slim(model, given()))


def test_a_column_that_is_almost_zero_stays() -> None:
    model = mlp()
    zero(model[2].weight, 1, [3, 4])
    model[2].weight.data[2, 4] = 1e-300
    assert gone(fxslim.plan(model, given())) == {"ffn": [3]}


def test_negative_zero_is_zero() -> None:
    model = mlp()
    model[2].weight.data[:, 5] = -0.0
    assert gone(fxslim.plan(model, given())) == {"ffn": [5]}


def test_a_unit_goes_only_if_every_consumer_is_zero() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(D, 10), nn.Linear(10, V), nn.Linear(10, V)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.sigmoid(self.up(x))
            return self.a(hidden) + self.b(hidden.square())

    model = Two().double().eval()
    zero(model.a.weight, 1, [1, 2, 3])
    zero(model.b.weight, 1, [2, 3, 4])
    small = fxslim.slim(model, given())
    assert list(gone(small.fxslim.plan).values()) == [[2, 3]]
    unchanged(model, (given(5, 1),), small)


@pytest.mark.parametrize(
    ("zeros", "multiple", "kept"), [(40, 32, 32), (31, 1, 33), (31, 32, 64), (33, 16, 32), (1, 1, 63)]
)
def test_any_number_of_zeros_at_any_multiple_deterministically(zeros: int, multiple: int, kept: int) -> None:
    model = mlp()
    columns = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(zeros))[:zeros].tolist()
    zero(model[2].weight, 1, columns)
    plans = [fxslim.plan(copy.deepcopy(model), given(), round_to=multiple) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    small = fxslim.slim(model, given(), round_to=multiple)
    assert small[0].out_features == kept
    assert set(gone(plans[0]).get("ffn", [])) <= set(columns)
    unchanged(model, (given(7, 1),), small)


def test_an_all_zero_site_keeps_one_unit_and_says_so() -> None:
    model = mlp()
    zero(model[2].weight, 1, list(range(HIDDEN)))
    small, graph = fxslim.slim(model, given()), fxslim.compile(model, given())
    for made in (small, graph):
        assert [len(part.keep) for part in made.fxslim.plan] == [1]
        assert [note.reason for note in made.fxslim.report.not_done] == ["every unit is zero; one has to stay"]
    unchanged(model, (given(7, 1),), small, graph)


def test_zeros_count_toward_a_request_and_go_first() -> None:
    model = mlp(hidden=10)
    zero(model[2].weight, 1, [8, 9])
    model[0].weight.data[8:] = 1e6  # the largest of all, and worth nothing
    assert gone(fxslim.plan(model, given(), ffn=0.2)) == {"ffn": [8, 9]}
    third = gone(fxslim.plan(model, given(), ffn=0.3))["ffn"]
    assert len(third) == 3
    assert {8, 9} < set(third)


# Transformers -------------------------------------------------------------------------------------------------------


def inputs_of(name: str, batch: int = 3, length: int = 9, seed: int = 2) -> dict[str, Any]:
    made: dict[str, Any] = ARCHITECTURES[name].inputs(batch, length, seed)
    return {**made, "use_cache": False} if ARCHITECTURES[name].generates else made


CONSUMERS = {
    "bert": ("encoder.layer.0.attention.output.dense", "encoder.layer.1.output.dense"),
    "gpt2": ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_proj"),
    "llama": ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
}


def zero_inputs(model: nn.Module, path: str, columns: list[int]) -> None:
    module = model.get_submodule(path)
    zero(module.weight, 0 if isinstance(module, Conv1D) else 1, columns)


@pytest.mark.parametrize("name", CONSUMERS)
def test_heads_and_channels_of_transformers(name: str) -> None:
    """Output columns alone are zero; queries, keys and values are not."""
    model = ARCHITECTURES[name].build()
    heads, channels = CONSUMERS[name]
    zero_inputs(model, heads, [*range(8, 16), *range(24, 31)])  # head 1, and most of head 3
    zero_inputs(model, channels, [0, 5, 11, 47])
    small, graph = fxslim.slim(model), fxslim.compile(model)
    (attention, ffn) = small.fxslim.plan.sites
    assert (attention.site.kind, attention.keep) == ("attention", (0, 2, 3))
    assert [unit for unit in range(48) if unit not in ffn.keep] == [0, 5, 11, 47]
    assert graph.fxslim.plan.sites == small.fxslim.plan.sites
    unchanged(model, inputs_of(name), small, graph, tolerance=INNER_FLOAT32 if name == "llama" else EXACT)
    if ARCHITECTURES[name].generates:
        prompt = ARCHITECTURES[name].inputs(2, 5, 1)
        for cache in (True, False):
            tokens = [m.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=cache) for m in (model, small)]
            assert torch.equal(*tokens)


def test_groups_drop_the_smallest_zero_count_and_report_the_rest() -> None:
    """Four query heads share two keys; a third site loses a whole group."""
    model = ARCHITECTURES["llama_gqa"].build()
    width = 6
    first, second = (f"model.layers.{layer}.self_attn.o_proj" for layer in range(2))
    zero_inputs(model, first, [*range(width), *range(2 * width, 4 * width)])  # heads 0, 2 and 3: group 1 goes
    zero_inputs(model, second, [*range(width)])  # head 0 alone: nothing can go
    small = fxslim.slim(model)
    assert [(part.site.name, part.keep) for part in small.fxslim.plan] in (
        [("model.layers.0.self_attn:attention", (1,))],
        [("model.layers.0.self_attn:attention", (0, 1))],
    )
    notes = {note.where: note.reason for note in small.fxslim.report.not_done}
    assert notes["model.layers.1.self_attn:attention"].startswith("1 zero heads stay")
    unchanged(model, inputs_of("llama_gqa"), small, fxslim.compile(model), tolerance=INNER_FLOAT32)


def test_uneven_zeros_in_groups() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=12, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config).double().eval()
    zero_inputs(model, "model.layers.0.self_attn.o_proj", [*range(8), *range(16, 20)])  # heads 0, 1 | 4
    plan = fxslim.plan(model)
    assert gone(plan) == {"model.layers.0.self_attn:attention": [0, 4]}
    assert [note.reason for note in plan.notes] == ["1 zero heads stay: every group keeps the same number of heads"]
    ids = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    unchanged(model, {"input_ids": ids, "use_cache": False}, fxslim.slim(model), tolerance=INNER_FLOAT32)


# Masks of other tools -----------------------------------------------------------------------------------------------


def test_structured_pruning_of_columns() -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    prune.ln_structured(model[2], "weight", amount=0.25, n=2, dim=1)
    before = state(model)
    small, graph = fxslim.slim(model, given()), fxslim.compile(model, given())
    assert same_state(before, state(model))
    assert prune.is_pruned(model[2])
    assert {"weight_orig", "bias"} == {name for name, _ in model[2].named_parameters()}
    assert torch.equal(model[2].weight_orig, dense[2].weight)
    assert small[0].out_features == 48
    assert not prune.is_pruned(small)
    assert dict(small[2].named_parameters()).keys() == {"weight", "bias"}
    unchanged(model, (given(7, 1),), small, graph)


def test_a_custom_mask_that_hides_whole_heads() -> None:
    model = ARCHITECTURES["bert"].build()
    projection = model.encoder.layer[0].attention.output.dense
    mask = torch.ones_like(projection.weight)
    mask[:, 16:24] = 0
    prune.custom_from_mask(projection, "weight", mask)
    prune.random_unstructured(model.encoder.layer[1].output.dense, "weight", amount=0.3)
    small = fxslim.slim(model)
    assert gone(small.fxslim.plan) == {"encoder.layer.0.attention:attention": [2]}
    assert prune.is_pruned(model)
    unchanged(model, inputs_of("bert"), small, fxslim.compile(model))


def test_pruned_producers_alone_leave_constants() -> None:
    """The biases survive the mask: the channels go, and what they made of their biases is folded."""
    model = mlp()
    prune.ln_structured(model[0], "weight", amount=0.25, n=2, dim=0)
    small, graph = fxslim.slim(model, given()), fxslim.compile(model, given())
    assert small[0].out_features == 48
    assert small.fxslim.plan.sites == graph.fxslim.plan.sites
    unchanged(model, (given(7, 1),), small, graph)


class Halved(nn.Module):
    """Zero every other column."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(weight.shape[1]) % 2)


def test_parametrizations() -> None:
    model = mlp()
    parametrize.register_parametrization(model[2], "weight", Halved())
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    before = outputs(model, (given(7, 1),))
    small = fxslim.slim(model, given())
    assert parametrize.is_parametrized(model[2])
    assert difference(before, outputs(model, (given(7, 1),))) == 0  # copies share a class with the original
    assert not parametrize.is_parametrized(small[2])
    assert gone(small.fxslim.plan) == {"ffn": list(range(0, HIDDEN, 2))}
    unchanged(model, (given(7, 1),), small, fxslim.compile(model, given()))


def test_weight_norm_and_spectral_norm() -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.spectral_norm(model[2])
    zero(model[2].parametrizations.weight.original, 1, [1, 2])
    small = fxslim.slim(model, given())
    assert gone(small.fxslim.plan) == {"ffn": [1, 2]}
    unchanged(model, (given(7, 1),), small)


def test_pruned_in_place_loses_its_hooks() -> None:
    model = mlp()
    prune.ln_structured(model[2], "weight", amount=0.5, n=2, dim=1)
    reference = outputs(model, (given(7, 1),))
    assert fxslim.slim(model, given(), inplace=True) is model
    assert not prune.is_pruned(model)
    assert model[0].out_features == HIDDEN // 2
    assert difference(reference, outputs(model, (given(7, 1),))) <= EXACT


# Nothing to remove --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert_classify", "gpt2", "llama_gqa", "vit_classify"])
def test_nothing_to_remove_is_the_identity_bit_for_bit(name: str) -> None:
    model = ARCHITECTURES[name].build(torch.float32)
    small, graph = fxslim.slim(model), fxslim.compile(model)
    assert small.fxslim.plan.sites == graph.fxslim.plan.sites == ()
    assert str(small.fxslim.plan) == "nothing to take out"
    expected, found = model.state_dict(), small.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    inputs = inputs_of(name)
    inputs = {key: value.float() if key == "pixel_values" else value for key, value in inputs.items()}
    want, have = outputs(model, inputs), outputs(small, inputs)
    assert all(torch.equal(tensor, have[key]) for key, tensor in want.items())
    assert difference(want, outputs(graph, inputs)) <= 1e-6
    report = small.fxslim.report
    assert (report.parameters_before, report.macs_before) == (report.parameters_after, report.macs_after)


def test_keeping_everything_is_the_identity() -> None:
    model = mlp()
    plan = fxslim.plan(model, given(), ffn=0.5)
    whole = plan.model_copy(update={"sites": ()})
    small = fxslim.slim(model, given(), plan=whole)
    assert torch.equal(outputs(model, (given(),))[""], outputs(small, (given(),))[""])
    assert small[0].weight is not model[0].weight


def test_the_numbers_in_the_report_are_exact() -> None:
    model = mlp()
    zero(model[2].weight, 1, [0, 1, 2, 3])
    report = fxslim.slim(model, given()).fxslim.report
    assert report.parameters_before == D * HIDDEN + HIDDEN + HIDDEN * V + V
    assert report.parameters_before - report.parameters_after == 4 * (D + 1 + V)
    rows = given().shape[0] * given().shape[1]
    assert report.macs_before == rows * HIDDEN * (D + V)
    assert report.macs_after == rows * (HIDDEN - 4) * (D + V)


# Weights that are computed at every call ----------------------------------------------------------------------------


class Concatenated(nn.Module):
    """Two projections fused on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, HIDDEN)), nn.Parameter(torch.randn(3, HIDDEN))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, torch.cat([self.a, self.b]))


class Adapted(nn.Module):
    """A weight with a low-rank correction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, HIDDEN))
        self.a, self.b = nn.Parameter(torch.randn(2, HIDDEN)), nn.Parameter(torch.randn(V, 2))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight + self.b @ self.a)


class Exponential(nn.Module):
    """Zeros in the parameter are ones in the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, HIDDEN))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight.exp())


def computed(consumer: type[nn.Module]) -> Any:
    model = mlp()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model[2] = consumer().double()
    return model


COMPUTED = [(Concatenated, "a"), (Concatenated, "b"), (Adapted, "weight"), (Adapted, "a"), (Exponential, "weight")]


@pytest.mark.parametrize(("consumer", "name"), COMPUTED, ids=[f"{c.__name__}.{n}" for c, n in COMPUTED])
def test_zeros_in_part_of_a_computed_weight_say_nothing(consumer: type[nn.Module], name: str) -> None:
    """Refusal: the column that a product reads is not zero, whatever one of its ingredients holds."""
    model = computed(consumer)
    zero(getattr(model[2], name), 1, [3, 7])
    assert fxslim.plan(model, given()).sites == ()
    unchanged(model, (given(7, 1),), fxslim.slim(model, given()), fxslim.compile(model, given()))


@pytest.mark.parametrize("consumer", [Concatenated, Adapted, Exponential])
def test_computed_weights_can_be_narrowed(consumer: type[nn.Module]) -> None:
    """They make a site like any other, so it is the zeros alone that are not believed above."""
    model, x = computed(consumer), given(7, 1)
    plan = random_plan(model, fxslim.inspect(model, given()).sites, 0.5)
    small, graph = (form(model, given(), plan=plan) for form in (fxslim.slim, fxslim.compile))
    assert small[0].out_features == HIDDEN // 2
    with fxslim.masked(model, plan):
        expected = outputs(model, (x,))
    assert difference(expected, outputs(small, (x,))) <= EXACT
    assert difference(expected, outputs(graph, (x,))) <= EXACT


def lossless(model: nn.Module, plan: Plan) -> None:
    """Run the safety net alone: trace the model and compare masked with dense."""
    passes = planning.Trace(), narrowing.Refer(graph=True, lossless=True)
    Pipeline(passes, given=(planning.Subject, Plan)).run(planning.subject(model, given()), plan)


def test_the_safety_net_catches_a_plan_that_loses_something() -> None:
    """Should zeros ever be read wrongly, masked is not dense, and nothing is returned."""
    model = mlp()
    zero(model[2].weight, 1, [3])
    plan = fxslim.plan(model, given())
    assert gone(plan) == {"ffn": [3]}
    lossless(model, plan)
    wrong = plan.model_copy(update={"sites": (plan.sites[0].model_copy(update={"keep": tuple(range(1, HIDDEN))}),)})
    assert gone(wrong) == {"ffn": [0]}
    with pytest.raises(VerifyError, match="disagree at") as caught:
        lossless(model, wrong)
    assert caught.value.max_abs > 1e-3 > caught.value.tolerance


def test_the_safety_net_is_part_of_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    wrong = fxslim.plan(model, given(), ffn=0.5)
    monkeypatch.setattr(planning.Choose, "run", lambda self, facts: facts.adding(wrong))
    for form in (fxslim.slim, fxslim.compile):
        with pytest.raises(VerifyError, match="disagree at"):
            form(model, given())
        form(model, given(), ffn=0.5)  # asked for: masked and dense may differ
