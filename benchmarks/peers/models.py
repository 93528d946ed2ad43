"""Models that every tool is given, and what a careful user knows of each: which linear is what, and how many heads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WORDS, HIDDEN, FFN, LAYERS, HEADS, GROUPS = 99, 64, 128, 2, 8, 2


@dataclass(frozen=True)
class Roles:
    """Say which linears of a model are what, by regular expressions over whole module paths.

    Attributes:
        queries: projections that make the queries, alone or together with keys and values.
        keys: those that make keys or values, where they are apart.
        attended: what reads the heads.
        up: what makes hidden channels of the FFN: up, gate, or both at once.
        down: what reads them.
    """

    queries: str
    keys: str
    attended: str
    up: str
    down: str

    def linears(self, model: nn.Module, role: str) -> dict[str, Any]:
        """Return the linears of a model that have a role, by their paths, in order."""
        pattern = re.compile(getattr(self, role))
        return {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}


@dataclass(frozen=True)
class Subject:
    """A model to prune.

    Attributes:
        name: what the tables call it.
        build: makes it with random weights, in eval mode.
        roles: its linears.
        heads: query heads of an attention.
        groups: key/value heads of an attention.
    """

    name: str
    build: Callable[[], nn.Module]
    roles: Roles
    heads: int = HEADS
    groups: int = HEADS

    def inputs(self, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
        """Return keyword inputs: pixels for the ViT, tokens with padding for all others, without a cache."""
        draw = torch.Generator().manual_seed(seed)
        if self.name == "ViT":
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=draw)}
        ids = torch.randint(3, WORDS, (batch, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.name == "T5":
            inputs["decoder_input_ids"] = ids.flip(0)[:, : length - 1]
        return inputs if "BERT" in self.name else inputs | {"use_cache": False}


BERT_ROLES = Roles(
    queries=r".*\battention\.self\.query",
    keys=r".*\battention\.self\.(key|value)",
    attended=r".*\battention\.output\.dense",
    up=r".*\bintermediate\.dense",
    down=r".*\blayer\.\d+\.output\.dense",
)
_LLAMA_ROLES = Roles(r".*\bq_proj", r".*\b[kv]_proj", r".*\bo_proj", r".*\b(up|gate)_proj", r".*\bdown_proj")
_ROLES = {
    "BERT": BERT_ROLES,
    "ViT": Roles(r".*\bq_proj", r".*\b[kv]_proj", r".*\bo_proj", r".*\bfc1", r".*\bfc2"),
    "GPT-2": Roles(r".*\bc_attn", r"(?!)", r".*\battn\.c_proj", r".*\bc_fc", r".*\bmlp\.c_proj"),
    "Llama GQA": _LLAMA_ROLES,
    "Llama GQA 4/2": _LLAMA_ROLES,
    "Qwen3": _LLAMA_ROLES,
    "T5": Roles(r".*Attention\.q", r".*Attention\.[kv]", r".*Attention\.o", r".*\bwi", r".*\bwo"),
    "Phi-3 GQA": Roles(r".*\bqkv_proj", r"(?!)", r".*\bo_proj", r".*\bgate_up_proj", r".*\bdown_proj"),
}
_SHAPE = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_GROUPED = {**_SHAPE, "num_key_value_heads": GROUPS, "head_dim": HIDDEN // HEADS}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertModel", "BertConfig", _SHAPE),
    "ViT": ("ViTModel", "ViTConfig", {**_SHAPE, "image_size": 32, "patch_size": 8}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS, "n_head": HEADS}),
    "Llama GQA": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Llama GQA 4/2": ("LlamaForCausalLM", "LlamaConfig",
                      {**_SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "T5": ("T5ForConditionalGeneration", "T5Config",
           {"d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "d_ff": FFN, "num_layers": LAYERS, "num_heads": HEADS,
            "decoder_start_token_id": 0}),
    "Phi-3 GQA": ("Phi3ForCausalLM", "Phi3Config", {**_SHAPE, "num_key_value_heads": GROUPS}),
}  # fmt: skip


def _build(name: str) -> nn.Module:
    """Return a model of two layers in which every parameter is random, biases and norms too."""
    import transformers

    transformers.logging.set_verbosity_error()
    model_class, config_class, sizes = _CONFIGS[name]
    words = {} if name == "ViT" else {"vocab_size": WORDS, **_ENDS}
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes, **words))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _bert_base() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(), add_pooling_layer=False).eval()


def _subject(name: str, roles: Roles) -> Subject:
    sizes = _CONFIGS[name][2]
    heads = sizes.get("num_attention_heads", HEADS)
    return Subject(name, lambda: _build(name), roles, heads, sizes.get("num_key_value_heads", heads))


SUBJECTS = {name: _subject(name, roles) for name, roles in _ROLES.items()}
BERT_BASE = Subject("BERT-base", _bert_base, BERT_ROLES, heads=12, groups=12)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all linears, one row for each output and one column for each input."""
    return {
        name: module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
