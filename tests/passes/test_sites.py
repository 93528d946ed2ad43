"""Sites: names, kinds, roles, order and which feeds which; and the goldens of whole architectures.

Regenerate goldens with ``FXSLIM_GOLDENS=write`` and read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from fxslim.passes.annotate import Labels
from fxslim.passes.sites import Sites, same_slices
from fxslim.program import Program
from fxslim.text import label_lines, program_lines, site_lines

from architectures import ARCHITECTURES
from stacks import Attend, Feed, Stack
from traced import known

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gpt2", "bart"])
def test_goldens(name: str) -> None:
    """Sites, why the rest stays, the site graph, what labels tie, and the traced operations, line by line."""
    entry = ARCHITECTURES[name]
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
