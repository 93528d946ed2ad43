"""Hard architectures, both forms, one question a test: what is found, cut, generated, disturbed.

What does not hold yet is listed in :data:`KNOWN` with the reason, and fails here as soon as it does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxslim
from fxslim.passes.prepare import permanent
from fxslim.plan import Plan

from agreement import FIXED, difference, outputs, plain_kernels, random_plan, tolerance
from architectures import Attention
from battery import (
    assert_labels_say_what_the_oracle_sees,
    layers,
    quiet,
    reached,
    removed,
    written,
)
from hard import HARD

SIZES = ((1, 5), (5, 11), (4, 3))
"""Batch sizes and lengths to compare on; examples for tracing have 2 rows of 7."""
FUSED = ("t5", "umt5", "falcon_mq", "falcon_alibi", "falcon_new", "qwen3", "gemma3", "pegasus", "whisper", "siglip")
"""Traced with fused attention as well; the modules of all are compared with both kinds anyway (fxslim does)."""
KNOWN: dict[str, dict[str, str]] = {}
"""Entry, or entry and attention, to test to the reason why it fails today."""


def cases(test: str) -> list[Any]:
    """Return every entry with every attention implementation, marked where a failure is known."""
    made = []
    for name in HARD:
        for attn in ("eager", "sdpa")[: 1 + (name in FUSED)]:
            reason = KNOWN.get(f"{name} {attn}", {}).get(test) or KNOWN.get(name, {}).get(test)
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            made.append(pytest.param(name, attn, marks=marks, id=f"{name}-{attn}"))
    return made


@pytest.fixture(autouse=True, scope="module")
def _battery() -> Iterator[None]:
    with quiet():
        yield


@functools.cache
def built(name: str, attn: Attention) -> Any:
    return HARD[name].build(torch.float64, attn)


def example(name: str) -> dict[str, Tensor] | None:
    return HARD[name].inputs(2, 7, seed=0) if HARD[name].given else None


@functools.cache
def inspected(name: str, attn: Attention = "eager") -> fxslim.Inspection:
    return fxslim.inspect(built(name, attn), example(name))


@functools.cache
def planned(name: str, attn: Attention) -> Plan:
    """Draw what goes, a unit of every site at least."""
    found = inspected(name, attn)
    plan = random_plan(built(name, attn), found.sites, seed=sorted(HARD).index(name))
    assert [part.site.name for part in plan] == [site.name for site in found.sites]
    return plan


@functools.cache
def slimmed(name: str, attn: Attention) -> Any:
    return fxslim.slim(built(name, attn), example(name), plan=planned(name, attn))


# Sites --------------------------------------------------------------------------------------------------------------

T5_ENCODER = ("layer.0.SelfAttention:attention 4", "layer.1.DenseReluDense:ffn 48")
T5_DECODER = (T5_ENCODER[0], "layer.1.EncDecAttention:attention 4", "layer.2.DenseReluDense:ffn 48")
T5 = [*layers(*T5_ENCODER, at="encoder.block.#."), *layers(*T5_DECODER, at="decoder.block.#.")]
T5_GATED = [site.replace(":ffn", ":gated_ffn") for site in T5]
GPT2 = ("transformer.h.#.attn:attention 4", "transformer.h.#.mlp:ffn 48")
FALCON = ("transformer.h.#.self_attention:attention 4", "transformer.h.#.mlp:ffn 48")
LLAMA_GQA = ("self_attn:attention 4/2", "mlp:gated_ffn 48")
BART = [
    *layers("self_attn:attention 4", ":ffn 48", at="model.encoder.layers.#."),
    *layers("self_attn:attention 4", "encoder_attn:attention 4", ":ffn 40", at="model.decoder.layers.#."),
]
DEBERTA = [
    *layers("attention:attention 4", ":ffn 48", at="deberta.encoder.layer.#."),
    "ffn 32 head",
]
TOWER = ("self_attn:attention 3", "mlp:ffn 36")
WAV2VEC2 = ("attention:attention 4", "feed_forward:ffn 48")
DEEPSEEK = [
    "model.layers.0.self_attn:attention 4",
    "model.layers.0.mlp:gated_ffn 48",
    "model.layers.1.self_attn:attention 4",
    "model.layers.1.mlp:experts 4",
    "model.layers.1.mlp.experts:gated_ffn 48/4",
    "model.layers.1.mlp.shared_experts:gated_ffn 24",
]
SITES: dict[str, list[str]] = {
    "t5": T5,
    "t5_gated": T5_GATED,
    "t5_encoder": layers(*T5_ENCODER, at="encoder.block.#."),
    "mt5": T5_GATED,
    "umt5": T5_GATED,
    "mpnet": [*layers("attention.attn:attention 4", ":ffn 48", at="mpnet.encoder.layer.#."), "classifier:ffn 32 head"],
    "bloom": layers("self_attention:attention 4", "mlp:ffn 128", at="transformer.h.#."),
    "mpt": layers("attn:attention 4", "ffn:ffn 128", at="transformer.blocks.#."),
    "falcon_alibi": layers(*FALCON),
    "falcon_mq": layers(*FALCON),
    "falcon_mha": layers(*FALCON),
    "falcon_new": layers("self_attention:attention 4/2", "mlp:ffn 48", at="transformer.h.#."),
    "codegen": layers("attn:attention 8/4", "mlp:ffn 48", at="transformer.h.#."),
    "gpt_bigcode": layers("attn:attention 4", "attn:generic 8", "mlp:ffn 48", at="transformer.h.#."),
    "gpt_bigcode_mha": layers(*GPT2),
    "persimmon": layers("self_attn:attention 4", "mlp:ffn 48", at="model.layers.#."),
    "qwen3": layers(*LLAMA_GQA, at="model.layers.#."),
    "gemma3": layers(*LLAMA_GQA, at="model.layers.#."),
    "olmo2": layers("self_attn:generic 16/2", "mlp:gated_ffn 48", at="model.layers.#."),
    "deberta_v2": DEBERTA,
    "deberta_v2_shared": DEBERTA,
    "swin": [
        *layers("attention:attention 2", "mlp:ffn 36", at="swin.encoder.layers.0.blocks.#."),
        *layers("attention:attention 4", "mlp:ffn 72", at="swin.encoder.layers.1.blocks.#."),
    ],
    "albert": [
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention:attention 4",
        "albert.encoder.albert_layer_groups.0.albert_layers.0:ffn 48",
        "ffn 32 head",
    ],
    "pegasus": BART,
    "whisper": ["model.encoder:generic 32", *BART],
    "wav2vec2": [
        "wav2vec2.feature_extractor.conv_layers:generic 20",  # groups of one channel each
        *layers(*WAV2VEC2, at="wav2vec2.encoder.layers.#."),
    ],
    "hubert": layers(*WAV2VEC2, at="hubert.encoder.layers.#."),
    "siglip": [
        *layers(*TOWER, at="vision_model.encoder.layers.#."),
        "vision_model.head.attention:attention 3",
        "vision_model.head.mlp:ffn 36",
        *layers("self_attn:attention 4", "mlp:ffn 48", at="text_model.encoder.layers.#."),
    ],
    "blip": [
        *layers(*TOWER, at="vision_model.encoder.layers.#."),
        *layers(
            "attention:attention 4", "crossattention:attention 4", ":ffn 48", at="text_decoder.bert.encoder.layer.#."
        ),
    ],
    "llava": [
        *[f"model.vision_tower.encoder.layers.{layer}.{site}" for layer in range(2) for site in TOWER],
        "model.multi_modal_projector:ffn 32",
        *layers(*LLAMA_GQA, at="model.language_model.layers.#."),
    ],
    "gpt_oss": layers("self_attn:attention 4/2", "mlp:experts 4", "mlp.experts:gated_ffn 192/4", at="model.layers.#."),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": [site for site in DEEPSEEK if ":experts" not in site],  # two of every group of two are needed
    "qwen3_next": [
        "model.layers.0.self_attn:attention 4/2",
        "model.layers.0.mlp.shared_expert:gated_ffn 20",
        "model.layers.0.mlp:experts 4",
        "model.layers.0.mlp.experts:gated_ffn 48/4",
        "model.layers.1.self_attn:attention 4/2",
        "model.layers.1.mlp.shared_expert:gated_ffn 20",
        "model.layers.1.mlp:experts 4",
        "model.layers.1.mlp.experts:gated_ffn 48/4",
    ],
    "torch_encoder": layers("self_attn:attention 4", ":ffn 48", at="encoder.layers.#."),
    "torch_encoder_seq": layers("self_attn:attention 4", ":ffn 48", at="encoder.layers.#."),
    "torch_decoder": layers("self_attn:attention 4", "multihead_attn:attention 4", ":ffn 48", at="decoder.layers.#."),
    "torch_self": ["attention:attention 4"],
    "torch_cross": ["attention:attention 4"],
}
"""Sites in the order of execution: ``name units[/groups] [head]``."""
ROLES = {
    "attention": {"q", "k", "v", "out"},
    "ffn": {"up", "down"},
    "gated_ffn": {"gate", "up", "down"},
    "experts": {"router"},
    "generic": set(),
}
MORE = {"attention": {"gate"}, "generic": {"v", "out"}}
"""Roles that some have: gates of outputs, and value channels where heads stay."""


@pytest.mark.parametrize(("name", "attn"), cases("sites"))
def test_every_site_is_found_named_and_counted(name: str, attn: Attention) -> None:
    found = inspected(name, attn)
    assert [written(site) for site in found.sites] == [line.replace(".:", ":") for line in SITES[name]]
    for site in found.sites:
        assert ROLES[site.kind] <= site.roles.keys() <= ROLES[site.kind] | MORE.get(site.kind, set()), site.name
        assert all(site.roles.values()), site.name
    assert all(note.reason for note in found.pinned)


@pytest.mark.parametrize(("name", "attn"), cases("rules"))
def test_every_operation_has_a_rule(name: str, attn: Attention) -> None:
    assert "no rule" not in str(inspected(name, attn))


# Masked and narrowed ------------------------------------------------------------------------------------------------


def forward_inputs(name: str, batch: int, length: int, seed: int) -> dict[str, Any]:
    entry = HARD[name]
    inputs: dict[str, Any] = entry.inputs(batch, max(length, entry.min_length), seed)
    return {**inputs, "use_cache": False} if entry.generates or entry.decoder else inputs


def assert_agree(name: str, model: Any, plan: Plan, narrowed: Any, batch: int | None = None) -> None:
    """Compare a masked and a narrowed model on fresh inputs of several sizes, padded and not."""
    for seed, (own, length) in enumerate(SIZES):
        size = batch or own
        inputs = forward_inputs(name, size, length, seed)
        variants = [inputs]
        optional = {"attention_mask", "input_ids"} <= inputs.keys() and not HARD[name].given
        if seed == 1 and optional and "Classification" not in HARD[name].model:
            variants.append({key: value for key, value in inputs.items() if key != "attention_mask"})
        for given in variants:
            with fxslim.masked(model, plan):
                expected = outputs(model, given)
            assert difference(expected, outputs(narrowed, given)) <= tolerance(name), (size, length, list(given))


def assert_counts(model: Any, plan: Plan, narrowed: Any) -> None:
    """Every weight that the plan takes out is gone, and no other."""
    gone = sum(removed(model, plan).values())
    assert gone > 0
    total = sum(p.numel() for p in permanent(model).parameters())
    assert sum(p.numel() for p in narrowed.parameters()) == total - gone


@pytest.mark.parametrize(("name", "attn"), cases("slim"))
def test_the_narrowed_module_computes_what_the_masked_one_does(name: str, attn: Attention) -> None:
    model, plan, small = built(name, attn), planned(name, attn), slimmed(name, attn)
    assert type(small) is type(model)
    assert_agree(name, model, plan, small)
    inputs = forward_inputs(name, 2, 7, 0)
    with fxslim.masked(model, plan):
        masked = outputs(model, inputs)
    assert difference(masked, outputs(model, inputs)) > 1e-4  # the masks do something


@pytest.mark.parametrize(("name", "attn"), cases("whole"))
def test_every_site_of_the_module_gets_smaller(name: str, attn: Attention) -> None:
    small = slimmed(name, attn)
    assert small.fxslim.plan.zeroed == ()
    assert_counts(built(name, attn), planned(name, attn), small)


@pytest.mark.parametrize(("name", "attn"), cases("compile"))
def test_the_narrowed_graph_computes_what_the_masked_module_does(name: str, attn: Attention) -> None:
    model, plan = built(name, attn), planned(name, attn)
    graph = fxslim.compile(model, example(name), plan=plan)
    assert graph.fxslim.plan.zeroed == ()
    with plain_kernels():
        assert_agree(name, model, plan, graph, FIXED.get(name))
    assert_counts(model, plan, graph)


GENERATES = [case for case in cases("tokens") if HARD[case.values[0]].generates]


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize(("name", "attn"), GENERATES)
def test_tokens(name: str, attn: Attention, cache: bool) -> None:
    """Greedy tokens, and the logits behind them: small models like to repeat themselves."""
    model, small = built(name, attn), slimmed(name, attn)
    given = HARD[name].inputs(3, 8, seed=5)
    prompt = {key: value for key, value in given.items() if not key.startswith("decoder")}

    def run(which: Any) -> Any:
        return which.generate(
            **prompt,
            max_new_tokens=6,
            do_sample=False,
            use_cache=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )

    with fxslim.masked(model, planned(name, attn)):
        expected = run(model)
    found = run(small)
    assert found.sequences.tolist() == expected.sequences.tolist()
    logits = [{str(step): logit for step, logit in enumerate(made.logits)} for made in (expected, found)]
    assert difference(*logits) <= tolerance(name)


# The oracle ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attn"), [case for case in cases("oracle") if case.values[1] == "eager"])
def test_labels_say_what_the_oracle_sees(name: str, attn: Attention) -> None:
    model = built(name, attn)
    inputs: dict[str, Any] = HARD[name].inputs(2, max(5, HARD[name].min_length), seed=1)
    inputs.pop("padding", None)  # makes nested tensors, whose batch cannot be told apart
    assert_labels_say_what_the_oracle_sees(model, inspected(name), reached(model, inputs))
