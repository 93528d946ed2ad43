"""The public face: every call form, every refusal with its text, and the model as it was before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxslim
from fxslim.errors import (
    FxslimError,
    InputError,
    PlanError,
    RequestError,
    TraceError,
    UnsupportedModelError,
    VerifyError,
)
from fxslim.plan import Plan

from agreement import EXACT, INNER_FLOAT32, difference, outputs, same_state, state
from architectures import ARCHITECTURES

D, HIDDEN, V = 8, 24, 5


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


class Mlp(nn.Module):
    """Two inputs, the second optional; a mode that was not traced."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, hidden), nn.Linear(hidden, V)
        self.count = 7

    def forward(self, x: Tensor, scale: Tensor | None = None, *, mode: str = "plain") -> Tensor:
        hidden = torch.tanh(self.up(x))
        if scale is not None:
            hidden = hidden * scale
        return self.down(hidden) if mode == "plain" else self.down(hidden) + 1


def mlp(dtype: torch.dtype = torch.float64) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mlp().to(dtype).eval()


def given(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 4, D, generator=torch.Generator().manual_seed(batch), dtype=torch.float64).to(dtype)


def bert(dtype: torch.dtype = torch.float64) -> Any:
    return ARCHITECTURES["bert_classify"].build(dtype)


def ids(batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    return ARCHITECTURES["bert_classify"].inputs(batch, length, seed=3)


@functools.cache
def compiled() -> Any:
    return fxslim.compile(bert(), ffn=0.5)


# Call forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [given(), (given(),), [given()], {"x": given()}, {"x": given(), "mode": "plain"}],
    ids=["tensor", "tuple", "list", "dict", "dict with an option"],
)
def test_every_form_of_inputs(inputs: Any) -> None:
    model = mlp()
    plan = fxslim.plan(model, inputs, ffn=0.5)
    assert [site.name for site in fxslim.inspect(model, inputs).sites] == ["ffn"]
    small = fxslim.slim(model, inputs, ffn=0.5)
    graph = fxslim.compile(model, inputs, plan=plan)
    assert small.fxslim.plan.sites == graph.fxslim.plan.sites == plan.sites
    with fxslim.masked(model, plan) as masked:
        assert masked is model
        expected = outputs(model, (given(5),))
    for made in (small, graph):
        assert difference(expected, outputs(made, (given(5),))) <= EXACT
        assert fxslim.verify(model, made, plan=plan, example_inputs=inputs).relative <= EXACT


def test_inputs_of_transformers_may_be_given_or_left_out() -> None:
    model = bert()
    without = fxslim.plan(model, ffn=0.5)
    extra = {**ids(), "length": torch.tensor([1, 2]), "special_tokens_mask": torch.zeros(2, 6)}
    for inputs in (ids(), ids()["input_ids"], (ids()["input_ids"], ids()["attention_mask"]), extra):
        assert fxslim.plan(model, inputs, ffn=0.5).sites == without.sites


def test_a_second_input_is_traced_when_given() -> None:
    model = mlp()
    scale = torch.rand(3, 4, HIDDEN, dtype=torch.float64)
    plan = fxslim.plan(model, (given(), scale), ffn=0.5)
    with fxslim.masked(model, plan):
        expected = outputs(model, (given() * 2, scale))
    for make in (fxslim.slim, fxslim.compile):  # it stays as wide, and is gathered
        small = make(model, (given(), scale), plan=plan)
        assert small.fxslim.plan.zeroed == ()
        assert difference(expected, outputs(small, (given() * 2, scale))) <= EXACT


# Refusals -----------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Ask the data which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, V)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        return self.down(hidden) if hidden.sum() > 0 else self.down(-hidden)


def with_weight(value: float) -> Any:
    model = mlp()
    model.up.weight.data[2, 3] = value
    return model


def another_plan() -> Plan:
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, V)).double()
    return fxslim.plan(model, given(), ffn=0.5)


def broken_plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], Plan]:
    def made(model: Any) -> Plan:
        data = fxslim.plan(model, given(), ffn=0.5).model_dump(mode="json")
        change(data)
        return Plan.from_json(data)

    return made


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], type[FxslimError], str]] = {
    "plan in the place of inputs": (
        mlp, lambda m: fxslim.slim(m, fxslim.plan(m, given(), ffn=0.5)), InputError,
        "a plan was given in the place of example_inputs; pass it as plan="),
    "sparsity in the place of inputs": (
        mlp, lambda m: fxslim.slim(m, 0.5), InputError,
        "example_inputs must be a dict of keyword inputs, a tuple of positional ones or one tensor, not float"),
    "no inputs": (
        mlp, lambda m: fxslim.slim(m, ffn=0.5), InputError,
        "Mlp does not say what its inputs look like (no config and main_input_name); give example_inputs"),
    "too many inputs": (
        mlp, lambda m: fxslim.slim(m, (given(), given(), "plain", 1), ffn=0.5), InputError,
        "but 4 positional inputs were given; use a dict of keyword inputs"),
    "inputs without a tensor": (mlp, lambda m: fxslim.slim(m, {"mode": "x"}, ffn=0.5), InputError, "hold no tensor"),
    "a missing input": (
        mlp, lambda m: fxslim.slim(m, {"scale": given()}, ffn=0.5), InputError, "Mlp.forward needs ['x']"),
    "unknown inputs": (
        mlp, lambda m: fxslim.slim(m, {"y": given()}, ffn=0.5), InputError,
        "name none of the inputs of Mlp.forward: got ['y'], forward takes ['x', 'scale', 'mode']"),
    "no model": (mlp, lambda m: fxslim.slim(m.forward, given()), InputError, "expected a torch.nn.Module, got method"),
    "a string for a plan": (
        mlp, lambda m: fxslim.slim(m, given(), plan="{}"), InputError, "plan= takes a fxslim Plan, not str"),
    "plan and request": (
        mlp, lambda m: fxslim.slim(m, given(), plan=fxslim.plan(m, given()), ffn=0.5), InputError,
        "give either plan= or a request, not both: ['ffn'] came with a plan"),
    "masked without a plan": (
        mlp, lambda m: fxslim.masked(m, {"ffn": 0.5}), InputError, "masked(model, plan) takes a fxslim Plan, not dict"),
    "verify without a plan": (
        mlp, lambda m: fxslim.verify(m, m, plan=None), InputError, "plan= takes a fxslim Plan, not NoneType"),
    "a plan of another model": (
        mlp, lambda m: fxslim.slim(m, given(), plan=another_plan()), PlanError,
        "the plan was made for another model (Sequential), not for this Mlp"),
    "a plan of another model, compiled": (
        mlp, lambda m: fxslim.compile(m, given(), plan=another_plan()), PlanError,
        "the plan was made for another model"),
    "a plan of another model, masked": (
        mlp, lambda m: fxslim.masked(m, another_plan()).__enter__(), PlanError,
        "the plan narrows 0.weight, which Mlp does not have"),
    "a plan that is applied already": (
        mlp, lambda m: fxslim.slim(fxslim.slim(m, given(), ffn=0.5), given(), plan=fxslim.plan(m, given(), ffn=0.5)),
        PlanError, "the plan was made for another model"),
    "a plan with repaired weights": (
        mlp, lambda m: fxslim.slim(m, given(), plan=broken_plan(lambda d: d.update(weights_changed=True))(m)),
        PlanError,
        "the plan repaired weights, so it cannot be applied to the dense model again"),
    "units out of range": (
        mlp, lambda m: broken_plan(lambda d: d["sites"][0].update(keep=[0, HIDDEN]))(m), PlanError,
        "keep must be ascending unit numbers below 24"),
    "units twice": (
        mlp, lambda m: broken_plan(lambda d: d["sites"][0].update(keep=[1, 1]))(m), PlanError,
        "keep must be ascending unit numbers"),
    "no unit": (
        mlp, lambda m: broken_plan(lambda d: d["sites"][0].update(keep=[]))(m), PlanError, "at least one unit stays"),
    "negative units": (
        mlp, lambda m: broken_plan(lambda d: d["sites"][0].update(keep=[-1, 2]))(m), PlanError,
        "not a valid fxslim plan"),
    "slices that are not this model's": (
        mlp, lambda m: fxslim.slim(m, given(), plan=broken_plan(lambda d: d["sites"][0]["site"]["slices"].pop(0))(m)),
        PlanError, "the plan's site ffn is not what this model's graph says it is"),
    "NaN": (
        functools.partial(with_weight, float("nan")), lambda m: fxslim.slim(m, given(), ffn=0.5), InputError,
        "up.weight holds NaN; repair the checkpoint before narrowing it"),
    "NaN, lossless": (
        functools.partial(with_weight, float("nan")), lambda m: fxslim.compile(m, given()), InputError,
        "up.weight holds NaN"),
    "infinity": (
        functools.partial(with_weight, float("inf")), lambda m: fxslim.plan(m, given(), ffn=0.5), InputError,
        "up.weight holds infinite values"),
    "empty": (
        nn.Sequential, lambda m: fxslim.slim(m, given(), ffn=0.5), UnsupportedModelError,
        "Sequential has no parameters: there is nothing to narrow"),
    "cannot be traced": (
        lambda: Branching().double(), lambda m: fxslim.slim(m, given(), ffn=0.5), TraceError,
        "control flow that depends on tensor values has to be taken out of forward, or slim the submodules one by one"),
    "does not run": (
        mlp, lambda m: fxslim.slim(m, given()[..., 1:], ffn=0.5), TraceError,
        "Check that the model runs on these example_inputs"),
    "everything": (
        mlp, lambda m: fxslim.slim(m, given(), ffn=1), RequestError,
        "ffn=1 asks for every unit; at least one has to stay"),
    "everything, as a float": (
        mlp, lambda m: fxslim.plan(m, given(), heads=1.0), RequestError,
        "heads=1 asks for every unit"),
    "more than everything": (
        mlp, lambda m: fxslim.slim(m, given(), ffn=1.5), RequestError,
        "ffn=1.5: give the fraction to remove, a number from 0 up to 1"),
    "percent": (
        mlp, lambda m: fxslim.slim(m, given(), heads=50), RequestError,
        "heads=50: give the fraction to remove"),
    "negative": (mlp, lambda m: fxslim.slim(m, given(), ffn=-0.1), RequestError, "ffn=-0.1: give the fraction"),
    "not a number": (
        mlp, lambda m: fxslim.slim(m, given(), ffn=float("nan")), RequestError,
        "ffn=nan: give the fraction"),
    "bool": (mlp, lambda m: fxslim.compile(m, given(), ffn=True), RequestError, "ffn=True: give the fraction"),
    "string": (
        mlp, lambda m: fxslim.plan(m, given(), kv_groups="0.5"), RequestError,
        "kv_groups='0.5': give the fraction"),
    "multiple of nothing": (
        mlp, lambda m: fxslim.plan(m, given(), ffn=0.5, round_to=0), RequestError,
        "round_to=0: give a whole number of at least 1"),
    "multiple of a half": (mlp, lambda m: fxslim.plan(m, given(), ffn=0.5, round_to=2.0), RequestError, "round_to=2.0"),
    "skip matches nothing": (
        mlp, lambda m: fxslim.slim(m, given(), ffn=0.5, skip="encoder.*"), RequestError,
        "skip='encoder.*' matches no module with a site; sites are in (root)"),
    "include matches nothing": (
        mlp, lambda m: fxslim.inspect(m, given(), include=["up", "layers.?"]), RequestError,
        "include='layers.?' matches no"),
    "experts": (
        mlp, lambda m: fxslim.slim(m, given(), experts=1.5), RequestError,
        "experts=1.5: give the fraction to remove, a number from 0 up to 1."),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_text_and_without_a_trace(name: str) -> None:
    make, call, error, text = REFUSED[name]
    model = make()
    before, random = state(model), torch.random.get_rng_state()
    with pytest.raises(error) as caught:
        call(model)
    assert text in str(caught.value)
    assert same_state(before, state(model))
    assert torch.equal(random, torch.random.get_rng_state())


def test_everything_but_model_and_inputs_is_keyword_only() -> None:
    model, plan = mlp(), fxslim.plan(mlp(), given(), ffn=0.5)
    for call in (fxslim.slim, fxslim.compile, fxslim.plan, fxslim.inspect):
        with pytest.raises(TypeError, match="positional argument"):
            call(model, given(), plan)
    with pytest.raises(TypeError, match="positional argument"):
        fxslim.verify(model, model, plan)


def test_every_error_is_an_fxslim_error() -> None:
    for error in (InputError, PlanError, RequestError, TraceError, UnsupportedModelError, VerifyError):
        assert issubclass(error, FxslimError)
    assert issubclass(InputError, ValueError)


def test_a_call_leaves_nothing_behind_for_the_next() -> None:
    """Options are not remembered: no mutable default collects them."""
    model, skip = bert(), ["*attention*"]
    first = fxslim.plan(model, heads=0.5, ffn=0.5, skip=skip)
    assert skip == ["*attention*"]
    assert {part.site.kind for part in first} == {"ffn"}
    assert {part.site.kind for part in fxslim.plan(model, heads=0.5, ffn=0.5)} == {"ffn", "attention"}


@pytest.mark.parametrize(
    ("units", "fraction", "kept"),
    [(4, 0.5, 2), (10, 0.7, 3), (100, 0.29, 71), (30, 0.1, 27), (4, 0.49999, 3), (8, 1 / 3, 6), (3, 0.99, 1)],
)
def test_fractions_round_down_but_not_past_what_they_say(units: int, fraction: float, kept: int) -> None:
    model = nn.Sequential(nn.Linear(D, units), nn.ReLU(), nn.Linear(units, V)).double()
    assert [len(part.keep) for part in fxslim.plan(model, given(), ffn=fraction)] == [kept]


def test_less_than_one_unit_is_reported() -> None:
    plan = fxslim.plan(mlp(), given(), ffn=0.01)
    assert plan.sites == ()
    assert [(note.where, note.reason) for note in plan.notes] == [("ffn", "ffn=0.01 of 24 channels is less than one")]
    nothing = fxslim.plan(mlp(), given(), heads=0.5)
    assert [note.reason for note in nothing.notes] == ["no attention site was found; fxslim.inspect(model) says why"]


# The model stays as it is -------------------------------------------------------------------------------------------


def prepared() -> Any:
    """Return a model in a state that is easily lost: hooks, frozen parts, gradients, mixed modes."""
    model = bert().train()
    model.bert.encoder.layer[1].eval()
    model.bert.embeddings.requires_grad_(False)
    model.classifier.register_forward_hook(lambda *_: None)
    model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda *_: None)
    model(**ids()).logits.sum().backward()
    model.note = "mine"
    return model


@pytest.mark.parametrize(
    "call",
    [
        lambda m: fxslim.inspect(m),
        lambda m: fxslim.plan(m, ffn=0.5, heads=0.5),
        lambda m: fxslim.slim(m, ffn=0.5, heads=0.5),
        lambda m: fxslim.compile(m, ffn=0.5, heads=0.5),
        lambda m: fxslim.compile(m, ffn=0.5, narrow=False),
        lambda m: fxslim.masked(m, fxslim.plan(m, ffn=0.5)).__exit__(None, None, None),
    ],
    ids=["inspect", "plan", "slim", "compile", "compile masked", "masked"],
)
def test_the_input_model_is_untouched(call: Callable[[Any], Any]) -> None:
    model = prepared()
    before = state(model)
    if "masked" in call.__code__.co_names and "compile" not in call.__code__.co_names:
        with fxslim.masked(model, fxslim.plan(model, ffn=0.5)):
            pass
    else:
        call(model)
    assert same_state(before, state(model))


def test_masked_restores_on_an_exception() -> None:
    model = mlp()
    plan, before = fxslim.plan(model, given(), ffn=0.5), state(model)
    with pytest.raises(RuntimeError, match="mine"), fxslim.masked(model, plan):
        raise RuntimeError("mine")
    assert same_state(before, state(model))


def test_the_result_keeps_mode_frozen_parts_and_attributes() -> None:
    model = prepared()
    small = fxslim.slim(model, ffn=0.5)
    assert type(small) is type(model)
    assert small.note == "mine"
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in small.named_modules()} == modes
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in small.named_parameters()} == frozen
    assert all(not m._forward_hooks or name == "classifier" for name, m in small.named_modules())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert shared == set()
    small.train()(**ids()).logits.sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad and p.dim() == 2 and len(p) > 2)


def test_a_frozen_model_is_narrowed_like_any_other() -> None:
    model = bert()
    expected = fxslim.plan(model, ffn=0.5, heads=0.5)
    model.requires_grad_(False)
    small = fxslim.slim(model, ffn=0.5, heads=0.5)
    assert small.fxslim.plan.sites == expected.sites
    assert len(expected.sites) == 4
    assert not any(p.requires_grad for p in small.parameters())


def test_under_no_grad_and_inference_mode() -> None:
    model = mlp()
    expected = fxslim.plan(model, given(), ffn=0.5).sites
    with torch.no_grad():
        assert fxslim.slim(model, given(), ffn=0.5).fxslim.plan.sites == expected
    assert torch.is_grad_enabled()


# In place -----------------------------------------------------------------------------------------------------------


def test_in_place_narrows_the_model_itself() -> None:
    model = bert()
    reference, plan = copy.deepcopy(model), fxslim.plan(model, ffn=0.5, heads=0.25)
    handle = model.register_forward_hook(lambda *_: None)
    assert fxslim.slim(model, plan=plan, inplace=True) is model
    assert model.fxslim.plan.sites == plan.sites
    assert list(model._forward_hooks) == [handle.id]
    with fxslim.masked(reference, plan):
        expected = outputs(reference, ids())
    assert difference(expected, outputs(model, ids())) <= EXACT
    assert model.config.fxslim["sites"][0]["keep"]
    with pytest.raises(PlanError, match="made for another model"):
        fxslim.slim(model, plan=plan)


@pytest.mark.parametrize(
    ("request_", "error"),
    [({"ffn": 1}, RequestError), ({"skip": "nope"}, RequestError), ({"experts": 1.5}, RequestError)],
)
def test_in_place_changes_nothing_on_failure(request_: dict[str, Any], error: type[FxslimError]) -> None:
    model = bert()
    before = state(model)
    with pytest.raises(error):
        fxslim.slim(model, inplace=True, **request_)
    assert same_state(before, state(model))


def test_in_place_changes_nothing_when_verification_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    before = state(model)

    def disagree(*_: Any, **__: Any) -> None:
        raise VerifyError("a site", 1.0, 0.0, "a path")

    monkeypatch.setattr("fxslim.passes.narrowing.compare", disagree)
    with pytest.raises(VerifyError, match="masked and narrowed models disagree at a site"):
        fxslim.slim(model, ffn=0.5, inplace=True)
    assert same_state(before, state(model))


# Results ------------------------------------------------------------------------------------------------------------


def test_the_record_tells_everything() -> None:
    model = bert()
    small = fxslim.slim(model, ffn=0.5, heads=0.25, round_to=2)
    record = small.fxslim
    report = record.report
    assert record.plan.requested == {"ffn": 0.5, "heads": 0.25, "round_to": 2}
    assert record.plan.torch == torch.__version__.partition("+")[0] or record.plan.torch == torch.__version__
    assert record.plan.fingerprint.model_class == "BertForSequenceClassification"
    assert report.plan == record.plan
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert 0 < report.macs_after < report.macs_before
    assert report.sites[0] == {
        "name": "bert.encoder.layer.0.attention:attention",
        "kind": "attention",
        "units": 4,
        "kept": 3,
    }
    assert report.verification.relative <= EXACT
    assert {"as given", "without mask", "sdpa attention", "batch of one"} <= {
        difference_.path for difference_ in report.verification.differences
    }
    assert report.seconds.keys() >= {"Trace", "Annotate", "Find", "Choose", "NarrowModule", "Verify"}
    assert report.to_dict()["parameters_after"] == report.parameters_after
    for word in ("parameters", "MACs", "bert.encoder.layer.1:ffn", "masked = narrowed", "task head"):
        assert word in str(report)
    assert Plan.from_json(record.plan.to_json()) == record.plan
    assert small.config.fxslim["fingerprint"] == record.plan.fingerprint.model_dump()
    assert not hasattr(model.config, "fxslim")
    assert not hasattr(model, "fxslim")


def test_a_plan_of_one_copy_fits_another() -> None:
    first, second = bert(), bert().float()
    plan = Plan.from_json(fxslim.plan(first, ffn=0.5).to_json())
    assert fxslim.slim(second, plan=plan).fxslim.plan.sites == plan.sites


def test_the_masked_graph_computes_what_the_masked_model_does() -> None:
    model = bert()
    plan = fxslim.plan(model, ffn=0.5, heads=0.5)
    graph = fxslim.compile(model, plan=plan, narrow=False)
    with fxslim.masked(model, plan):
        expected = outputs(model, ids(4, 9))
    assert difference(expected, outputs(graph, ids(4, 9))) <= EXACT
    assert difference(outputs(model, ids(4, 9)), expected) > 1e-4
    assert {n: p.shape for n, p in graph.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_verify_names_the_disturbed_site() -> None:
    model = bert()
    plan = fxslim.plan(model, ffn=0.5, heads=0.5)
    small = fxslim.slim(model, plan=plan)
    assert fxslim.verify(model, small, plan=plan).relative <= EXACT
    with torch.no_grad():
        small.bert.encoder.layer[1].output.dense.weight[3, 5] += 0.01
    with pytest.raises(VerifyError) as caught:
        fxslim.verify(model, small, plan=plan)
    assert caught.value.site == "bert.encoder.layer.1:ffn"
    assert caught.value.max_abs > caught.value.tolerance > 0
    assert "masked and narrowed models disagree at bert.encoder.layer.1:ffn" in str(caught.value)
    with torch.no_grad():
        small.bert.encoder.layer[0].attention.self.key.weight[0] += 0.1
    with pytest.raises(VerifyError, match=r"bert.encoder.layer.0.attention:attention"):
        fxslim.verify(model, small, plan=plan)


def test_verify_sees_wrong_units() -> None:
    model = bert()
    plan = fxslim.plan(model, heads=0.5)
    other = plan.model_copy(update={"sites": tuple(
        part.model_copy(update={"keep": tuple(u for u in range(4) if u not in part.keep)}) for part in plan
    )})  # fmt: skip
    for made in (fxslim.slim(model, plan=other), fxslim.compile(model, plan=other)):
        with pytest.raises(VerifyError):
            fxslim.verify(model, made, plan=plan)


def test_the_observer_sees_every_pass() -> None:
    seen: list[tuple[str, bool, float]] = []

    def observer(before: Any, step: Any, after: Any, seconds: float) -> None:
        seen.append((type(step).__name__, before is not after, seconds))

    fxslim.slim(mlp(), given(), ffn=0.5, observer=observer)
    names = [name for name, _, _ in seen]
    assert names[:5] == ["Trace", "Annotate", "Find", "Name", "Order"]
    assert names[-2:] == ["Verify", "Account"]
    assert all(seconds >= 0 for _, _, seconds in seen)
    seen.clear()
    fxslim.inspect(mlp(), given(), observer=observer)
    assert [name for name, _, _ in seen] == ["Trace", "Annotate", "Find", "Name", "Order"]


def test_progress_does_not_print_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    fxslim.slim(mlp(), given(), ffn=0.5, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    fxslim.slim(mlp(), given(), ffn=0.5)
    assert capfd.readouterr() == ("", "")


def test_why() -> None:
    found = fxslim.inspect(bert())
    assert "layer_norm" in found.why("bert.encoder.layer.0.intermediate")
    assert "ffn in bert.encoder.layer.0" in found.why("bert.encoder.layer.0.output.dense")
    assert "no linear in the graph" in found.why("bert.encoder.layer.9")
    assert found["bert.encoder.layer.0:ffn"].units == 48
    text = str(found)
    assert text.startswith("5 sites")
    assert "stays, because" in text


# Graphs -------------------------------------------------------------------------------------------------------------


def test_graphs_are_called_like_the_model() -> None:
    graph, model = compiled(), bert()
    assert isinstance(graph, torch.fx.GraphModule)
    assert type(graph).__name__ == "BertForSequenceClassification"
    with torch.no_grad(), fxslim.masked(model, graph.fxslim.plan):
        expected = model(**ids()).logits
    with torch.no_grad():
        found = graph(**ids())
        assert type(found).__name__ == "SequenceClassifierOutput"
        values = ids()
        forms = [
            found.logits,
            found[0],
            graph(values["input_ids"], values["attention_mask"]).logits,
            graph(values["input_ids"], attention_mask=values["attention_mask"], token_type_ids=None).logits,
            graph(**values, return_dict=True, labels=None, output_attentions=False).logits,
        ]
    for form in forms:
        assert float((form - expected).abs().max()) <= EXACT * float(expected.abs().max())


class Options(nn.Module):
    """Inputs called as the generated code and Python's builtins are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, V)

    def forward(self, input: Tensor, options: Tensor | None = None) -> Tensor:
        hidden = torch.relu(self.up(input))
        return self.down(hidden if options is None else hidden * options.mean())


@pytest.mark.parametrize("count", [1, 2])
def test_names_of_inputs_do_not_clash(count: int) -> None:
    model = Options().double().eval()
    graph = fxslim.compile(model, (given(), given())[:count], ffn=0.5)
    with fxslim.masked(model, graph.fxslim.plan):
        expected = outputs(model, (given(5), given(5))[:count])
    assert difference(expected, outputs(graph, (given(5), given(5))[:count])) <= EXACT


def test_an_omitted_mask_stands_for_ones() -> None:
    graph = compiled()
    values = ids()["input_ids"]
    with torch.no_grad():
        assert torch.equal(graph(values).logits, graph(values, torch.ones_like(values)).logits)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (lambda: {**ids(), "labels": torch.tensor([0, 1])}, "was compiled without the input 'labels'"),
        (lambda: {**ids(), "output_attentions": True}, "was compiled without the input 'output_attentions'"),
        (lambda: {**ids(), "nonsense": 3}, "was compiled without the input 'nonsense'"),
        (lambda: {"attention_mask": ids()["attention_mask"]}, "was compiled with the input 'input_ids'; give it"),
        (lambda: {"input_ids": [[1, 2]]}, "input 'input_ids' must be a tensor, not list"),
        (lambda: {"input_ids": ids()["input_ids"].double()}, "compiled with another kind of numbers"),
    ],
)
def test_graphs_refuse_what_was_not_traced(arguments: Callable[[], dict[str, Any]], text: str) -> None:
    with pytest.raises(InputError) as caught:
        compiled()(**arguments())
    assert text in str(caught.value)


def test_wrong_sizes_are_refused_with_the_axis() -> None:
    model = ARCHITECTURES["vit_classify"].build()
    graph = fxslim.compile(model, ffn=0.5)
    with pytest.raises(
        InputError, match=r"input 'pixel_values' has shape \(2, 3, 12, 12\), but axis 2 was fixed at 16"
    ):
        graph(torch.zeros(2, 3, 12, 12, dtype=torch.float64))
    with pytest.raises(InputError, match="axis 1 was fixed at 3"):
        graph(torch.zeros(2, 1, 16, 16, dtype=torch.float64))


def test_graphs_are_for_inference() -> None:
    graph = compiled()
    assert not graph.training
    with pytest.raises(UnsupportedModelError, match=r"a compiled graph is for inference.*Use fxslim.slim"):
        graph.train()
    assert graph.eval() is graph
    assert graph.train(False) is graph


def test_a_graph_has_no_class_to_slim_and_what_is_final_is_refused() -> None:
    once, inputs = compiled(), ids()
    for graph, more in ((once, (inputs,)), (fxslim.inspect(once, inputs), ())):
        with pytest.raises(InputError, match=r"a model's own class, and this is a compiled graph: compile takes"):
            fxslim.slim(graph, *more, ffn=0.5)
    for read in (fxslim.compile, fxslim.inspect, fxslim.plan, fxslim.slim):
        with pytest.raises(UnsupportedModelError, match=r"what fxslim\.optimize made of another model: narrow that"):
            read(fxslim.optimize(once), inputs)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["bert_classify", "llama_gqa"])
@pytest.mark.parametrize("form", ["compiled", "exported"])
def test_graphs_are_compiled_again(name: str, form: str) -> None:
    """Modules of a graph are not called: what is masked are columns. Task heads are told from blocks as before."""
    model = ARCHITECTURES[name].build(torch.float64)
    inputs = dict(ARCHITECTURES[name].inputs(2, 7))
    small: Any = fxslim.slim(model, ffn=0.5)
    once: Any = fxslim.compile(model, plan=small.fxslim.plan)
    if form == "exported":
        inputs |= {} if name == "bert_classify" else {"use_cache": False}
        once = torch.export.export(small, (), inputs).module()
    plan, own = (fxslim.plan(one, inputs, ffn=0.5, heads=0.5) for one in (once, small))
    assert [(p.site.name, p.keep) for p in plan] == [(p.site.name, p.keep) for p in own]
    assert plan.notes == own.notes
    with torch.no_grad(), fxslim.masked(once, plan):
        want = outputs(once, inputs)
    assert difference(want, outputs(once, inputs)) > 1e-3
    twice: Any = fxslim.compile(once, inputs, plan=plan)
    assert difference(want, outputs(twice, inputs)) <= 1e-9


def test_what_is_loaded_into_a_graph_does_not_reach_the_model() -> None:
    model = bert()
    before, graph = state(model), fxslim.compile(model, ffn=0.5)
    graph.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in graph.state_dict().items()})
    assert same_state(before, state(model))


@pytest.mark.parametrize("form", ["slim", "compile"])
def test_results_can_be_copied(form: str) -> None:
    model = bert()
    made = getattr(fxslim, form)(model, ffn=0.5, heads=0.5)
    copied = copy.deepcopy(made)
    assert type(copied).__name__ == type(made).__name__
    assert copied.fxslim.plan == made.fxslim.plan
    assert copied.state_dict().keys() == made.state_dict().keys()
    expected = outputs(made, ids())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert difference(expected, outputs(copied, ids())) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_both_forms_exchange_their_weights(name: str) -> None:
    model = ARCHITECTURES[name].build()
    small, graph = fxslim.slim(model, ffn=0.5, heads=0.5), fxslim.compile(model, ffn=0.5, heads=0.5)
    weights = {key: tensor.clone() for key, tensor in small.state_dict().items()}
    assert {k: t.shape for k, t in graph.state_dict().items()} == {k: t.shape for k, t in weights.items()}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.25)
    graph.load_state_dict(small.state_dict())
    inputs: dict[str, Any] = ARCHITECTURES[name].inputs(2, 6)
    inputs = inputs | ({"use_cache": False} if ARCHITECTURES[name].generates else {})
    tolerance = INNER_FLOAT32 if name == "llama_gqa" else EXACT
    assert difference(outputs(small, inputs), outputs(graph, inputs)) <= tolerance
    graph.load_state_dict(weights)
    small.load_state_dict(graph.state_dict())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in small.state_dict().items())


# Kinds of models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("bert", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
     ("llama_gqa", torch.float32), ("llama_gqa", torch.bfloat16)],
)  # fmt: skip
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[name].build(dtype)
    small, graph = fxslim.slim(model, ffn=0.5, heads=0.5), fxslim.compile(model, ffn=0.5, heads=0.5)
    for made in (small, graph):
        assert {p.dtype for p in made.parameters()} == {dtype}
    inputs = {**ARCHITECTURES[name].inputs(3, 9, 4), **({"use_cache": False} if name != "bert" else {})}
    with fxslim.masked(model, small.fxslim.plan):
        expected = outputs(model, inputs)
    loose = {torch.float64: INNER_FLOAT32, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for made in (small, graph):
        assert difference(expected, outputs(made, inputs)) <= loose


@pytest.mark.parametrize("name", ["bert_classify", "llama_gqa"])
def test_models_on_meta_are_inspected_and_planned_without_weights(name: str) -> None:
    real, entry = ARCHITECTURES[name].build(), ARCHITECTURES[name]
    with torch.device("meta"):
        model = getattr(transformers, entry.model)(getattr(transformers, entry.config)(**entry.sizes)).double().eval()
    assert all(p.is_meta for p in model.parameters())
    found, expected = fxslim.inspect(model), fxslim.inspect(real)
    assert [(s.name, s.units, s.slices) for s in found.sites] == [(s.name, s.units, s.slices) for s in expected.sites]
    plan = fxslim.plan(model, ffn=0.5, heads=0.5)
    assert "weights are on meta: units were chosen by number, not by score" in [note.reason for note in plan.notes]
    assert [len(p.keep) for p in plan] == [len(p.keep) for p in fxslim.plan(real, ffn=0.5, heads=0.5)]
    small = fxslim.slim(real, plan=plan)
    assert small.fxslim.plan.sites == plan.sites
    assert all(p.is_meta for p in model.parameters())


def test_norms_on_queries_and_keys_do_not_hide_the_heads() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 50}
    config = transformers.Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.Qwen3ForCausalLM(config).double().eval()
    small = fxslim.slim(model, heads=0.5)
    assert [(part.site.kind, part.site.units, len(part.keep)) for part in small.fxslim.plan] == [("attention", 4, 2)]
    inputs = {"input_ids": torch.arange(3, 15).reshape(2, 6), "use_cache": False}
    with fxslim.masked(model, small.fxslim.plan):
        expected = outputs(model, inputs)
    assert difference(expected, outputs(small, inputs)) <= INNER_FLOAT32


@pytest.mark.parametrize(
    ("name", "ties"),
    [("gpt2", ["transformer.wte.weight", "lm_head.weight"]),
     ("bart", ["model.shared.weight", "model.encoder.embed_tokens.weight", "lm_head.weight"])],
)  # fmt: skip
def test_tied_weights_stay_tied(name: str, ties: list[str]) -> None:
    model = ARCHITECTURES[name].build()
    for made in (fxslim.slim(model, ffn=0.5, heads=0.5), fxslim.compile(model, ffn=0.5, heads=0.5)):
        tied = [made.get_parameter(path) for path in ties]
        assert all(parameter is tied[0] for parameter in tied)
        assert tied[0] is not model.get_parameter(ties[0])
        assert made.fxslim.report.parameters_after == sum(p.numel() for p in made.parameters())


class Twice(nn.Module):
    """One attention and one FFN, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=16, num_attention_heads=4, intermediate_size=20, attn_implementation="eager"
        )
        from transformers.models.bert.modeling_bert import BertLayer

        self.layer, self.norm, self.head = BertLayer(config), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(self.norm(x))


def test_shared_modules_are_narrowed_once() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Twice().double().eval()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fxslim.inspect(model, x)
    assert [(site.kind, site.units) for site in found.sites] == [("attention", 4), ("ffn", 20)]
    plan = fxslim.plan(model, x, ffn=0.5, heads=0.5)
    fresh = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with fxslim.masked(model, plan):
        expected = outputs(model, (fresh,))
    for made in (fxslim.slim(model, x, plan=plan), fxslim.compile(model, x, plan=plan)):
        assert difference(expected, outputs(made, (fresh,))) <= EXACT


# Quantized ----------------------------------------------------------------------------------------------------------


def dynamically_quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(mlp(torch.float32), {nn.Linear}, dtype=torch.qint8)


def like_bitsandbytes() -> nn.Module:
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model = mlp()
    model.up = kind(D, HIDDEN).double()
    return model


class Packed(Tensor):
    """A tensor subclass as torchao makes them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float64)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return "Packed()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].inner)
        raise NotImplementedError(func)


def like_torchao() -> nn.Module:
    model = mlp()
    model.up.weight = nn.Parameter(Packed(torch.zeros(HIDDEN, D, dtype=torch.int8)), requires_grad=False)
    return model


def marked_by_transformers() -> nn.Module:
    model = bert()
    model.is_quantized = True
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (dynamically_quantized, "quantized"),
        (like_bitsandbytes, "up is a quantized Linear8bitLt"),
        (like_torchao, "up.weight is stored as"),
        (marked_by_transformers, "BertForSequenceClassification is quantized"),
    ],
)
def test_quantized_models_are_refused(make: Callable[[], nn.Module], text: str) -> None:
    model = make()
    for call in (fxslim.inspect, fxslim.plan, fxslim.slim, fxslim.compile):
        with pytest.raises(UnsupportedModelError) as caught:
            call(model, given(dtype=torch.float32))
        assert text in str(caught.value)
        assert "narrow the original model and quantize" in str(caught.value)
