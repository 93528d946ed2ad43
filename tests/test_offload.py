"""Models that accelerate has offloaded are planned as the same models in memory are, a few tensors at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fxslim

pytest.importorskip("accelerate")

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True),
    "bert": BertConfig(**SIZES, num_hidden_layers=2),
}
KINDS: dict[str, type[PreTrainedModel]] = {"llama": LlamaForCausalLM, "bert": BertModel}


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return [{"input_ids": torch.randint(3, 60, (4, 10)), "attention_mask": mask} for _ in range(4)]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """Return a model in memory, and the same one on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    dense = KINDS[request.param](CONFIGS[request.param]).eval()
    dense.save_pretrained(folder / "dense")
    loaded = KINDS[request.param].from_pretrained(
        folder / "dense", device_map={"": "disk"}, offload_folder=folder / "offloaded"
    )
    assert all(parameter.is_meta for parameter in loaded.parameters())
    return dense, loaded


@pytest.mark.parametrize(
    "asked",
    [
        {"ffn": 0.5, "heads": 0.5},
        {"target": fxslim.macs(0.6)},
        {"target": fxslim.memory("16KB")},
        {"ffn": 0.5, "heads": 0.5, "method": "wanda", "repair": False},
        {"ffn": 0.5, "method": "taylor", "repair": "bias"},
    ],
    ids=["fractions", "macs", "memory", "wanda", "taylor"],
)
def test_a_calibrated_plan_is_that_of_the_model_in_memory(pair: tuple[nn.Module, nn.Module], asked: Any) -> None:
    dense, loaded = pair
    plan = fxslim.plan(loaded, calibration=batches(), **asked)
    assert plan == fxslim.plan(dense, calibration=batches(), **asked)
    assert plan.sites


def test_without_data_too(pair: tuple[nn.Module, nn.Module]) -> None:
    dense, loaded = pair
    assert fxslim.plan(loaded, ffn=0.5, heads=0.5) == fxslim.plan(dense, ffn=0.5, heads=0.5)


def test_it_has_run_before(tmp_path: Path) -> None:
    """accelerate unties the weights of what has run."""
    dense = KINDS["llama"](CONFIGS["llama"]).eval()
    dense.save_pretrained(tmp_path / "dense")
    where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers": "disk", "model.norm": "disk"}
    loaded = KINDS["llama"].from_pretrained(
        tmp_path / "dense", device_map=where | {"model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    before = loaded(**batches()[0]).logits
    assert fxslim.plan(loaded, ffn=0.5) == fxslim.plan(dense, ffn=0.5)
    assert torch.equal(loaded(**batches()[0]).logits, before)
    assert all(parameter.is_meta for parameter in loaded.model.layers.parameters())


def test_a_narrowed_checkpoint_is_the_repaired_model(tmp_path: Path) -> None:
    dense = KINDS["llama"](CONFIGS["llama"]).eval()
    dense.save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"calibration": batches(), "ffn": 0.5, "heads": 0.5}
    expected = fxslim.slim(dense, **asked)
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "small", **asked)
    small: Any = fxslim.from_pretrained(tmp_path / "small")
    assert small.fxslim.plan.weights_changed
    assert small.fxslim.plan.sites == expected.fxslim.plan.sites
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    plan = fxslim.plan_checkpoint(tmp_path / "dense", **asked)
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "other", plan, calibration=batches())
    other = fxslim.from_pretrained(tmp_path / "other").state_dict()
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    assert not any(path.name.startswith(".") for path in (*tmp_path.iterdir(), *(tmp_path / "small").iterdir()))
