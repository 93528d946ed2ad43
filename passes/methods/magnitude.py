"""Magnitude: the norm of everything that a unit owns. Weak: weights alone do not say what passes through them."""

from __future__ import annotations

from fxslim.passes.fitting.curve import Curve, Items, by_scores
from fxslim.passes.fitting.seen import Seen


def magnitude(seen: Seen, items: Items) -> Curve:
    """Score units by the squared L2 norm over all their rows."""
    return by_scores(items, seen.norms**2)
