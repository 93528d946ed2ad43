"""The README's table of architectures has a row for every entry, in order, and one row is what a run gives now."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.architectures import BEGIN, END, HEAD, cell, row
from benchmarks.readme import written

from architectures import ARCHITECTURES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, ...]]:
    inner = README.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in inner]


def test_every_architecture_has_its_row() -> None:
    found = rows()
    assert found[0] == HEAD
    assert [cells[0].split("`")[1] for cells in found[2:]] == [entry.model for entry in ARCHITECTURES.values()]
    assert {len(cells) for cells in found} == {len(HEAD)}


def test_no_row_admits_a_failure() -> None:
    assert "**" not in README.partition(BEGIN)[2].partition(END)[0]


@pytest.mark.parametrize("name", ["bert_classify", "llama_gqa"])
def test_a_row_is_what_a_run_gives(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        assert row(ARCHITECTURES[name]) == rows()[2 + list(ARCHITECTURES).index(name)]
    finally:
        torch.set_num_threads(threads)


def test_one_failure_is_enough() -> None:
    assert (cell([True, True]), cell([True, False]), cell([])) == ("yes", "**no**", "")


def test_only_what_is_between_the_markers_is_rewritten() -> None:
    assert written(f"a\n{BEGIN}\nold\n{END}\nb", "new", BEGIN, END) == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(SystemExit, match="lacks"):
        written("no markers", "new", BEGIN, END)
