"""The model card says what the plan and the report say, and nothing else."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import fxslim
from fxslim.errors import VerifyError
from fxslim.hf.card import BEGIN, CHANGED, END, card
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


def test_figures_of_a_model_that_was_trained_on_are_said_to_be_older() -> None:
    """A model that was trained since: the card must not say what it was as if it still were."""
    torch.manual_seed(0)
    model: Any = fxslim.slim(ARCHITECTURES["bert_classify"].build(torch.float32), ffn=0.5)
    assert CHANGED not in card(model, model.fxslim)
    assert CHANGED not in card(copy.deepcopy(model), model.fxslim)
    train(model)
    text = card(model, model.fxslim)
    assert text.index(CHANGED) < text.index("| parameters |") < text.index("outputs differ by at most")


def train(model: Any) -> None:
    """Take one step of training, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = ARCHITECTURES["bert_classify"].inputs()
    model(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()


def test_verify_says_that_weights_have_changed() -> None:
    torch.manual_seed(0)
    dense = ARCHITECTURES["bert_classify"].build(torch.float32)
    small: Any = fxslim.slim(dense, ffn=0.5)
    train(small)
    said = r"narrowed weights are not those .*\(bert\.[a-z_.]+, \d+ in all\): if it was trained since"
    with pytest.raises(VerifyError, match=said) as caught:
        fxslim.verify(dense, small, plan=small.fxslim.plan)
    assert len(caught.value.changed) > 30
    broken: Any = fxslim.slim(dense, ffn=0.5)
    broken.bert.encoder.layer[0].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    with pytest.raises(VerifyError, match=r"report it with the model's config\.$") as caught:
        fxslim.verify(dense, broken, plan=broken.fxslim.plan)
    assert caught.value.changed == ()


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
