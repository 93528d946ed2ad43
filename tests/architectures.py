"""Small, randomly weighted models of the architectures that fxslim promises to handle.

Every entry of :data:`ARCHITECTURES` builds a two-layer model in eval mode in a few tens of milliseconds and makes fresh
inputs for it. Sizes differ wherever the architecture lets them, so that a mixed-up axis fails loudly:

    D = 32 model width, H = 4 query heads, K = 2 kv heads, E = 8 head width, F = 48 hidden width, V = 99 vocabulary

(Llama-GQA, Mistral and Qwen2 take E = 6, so that H * E = 24 is not D; the decoder of BART has F = 40; the vision tower
of CLIP has D = 24, H = 3, F = 36 and both towers project to 20.)

Every *parameter* is random, biases and norm weights too, and depends only on the entry's name and the parameter's: the
same in every dtype and for every attention implementation. Buffers and dropout probabilities keep their defaults.

Rows are padded on the right: left padding makes fully masked rows, hence NaN, in several eager models. Generation is
never stopped early: ``generation_config`` has no end-of-sequence token, so greedy decoding of *n* new tokens always
gives *n* of them (on padded rows too, with a warning about right padding that is of no consequence when two models are
compared with each other).

Shapes: B batch, S sequence, D model width, F hidden width, H query heads, K kv heads, E head width.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Attention = Literal["eager", "sdpa"]

WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, HIDDEN, VOCAB = 32, 4, 2, 8, 48, 99
LAYERS, POSITIONS, LABELS = 2, 64, 3
BOS, PAD, EOS = 0, 1, 3  # not 2: CLIP reads an end-of-sequence id of 2 as "take the largest id"
FIRST_WORD = 4
IMAGE, PATCH = 16, 8
SPECIAL = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS}


@dataclass(frozen=True)
class Architecture:
    """Name one model class with its tiny config; build it, and make inputs for it.

    Attributes:
        name: Key in :data:`ARCHITECTURES`; also seeds the weights.
        model: Model class in ``transformers``.
        config: Config class in ``transformers``.
        sizes: Config fields that differ from the config's defaults.
        generates: Whether ``model.generate(**inputs)`` works.
        text: Whether the model takes ``input_ids`` and ``attention_mask``.
        image: Whether the model takes ``pixel_values``; they do not depend on the length.
        decoder: Whether to pass ``decoder_input_ids`` (of length S + 1, so that the two lengths differ).
        sdpa: Whether ``attn="sdpa"`` is supported; ``transformers`` refuses it otherwise.
        min_length: Shortest sequence for which every parameter matters.
    """

    name: str
    model: str
    config: str
    sizes: Mapping[str, Any] = field(hash=False)
    generates: bool = False
    text: bool = True
    image: bool = False
    decoder: bool = False
    sdpa: bool = True
    min_length: int = 3

    def build(self, dtype: torch.dtype = torch.float64, attn: Attention = "eager") -> nn.Module:
        """Return a fresh model in eval mode; the global random state is left alone."""
        config = getattr(transformers, self.config)(**self.sizes, attn_implementation=attn)
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = getattr(transformers, self.model)(config)
        model = model.to(dtype).eval()
        randomise(model, self.name)
        if self.generates:
            generation: Any = model.generation_config
            generation.eos_token_id = generation.forced_eos_token_id = None
            generation.pad_token_id = PAD
        return model

    def inputs(
        self, batch: int = 3, length: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        """Return keyword arguments for ``forward``; row 0 is never padded, later rows may be, on the right.

        The last token of every row is the end-of-sequence token, which some classification heads look for.

        Args:
            batch: B.
            length: S, at least ``min_length``.
            seed: Equal seeds give equal inputs.
            dtype: Of ``pixel_values``.
        """
        if not self.min_length <= length < POSITIONS - 2:
            raise ValueError(f"{self.name}: length {length} is not in [{self.min_length}, {POSITIONS - 2})")
        generator = torch.Generator().manual_seed(seed)
        result: dict[str, Tensor] = {}
        if self.text:
            lengths = torch.randint(self.min_length, length + 1, (batch,), generator=generator)
            lengths[0] = length
            position = torch.arange(length)
            ids = torch.randint(FIRST_WORD, VOCAB, (batch, length), generator=generator)
            ids[position == lengths[:, None] - 1] = EOS
            real = position < lengths[:, None]
            result |= {"input_ids": ids.where(real, PAD), "attention_mask": real.long()}
        if self.decoder:
            result["decoder_input_ids"] = torch.randint(FIRST_WORD, VOCAB, (batch, length + 1), generator=generator)
        if self.image:
            pixels = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64)
            result["pixel_values"] = pixels.to(dtype)
        return result


def randomise(model: nn.Module, name: str) -> None:
    """Fill every parameter with reproducible values that keep activations of order one.

    Matrices have variance 1 / fan-in, embeddings and other tables 1/4, norm weights lie around 1, all else around 0.
    """
    done: set[int] = set()
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:  # tied weights
                continue
            done.add(id(parameter))
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{path}.{key}".encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                parameter.copy_(_scaled(noise, module, key))


def _scaled(noise: Tensor, module: nn.Module, key: str) -> Tensor:
    """Scale standard normal noise for the parameter called ``key`` of ``module``."""
    if key == "weight" and isinstance(module, nn.Linear | nn.Conv2d):
        return noise / math.sqrt(noise[0].numel())
    if key == "weight" and isinstance(module, Conv1D):
        return noise / math.sqrt(noise.shape[0])
    if key == "weight" and "Norm" in type(module).__name__:
        return 1 + 0.1 * noise
    return (0.5 if noise.dim() > 1 else 0.3) * noise


_BERT = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": POSITIONS,
}
_LABELS = {"num_labels": LABELS}
_DISTILBERT = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": HIDDEN,
    "max_position_embeddings": POSITIONS,
}
_GPT2 = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": HIDDEN,
    "n_positions": POSITIONS,
}
_OPT = {k: v for k, v in _BERT.items() if k != "intermediate_size"} | {"ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH}
_MHA = {**_BERT, "num_key_value_heads": HEADS}
_GQA = {**_BERT, "num_key_value_heads": KV_HEADS}
_NARROW_GQA = {**_GQA, "head_dim": 6}
_BART = {
    **SPECIAL,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN - 8,
    "max_position_embeddings": POSITIONS,
}
_VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_CLIP = {
    "text_config": {**_BERT, "projection_dim": 20},
    "vision_config": {
        **_VISION,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_size": 36,
        "projection_dim": 20,
    },
    "projection_dim": 20,
}

_decoder = partial(Architecture, generates=True)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Architecture("bert", "BertModel", "BertConfig", _BERT),
            Architecture("bert_classify", "BertForSequenceClassification", "BertConfig", _BERT | _LABELS),
            Architecture("bert_qa", "BertForQuestionAnswering", "BertConfig", _BERT),
            Architecture("bert_tag", "BertForTokenClassification", "BertConfig", _BERT | _LABELS),
            Architecture("bert_mlm", "BertForMaskedLM", "BertConfig", _BERT),
            Architecture("roberta_classify", "RobertaForSequenceClassification", "RobertaConfig", _BERT | _LABELS),
            Architecture("distilbert_qa", "DistilBertForQuestionAnswering", "DistilBertConfig", _DISTILBERT),
            Architecture(
                "distilbert_classify",
                "DistilBertForSequenceClassification",
                "DistilBertConfig",
                _DISTILBERT | _LABELS,
            ),
            Architecture(
                "electra_classify",
                "ElectraForSequenceClassification",
                "ElectraConfig",
                _BERT | _LABELS | {"embedding_size": 20},
            ),
            _decoder("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
            _decoder("gptj", "GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}, sdpa=False),
            _decoder("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT),
            _decoder("opt", "OPTForCausalLM", "OPTConfig", _OPT),
            _decoder("llama", "LlamaForCausalLM", "LlamaConfig", _MHA),
            _decoder("llama_gqa", "LlamaForCausalLM", "LlamaConfig", _NARROW_GQA),
            _decoder("mistral", "MistralForCausalLM", "MistralConfig", _NARROW_GQA),
            _decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _NARROW_GQA),
            _decoder("phi", "PhiForCausalLM", "PhiConfig", _MHA),
            _decoder("phi3", "Phi3ForCausalLM", "Phi3Config", _MHA),
            _decoder("phi3_gqa", "Phi3ForCausalLM", "Phi3Config", _GQA),
            _decoder("bart", "BartForConditionalGeneration", "BartConfig", _BART, decoder=True),
            Architecture("bart_classify", "BartForSequenceClassification", "BartConfig", _BART | _LABELS),
            Architecture(
                "vit_classify", "ViTForImageClassification", "ViTConfig", _VISION | _LABELS, text=False, image=True
            ),
            Architecture("clip", "CLIPModel", "CLIPConfig", _CLIP, image=True),
        )
    }
)
