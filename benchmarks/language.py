"""A small language model of bytes, trained here on WikiText-2, and what is left of it after pruning."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LENGTH = 128
"""Bytes in a sequence."""
STEPS = 1200
BATCH = 16
SEQUENCES = 128
"""Sequences that calibrate."""
TESTED = 256
"""Sequences of the test text that are scored: evenly spread over all of it."""
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2 * LENGTH,
}


class Language:
    """WikiText-2: perplexity per byte of a Llama with grouped queries, and KL(dense || model) per byte."""

    name = "WikiText-2"

    def __init__(self, data: Path, keep: Path | None = None, steps: int = STEPS) -> None:
        folder = data / "wikitext2"
        self.train, test = read(folder / "valid.txt"), read(folder / "test.txt")
        self.model: nn.Module = trained(self.train, keep, steps)
        blocks = test[: len(test) // LENGTH * LENGTH].view(-1, LENGTH)
        own = torch.linspace(0, len(blocks) - 1, min(TESTED, len(blocks))).round().long()
        self.inputs = blocks[own].split(32)
        self.dense = [predictions(self.model, ids) for ids in self.inputs]

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of sequences that were drawn from the training text, none twice."""
        starts = range(0, len(self.train) - LENGTH + 1, LENGTH)
        drawn = random.Random(seed).sample(starts, min(SEQUENCES, len(starts)))
        ids = torch.stack([self.train[start : start + LENGTH] for start in drawn])
        return [{"input_ids": batch} for batch in ids.split(BATCH)]

    def score(self, model: nn.Module) -> tuple[float, float]:
        """Return the perplexity per byte, and KL(dense || model), both over all bytes but each sequence's first."""
        made = (predictions(model, ids) for ids in self.inputs)
        return compare(self.inputs, made, self.dense)


def read(path: Path) -> Tensor:
    """Read a text as bytes.  (bytes,)"""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()


def predictions(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logarithm of each next byte's distribution.  (B, S) -> (B, S - 1, 256)"""
    with torch.inference_mode():
        return functional.log_softmax(model(input_ids=ids).logits[:, :-1], -1)


def compare(inputs: Iterable[Tensor], made: Iterable[Tensor], dense: Iterable[Tensor]) -> tuple[float, float]:
    """Return the perplexity of distributions on what came, and their mean divergence from the dense model's."""
    surprise = divergence = count = 0.0
    for ids, own, other in zip(inputs, made, dense, strict=True):
        surprise -= float(own.gather(-1, ids[:, 1:, None]).double().sum())
        divergence += float((other.exp() * (other - own)).double().sum())
        count += ids[:, 1:].numel()
    return float(torch.tensor(surprise / count, dtype=torch.float64).exp()), divergence / count


def trained(text: Tensor, keep: Path | None, steps: int) -> nn.Module:
    """Return the model that is kept in a folder, or train it on a text and keep it there."""
    from transformers import LlamaForCausalLM

    if keep is not None and (keep / "model.safetensors").exists():
        kept: nn.Module = LlamaForCausalLM.from_pretrained(keep).eval()
        return kept
    model = train(text, steps)
    if keep is not None:
        model.save_pretrained(keep)
    return model


def train(text: Tensor, steps: int, seed: int = 0) -> Any:
    """Train a Llama on sequences that are drawn from a text: AdamW, a short warm-up, and a cosine down to nothing."""
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False, bos_token_id=None, eos_token_id=None)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    bar = tqdm(range(steps), unit="step", desc="training", mininterval=5)
    for _ in bar:
        starts = torch.randint(len(text) - LENGTH + 1, (BATCH,), generator=draw)
        ids = text[starts[:, None] + torch.arange(LENGTH)]
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()
