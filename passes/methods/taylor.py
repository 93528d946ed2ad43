"""First-order Taylor expansion in the masks."""

from __future__ import annotations

from fxslim.passes.fitting.curve import Curve, Items, by_scores
from fxslim.passes.fitting.seen import Seen


def taylor(seen: Seen, items: Items) -> Curve:
    """Score ``E |m ∂L/∂m|`` at masks of one (Michel et al. 2019, equation 2)."""
    return by_scores(items, seen.slope)
