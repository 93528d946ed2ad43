"""Mask Fisher: second-order, of gradients for every sample by itself."""

from __future__ import annotations

from fxslim.passes.fitting.curve import Curve, Items, by_scores
from fxslim.passes.fitting.seen import Seen


def fisher(seen: Seen, items: Items) -> Curve:
    """Score ``E (∂L/∂m)²`` over samples (Kwon et al. 2022, equation 6; their code squares sums over batches)."""
    return by_scores(items, seen.bend)
