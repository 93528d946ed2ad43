"""Every architecture, both forms: named sites, masked ≡ narrowed for random keeps, the oracle against the labels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxslim
from fxslim.passes import pipelines
from fxslim.plan import Plan, Site, Slice
from fxslim.program import Program

from agreement import difference, outputs, random_plan, tolerance
from architectures import ARCHITECTURES, Attention
from oracle import Channel, disturb

SIZES = ((1, 5), (5, 11), (4, 3))
"""Batch sizes and lengths to compare on; examples for tracing have 2 rows of 7."""
CASES = [(name, attn) for name, entry in ARCHITECTURES.items() for attn in ("eager", "sdpa")[: 1 + entry.sdpa]]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True, scope="module")
def _one_trace_per_model() -> Iterator[None]:
    """Trace each model once: a program is never edited, and tracing is nine tenths of every call."""
    traced: dict[int, Program] = {}

    def trace(model: nn.Module, *candidates: Any, filled: frozenset[str]) -> Program:
        first = id(next(model.parameters()))  # copies that are worked on share the parameters
        if first not in BUILT:
            return pipelines_trace(model, *candidates, filled=filled)
        if first not in traced:
            traced[first] = pipelines_trace(model, *candidates, filled=filled)
        return traced[first]

    pipelines_trace = pipelines.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "trace", trace)
        yield


BUILT: set[int] = set()
"""First parameters of models that live as long as the tests here, and do not change."""


@functools.cache
def built(name: str, attn: Attention) -> Any:
    model = ARCHITECTURES[name].build(torch.float64, attn)
    BUILT.add(id(next(model.parameters())))
    return model


@functools.cache
def inspected(name: str, attn: Attention = "eager") -> fxslim.Inspection:
    return fxslim.inspect(built(name, attn))


# Sites --------------------------------------------------------------------------------------------------------------


def layers(*sites: str, at: str = "") -> list[str]:
    return [f"{at}{site}".replace("#", str(layer)) for layer in range(2) for site in sites]


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


def written(site: Site) -> str:
    groups = "" if site.groups is None else f"/{site.group_count}"
    return f"{site.name} {site.units}{groups}{' head' if site.task_head else ''}"


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
    gone = sum(_removed(model, plan).values())
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


def _removed(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Count the parameters that a plan takes out, from the kept units and the slices alone."""
    keep: dict[str, list[int]] = {}
    for part in plan:
        gone = np.isin(np.arange(part.site.units), part.keep, invert=True)
        for piece in part.site.slices:
            shape = keep.setdefault(piece.tensor, list(model.get_parameter(piece.tensor).shape))
            shape[piece.dim] -= len(rows(piece, np.flatnonzero(gone).tolist()))
    return {name: model.get_parameter(name).numel() - int(np.prod(shape)) for name, shape in keep.items()}


def rows(piece: Slice, units: list[int]) -> set[int]:
    """Return the rows of a slice that go with these units, read off its blocks."""
    if piece.groups is not None:
        left = {group for unit, group in enumerate(piece.groups) if unit not in units}
        units = sorted(set(piece.groups) - left)
    return {
        block.start + i * block.step + offset
        for block in piece.blocks
        for i in range(block.count)
        if block.first + i in units
        for offset in range(block.width)
    }


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


@functools.cache
def reached(name: str) -> dict[str, list[Channel]]:
    """Ask the oracle about every output channel of every linear that the model calls."""
    model, inputs = built(name, "eager"), ARCHITECTURES[name].inputs(2, 5, seed=1)
    called = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {path: disturb(model, inputs, path) for path in sorted(called)}


def output_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, Conv1D) else 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_labels_say_what_the_oracle_sees(name: str) -> None:
    model, found = built(name, "eager"), inspected(name)
    names: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), path)
    canonical = {path: names[id(p)] for path, p in model.named_parameters(remove_duplicate=False)}
    pinned = {note.where: note.reason for note in found.pinned}
    whole: dict[str, int] = {}
    single: dict[str, int] = {}
    covered: set[tuple[str, int, str]] = set()
    for producer, channels in reached(name).items():
        weight = canonical[f"{producer}.weight"]
        dim = output_dim(model.get_submodule(producer))
        pieces = [(site, p) for site in found.sites for p in site.slices if (p.tensor, p.dim) == (weight, dim)]
        for channel in channels:
            owners = [
                (site, piece) for site, piece in pieces if channel.channel in rows(piece, list(range(site.units)))
            ]
            assert len(owners) <= 1, f"{producer} {channel.channel} lies in two slices"
            consumers = {canonical[f"{c}.weight"]: set(columns) for c, columns in channel.consumers.items()}
            if not owners:
                if channel.prunable:
                    where = [consumer.removesuffix(".weight") for consumer in consumers]
                    assert all(pinned.get(path) for path in where), f"{producer} {channel.channel}: {channel.reason}"
                continue
            ((site, piece),) = owners
            assert channel.prunable, f"{site.name} removes {producer} {channel.channel}, which {channel.reason}"
            covered.add((weight, channel.channel, site.name))
            expected = columns_of(site, units_of(piece, channel.channel, site))
            assert consumers.keys() == expected.keys(), f"{producer} {channel.channel}"
            if consumers == expected:
                whole[site.name] = whole.get(site.name, 0) + 1
                continue
            assert site.kind == "attention", f"{producer} {channel.channel} reaches {consumers}, not {expected}"
            (columns,), (head,) = consumers.values(), expected.values()
            heads = units_of(piece, channel.channel, site)
            assert columns < head, f"{producer} {channel.channel}"
            assert len(columns) == len(heads)  # one value column in every head that reads it
            for unit in heads:
                assert len(columns & columns_of(site, [unit])[next(iter(expected))]) == 1
            single[site.name] = single.get(site.name, 0) + 1
    for site in found.sites:
        promised = {
            (piece.tensor, row, site.name)
            for piece in site.slices
            if piece.role == "out" and piece.tensor.endswith(".weight") and model.get_parameter(piece.tensor).dim() == 2
            for row in rows(piece, list(range(site.units)))
        }
        assert promised <= covered, f"{site.name}: the oracle never saw {sorted(promised - covered)[:3]}"
        if site.kind == "attention":
            width = len(next(iter(columns_of(site, [0]).values())))
            groups = site.group_count
            assert (whole[site.name], single[site.name]) == ((site.units + groups) * width, groups * width)
        else:
            producers = {tensor for tensor, _, _ in promised}
            assert whole[site.name] == len(promised) >= site.units * len(producers)
        _biases_follow_their_weights(model, site)


def units_of(piece: Slice, row: int, site: Site) -> list[int]:
    """Return the units that have to go for a row to go."""
    if piece.groups is None:
        return [unit for unit in range(site.units) if row in rows(piece, [unit])]
    number = next(group for group in set(piece.groups) if row in rows(piece, _of_group(piece, group)))
    return _of_group(piece, number)


def _of_group(piece: Slice, number: int) -> list[int]:
    assert piece.groups is not None
    return [unit for unit, group in enumerate(piece.groups) if group == number]


def columns_of(site: Site, units: list[int]) -> dict[str, set[int]]:
    """Return the columns of every consumer that go with these units."""
    return {piece.tensor: rows(piece, units) for piece in site.slices if piece.role == "in"}


def _biases_follow_their_weights(model: nn.Module, site: Site) -> None:
    for piece in site.slices:
        path, _, leaf = piece.tensor.rpartition(".")
        module = model.get_submodule(path)
        if (
            piece.role == "out"
            and leaf == "weight"
            and isinstance(module, nn.Linear | Conv1D)
            and module.bias is not None
        ):
            bias = [p for p in site.slices if p.tensor == f"{path}.bias" and p.groups == piece.groups]
            assert [p.blocks for p in bias] == [piece.blocks], path
