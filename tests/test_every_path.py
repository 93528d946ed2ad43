"""Every path that a user takes: generation, training, copies, compilers. Masked and narrowed do the same on each."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import fxslim
from fxslim.passes.narrow import replay

from agreement import difference, outputs
from architectures import VOCAB
from battery import quiet
from everywhere import (
    DECODERS,
    ENTRIES,
    GENERATING,
    NAMES,
    PAIRS,
    built,
    fewer_groups,
    forward_inputs,
    loose,
    narrowed,
    plan_of,
    prompt,
)


@pytest.fixture(autouse=True, scope="module")
def _battery() -> Iterator[None]:
    with quiet():
        yield


# Generation ---------------------------------------------------------------------------------------------------------

NEW = 6
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "static prefill in chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
}


def generated(model: Any, given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens and the logits of every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = model.generate(
            **given, **{"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW} | options,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def assert_same_generation(name: str, given: dict[str, Any], **options: Any) -> None:
    assert_same_tokens((built(name), narrowed(name)), loose(name), given, **options)


def assert_same_tokens(pair: tuple[Any, Any], close: float, given: dict[str, Any], **options: Any) -> None:
    model, small = pair
    with fxslim.masked(model, small.fxslim.plan):
        tokens, logits = generated(model, given, **options)
    mine, my_logits = generated(small, given, **options)
    assert torch.equal(tokens, mine)
    assert difference({"logits": logits}, {"logits": my_logits}) <= close


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATING)
def test_generation(name: str, way: str) -> None:
    if name == "whisper" and "chunks" in way:
        pytest.skip("transformers hands position_ids twice: the dense model does not read prompts in chunks")
    assert_same_generation(name, prompt(name), **WAYS[way])


@pytest.mark.parametrize("way", ["greedy", "static", "beams"])
@pytest.mark.parametrize("name", [name for name in GENERATING if ENTRIES[name].sdpa])
def test_generation_with_fused_attention(name: str, way: str) -> None:
    models = built(name), narrowed(name)
    try:
        for model in models:
            model.set_attn_implementation("sdpa")
        assert_same_generation(name, prompt(name), **WAYS[way])
    finally:
        for model in models:
            model.set_attn_implementation("eager")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama_gqa", "phi3_gqa", "gemma3"])
def test_generation_with_fewer_key_value_heads(name: str, way: str) -> None:
    assert_same_tokens((built(name), fewer_groups(name)), loose(name), prompt(name, length=12), **WAYS[way])


@pytest.mark.parametrize("name", GENERATING)
def test_the_masks_change_the_logits(name: str) -> None:
    model = built(name)
    _, logits = generated(model, prompt(name))
    with fxslim.masked(model, plan_of(name)):
        _, masked = generated(model, prompt(name))
    assert difference({"": logits}, {"": masked}) > 1e-2


@pytest.mark.parametrize("way", ["greedy", "static", "beams"])
@pytest.mark.parametrize("name", DECODERS)
def test_prompts_padded_on_the_left(name: str, way: str) -> None:
    """In float32: a softmax in float32 makes NaN of rows whose keys are all masked by the least float64."""
    pair = copy.deepcopy(built(name)).float(), copy.deepcopy(narrowed(name)).float()
    assert_same_tokens(pair, 1e-4, prompt(name, left=True), **WAYS[way])


@pytest.mark.parametrize("name", GENERATING)
def test_assisted_generation(name: str) -> None:
    """A model that is narrowed more proposes tokens; and the narrowed model is the dense one's assistant."""
    given = prompt(name, batch=1)
    assert_same_generation(name, given, assistant_model=narrowed(name, 2), num_assistant_tokens=3)
    tokens, _ = generated(built(name), given)
    assert torch.equal(tokens, generated(built(name), given, assistant_model=narrowed(name))[0])


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_looked_up_in_the_prompt(name: str) -> None:
    given = {key: torch.cat([value, value], 1) for key, value in prompt(name, batch=1).items()}
    assert_same_generation(name, given, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("cache", ["sliding_window", "hybrid"])
def test_caches_that_slide(cache: str) -> None:
    """The prompt is longer than the window of 8."""
    assert_same_generation("gemma3", prompt("gemma3", length=14), cache_implementation=cache)


def test_a_cache_that_quanto_quantizes() -> None:
    if not is_optimum_quanto_available():
        pytest.skip("quanto is not installed")
    assert_same_generation("gpt2", prompt("gpt2"), cache_implementation="quantized", cache_config={"backend": "quanto"})


@pytest.mark.parametrize("backend", ["fp8", "hqq"])
def test_a_cache_quantized_over_all_heads_is_near(backend: str) -> None:
    """One scale for all heads (fp8), or rounding fitted to all of them (hqq): masked heads have a part in it."""
    if backend == "hqq" and not is_hqq_available():
        pytest.skip("hqq is not installed")
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}  # its groups run over all heads on axis 0
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **axes}}
    name = "gpt2" if backend == "hqq" else "llama_gqa"  # hqq packs an even number of groups
    model, small, given = built(name), narrowed(name), prompt(name, length=16)
    with fxslim.masked(model, plan_of(name)):
        _, expected = generated(model, given, **options)
    _, found = generated(small, given, **options)
    assert difference({"first": expected[0]}, {"first": found[0]}) <= loose(name)  # nothing is quantized yet
    assert difference({"second": expected[1]}, {"second": found[1]}) <= 0.2


def chunks(model: Any, given: dict[str, Tensor], at: int) -> Tensor:
    """Return the logits of a prompt that is read in two parts."""
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :at], attention_mask=mask[:, :at], use_cache=True)
        second = model(
            input_ids=ids[:, at:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True
        )
    logits: Tensor = torch.cat([first.logits, second.logits], 1)
    return logits


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_two_chunks(name: str) -> None:
    given = prompt(name, length=14)
    model, small = built(name), narrowed(name)
    for at in (5, 13):
        with fxslim.masked(model, plan_of(name)):
            expected = chunks(model, given, at)
        assert difference({"": expected}, {"": chunks(small, given, at)}) <= loose(name)


# What models show of their inside -----------------------------------------------------------------------------------


def heads(name: str) -> dict[str, list[tuple[int, ...] | None]]:
    """Return the kept heads of every attention by where its weights are shown; None where none went."""
    kept: dict[str, list[tuple[int, ...] | None]] = {}
    for part in plan_of(name):
        if part.site.kind == "attention":
            where = "attentions"
            if name in PAIRS:
                cross = "encoder_attn" in part.site.name or "EncDecAttention" in part.site.name
                within = "encoder" if "encoder." in part.site.name.replace("decoder.", "") else "decoder"
                where = "cross_attentions" if cross else f"{within}_attentions"
            kept.setdefault(where, []).append(part.keep)
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_attention_weights_of_the_kept_heads(name: str) -> None:
    model, small = built(name), narrowed(name)
    inputs = {**forward_inputs(name), "output_attentions": True}
    with torch.no_grad():
        with fxslim.masked(model, plan_of(name)):
            expected = model(**inputs)
        found = small(**inputs)
    shown = [key for key in expected if key.endswith("attentions") and expected[key]]
    kept = heads(name)
    assert set(kept) <= set(shown)
    assert kept or name == "falcon_new"
    for key in shown:
        assert len(expected[key]) == len(found[key]) > 0
        for layer, (want, have) in enumerate(zip(expected[key], found[key], strict=True)):
            own = list(kept[key][layer] or ()) if key in kept else list(range(want.shape[1]))
            assert difference({key: want[:, own]}, {key: have}) <= loose(name)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states(name: str) -> None:
    inputs = {**forward_inputs(name), "output_hidden_states": True}
    with fxslim.masked(built(name), plan_of(name)):
        expected = outputs(built(name), inputs)
    assert any("hidden_states" in key for key in expected)
    assert difference(expected, outputs(narrowed(name), inputs)) <= loose(name)


# Training -----------------------------------------------------------------------------------------------------------


def labelled(name: str) -> dict[str, Any]:
    inputs = forward_inputs(name)
    if name == "bert":
        return inputs
    ids = inputs["decoder_input_ids"] if name in PAIRS else inputs["input_ids"]
    return {**inputs, "labels": ids.roll(1, -1) % VOCAB}


def trained(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of one step of training."""
    model.zero_grad(set_to_none=True)
    model.train()
    try:
        found = model(**inputs)
        loss = found.loss if "labels" in inputs else found.last_hidden_state.sin().sum()
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)


def assert_same_gradients(name: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Compare gradients of the dense model's shapes, or of the narrowed one's, by the scale of each tensor."""
    columns = {(p.tensor, p.dim) for part in plan_of(name) for p in part.site.slices if p.role == "in" and not p.hook}
    removed: dict[str, list[tuple[int, np.ndarray]]] = {}
    for (tensor, dim), gone in plan_of(name).removed_rows().items():
        removed.setdefault(tensor, []).append((dim, gone))
    assert expected.keys() == found.keys()
    for tensor, mine in found.items():
        want = expected[tensor]
        scale = float(want.abs().max())
        for dim, gone in removed.get(tensor, ()) if want.shape != mine.shape else ():
            lost = want.index_select(dim, torch.from_numpy(np.flatnonzero(gone)))
            silent = (tensor, dim) not in columns  # zero columns, where no input is masked, still have gradients
            assert not (silent and lost.any()), f"{tensor}: what is masked has a gradient"
            rows = torch.from_numpy(np.flatnonzero(~gone))
            want = want.index_select(dim, rows)
        assert want.shape == mine.shape, tensor
        assert float((want - mine).abs().max()) <= 10 * loose(name) * scale + 1e-13, tensor


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name: str) -> None:
    model, small, inputs = built(name), narrowed(name), labelled(name)
    with fxslim.masked(model, plan_of(name)):
        loss, expected = trained(model, inputs)
    mine, found = trained(small, inputs)
    assert difference({"loss": loss}, {"loss": mine}) <= loose(name)
    assert sum(bool(grad.any()) for grad in found.values()) > len(found) / 2
    assert_same_gradients(name, expected, found)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    small, inputs = narrowed(name), labelled(name)
    _, expected = trained(small, inputs)
    copied = copy.deepcopy(small)
    copied.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # needs an input with a gradient
        copied.enable_input_require_grads()
    _, found = trained(copied, inputs)
    assert_same_gradients(name, expected, found)


# Compilers, copies, other dtypes ------------------------------------------------------------------------------------


def compiled(model: nn.Module, inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    torch._dynamo.reset()
    try:
        return outputs(torch.compile(model, backend=backend, fullgraph=True), inputs)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_one_graph(name: str) -> None:
    small, inputs = narrowed(name), forward_inputs(name)
    expected = outputs(small, inputs)
    assert difference(expected, compiled(small, inputs, "eager")) <= loose(name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("name", ["bert"])
def test_compiled_by_inductor(name: str) -> None:
    small, inputs = narrowed(name), forward_inputs(name)
    assert difference(outputs(small, inputs), compiled(small, inputs, "inductor")) <= loose(name)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_state_dicts(name: str) -> None:
    small, inputs = narrowed(name), forward_inputs(name)
    expected = outputs(small, inputs)
    copied = copy.deepcopy(small)
    assert difference(expected, outputs(copied, inputs)) == 0
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert difference(expected, outputs(small, inputs)) == 0
    copied.load_state_dict(small.state_dict())
    assert difference(expected, outputs(copied, inputs)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_a_whole(name: str) -> None:
    """One that was never asked for its attention: transformers then leaves hooks that nobody can pickle."""
    model, inputs = ENTRIES[name].build(), forward_inputs(name)
    small = replay(model, plan_of(name))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert difference(outputs(small, inputs), outputs(torch.load(file, weights_only=False), inputs)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs(name: str, dtype: torch.dtype) -> None:
    inputs = forward_inputs(name)
    expected = outputs(narrowed(name), inputs)
    small = copy.deepcopy(narrowed(name)).to(dtype)
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    found = outputs(small, cast)
    assert difference(expected, {key: value.double() for key, value in found.items()}) <= 0.15
