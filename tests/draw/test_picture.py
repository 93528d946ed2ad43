"""What a picture says, against the models themselves: counts, shapes, streams, what feeds what."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.draw.picture import Picture, parents, runs
from fxslim.draw.read import picture_of
from fxslim.errors import InputError, PlanError

from architectures import ARCHITECTURES, HEADS, HIDDEN, KV_HEADS, WIDTH
from hard import HARD

EVERY = {"bert": ARCHITECTURES["bert"], "llama_gqa": ARCHITECTURES["llama_gqa"], "t5": HARD["t5"]}
SITES = {"bert": (2, 2), "llama_gqa": (2, 2), "t5": (6, 4)}
"""How many attention and feed-forward sites there are, by the configs: two layers (T5: with cross attention)."""
STREAMS = {"bert": 1, "llama_gqa": 1, "t5": 1}
"""Encoder and decoder of T5 share their embeddings, so that their residual streams are one."""


@dataclass(frozen=True)
class Case:
    """A model, what was found and planned, what came of it, and the picture of all that."""

    model: nn.Module
    found: fxslim.Inspection
    small: nn.Module
    picture: Picture
    inputs: dict[str, Any]

    @property
    def plan(self) -> fxslim.Plan:
        return self.small.fxslim.plan  # type: ignore[union-attr,return-value]


@cache
def case(name: str) -> Case:
    model = EVERY[name].build(torch.float32)
    found = fxslim.inspect(model)
    small = fxslim.slim(found, ffn=0.5, heads=0.5)
    inputs = dict(EVERY[name].inputs(2, 7))
    return Case(model, found, small, picture_of(found, after=small), inputs)


def linears(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[int]]:
    """Run a model; return how wide the output of every call of every linear was."""
    seen: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, path=path: seen.setdefault(path, []).append(out.shape[-1]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", EVERY)
def test_there_are_as_many_sites_as_the_config_says(name: str) -> None:
    kinds = [box.kind for box in case(name).picture.sites]
    assert (kinds.count("attention"), kinds.count("ffn") + kinds.count("gated_ffn")) == SITES[name]
    for box in case(name).picture.sites:
        if box.kind == "attention":
            assert (box.unit, box.units, box.kept) == ("heads", HEADS, HEADS // 2)
            assert box.groups == (KV_HEADS if name == "llama_gqa" else 0)
        else:
            assert (box.unit, box.units, box.kept) == ("channels", HIDDEN, HIDDEN // 2)
        assert sum(count for _, count in box.keep) == box.kept
        assert case(name).picture.scale(box) == 1.0


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_those_of_the_dense_and_the_narrowed_tensors(name: str) -> None:
    dense, narrow = (dict(model.named_parameters()) for model in (case(name).model, case(name).small))
    rows = [row for box in case(name).picture.sites for row in box.rows]
    assert len(rows) >= 2 * sum(SITES[name])
    for row in rows:
        if row.tensor in dense:
            assert dense[row.tensor].shape[row.dim] == row.size
            assert narrow[row.tensor].shape[row.dim] == row.left


@pytest.mark.parametrize("name", EVERY)
def test_linears_are_all_there_with_their_widths_before_and_after(name: str) -> None:
    drawn: dict[str, list[Any]] = {}
    for op in case(name).picture.ops:
        if op.op == "aten.linear":
            drawn.setdefault(op.module, []).append(op)
    before, after = (linears(model, case(name).inputs) for model in (case(name).model, case(name).small))
    assert drawn.keys() == before.keys()
    for path, ops in drawn.items():
        assert [int(op.shape.split("×")[-1]) for op in ops] == before[path]
        assert [int((op.after or op.shape).split("×")[-1]) for op in ops] == after[path]
        assert {op.dtype for op in ops} == {"float32"}


@pytest.mark.parametrize("name", EVERY)
def test_streams_are_as_wide_as_the_model_and_join_the_sites(name: str) -> None:
    picture = case(name).picture
    streams = [group for group in picture.groups if group.kind == "stream"]
    assert [group.width for group in streams] == [WIDTH] * STREAMS[name]
    assert all(group.reason for group in streams)
    between = [feed for feed in picture.feeds if "input" not in feed.source and "output" not in feed.target]
    assert all(feed.certain for feed in between)
    assert {feed.group for feed in between} >= {group.id for group in streams}


def test_what_flows_out_of_a_site_is_the_stream() -> None:
    picture = case("bert").picture
    site = picture.site("encoder.layer.0:ffn")
    by_role = {role: picture.ops[i] for i in site.ops for name, role in picture.ops[i].roles if name == site.name}
    assert by_role.keys() == {"up", "act", "down"}
    assert by_role["up"].groups == by_role["act"].groups == (site.name,)
    assert by_role["down"].groups == ("stream 1",)
    assert picture.ops[by_role["up"].inputs[0]].groups == ("stream 1",)
    assert by_role["up"].ratio == 0.5 and by_role["down"].ratio == 1.0


def test_bert_is_a_chain() -> None:
    picture = case("bert").picture
    order = ["input", *(box.name for box in picture.sites), "output"]
    assert {(feed.source, feed.target) for feed in picture.feeds} == set(pairwise(order))


def test_pinned_places_say_why() -> None:
    ops = case("bert").picture.ops
    assert any("indexed by data" in op.pinned for op in ops if op.op == "aten.embedding")
    assert "an output of the model" in ops[-1].pinned and ops[-1].op == "output"
    assert not any(op.pinned for op in ops if op.op == "aten.gelu")


def test_without_a_plan_nothing_is_narrowed() -> None:
    picture = picture_of(case("bert").found)
    assert not picture.narrowed and all(box.ratio == 1.0 for box in picture.sites)
    assert not any(op.after for op in picture.ops)


def test_a_model_by_itself_is_inspected() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    picture = picture_of(model, example_inputs=torch.randn(3, 6))
    assert [(box.units, box.kept) for box in picture.sites] == [(8, 8)]
    assert [op.op for op in picture.ops] == ["input", "aten.linear", "aten.relu", "aten.linear", "output"]


def test_a_plan_and_a_report_have_sites_alone() -> None:
    for x in (case("bert").plan, case("bert").small.fxslim.report, case("bert").small):  # type: ignore[union-attr]
        picture = picture_of(x)
        assert picture.title == "BertModel" and not picture.ops
        assert [(box.name, box.kept) for box in picture.sites] == [
            (box.name, box.kept) for box in case("bert").picture.sites
        ]
        assert not any(feed.certain for feed in picture.feeds)
    report = case("bert").small.fxslim.report  # type: ignore[union-attr]
    assert picture.totals[0].after == sum(p.numel() for p in case("bert").small.parameters())
    assert picture.totals[1].before == report.macs_before  # type: ignore[union-attr]


def test_a_compiled_graph_has_operations_and_the_sites_of_its_plan() -> None:
    graph = fxslim.compile(case("bert").found, plan=case("bert").plan)
    picture = picture_of(graph)
    assert len([op for op in picture.ops if op.op == "aten.linear"]) == 13  # four and two for each layer, the pooler
    site = picture.site("encoder.layer.1:ffn")
    up = next(picture.ops[i] for i in site.ops if (site.name, "up") in picture.ops[i].roles)
    assert int(up.shape.split("×")[-1]) == HIDDEN // 2
    assert any("has no labels" in note.reason for note in picture.notes)


def test_a_graph_of_a_model_that_is_one_block_holds_all_of_it() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    picture = picture_of(fxslim.compile(model, torch.randn(3, 6), ffn=0.5))
    assert {"aten.linear", "aten.relu"} <= {picture.ops[i].op for i in picture.sites[0].ops}


def test_a_plain_graph_has_operations() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    assert [op.op for op in picture_of(traced).ops] == ["input", "call_module", "call_module", "output"]


def test_open_sizes_are_named_in_the_order_of_the_inputs() -> None:
    class Sums(nn.Module):
        def forward(self, *given: torch.Tensor) -> list[torch.Tensor]:
            return [one + 1 for one in given]

    given = tuple(torch.randn(2 + i, 1) for i in range(6))
    dynamic = (tuple({0: torch.export.Dim.DYNAMIC} for _ in given),)
    picture = picture_of(torch.export.export(Sums(), given, dynamic_shapes=dynamic).graph_module)
    named = [f"{letter}×1" for letter in ("B", "B2", "B3", "B4", "B5", "B6")]
    for kind in ("input", "aten.add"):
        assert [op.shape for op in picture.ops if op.op == kind] == named


@pytest.mark.parametrize("name", EVERY)
def test_a_picture_is_plain_data(name: str) -> None:
    data = json.loads(json.dumps(case(name).picture.to_dict()))
    assert len(data["sites"]) == sum(SITES[name]) and len(data["ops"]) == len(case(name).picture.ops)


def test_what_cannot_be_drawn_is_refused() -> None:
    found = case("bert").found
    with pytest.raises(InputError, match=r"cannot draw a int; give a model"):
        picture_of(3)
    with pytest.raises(InputError, match=r"after= takes a Plan, a Report or a narrowed model, not str"):
        picture_of(found, after="plan.json")
    with pytest.raises(InputError, match=r"after= takes .* not BertModel"):
        picture_of(found, after=case("bert").model)
    with pytest.raises(InputError, match=r"go with a dense model or an Inspection, not with a Plan"):
        picture_of(case("bert").plan, after=case("bert").plan)
    with pytest.raises(InputError, match="give no others with it"):
        picture_of(found, example_inputs=torch.ones(2, 3))
    with pytest.raises(PlanError, match="made for another model"):
        picture_of(found, after=case("llama_gqa").plan)
    with pytest.raises(InputError, match=r"no site is called 'nowhere'; there are 4"):
        case("bert").picture.site("nowhere")


def test_modules_are_nested_where_they_hold_several_things() -> None:
    paths = ["m.layers.0.attn", "m.layers.0.mlp", "m.layers.1.attn", "m.layers.1", "head", "m.norm"]
    assert parents(paths) == {"m": "", "m.layers": "m", "m.layers.0": "m.layers", "m.layers.1": "m.layers"}
    assert parents(["a.b", "a.b"]) == {"a.b": ""}
    assert parents([""]) == {}


def test_runs() -> None:
    assert list(runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 1), (7, 2)]
    assert list(runs([])) == []
