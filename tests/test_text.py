"""The printer: tables for people, and lines that goldens compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxslim.passes.annotate import annotate
from fxslim.site import Block, Site, Slice
from fxslim.tables import Table
from fxslim.text import label_lines, program_lines, site_lines

from traced import Function, labelled, numbers, traced


def test_tables_align_numbers_to_the_right_and_group_digits() -> None:
    text = str(Table(("name", "count#"), [("one", 1), ("two [not markup]", 1234567)], title="a title"))
    lines = text.splitlines()
    assert lines[0] == "a title"
    assert next(line.split() for line in lines if line.startswith(" ") and line.strip()[0].isalpha()) == [
        "name",
        "count",
    ]
    one, two = (next(line for line in lines if word in line) for word in ("one", "two"))
    assert two.endswith("1,234,567")
    assert len(one) == len(two)
    assert "[not markup]" in two
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in text


def test_an_empty_table_prints_its_columns() -> None:
    assert "name" in str(Table(("name",), []))


def test_html_tables_hold_text_alone() -> None:
    html = Table(("<b>", "count#"), [("<script>alert(1)</script>", 1234)], title="a & b").html()
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<caption>a &amp; b</caption>" in html and ">1,234</td>" in html and "&lt;b&gt;" in html


def test_site_lines() -> None:
    site = Site(
        name="a:attention", kind="attention", module="a", units=4, groups=(0, 0, 1, 1), task_head=True,
        slices=(
            Slice(tensor="a.k.weight", dim=0, size=8, role="out", groups=(0, 0, 1, 1),
                  blocks=(Block(first=0, count=2, start=2, step=3, width=3),)),
            Slice(tensor="a.o.weight", dim=1, size=9, role="in", hook="a.o",
                  blocks=(Block(first=0, count=1, start=0, step=0, width=2),
                          Block(first=1, count=3, start=3, step=2, width=2))),
        ),
    )  # fmt: skip
    assert site_lines([site]) == [
        "a:attention [4 units in 2 groups] task head",
        "  out a.k.weight.0 (8): 2x3@2+3 by group",
        "  in  a.o.weight.1 (9): 1x2@0 3x2@3+2 <- a.o",
    ]


def test_program_lines() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return torch.cat([functional.linear(x, m.weight), x], -1)

    assert program_lines(traced(Function(function, weight=(5, 4)), numbers(2, 3, 4))) == [
        "linear: 2x3x5 = aten.linear.default(x, weight)",
        "cat: 2x3x9 = aten.cat.default([linear, x], -1)",
    ]


def test_label_lines() -> None:
    """Two heads of two: value channels 3-6 are children of the heads, which queries and keys carry."""

    def function(m: Any, x: Tensor) -> Tensor:
        q, k, v = (functional.linear(x, w).unflatten(-1, (2, 2)).transpose(1, 2) for w in (m.q, m.k, m.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return functional.linear(mixed, m.o)

    program, labels = labelled(function, numbers(2, 3, 4), q=(4, 4), k=(4, 4), v=(4, 4), o=(3, 4))
    assert label_lines(program, labels.starts, labels.components) == [
        "q.0 (4): 1*2 2*2",
        "q.1 (4): stays*4",
        "k.0 (4): 1*2 2*2",
        "k.1 (4): stays*4",
        "v.0 (4): 3-6",
        "v.1 (4): stays*4",
        "o.0 (3): stays*3",
        "o.1 (4): 3-6",
        "1 > 3-4",
        "2 > 5-6",
    ]


def test_printing_twice_gives_the_same() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, m.up).relu(), m.down)

    pages = []
    for _ in range(2):
        program = traced(Function(function, up=(6, 4), down=(5, 6)), numbers(2, 3, 4))
        labels = annotate(program)
        pages.append([*program_lines(program), *label_lines(program, labels.starts, labels.components)])
    assert pages[0] == pages[1]
