"""Methods: each maps what was seen of a site to scores of its units, or to a cost curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fxslim.passes.fitting.curve import Curve, Items
from fxslim.passes.fitting.seen import Seen
from fxslim.passes.methods.fisher import fisher
from fxslim.passes.methods.flap import flap
from fxslim.passes.methods.magnitude import magnitude
from fxslim.passes.methods.obs import obs
from fxslim.passes.methods.random import random
from fxslim.passes.methods.taylor import taylor
from fxslim.passes.methods.wanda import wanda

Method = Callable[[Seen, Items], Curve]

METHODS: Mapping[str, Method] = {
    "random": random,
    "magnitude": magnitude,
    "taylor": taylor,
    "fisher": fisher,
    "wanda": wanda,
    "flap": flap,
    "obs": obs,
}
GRADIENTS = frozenset(("taylor", "fisher"))
"""Methods that need gradients of the outputs."""
WEIGHTS = frozenset(("random", "magnitude"))
"""Methods that need no calibration data."""
