"""The comparison with other tools: what it says of a pruned model, and what its tables show. No rival is needed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxslim
from benchmarks.peers import cell
from benchmarks.peers.masked import difference, gone, kept_columns, masked, narrowed, outputs
from benchmarks.peers.models import SUBJECTS, Roles, Subject, matrices
from benchmarks.peers.report import base_text, cells, exact, figure, models_text
from benchmarks.processes import tried

HEADS, WIDTH = 3, 2
ROLES = Roles(queries="q", keys="[kv]", attended="o", up="up", down="down")


class Block(nn.Module):
    """Values of three heads, summed over rows, and an FFN of four channels after it; one linear is a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(5, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 5)
        self.up, self.down = nn.Linear(5, 4), Conv1D(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(self.v(x).cumsum(0))
        y: torch.Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


def block() -> Block:
    torch.manual_seed(0)
    made = Block()
    nn.init.normal_(made.down.weight)
    return made


def shrunk(dense: Block, columns: list[int], channels: list[int]) -> Block:
    """Take out what is not named, by hand."""
    small = copy.deepcopy(dense)
    small.v.weight, small.v.bias = (nn.Parameter(p[columns]) for p in (dense.v.weight, dense.v.bias))
    small.o.weight = nn.Parameter(dense.o.weight[:, columns])
    small.up.weight, small.up.bias = (nn.Parameter(p[channels]) for p in (dense.up.weight, dense.up.bias))
    small.down.weight = nn.Parameter(dense.down.weight[channels])
    return small


def test_columns_are_found_wherever_they_are() -> None:
    dense = torch.arange(12.0).view(3, 4)
    assert kept_columns(dense[:, [3, 1]], dense) == [3, 1]
    with pytest.raises(ValueError, match="2 of 3 rows"):
        kept_columns(dense[:2, :2], dense)
    with pytest.raises(ValueError, match="column 1 is 0 columns"):
        kept_columns(torch.stack([dense[:, 0], dense[:, 1] + 0.5], 1), dense)
    with pytest.raises(ValueError, match="column 0 is 2 columns"):
        kept_columns(torch.ones(3, 1), torch.ones(3, 2))


def test_the_reference_is_the_dense_model_with_those_columns_zeroed() -> None:
    dense, subject = block(), Subject("block", block, ROLES, heads=HEADS)
    small = shrunk(dense, [0, 1, 4, 5], [2, 3])
    kept = narrowed(dense, small)
    assert kept == {"o": [0, 1, 4, 5], "down": [2, 3]}
    found = gone(subject, dense, kept)
    assert (found.channels, found.heads, found.cut) == (0.5, 1 / 3, 0)
    reference = masked(dense, kept)
    own = matrices(reference)
    assert not own["o"][:, [2, 3]].any() and not own["down"][:, [0, 1]].any()
    assert torch.equal(own["o"][:, kept["o"]], dense.o.weight[:, kept["o"]])
    assert matrices(dense)["o"].all(), "the dense model is left alone"
    inputs = {"x": torch.randn(4, 5)}
    assert difference(outputs(small, inputs), outputs(reference, inputs)) < 1e-14
    with torch.no_grad():
        small.up.weight.copy_(dense.up.weight[[0, 3]])  # rows that do not belong to the columns
    assert difference(outputs(small, inputs), outputs(reference, inputs)) > 1e-3


def test_heads_that_are_cut_apart_do_not_count() -> None:
    dense, subject = block(), Subject("block", block, ROLES, heads=HEADS)
    found = gone(subject, dense, narrowed(dense, shrunk(dense, [0, 2, 3], [0, 1, 2, 3])))
    assert (found.channels, found.heads, found.cut) == (0.0, 1 / 3, 1)


def test_a_missing_linear_and_other_shapes_are_said() -> None:
    dense, small = block(), block()
    del small.o
    with pytest.raises(ValueError, match="o is missing"):
        narrowed(dense, small)
    with pytest.raises(ValueError, match="shapes"):
        difference([torch.ones(2)], [torch.ones(3)])


@pytest.mark.parametrize("name", SUBJECTS)
def test_roles_name_every_block_once(name: str) -> None:
    subject = SUBJECTS[name]
    model = subject.build()
    attentions = 6 if name == "T5" else 2
    blocks = 4 if name == "T5" else 2
    sizes = {role: len(subject.roles.linears(model, role)) for role in ("queries", "keys", "attended", "up", "down")}
    fused = name in ("GPT-2", "Phi-3 GQA")
    gated = name.startswith(("Llama", "Qwen"))
    assert sizes == {"queries": attentions, "keys": 0 if fused else 2 * attentions, "attended": attentions,
                     "up": 2 * blocks if gated else blocks, "down": blocks}  # fmt: skip


def row(**values: Any) -> dict[str, Any]:
    took = {"wall_seconds": 1.0, "cpu_seconds": 0.5, "peak_gib": 0.25}
    found = {"channels": 0.5, "heads": 0.5, "cut": 0, "runs": True, "difference": 1e-16}
    return {"tool": "T", "version": "1", "model": "M", "error": "", **took, **found, **values}


def test_the_table_says_what_came_of_it() -> None:
    assert cells(row()) == ("M", "T", "50%", "50%", "yes", "yes", "1e-16", "0.50", "1.00", "0.25", "")
    assert cells(row(difference=0.1))[5] == "**no**"
    assert exact(row(channels=0.0, heads=0.0)) is None, "where nothing went, nothing is exact"
    assert cells(row(heads=0.0, cut=3))[3] == "0%, 3 cut apart"
    crashed = {"tool": "T", "model": "M", "error": "IndexError: " + "x" * 200}
    assert cells(crashed)[2:10] == ("",) * 8
    assert len(cells(crashed)[10]) == 160
    assert cells({**crashed, "error": "killed by SIGXCPU"})[10] == "no end after 120 s of processor time"
    broken = {
        key: value for key, value in row(error="RuntimeError: shapes").items() if key not in ("runs", "difference")
    }
    assert cells(broken)[4:6] == ("**no**", "")
    text = "\n".join(models_text([row(), crashed]))
    assert "| M | T | 50% | 50% | yes | yes |" in text
    bars = figure([row(), {**row(difference=1.0), "model": "N"}]).axes[0].patches
    assert [bar.get_hatch() for bar in bars] == [None, "////"]


def test_a_process_that_fails_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rival.py").write_text(
        "import os, sys, time\n"
        "case = sys.argv[2]\nprint('{\"a\": 1}', flush=True)\n"
        "if case == 'raise': raise IndexError('deep\\ninside')\n"
        "if case == 'die': os.abort()\n"
        "if case == 'hang': time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert tried("rival", "well") == ({"a": 1}, "")
    assert tried("rival", "raise") == ({"a": 1}, "IndexError: deep")
    assert tried("rival", "die") == ({"a": 1}, "killed by SIGABRT")
    assert tried("rival", "hang", python=sys.executable, seconds=2)[1] == "no end after 2 s"


def test_the_cell_of_fxslim_takes_half_and_is_exact() -> None:
    emitted: list[dict[str, Any]] = []
    cell.run("fxslim", SUBJECTS["BERT"], check=True, emit=emitted.append)
    assert [emitted[-1][key] for key in ("channels", "heads", "cut", "runs")] == [0.5, 0.5, 0, True]
    assert emitted[-1]["difference"] < 1e-12
    assert all(emitted[-1][key] > 0 for key in ("wall_seconds", "cpu_seconds", "peak_gib"))


def test_the_cell_of_torch_pruning_takes_half_and_is_exact() -> None:
    pytest.importorskip("torch_pruning", reason="needs Torch-Pruning: pip install '.[peers]'")
    emitted: list[dict[str, Any]] = []
    cell.run("Torch-Pruning", SUBJECTS["BERT"], check=True, emit=emitted.append)
    assert [emitted[-1][key] for key in ("channels", "heads", "cut", "runs")] == [0.5, 0.5, 0, True]
    assert emitted[-1]["difference"] < 1e-12


def test_the_tables_of_bert_base_hold_the_ratio_of_a_benchmark() -> None:

    model, inputs = SUBJECTS["BERT"].build(), SUBJECTS["BERT"].inputs(1, 6)
    found = fxslim.benchmark({"Torch-Pruning": model, "fxslim": model}, inputs, check=False, max_seconds=0.05)
    ratio = next(s.ratio for s in found.points[0].timing.samples if s.name == "fxslim")
    own = {"time": [row(grown_gib=0.1), {"tool": "INC", "error": "ImportError"}], "latency": found.to_dict(),
           "latency_table": found.to_markdown()}  # fmt: skip
    text = "\n".join(base_text(own))
    assert f"takes {ratio.value:.3f} times as long" in text and "batch 1, length 6" in text
    assert "| T | 0.5 | 1.0 | 0.25 | 0.10 |  |" in text and "| INC |  |  |  |  | ImportError |" in text
