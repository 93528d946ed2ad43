"""Sites: names, kinds, roles, order and which feeds which; and the goldens of whole architectures.

Regenerate goldens with ``FXSLIM_GOLDENS=write`` and read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fxslim
from fxslim.passes.annotate import Labels
from fxslim.passes.sites import Sites, _blocks, same_slices
from fxslim.program import Program
from fxslim.text import label_lines, program_lines, site_lines

from architectures import ARCHITECTURES
from stacks import Attend, Feed, Stack
from traced import known

GOLDENS = Path(__file__).parent.parent / "goldens"


class Blocks(nn.Module):
    """One block in a list, several in a sequence, and a head of unlike parts."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(layers + 2)]
        self.layers, self.more = nn.ModuleList(blocks[:layers]), nn.Sequential(*blocks[layers:])
        self.head = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        result: torch.Tensor = self.head(self.more(x))
        return result


@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_of_a_graph_are_those_of_its_model(layers: int) -> None:
    model, x = Blocks(layers).eval(), torch.randn(2, 3, 4)
    assert set(_blocks(model)) == {*(f"layers.{i}" for i in range(layers)), "more.0", "more.1"}
    for graph in (fxslim.compile(model, x), torch.export.export(model, (x,)).module()):
        assert set(_blocks(graph)) == set(_blocks(model))
        plans = [fxslim.plan(one, x, ffn=0.5) for one in (model, graph)]
        assert [part.site.name for part in plans[0]] == [part.site.name for part in plans[1]]
        assert [note.where for note in plans[0].notes] == [note.where for note in plans[1].notes]
        assert "head:ffn" in [note.where for note in plans[1].notes]


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gpt2", "bart"])
def test_goldens(name: str) -> None:
    """Sites, why the rest stays, the site graph, what labels tie, and the traced operations, line by line."""
    entry = ARCHITECTURES[name]
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):  # as it is outside of tests: it numbers sizes
        facts = known(entry.build(), entry.inputs(batch=2, length=5))
    sites, program, labels = facts.get(Sites), facts.get(Program), facts.get(Labels)
    text = "\n".join(
        [
            "# sites",
            *site_lines(sites.sites),
            "# stays",
            *(f"{note.where}: {note.reason}" for note in sites.pinned),
            "# feeds",
            *(f"{one} -> {other}" for one, other in sites.feeds.edges),
            "# labels",
            *label_lines(program, labels.starts, labels.components),
            "# program",
            *program_lines(program),
            "",
        ]
    )
    golden = GOLDENS / f"{name}.txt"
    if os.environ.get("FXSLIM_GOLDENS") == "write":
        golden.write_text(text)
    assert text.splitlines() == golden.read_text().splitlines()


def test_sites_come_in_order_of_execution_with_kinds_and_roles() -> None:
    stack = Stack((Feed(), Attend(2, 2, 2), Feed(gates=1)))
    found = known(stack.build(), stack.inputs()).get(Sites)
    assert [(site.name, site.kind, site.module, site.units, site.groups) for site in found.sites] == [
        ("layers.0:ffn", "ffn", "layers.0", 5, None),
        ("layers.1:attention", "attention", "layers.1", 4, (0, 0, 1, 1)),
        ("layers.2:gated_ffn", "gated_ffn", "layers.2", 5, None),
    ]
    assert found.sites[0].roles == {"up": ("layers.0.up.0.weight",), "down": ("layers.0.down.weight",)}
    assert found.sites[1].roles == {role: (f"layers.1.{role[0]}.weight",) for role in ("q", "k", "v", "out")}
    assert found.sites[2].roles == {
        "gate": ("layers.2.up.0.weight",),
        "up": ("layers.2.up.1.weight",),
        "down": ("layers.2.down.weight",),
    }
    assert list(found.families) == [site.name for site in found.sites]


def test_sites_feed_their_successors_only() -> None:
    stack = Stack((Feed(), Attend(2, 1, 2), Feed(gates=1)))
    feeds = known(stack.build(), stack.inputs()).get(Sites).feeds
    assert set(feeds.edges) == {
        ("layers.0:ffn", "layers.1:attention"),
        ("layers.1:attention", "layers.2:gated_ffn"),
    }


class _Classifier(nn.Module):
    """Two blocks, then a head that looks like a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(2)])
        self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x):  # type: ignore[no-untyped-def]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_what_lies_behind_the_last_block_is_a_task_head() -> None:
    found = known(_Classifier().double(), Stack((Feed(),)).inputs()).get(Sites)
    assert {site.name: site.task_head for site in found.sites} == {
        "blocks.0:ffn": False,
        "blocks.1:ffn": False,
        "generic": False,  # what the head reads of the last block
        "head:ffn": True,
    }


class _Twice(nn.Module):
    """Two feed-forward networks in one module."""

    def __init__(self) -> None:
        super().__init__()
        for number in "ab":
            setattr(self, f"up_{number}", nn.Linear(4, 6))
            setattr(self, f"down_{number}", nn.Linear(6, 4))

    def forward(self, x):  # type: ignore[no-untyped-def]
        x = x + self.down_a(self.up_a(x).relu())
        return x + self.down_b(self.up_b(x).relu())


def test_names_are_unique() -> None:
    found = known(_Twice().double(), Stack((Feed(),)).inputs()).get(Sites)
    assert [site.name for site in found.sites] == ["ffn", "ffn@down_b"]


def test_consumers_that_stay_are_named_with_their_reason() -> None:
    stack = Stack((Feed(),))
    found = known(stack.build(), stack.inputs()).get(Sites)
    assert [(note.where, note.reason) for note in found.pinned] == [("layers.0.up.0", "input 'x' of the model")]


def test_a_plan_with_other_slices_is_told_apart() -> None:
    """Refusal: hooks may differ between ways of tracing, rows may not."""
    stack = Stack((Feed(),))
    site = known(stack.build(), stack.inputs()).get(Sites).sites[0]
    unhooked = tuple(piece.model_copy(update={"hook": None}) for piece in site.slices)
    assert same_slices(site.slices, unhooked)
    assert same_slices(site.slices, site.slices[::-1])
    assert not same_slices(site.slices, site.slices[1:])
    assert not same_slices(site.slices, (site.slices[0].model_copy(update={"dim": 1}), *site.slices[1:]))


class _PerHead(nn.Module):
    """Projections per head: as many sites in one module, none of which a pattern names."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(16, 4) for _ in range(4)) for _ in range(3))
        self.o = nn.Linear(16, 16)

    def forward(self, x):  # type: ignore[no-untyped-def]
        heads = [(q(x) @ k(x).mT).softmax(-1) @ v(x) for q, k, v in zip(self.q, self.k, self.v, strict=True)]
        return self.o(torch.cat(heads, -1))


def test_sites_of_one_consumer_have_names_of_their_own() -> None:
    """And so have plans, which look sites up by name."""
    model = _PerHead().double().eval()
    with torch.no_grad():
        model.o.weight[:, [5, 14]] = 0
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = [site.name for site in known(model, x).get(Sites).sites]
    assert names == ["generic", "generic@o", "generic@o#2", "generic@o#3"]
    plan = fxslim.plan(model, x)
    assert {part.site.name: [u for u in range(4) if u not in part.keep] for part in plan} == {
        "generic@o": [1],
        "generic@o#3": [2],
    }
    for form in (fxslim.slim, fxslim.compile):
        small = form(model, x, plan=plan)
        assert small.get_parameter("v.1.weight").shape == (3, 16)
        assert small.get_parameter("v.0.weight").shape == (4, 16)
        assert float((small(x) - model(x)).detach().abs().max()) < 1e-12


class _Normed(nn.Module):
    """A feed-forward network with a norm over its hidden channels: all of them or none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return x + self.down(self.norm(self.up(x).relu()))


def test_what_was_asked_for_and_is_not_there_is_reported() -> None:
    """Refusal: a feed-forward network that cannot be narrowed does not vanish from the report."""
    model = nn.Sequential(Stack((Feed(),)).build(), _Normed()).double().eval()
    x = Stack((Feed(),)).inputs()
    for form in (fxslim.slim, fxslim.compile):
        report = form(model, x, ffn=0.5).fxslim.report
        assert [site["name"] for site in report.sites] == ["0.layers.0:ffn"]
        notes = {note.where: note.reason for note in report.not_done}
        assert notes["1.down"] == "all its channels go together (tied by aten.layer_norm.default in 1.norm)"
        assert not [where for where in notes if where.startswith("0")]
        assert "not done: 1.down: all its channels go together" in str(report)
    assert fxslim.slim(model, x).fxslim.report.not_done == ()


def test_generic_sites_are_reported_when_something_is_asked_for() -> None:
    model = nn.Sequential(Stack((Feed(),)).build(), _PerHead()).double().eval()
    model[1].q, model[1].k, model[1].v = (nn.ModuleList(nn.Linear(4, 4) for _ in range(4)) for _ in range(3))
    model.double()
    notes = fxslim.plan(model, Stack((Feed(),)).inputs(), heads=0.5).notes
    reason = "its heads are not told apart; value= takes value channels"
    assert [(note.where, note.reason) for note in notes if "value=" in note.reason] == [
        ("1:generic and 3 more", reason)
    ]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_residual_stream_is_not_news(name: str) -> None:
    """What no one would expect to be narrowed is not reported as left out."""
    plan = fxslim.plan(ARCHITECTURES[name].build(), ffn=0.5, heads=0.5)
    assert len(plan.sites) == 4
    assert plan.notes == ()
