"""Where the config can say a narrowed model's sizes, transformers loads it alone; where not, it fails and says why."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxslim
from fxslim.errors import PlanError

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
        ("llama", {"heads": 0.5}, "AutoModelForCausalLM", {"num_attention_heads", "num_key_value_heads"}),
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": [1 << 20, 2]}, "num_hidden_layers of the config was 1048576 and is 2: no site has"),
        ({"intermediate_size": [1 << 20, 7]}, "intermediate_size of the config is 7, which is [0-9]+ there"),
        ({"no_field": [8, 4]}, "no_field of the config is 4, which is None there"),
    ],
)
def test_sizes_that_no_site_has_are_not_built(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    small: Any = fxslim.slim(ARCHITECTURES["bert_classify"].build(torch.float32), ffn=0.5)
    folder = fxslim.save_pretrained(small, tmp_path / "small")
    for name in ("config.json", "fxslim_plan.json"):
        data = json.loads((folder / name).read_text())
        plan = data["fxslim"] if name == "config.json" else data  # a plan says by which fxslim it was made
        plan["config"] = fields
        (folder / name).write_text(json.dumps(data))
    begun = time.process_time()
    with pytest.raises(PlanError, match=said):
        fxslim.from_pretrained(folder)
    assert time.process_time() - begun < 5


def test_what_transformers_refuses_to_be_said_is_named() -> None:
    """A Llama's config takes only numbers of heads that divide the hidden size, whatever the heads' width."""
    small: Any = fxslim.slim(ARCHITECTURES["llama"].build(torch.float32), heads=0.25)
    plain = small.fxslim.report.plain
    assert not plain.loads
    assert plain.reason == (
        "the config would say num_attention_heads 4 -> 3, num_key_value_heads 4 -> 3, but transformers refuses that: "
        "The hidden size (32) is not a multiple of the number of attention heads (3)"
    )


def test_a_forged_site_does_not_make_a_model_of_many_layers(tmp_path: Path) -> None:
    """A site that is about no tensor may say any size; what is built is bounded by the weights that are there."""
    dense = ARCHITECTURES["bert_classify"].build(torch.float32)
    small: Any = fxslim.slim(dense, ffn=0.5)
    folder = fxslim.save_pretrained(small, tmp_path / "small")
    layers = 1 << 20
    for name in ("config.json", "fxslim_plan.json"):
        data = json.loads((folder / name).read_text())
        plan = data["fxslim"] if name == "config.json" else data
        forged = {"name": "x:ffn", "kind": "ffn", "module": "", "units": layers, "roles": {}, "slices": []}
        plan["sites"].append({"site": forged, "keep": [0, 1]})
        plan["config"] = {"num_hidden_layers": [layers, 2]}
        (folder / name).write_text(json.dumps(data))
    begun = time.process_time()  # seconds of this process: what else runs does not count
    with pytest.raises(PlanError, match=r"more than \d+ modules and parameters, many more than there are weights for"):
        fxslim.from_pretrained(folder)
    assert time.process_time() - begun < 5
    plan = fxslim.Plan.from_file(folder / "fxslim_plan.json").model_copy(update={"sites": ()})
    assert not fxslim.slim(dense, plan=plan).fxslim.report.plain.loads


def test_a_module_of_ones_own_has_nothing_to_say() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    small: Any = fxslim.slim(model, torch.randn(2, 4), ffn=0.5)
    assert small.fxslim.report.plain is None
    assert "plain from_pretrained" not in str(small.fxslim.report)
