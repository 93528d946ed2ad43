"""Skeletons from configs that nobody vouches for: they may hold no more parts than the weights that are there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from fxslim.errors import PlanError

EACH, BESIDE = 32, 1024
"""Most modules and parameters for every tensor that is there, and beside those."""
MOST = 1 << 19
"""Most of all: several times as many as models have whose experts are modules of their own."""


@contextmanager
def bounded(tensors: int | None) -> Iterator[None]:
    """Stop whoever builds a model inside once it has many more parts than there are tensors for it.

    Sizes cost nothing on ``meta``, but the number of layers and of experts does.

    Args:
        tensors: how many there are; None where nobody knows.

    Raises:
        PlanError: the model would have too many parts.
    """
    most = MOST if tensors is None else min(EACH * tensors + BESIDE, MOST)
    count, here = 0, threading.get_ident()

    def add(_owner: nn.Module, _name: str, _part: object) -> None:
        nonlocal count
        if threading.get_ident() != here:
            return
        count += 1
        if count > most:
            raise PlanError(
                f"the sizes that the plan says of the dense model make one of more than {most} modules and parameters, "
                "many more than there are weights for. The plan was made for another model, or tampered with."
            )

    handles = (register_module_module_registration_hook(add), register_module_parameter_registration_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
