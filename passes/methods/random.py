"""Random order: what any other method has to beat."""

from __future__ import annotations

import zlib

import numpy as np

from fxslim.passes.fitting.curve import Curve, Items, by_scores
from fxslim.passes.fitting.seen import Seen


def random(seen: Seen, items: Items) -> Curve:
    """Draw scores from the seed and the site's name."""
    drawn = np.random.default_rng([seen.seed, zlib.crc32(seen.site.name.encode())])
    return by_scores(items, drawn.random(seen.site.units))
