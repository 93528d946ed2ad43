"""Hooks that belong to one model: copies and pickles of it go without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Hook:
    """A hook that does nothing in copies of its module.

    Copies can be narrowed, saved and run as they are: the zeros that masks leave are in their weights.

    Args:
        call: the hook.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    @property
    def inert(self) -> bool:
        """Tell whether it does nothing, so that a graph may stand for the module."""
        return self.call is nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (nothing,)


def nothing(*args: Any) -> None:
    """Stand for a hook in copies."""


class MaskedInput:
    """Multiplies the first input of a module by a mask, where gradients are taken.

    Where they are not, the zeros in the weights do the same.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        if args:
            return (_times(args[0], self.mask), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: _times(kwargs[name], self.mask)}


def _times(value: Tensor, mask: Tensor) -> Tensor:
    if value.is_nested:  # rows of different lengths, as torch's encoder packs them
        return torch.nested.as_nested_tensor([_times(row, mask) for row in value.unbind()])
    return value * mask.to(value.device, value.dtype)
