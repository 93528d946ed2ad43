"""Every architecture, both forms: named sites, masked ≡ narrowed for random keeps, the oracle against the labels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.plan import Plan

from agreement import difference, outputs, random_plan, tolerance
from architectures import ARCHITECTURES, Attention
from battery import (
    assert_labels_say_what_the_oracle_sees,
    layers,
    quiet,
    reached,
    removed,
    rows,
    written,
)

SIZES = ((1, 5), (5, 11), (4, 3))
"""Batch sizes and lengths to compare on; examples for tracing have 2 rows of 7."""
CASES = [(name, attn) for name, entry in ARCHITECTURES.items() for attn in ("eager", "sdpa")[: 1 + entry.sdpa]]


@pytest.fixture(autouse=True, scope="module")
def _battery() -> Iterator[None]:
    with quiet():
        yield


@functools.cache
def built(name: str, attn: Attention) -> Any:
    return ARCHITECTURES[name].build(torch.float64, attn)


@functools.cache
def inspected(name: str, attn: Attention = "eager") -> fxslim.Inspection:
    return fxslim.inspect(built(name, attn))


# Sites --------------------------------------------------------------------------------------------------------------


BERT = ("encoder.layer.#.attention:attention 4", "encoder.layer.#:ffn 48")
DISTILBERT = ("distilbert.transformer.layer.#.attention:attention 4", "distilbert.transformer.layer.#.ffn:ffn 48")
GPT2 = ("transformer.h.#.attn:attention 4", "transformer.h.#.mlp:ffn 48")
LLAMA = ("model.layers.#.self_attn:attention 4", "model.layers.#.mlp:gated_ffn 48")
LLAMA_GQA = ("model.layers.#.self_attn:attention 4/2", "model.layers.#.mlp:gated_ffn 48")
BART = [
    *layers("self_attn:attention 4", ":ffn 48", at="model.encoder.layers.#."),
    *layers("self_attn:attention 4", "encoder_attn:attention 4", ":ffn 40", at="model.decoder.layers.#."),
]
SITES = {
    "bert": layers(*BERT),
    "bert_classify": [*layers(*BERT, at="bert."), "ffn 32 head"],
    "bert_qa": layers(*BERT, at="bert."),
    "bert_tag": layers(*BERT, at="bert."),
    "bert_mlm": layers(*BERT, at="bert."),
    "roberta_classify": [*layers(*BERT, at="roberta."), "classifier:ffn 32 head"],
    "distilbert_qa": layers(*DISTILBERT),
    "distilbert_classify": [*layers(*DISTILBERT), "ffn 32 head"],
    "electra_classify": [*layers(*BERT, at="electra."), "classifier:ffn 32 head"],
    "gpt2": layers(*GPT2),
    "gptj": layers(*GPT2),
    "gpt_neox": layers("gpt_neox.layers.#.attention:attention 4", "gpt_neox.layers.#.mlp:ffn 48"),
    "opt": layers("model.decoder.layers.#.self_attn:attention 4", "model.decoder.layers.#:ffn 48"),
    "llama": layers(*LLAMA),
    "llama_gqa": layers(*LLAMA_GQA),
    "mistral": layers(*LLAMA_GQA),
    "qwen2": layers(*LLAMA_GQA),
    "phi": layers("model.layers.#.self_attn:attention 4", "model.layers.#.mlp:ffn 48"),
    "phi3": layers(*LLAMA),
    "phi3_gqa": layers(*LLAMA_GQA),
    "bart": BART,
    "bart_classify": [*BART, "classification_head:ffn 32 head"],
    "vit_classify": layers("vit.layers.#.attention:attention 4", "vit.layers.#.mlp:ffn 48"),
    "clip": [
        *layers("self_attn:attention 3", "mlp:ffn 36", at="vision_model.encoder.layers.#."),
        *layers("self_attn:attention 4", "mlp:ffn 48", at="text_model.encoder.layers.#."),
    ],
}
"""Sites in the order of execution: ``name units[/groups] [head]``."""
ROLES = {"attention": {"q", "k", "v", "out"}, "ffn": {"up", "down"}, "gated_ffn": {"gate", "up", "down"}}


@pytest.mark.parametrize(("name", "attn"), CASES)
def test_every_site_is_found_named_and_counted(name: str, attn: Attention) -> None:
    found = inspected(name, attn)
    assert [written(site) for site in found.sites] == [line.replace(".:", ":") for line in SITES[name]]
    for site in found.sites:
        assert site.roles.keys() == ROLES[site.kind], site.name
        consumer = "out" if site.kind == "attention" else "down"
        sliced = {piece.tensor: piece.role for piece in site.slices}
        for role, weights in site.roles.items():
            assert weights, f"{site.name} has no {role}"
            assert {sliced[weight] for weight in weights} == {"in" if role == consumer else "out"}
    assert all(note.reason for note in found.pinned)
    assert "no rule" not in str(found)


@pytest.mark.parametrize(
    ("name", "site", "roles"),
    [
        ("llama_gqa", "model.layers.1.self_attn:attention", "q_proj k_proj v_proj o_proj"),
        ("gpt2", "transformer.h.0.attn:attention", "c_attn c_attn c_attn c_proj"),
        ("gpt_neox", "gpt_neox.layers.0.attention:attention", "query_key_value query_key_value query_key_value dense"),
        ("phi3_gqa", "model.layers.0.self_attn:attention", "qkv_proj qkv_proj qkv_proj o_proj"),
        ("bart", "model.decoder.layers.1.encoder_attn:attention", "q_proj k_proj v_proj out_proj"),
    ],
)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_roles_of_attention(name: str, site: str, roles: str, attn: Attention) -> None:
    module = site.partition(":")[0]
    found = inspected(name, attn)[site].roles
    expected = zip(("q", "k", "v", "out"), roles.split(), strict=True)
    assert found == {role: (f"{module}.{leaf}.weight",) for role, leaf in expected}


def test_roles_of_gated_ffn() -> None:
    apart = inspected("llama")["model.layers.0.mlp:gated_ffn"].roles
    assert {role: [weight.split(".")[-2] for weight in weights] for role, weights in apart.items()} == {
        "gate": ["gate_proj"],
        "up": ["up_proj"],
        "down": ["down_proj"],
    }
    fused = inspected("phi3")["model.layers.0.mlp:gated_ffn"].roles
    assert fused["gate"] == fused["up"] == ("model.layers.0.mlp.gate_up_proj.weight",)


@pytest.mark.parametrize("name", ["bert_classify", "bart", "llama_gqa"])
def test_sites_feed_each_other_in_order(name: str) -> None:
    found = inspected(name)
    names = [site.name for site in found.sites]
    assert list(found.feeds) == names or set(found.feeds) == set(names)
    for first, second in found.feeds.edges:
        assert names.index(first) < names.index(second)
    for name_, degree in found.feeds.in_degree:
        assert degree or name_ in (names[0], *[n for n in names if "decoder.layers.0.self_attn" in n])


# Masked and narrowed ------------------------------------------------------------------------------------------------


def tokens(model: Any, inputs: dict[str, Tensor], *, cache: bool) -> list[list[int]]:
    prompt = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    return model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cache).tolist()


def forward_inputs(name: str, batch: int, length: int, seed: int) -> dict[str, Any]:
    entry = ARCHITECTURES[name]
    inputs: dict[str, Any] = entry.inputs(batch, max(length, entry.min_length), seed)
    return {**inputs, "use_cache": False} if entry.generates or entry.decoder else inputs


def assert_agree(name: str, model: Any, plan: Plan, *narrowed: nn.Module) -> None:
    """Compare masked and narrowed models on fresh inputs of several sizes, padded and not."""
    for seed, (batch, length) in enumerate(SIZES):
        inputs = forward_inputs(name, batch, length, seed)
        variants = [inputs]
        if seed == 1 and "attention_mask" in inputs and "classify" not in name:
            variants.append({key: value for key, value in inputs.items() if key != "attention_mask"})
        for given in variants:
            with fxslim.masked(model, plan):
                expected = outputs(model, given)
            for small in narrowed:
                assert difference(expected, outputs(small, given)) <= tolerance(name), (type(small), batch, length)


@pytest.mark.parametrize(("name", "attn"), CASES)
def test_random_keeps_masked_equals_both_forms(name: str, attn: Attention) -> None:
    model = built(name, attn)
    sites = inspected(name, attn).sites
    plan = random_plan(model, sites, seed=CASES.index((name, attn)))
    assert {part.site.name for part in plan} == {site.name for site in sites}
    small = fxslim.slim(model, plan=plan)
    graph = fxslim.compile(model, plan=plan)
    assert type(small) is type(model)
    assert small.fxslim.plan.zeroed == ()  # every site really gets smaller
    gone = sum(removed(model, plan).values())
    total = sum(p.numel() for p in model.parameters())
    for made in (small, graph):
        assert sum(p.numel() for p in made.parameters()) == total - gone
    assert_agree(name, model, plan, small, graph)
    with fxslim.masked(model, plan):
        masked = outputs(model, forward_inputs(name, 2, 7, 0))
    assert difference(masked, outputs(model, forward_inputs(name, 2, 7, 0))) > 1e-4  # the masks do something
    if ARCHITECTURES[name].generates:
        inputs = ARCHITECTURES[name].inputs(3, 8, seed=5)
        for cache in (True, False):
            with fxslim.masked(model, plan):
                expected = tokens(model, inputs, cache=cache)
            assert tokens(small, inputs, cache=cache) == expected


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3_gqa", "gpt_neox"])
def test_masked_is_what_zero_columns_compute(name: str) -> None:
    """The reference itself, against weights zeroed by hand."""
    model = built(name, "eager")
    plan = random_plan(model, inspected(name).sites, seed=3)
    zeroed = ARCHITECTURES[name].build()
    with torch.no_grad():
        for part in plan:
            gone = [unit for unit in range(part.site.units) if unit not in part.keep]
            for piece in part.site.slices:
                if piece.role == "in":
                    weight = zeroed.get_parameter(piece.tensor)
                    weight.index_fill_(piece.dim, torch.tensor(sorted(rows(piece, gone))), 0)
    inputs = forward_inputs(name, 3, 9, 2)
    with fxslim.masked(model, plan):
        assert difference(outputs(zeroed, inputs), outputs(model, inputs)) <= tolerance(name)


# Requests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "multi_head", "grouped"),
    [({"heads": 0.5}, 2, 2), ({"kv_groups": 0.5}, 2, 2), ({"heads": 0.5, "kv_groups": 0.5}, 1, 1)],
    ids=["heads", "kv_groups", "both"],
)
@pytest.mark.parametrize(
    ("name", "attn"),
    [("bert_classify", "eager"), ("gpt2", "sdpa"), ("llama_gqa", "eager"), ("phi3_gqa", "sdpa"), ("bart", "sdpa")],
)
def test_heads_and_groups(
    name: str, attn: Attention, request_: dict[str, float], multi_head: int, grouped: int
) -> None:
    model = built(name, attn)
    small = fxslim.slim(model, **request_)
    plan = small.fxslim.plan
    graphs = [fxslim.compile(model, **request_)] if len(request_) == 2 else []
    assert all(graph.fxslim.plan.sites == plan.sites for graph in graphs)
    attentions = [site for site in inspected(name, attn).sites if site.kind == "attention"]
    assert [part.site.name for part in plan] == [site.name for site in attentions]
    for part in plan:
        grouped_site = part.site.groups is not None
        assert len(part.keep) == (grouped if grouped_site else multi_head)
        if grouped_site:
            kept = [part.site.groups[unit] for unit in part.keep]
            assert len(set(kept)) == (1 if "kv_groups" in request_ else 2)
    assert plan.zeroed == ()
    assert_agree(name, model, plan, small, *graphs)
    if ARCHITECTURES[name].generates:
        inputs = ARCHITECTURES[name].inputs(2, 6, seed=8)
        for cache in (True, False):
            with fxslim.masked(model, plan):
                expected = tokens(model, inputs, cache=cache)
            assert tokens(small, inputs, cache=cache) == expected


def test_lowest_magnitude_goes_first() -> None:
    model = ARCHITECTURES["bert"].build()
    layer = model.encoder.layer[0]
    with torch.no_grad():
        for weak in (3, 17, 40):
            layer.intermediate.dense.weight[weak] *= 1e-3
            layer.intermediate.dense.bias[weak] *= 1e-3
            layer.output.dense.weight[:, weak] *= 1e-3
    (part,) = fxslim.plan(model, ffn=3 / 48, include="encoder.layer.0").sites
    assert [unit for unit in range(48) if unit not in part.keep] == [3, 17, 40]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"skip": "bert.encoder.layer.0"}, ["bert.encoder.layer.1.attention:attention", "bert.encoder.layer.1:ffn"]),
        ({"skip": ["*attention*", "*.1"]}, ["bert.encoder.layer.0:ffn"]),
        ({"include": "bert.encoder.layer.1"}, ["bert.encoder.layer.1.attention:attention", "bert.encoder.layer.1:ffn"]),
        ({"include": "bert.encoder.layer.*", "skip": ["*:ffn", "*.1"]}, ["bert.encoder.layer.0.attention:attention"]),
        ({"include": "classifier"}, ["ffn"]),
        ({"include": ["bert.pooler", "bert.encoder.layer.0.intermediate"]}, ["bert.encoder.layer.0:ffn", "ffn"]),
    ],
)  # fmt: skip
def test_include_and_skip(options: dict[str, Any], expected: list[str]) -> None:
    model = built("bert_classify", "sdpa")
    found = [site.name for site in fxslim.inspect(model, **options).sites]
    small = fxslim.slim(model, ffn=0.5, heads=0.5, **options)
    narrowed = [part.site.name for part in small.fxslim.plan]
    if "include" in options:
        assert narrowed == found == expected
    else:
        assert narrowed == [name for name in expected if name != "ffn"]
    assert_agree("bert_classify", model, small.fxslim.plan, small)


def test_task_heads_are_left_alone_and_the_report_says_so() -> None:
    model = built("bert_classify", "sdpa")
    report = fxslim.compile(model, ffn=0.5).fxslim.report
    assert "ffn" not in [row["name"] for row in report.sites]
    (note,) = [note for note in report.not_done if note.where == "ffn"]
    assert note.reason == "a task head behind the last block: left alone unless included"
    assert note.reason in str(report)


@pytest.mark.parametrize(
    ("name", "request_", "kept"),
    [
        ("bert", {"ffn": 0.4, "round_to": 8}, {"ffn": 32}),
        ("bert", {"ffn": 0.4, "round_to": 1}, {"ffn": 29}),
        ("bert", {"ffn": 0.4, "heads": 0.75, "round_to": 16}, {"ffn": 32, "attention": 2}),
        ("llama", {"ffn": 0.9, "round_to": 32}, {"gated_ffn": 32}),
        ("llama_gqa", {"heads": 0.5, "round_to": 4}, {"attention": 2}),
        ("phi3_gqa", {"ffn": 0.51, "round_to": 12}, {"gated_ffn": 24}),
    ],
)
def test_round_to_rounds_what_is_kept_up(name: str, request_: dict[str, Any], kept: dict[str, int]) -> None:
    model = built(name, "eager")
    plan = fxslim.plan(model, **request_)
    assert {part.site.kind: len(part.keep) for part in plan} == kept
    assert plan == fxslim.plan(model, **request_)  # nothing is drawn by chance
    assert_agree(name, model, plan, fxslim.slim(model, plan=plan))


@pytest.mark.parametrize(
    ("name", "request_"), [("bert", {"ffn": 0.4, "round_to": 48}), ("llama_gqa", {"heads": 0.5, "round_to": 24})]
)
def test_rounding_that_leaves_nothing_to_remove_is_reported(name: str, request_: dict[str, Any]) -> None:
    plan = fxslim.plan(built(name, "eager"), **request_)
    assert plan.sites == ()
    assert any(f"multiple of {request_['round_to']}" in note.reason for note in plan.notes), plan.notes


# The oracle ---------------------------------------------------------------------------------------------------------


# The oracle ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_labels_say_what_the_oracle_sees(name: str) -> None:
    model = built(name, "eager")
    seen = reached(model, ARCHITECTURES[name].inputs(2, 5, seed=1))
    assert_labels_say_what_the_oracle_sees(model, inspected(name), seen)
