"""What was seen of a site: its weights, the moments of its consumers' inputs, gradients of its masks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fxslim.passes.fitting.consumers import Consumer
from fxslim.passes.fitting.moments import Moments
from fxslim.site import Site


@dataclass(frozen=True)
class Read:
    """One consumer of a site: what it reads and what it makes of it.

    Attributes:
        consumer: the consumer.
        moments: moments of its inputs and targets, over all rows.
        weight: its matrix.  (in, out)
        root: ``L`` of the metric ``L Lᵀ`` of what it returns, or its diagonal; None for plain squares.
    """

    consumer: Consumer
    moments: Moments
    weight: Tensor
    root: Tensor | None = None

    def measured(self, returned: Tensor) -> Tensor:
        """Return what the consumer makes of inputs as coordinates in which the metric is the identity.  (in, out)"""
        if self.root is None:
            return returned
        return returned * self.root if self.root.ndim == 1 else returned @ self.root


@dataclass(frozen=True)
class Seen:
    """Everything that a method may look at.

    Attributes:
        site: the site.
        norms: L2 norm over all rows that a unit owns.  (units,)
        reads: its consumers.
        slope: mean over samples of the absolute derivative of the loss by each unit's mask.  (units,)
        bend: mean over samples of its square.  (units,)
        seed: for what is drawn.
    """

    site: Site
    norms: np.ndarray
    reads: tuple[Read, ...] = ()
    slope: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bend: np.ndarray = field(default_factory=lambda: np.zeros(0))
    seed: int = 0

    def by_unit(self, inputs: np.ndarray, read: Read) -> np.ndarray:
        """Sum something about a consumer's inputs over the inputs of every unit.  (in,) -> (units,)"""
        owner = read.consumer.owner
        totals = np.zeros(self.site.units)
        np.add.at(totals, owner[owner >= 0], inputs[owner >= 0])
        return totals
