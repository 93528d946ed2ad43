"""What a model's output is, how far two of them are apart, and a loss that needs no labels."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits")


def is_distribution(name: str, value: Tensor) -> bool:
    """Tell whether a part of an output is logits; a single one for each row is a number (a regression)."""
    return name in LOGITS and value.shape[-1] > 1


def divergence(dense: Any, other: Any, mask: Tensor | None, chosen: Tensor | None = None) -> tuple[float, float]:
    """Return how far an output is from the dense model's, as a sum and what to divide it by.

    Logits: the Kullback-Leibler divergence KL(dense || other), and the number of distributions. Anything else: the
    squared difference, and the square of the dense output. Padding does not count.

    Args:
        dense: output of the dense model.
        other: output of the other.
        mask: 1 where a token counts, or None.  (B, S)
        chosen: sequences that count; None for all.  (B,) bool
    """
    total = weight = 0.0
    for name, first in main(dense).items():
        second = main(other)[name]
        if chosen is not None and len(first) == len(chosen):
            first, second = first[chosen], second[chosen]
            mask = mask[chosen] if mask is not None and len(mask) == len(chosen) else mask
        rows, others = _rows(first, mask).double(), _rows(second, mask).double()
        if is_distribution(name, first):
            own = functional.log_softmax(rows, dim=-1)
            apart = functional.kl_div(functional.log_softmax(others, dim=-1), own, log_target=True, reduction="sum")
            total, weight = total + float(apart), weight + len(rows)
        else:
            total, weight = total + float((rows - others).square().sum()), weight + float(rows.square().sum())
    return total, weight


def loss(output: Any, mask: Tensor | None, labels: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Return the loss of a batch, summed over samples: its mask gradients, squared, are the Fisher information.

    Class labels are used where a batch holds valid ones. Others are drawn from the model's own distribution (the true
    Fisher, Kunstner et al. 2019), or, for outputs that are no logits, the loss is their product with noise.
    """
    total = torch.zeros(())
    for name, value in main(output).items():
        rows = _rows(value, mask)
        if not is_distribution(name, value):
            noise = torch.randn(rows.shape, generator=generator).to(rows)
            total = total.to(rows) + (rows * noise).sum()
            continue
        wanted = torch.multinomial(rows.detach().float().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        given = labels.get("labels", labels.get("label"))
        if given is not None and given.shape == wanted.shape and not given.is_floating_point():
            known = given.cpu().long()
            wanted = torch.where((known >= 0) & (known < rows.shape[-1]), known, wanted)
        total = total.to(rows) + functional.cross_entropy(rows, wanted.to(rows.device), reduction="sum")
    return total


def size(output: Any, mask: Tensor | None) -> float:
    """Return what squared errors in units of `loss` are divided by, to be what `divergence` counts.

    Of logits: a Kullback-Leibler divergence is half a square, for every distribution. Of anything else: its square.
    """
    found = 0.0
    for name, value in main(output).items():
        rows = _rows(value.detach(), mask)
        found += 2.0 * len(rows) if is_distribution(name, rows) else float(rows.double().square().sum())
    return found


def draw_of(inputs: Mapping[str, Any], seed: int) -> torch.Generator:
    """Return a generator that depends on a batch's tokens alone: who runs it, when, and how padded, changes nothing."""
    found, mask = seed, inputs.get("attention_mask")
    for value in inputs.values():
        if isinstance(value, Tensor):
            padded = isinstance(mask, Tensor) and mask.ndim == 2 and value.shape[:2] == mask.shape
            held = value[mask.bool()] if padded and mask is not None else value
            found = zlib.crc32(held.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(), found)
    return torch.Generator().manual_seed(found)


def main(output: Any) -> dict[str, Tensor]:
    """Return the parts of an output that matter: its logits, or else the first tensor of floating-point numbers."""
    if isinstance(output, Mapping):
        logits = {name: output[name] for name in LOGITS if isinstance(output.get(name), Tensor)}
        if logits:
            return logits
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            return {"": leaf}
    return {}


def _rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the last axis of every token that counts.  (..., channels) -> (rows, channels)"""
    if mask is not None and value.ndim >= 3 and value.shape[:2] == mask.shape:
        return value[mask.bool()].reshape(-1, value.shape[-1])
    return value.reshape(-1, value.shape[-1])
