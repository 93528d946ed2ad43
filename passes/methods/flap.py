"""FLAP: how much what a channel carries fluctuates, times the size of what the consumer makes of it."""

from __future__ import annotations

import numpy as np

from fxslim.passes.fitting.curve import Curve, Items, by_scores
from fxslim.passes.fitting.seen import Seen


def flap(seen: Seen, items: Items) -> Curve:
    """Score ``sum over a unit's inputs j of Var(x_j) |W_j|²`` (An et al. 2023, equation 5)."""
    scores = np.zeros(seen.site.units)
    for read in seen.reads:
        scores += seen.by_unit((read.moments.variance * read.weight.square().sum(1)).cpu().numpy(), read)
    return by_scores(items, scores)
