"""Where the config can say a narrowed model's sizes, transformers loads it alone; where not, it fails and says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxslim

from architectures import ARCHITECTURES

PLAIN = """
import sys
sys.modules["fxslim"] = None  # importing it fails
import transformers
from safetensors.torch import load_file, save_file
folder, kind = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()
found = model(**load_file(f"{folder}/../inputs.safetensors"))
save_file({"logits": found.logits.detach().contiguous()}, f"{folder}/../logits.safetensors")
"""


@pytest.mark.parametrize(
    ("name", "asked", "auto", "fields"),
    [
        ("bert_classify", {"ffn": 0.5}, "AutoModelForSequenceClassification", {"intermediate_size"}),
        ("llama_gqa", {"ffn": 0.5, "kv_groups": 0.5}, "AutoModelForCausalLM",
         {"intermediate_size", "num_attention_heads", "num_key_value_heads"}),
    ],
)  # fmt: skip
def test_plain_transformers_loads_it_with_no_fxslim_installed(
    name: str, asked: dict[str, Any], auto: str, fields: set[str], tmp_path: Path
) -> None:
    model: Any = ARCHITECTURES[name].build(torch.float32, "eager")
    before = model.config.to_dict()
    small: Any = fxslim.slim(model, **asked)
    assert model.config.to_dict() == before
    assert set(small.fxslim.plan.config) == fields
    assert small.fxslim.report.plain.loads
    assert "plain from_pretrained loads what is saved: yes" in str(small.fxslim.report)
    inputs = ARCHITECTURES[name].inputs()
    save_file(inputs, tmp_path / "inputs.safetensors")
    fxslim.save_pretrained(small, tmp_path / "small")
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path / "small"), auto], check=True, capture_output=True)
    with torch.no_grad():
        expected = small(**inputs).logits
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        fxslim.from_pretrained(tmp_path / "small", attn_implementation="eager")(**inputs).logits, expected
    )


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"heads": 0.25}, "no field of the config says these sizes"),
        ({"ffn": 0.5, "include": "bert.encoder.layer.0.*"}, r"layers of the same size got different ones"),
    ],
)
def test_where_no_field_says_it_plain_loading_fails_and_the_report_said_so(
    asked: dict[str, Any], why: str, tmp_path: Path
) -> None:
    small: Any = fxslim.slim(ARCHITECTURES["bert_classify"].build(torch.float32), **asked)
    plain = small.fxslim.report.plain
    assert not plain.loads and why in plain.reason
    assert small.fxslim.report.to_dict()["plain"] == {"loads": False, "reason": plain.reason}
    assert small.fxslim.plan.config == {}
    fxslim.save_pretrained(small, tmp_path / "small")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(small).from_pretrained(tmp_path / "small")


def test_a_module_of_ones_own_has_nothing_to_say() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    small: Any = fxslim.slim(model, torch.randn(2, 4), ffn=0.5)
    assert small.fxslim.report.plain is None
    assert "plain from_pretrained" not in str(small.fxslim.report)
