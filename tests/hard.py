"""Small, randomly weighted models of architectures that are hard to narrow, built like those of `architectures`.

What makes each of them hard stands next to its entry in :data:`HARD`. Sizes are those of `architectures`, and differ
wherever the architecture lets them; models without a config of ``transformers`` are built from ``torch.nn`` here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from architectures import (
    _BART,
    _BERT,
    _GPT2,
    _GQA,
    _LABELS,
    _NARROW_GQA,
    _VISION,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    PAD,
    POSITIONS,
    SPECIAL,
    VOCAB,
    WIDTH,
    Architecture,
    Attention,
    randomise,
)

MEL, FRAMES = 10, 24
"""Whisper's spectrogram: bins and time steps, always as many."""
STRIDE = 16
"""Samples of a waveform for each frame of the encoder."""
MEMORY, KEYS, VALUES = 5, 20, 28
"""Length of what cross attention reads, and the widths of its keys and values."""
IMAGE_TOKEN, PATCHES = VOCAB - 1, (IMAGE // 8) ** 2


@dataclass(frozen=True)
class Hard(Architecture):
    """An architecture that takes other inputs than text and images, or needs its experts told how to compute.

    Attributes:
        audio: Name of the waveform or spectrogram among the inputs, if there is one.
        mask: Whether to pass ``attention_mask``.
        image_tokens: Whether the text holds a place for every patch of the image, at its start.
        experts: How experts compute; grouped kernels have no float64, and loops cannot be traced.
        given: Whether ``fxslim`` has to be given example inputs.
    """

    audio: str = ""
    mask: bool = True
    image_tokens: bool = False
    experts: str = ""
    given: bool = False

    def build(self, dtype: torch.dtype = torch.float64, attn: Attention = "eager") -> nn.Module:
        model: Any = super().build(dtype, attn)
        if self.experts:
            model.set_experts_implementation(self.experts)
        return model

    def inputs(
        self, batch: int = 3, length: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        made = super().inputs(batch, length, seed, dtype)
        generator = torch.Generator().manual_seed(seed + 1)
        if self.image_tokens:
            ids, real = made["input_ids"], made["attention_mask"]
            made["input_ids"] = torch.cat([torch.full((batch, PATCHES), IMAGE_TOKEN), ids.clamp(max=VOCAB - 2)], 1)
            made["attention_mask"] = torch.cat([torch.ones_like(real[:, :1]).expand(-1, PATCHES), real], 1)
        if self.audio == "input_features":
            made[self.audio] = torch.randn(batch, MEL, FRAMES, generator=generator, dtype=torch.float64).to(dtype)
        if self.audio == "input_values":
            samples = STRIDE * (length + 2)
            made[self.audio] = torch.randn(batch, samples, generator=generator, dtype=torch.float64).to(dtype)
            if self.mask:
                ends = STRIDE * torch.randint(self.min_length + 2, length + 3, (batch, 1), generator=generator)
                ends[0] = samples
                made["attention_mask"] = (torch.arange(samples) < ends).long()
        if not self.mask:
            made.pop("attention_mask", None)
        return made


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class Decoder(nn.Module):
    """``nn.TransformerDecoder``: self attention, cross attention, FFN."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.decoder(x, memory, tgt_key_padding_mask=padding)


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` on one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` whose keys and values come from elsewhere and have widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=KEYS, vdim=VALUES, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return x + self.attention(x, keys, values)[0]


@dataclass(frozen=True)
class Plain(Hard):
    """A module of ``torch.nn``.

    Attributes:
        make: Builds it.
        shapes: Names and shapes of its inputs; B and S stand for batch and length.
        padded: Whether to pass a padding mask: true where there is nothing.
    """

    make: Callable[[], nn.Module] = nn.Identity
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict, hash=False)
    padded: bool = True

    def build(self, dtype: torch.dtype = torch.float64, attn: Attention = "eager") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model = self.make()
        model = model.to(dtype).eval()
        randomise(model, self.name)
        return model

    def inputs(
        self, batch: int = 3, length: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = {"B": batch, "S": length}
        made = {}
        for key, shape in self.shapes.items():
            numbers = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
            made[key] = torch.randn(numbers, generator=generator, dtype=torch.float64).to(dtype)  # type: ignore[arg-type]
        if self.padded:
            lengths = torch.randint(self.min_length, length + 1, (batch, 1), generator=generator)
            lengths[0] = length
            made["padding"] = torch.arange(length) >= lengths
        return made


def _plain(
    name: str, model: str, make: Callable[[], nn.Module], padded: bool = True, **shapes: tuple[int | str, ...]
) -> Plain:
    return Plain(name, model, "", {}, sdpa=False, text=False, given=True, make=make, shapes=shapes, padded=padded)


_T5 = {
    **SPECIAL,
    "decoder_start_token_id": PAD,
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 6,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
}
_GATED = {"feed_forward_proj": "gated-gelu"}
_BLOOM = {**SPECIAL, "vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
_FALCON = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": HIDDEN,
    "max_position_embeddings": POSITIONS,
    "bias": True,
    "alibi": False,
    "new_decoder_architecture": False,
}
_DEBERTA = {
    **_BERT,
    **_LABELS,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
_SWIN = {
    **_LABELS,
    "image_size": IMAGE,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 3.0,
}
_DEEPSEEK = {
    **_BERT,
    "num_key_value_heads": HEADS,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
}
_QWEN3_NEXT = {
    **_GQA,
    "layer_types": ["full_attention", "full_attention"],  # a linear attention alone takes a minute to trace
    "head_dim": 8,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_experts_per_tok": 2,
    "num_experts": 4,
}
_GPT_OSS = {
    **_GQA,
    "head_dim": 6,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_AUDIO = {
    **_BERT,
    "vocab_size": 32,
    "conv_dim": [20, 24],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
_WHISPER = {
    **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
    "num_mel_bins": MEL,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": POSITIONS,
    "begin_suppress_tokens": None,
    "suppress_tokens": [PAD],
}
_TOWER = {**_VISION, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 36}
_SIGLIP = {"text_config": {**_BERT, "projection_size": 24}, "vision_config": _TOWER}
_BLIP = {
    "text_config": {**_BERT, "encoder_hidden_size": 24, "sep_token_id": 3},
    "vision_config": _TOWER,
    "projection_dim": 20,
    "image_text_hidden_size": 20,
}
_LLAVA = {
    "text_config": {**_NARROW_GQA, "model_type": "llama"},
    "vision_config": {**_TOWER, "num_hidden_layers": 3, "model_type": "clip_vision_model"},
    "image_token_index": IMAGE_TOKEN,
    "image_seq_length": PATCHES,
}


def _hard(name: str, model: str, config: str, sizes: Mapping[str, Any], **options: Any) -> Hard:
    return Hard(name, model, config, sizes, **options)


def _decoder(name: str, model: str, config: str, sizes: Mapping[str, Any], **options: Any) -> Hard:
    return Hard(name, model, config, sizes, generates=True, **options)


def _encoder_decoder(name: str, model: str, config: str, sizes: Mapping[str, Any], **options: Any) -> Hard:
    return Hard(name, model, config, sizes, generates=True, decoder=True, **options)


_ENTRIES: tuple[Hard, ...] = (
    # A table of position biases, held by the first layer of a stack and handed to all others.
    _encoder_decoder("t5", "T5ForConditionalGeneration", "T5Config", _T5),
    _encoder_decoder("t5_gated", "T5ForConditionalGeneration", "T5Config", {**_T5, **_GATED}),
    _hard("t5_encoder", "T5EncoderModel", "T5Config", _T5),
    _encoder_decoder("mt5", "MT5ForConditionalGeneration", "MT5Config", {**_T5, **_GATED}),
    _encoder_decoder("umt5", "UMT5ForConditionalGeneration", "UMT5Config", {**_T5, **_GATED}),
    _hard("mpnet", "MPNetForSequenceClassification", "MPNetConfig", {**_BERT, **_LABELS}, sdpa=False),
    # Slopes per head, computed from the number of heads, outside the layers.
    _decoder("bloom", "BloomForCausalLM", "BloomConfig", _BLOOM, sdpa=False),
    _decoder("mpt", "MptForCausalLM", "MptConfig", {
        **SPECIAL, "vocab_size": VOCAB, "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "expansion_ratio": 2,
        "max_seq_len": POSITIONS,
    }, sdpa=False),
    _decoder("falcon_alibi", "FalconForCausalLM", "FalconConfig", {
        **_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False,
    }),
    # Query, key and value in one linear, laid out in four ways.
    _decoder("falcon_mq", "FalconForCausalLM", "FalconConfig", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    _decoder("falcon_mha", "FalconForCausalLM", "FalconConfig", {**_FALCON, "multi_query": False}),
    _decoder("falcon_new", "FalconForCausalLM", "FalconConfig", {
        **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2,
    }),
    _decoder("codegen", "CodeGenForCausalLM", "CodeGenConfig", {**_GPT2, "n_head": 8, "rotary_dim": 4}, sdpa=False),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**_GPT2, "multi_query": True}),
    _decoder("gpt_bigcode_mha", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**_GPT2, "multi_query": False}),
    _decoder("persimmon", "PersimmonForCausalLM", "PersimmonConfig", _BERT),
    # Norms of queries and keys: over a head, or over all heads together.
    _decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _NARROW_GQA),
    _decoder("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {
        **_NARROW_GQA, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
        "query_pre_attn_scalar": 6,
    }, min_length=4),
    _decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config", _GQA),
    # Attention over relative positions, by projections of their own or by those of the content.
    _hard("deberta_v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", {**_DEBERTA, "share_att_key": False},
          sdpa=False),
    _hard("deberta_v2_shared", "DebertaV2ForSequenceClassification", "DebertaV2Config",
          {**_DEBERTA, "share_att_key": True}, sdpa=False),
    # Windows, shifted; one layer called many times; frames, patches, two towers.
    _hard("swin", "SwinForImageClassification", "SwinConfig", _SWIN, text=False, image=True),
    _hard("albert", "AlbertForSequenceClassification", "AlbertConfig", {**_BERT, **_LABELS, "embedding_size": 20}),
    _encoder_decoder("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", _BART),
    _encoder_decoder("whisper", "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, text=False,
                     audio="input_features", given=True),
    _hard("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _AUDIO, text=False, audio="input_values", mask=False,
          given=True),
    _hard("hubert", "HubertForCTC", "HubertConfig", {
        **_AUDIO, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    }, text=False, audio="input_values", given=True),
    _hard("siglip", "SiglipModel", "SiglipConfig", _SIGLIP, image=True),
    _hard("blip", "BlipForConditionalGeneration", "BlipConfig", _BLIP, image=True, sdpa=False),
    _decoder("llava", "LlavaForConditionalGeneration", "LlavaConfig", _LLAVA, image=True, image_tokens=True,
             given=True),
    # Experts, latent keys and values, linear attention.
    _decoder("gpt_oss", "GptOssForCausalLM", "GptOssConfig", _GPT_OSS, sdpa=False, min_length=4, experts="batched_mm"),
    _decoder("deepseek_v2", "DeepseekV2ForCausalLM", "DeepseekV2Config", _DEEPSEEK, experts="batched_mm"),
    _decoder("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
             experts="batched_mm"),
    _decoder("qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig", _QWEN3_NEXT, experts="batched_mm"),
    # Modules of torch: one tensor for query, key and value, and a call into a function that checks its sizes.
    _plain("torch_encoder", "nn.TransformerEncoder", lambda: Encoder(batch_first=True), x=("B", "S", WIDTH)),
    _plain("torch_encoder_seq", "nn.TransformerEncoder", lambda: Encoder(batch_first=False), x=("S", "B", WIDTH)),
    _plain("torch_decoder", "nn.TransformerDecoder", Decoder, x=("B", "S", WIDTH), memory=("B", MEMORY, WIDTH)),
    _plain("torch_self", "nn.MultiheadAttention", SelfAttention, x=("B", "S", WIDTH)),
    _plain("torch_cross", "nn.MultiheadAttention", CrossAttention, padded=False, x=("B", "S", WIDTH),
           keys=("B", MEMORY, KEYS), values=("B", MEMORY, VALUES)),
)  # fmt: skip

HARD: Mapping[str, Hard] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
