"""The model card says what the plan and the report say, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import fxslim
from fxslim.hf.card import BEGIN, END, card
from fxslim.report import Record

from architectures import ARCHITECTURES

DENSE = """---
license: apache-2.0
base_model: someone/bert
tags:
- bert
model-index:
- name: dense
  results:
  - task: {type: text-classification}
    dataset: {name: SST-2, type: sst2}
    metrics:
    - {type: accuracy, value: 0.93}
---
# A dense model

It classifies.
"""


@pytest.fixture(scope="module")
def small() -> Any:
    return fxslim.slim(ARCHITECTURES["bert_classify"].build(torch.float32), ffn=0.5, heads=0.25)


def test_figures_are_those_of_the_report(small: Any) -> None:
    text = card(small, small.fxslim)
    read, report = ModelCard(text), small.fxslim.report
    assert read.data.to_dict() == {"library_name": "transformers", "tags": ["fxslim", "pruned"]}
    assert f"| parameters | {report.parameters_before:,} | {report.parameters_after:,} |" in read.text
    assert f"| MACs of the example | {report.macs_before:,} | {report.macs_after:,} |" in read.text
    assert f"{report.verification.max_abs:.2e}" in read.text
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", read.text, flags=re.MULTILINE)
    kept = {(name.replace("#", str(layer)), int(k), int(n)) for name, _, k, n, _ in rows for layer in range(2)}
    assert kept == {(part.site.name, len(part.keep), part.site.units) for part in small.fxslim.plan}
    assert str(report.plain) in read.text
    assert card(small, small.fxslim) == text


def test_what_is_not_known_is_not_said(small: Any) -> None:
    text = card(small, Record(small.fxslim.plan))
    assert "what was measured when it was narrowed is not known here" in text
    assert "parameters |" not in text and "MACs" not in text


def test_the_dense_models_card_is_kept_below_without_its_results(small: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(DENSE)
    text = card(small, small.fxslim, source=tmp_path)
    read = ModelCard(text)
    assert read.data.to_dict() == {
        "license": "apache-2.0",
        "base_model": "someone/bert",
        "tags": ["bert", "fxslim", "pruned"],
        "library_name": "transformers",
    }
    assert "0.93" not in text
    assert text.endswith("# A dense model\n\nIt classifies.\n")
    assert "made from `someone/bert`" in text and str(tmp_path) not in text
    (tmp_path / "README.md").write_text(text)
    again = card(small, small.fxslim, source=tmp_path)
    assert again == text
    assert again.count(BEGIN) == again.count(END) == 1
