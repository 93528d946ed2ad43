"""Scores: what a step says of a group of weights, and how much of what earlier steps said stays.

A mask m multiplies the weights of a group (those that read a unit in every consumer, or a block of a weight), so that
``∂L/∂m = Σ W·∂L/∂W`` over them, where m is 1: gradients of masks need nothing but those of the weights, after they have
been averaged over processes, unscaled and accumulated. Where m is 0 they are 0: what is masked stays masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
"""Sums something about every weight over groups."""


@dataclass(frozen=True)
class Score:
    """How a group of weights is scored.

    Attributes:
        of: what is looked at of every weight: ``weight`` its absolute value, ``gradient`` that of its gradient,
            ``product`` that of both multiplied, ``mask`` the derivative of the loss by the group's mask.
        power: the power that is taken of the absolute value, summed over the group first for ``mask``.
        decay: what stays of the score from one step to the next.
        mean: whether a step's part is weighed so that the score is a mean, not a sum.
        per_cost: whether it is divided by the number of weights that would go.
        owned: whether a unit counts by the norm of all that it owns, not by what reads it.
    """

    of: Literal["weight", "gradient", "product", "mask"]
    power: int = 1
    decay: float = 0.0
    mean: bool = False
    per_cost: bool = False
    owned: bool = False

    @property
    def memory(self) -> bool:
        """Tell whether earlier steps count."""
        return self.decay > 0

    @property
    def gradients(self) -> bool:
        """Tell whether gradients are needed."""
        return self.of != "weight"

    def elements(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """Return what is summed over a group's weights.  (shape of the weight)"""
        weight = weight.detach()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if self.of == "weight":
            return weight.to(dtype).abs()
        assert gradient is not None
        if self.of == "gradient":
            return gradient.to(dtype).abs()
        product = weight.to(dtype) * gradient.to(dtype)
        return product.abs() if self.of == "product" else product

    def step(self, summed: Tensor) -> Tensor:
        """Return what one step says, from what was summed over groups."""
        return summed.abs() ** self.power if self.of == "mask" else summed

    def after(self, before: Tensor, step: Tensor, decay: float | None = None) -> Tensor:
        """Return the score after a step.

        Args:
            before: the score before.
            step: what the step says.
            decay: instead of the score's own.
        """
        if not self.memory:
            return step
        kept = self.decay if decay is None else decay
        return kept * before + (1 - kept if self.mean else 1.0) * step


SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "magnitude": Score("weight", owned=True),
        "l1": Score("weight"),
        "gradient": Score("gradient"),
        "snip": Score("product"),
        "snip_momentum": Score("product", decay=0.9),
        "taylor": Score("mask", decay=0.85, mean=True),
        "fisher": Score("mask", power=2, decay=0.85, mean=True, per_cost=True),
        "block_mask": Score("mask", decay=0.9),
    }
)
"""magnitude |W|, of units the norm of all that they own; l1 |W|, of units the sum over what reads them; gradient |g|;
snip |W·g| (Lee et al. 2019); snip_momentum S ← 0.9·S + |W·g|; taylor mean of |m·∂L/∂m| (Molchanov et al. 2017); fisher
mean of (m·∂L/∂m)² per weight that goes (Kwon et al. 2022); block_mask S ← 0.9·S + |∂L/∂m|."""
