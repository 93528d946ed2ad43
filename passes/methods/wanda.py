"""Wanda by units: the size of what a channel carries times the size of what the consumer makes of it."""

from __future__ import annotations

import numpy as np

from fxslim.passes.fitting.curve import Curve, Items, by_scores
from fxslim.passes.fitting.seen import Seen


def wanda(seen: Seen, items: Items) -> Curve:
    """Score ``sum over a unit's inputs j of E[x_j²] |W_j|²`` (Sun et al. 2023, equation 1, squared and summed)."""
    scores = np.zeros(seen.site.units)
    for read in seen.reads:
        power = read.moments.xx.diagonal() + read.moments.x.square()
        scores += seen.by_unit((power * read.weight.square().sum(1)).cpu().numpy(), read)
    return by_scores(items, scores)
