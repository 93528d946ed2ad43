"""What an optimizer remembers of weights that are masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SINGLE = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax,
    torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.SGD,
)  # fmt: skip
"""Optimizers that look at every weight by itself, and remember a number for each."""


def forget(optimizer: Any, parameter: nn.Parameter, clear: Callable[[torch.Tensor], None]) -> None:
    """Clear part of every tensor of a parameter's state that has the parameter's shape (moments, averages).

    What is stored in another form (quantized, factored, one vector over all parameters) stays: a zero there need not
    mean zero. Zeros in weights are put back after every step then; see `keeps_zeros`.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or something that wraps one; None for none.
        parameter: the parameter.
        clear: zeroes the part in a tensor, in place.
    """
    if optimizer is None:
        return
    state = optimizer.state.get(parameter, {})
    for value in state.values():
        if type(value) is torch.Tensor and value.is_floating_point() and value.shape == parameter.shape:
            clear(value)


def keeps_zeros(optimizer: Any) -> bool:
    """Tell whether a weight stays zero when its gradient is, and what `forget` has cleared: it is looked at by itself.

    Args:
        optimizer: an optimizer, or something that wraps one; None for an unknown one.
    """
    return type(getattr(optimizer, "optimizer", optimizer)) in SINGLE


def learning_rates(optimizer: Any) -> dict[int, float]:
    """Return the learning rate of every parameter, by its identity."""
    return {id(one): float(group["lr"]) for group in optimizer.param_groups for one in group["params"]}
