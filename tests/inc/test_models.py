"""The models on which the old tool was measured: half of the FFN and half of the heads, pruned, slimmed, reloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hub
from torch import Tensor, nn

import fxslim
from fxslim.inc import CompressionManager, WeightPruningConfig, parse_auto_slim_config, prepare_compression

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "pad_token_id": 0}  # fmt: skip
GPT = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
DECODER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip

MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "BERT": (lambda: hub.BertForSequenceClassification(hub.BertConfig(**SMALL)), 2, 2),
    "RoBERTa": (lambda: hub.RobertaForSequenceClassification(hub.RobertaConfig(**SMALL)), 2, 2),
    "GPT-2": (lambda: hub.GPT2LMHeadModel(hub.GPT2Config(**GPT)), 2, 2),
    "OPT": (lambda: hub.OPTForCausalLM(hub.OPTConfig(**{**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32})), 2, 2),
    "GPT-J": (lambda: hub.GPTJForCausalLM(hub.GPTJConfig(**GPT, rotary_dim=4)), 2, 2),
    "Llama": (lambda: hub.LlamaForCausalLM(hub.LlamaConfig(**SMALL)), 2, 2),
    "Llama GQA": (lambda: hub.LlamaForCausalLM(hub.LlamaConfig(**SMALL, num_key_value_heads=2)), 2, 2),
    "ViT": (lambda: hub.ViTForImageClassification(hub.ViTConfig(**SMALL, image_size=8, patch_size=4)), 2, 2),
    "T5": (lambda: hub.T5ForConditionalGeneration(hub.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2,
                                                               num_heads=4, decoder_start_token_id=0)), 4, 6),
    "DistilBERT": (lambda: hub.DistilBertForSequenceClassification(
        hub.DistilBertConfig(vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=64, pad_token_id=0)), 2, 2),
    "Whisper": (lambda: hub.WhisperForConditionalGeneration(
        hub.WhisperConfig(**DECODER, vocab_size=40, num_mel_bins=4, max_source_positions=8, pad_token_id=0,
                          bos_token_id=1, eos_token_id=1, decoder_start_token_id=2, suppress_tokens=None,
                          begin_suppress_tokens=None)), 3, 5),
    "BLOOM": (lambda: hub.BloomForCausalLM(hub.BloomConfig(**{**GPT, "hidden_size": 32})), 2, 2),
}  # fmt: skip
"""Name -> how to make it, how many feed-forward blocks and attentions it has."""


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, so that what is cut wrongly shows
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def batch(model: Any, rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 40, (rows, 7), generator=generator)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, dtype=torch.float64, generator=generator)}
    if model.config.model_type == "whisper":
        features = torch.randn(rows, 4, 16, dtype=torch.float64, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize("name", MODELS)
def test_half_of_a_model_goes_and_comes_back(name: str, tmp_path: Path) -> None:
    """The narrowed model computes what the masked one does, in float64, and so does what is loaded again."""
    model = build(name)
    _, blocks, attentions = MODELS[name]
    data = [batch(model)] if name == "Whisper" else None  # whose config does not tell how long its inputs are
    pruners = parse_auto_slim_config(model, data, ffn2_sparsity=0.5, mha_sparsity=0.5)
    assert len(pruners[0]["op_names"]) == blocks
    conf = WeightPruningConfig(pruners, pruning_type="magnitude", pruning_scope="local")
    manager = prepare_compression(model, conf, dataloader=data)
    manager.callbacks.on_train_begin()
    assert manager.callbacks.sparsity == {"ffn": 0.5, "heads": 0.5}
    manager.callbacks.on_train_end()
    masked = copy.deepcopy(model)
    for path in pruners[0]["op_names"]:
        layer = masked.get_submodule(path)
        assert (layer.weight == 0).all(1 if hasattr(layer, "nf") else 0).double().mean() == 0.5
    small = manager.callbacks.model_slim(model, data, round_multiplier=1)
    assert small is model
    kinds = [part.site.kind for part in small.fxslim.plan]
    halves = [len(part.keep) * 2 == part.site.units for part in small.fxslim.plan]
    assert kinds.count("attention") == attentions and len(kinds) == attentions + blocks and all(halves)
    assert not small.fxslim.plan.zeroed
    given = batch(model)
    with torch.no_grad():
        expected = masked(**given).logits
        assert torch.allclose(small(**given).logits, expected, rtol=0, atol=1e-10)
        CompressionManager(small, manager.callbacks).save(tmp_path / "small")
        again = fxslim.from_pretrained(tmp_path / "small").eval()
        assert next(again.parameters()).dtype == torch.float64
        assert torch.allclose(again(**given).logits, expected, rtol=0, atol=1e-10)
