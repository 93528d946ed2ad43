"""Let a linear compute fewer channels than what is around it counts: zeros stand for those that it lost.

A module may read the width of its heads where no integer says it: off the model's width, off a product of others. Its
linears can lose rows and columns all the same. What a removed channel held reaches the output through the consumer's
columns alone, and these are gone as well, so that any value may stand in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def channel_axis(module: nn.Module) -> int:
    """Return the axis of a linear's input and output that holds channels, counted from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1


@dataclass(frozen=True)
class Spread:
    """A forward hook that puts what a linear returns into its old places, with zeros between.

    Attributes:
        size: the width after it.
        keep: the places, ascending.
    """

    size: int
    keep: tuple[int, ...]

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Return the output with zeros where channels are gone."""
        axis = channel_axis(module)
        places = {channel: place for place, channel in enumerate(self.keep)}
        index = [places.get(channel, len(self.keep)) for channel in range(self.size)]
        padded = functional.pad(
            output, [0, 0] * (-1 - axis) + [0, 1]
        )  # one channel of zeros, taken wherever one is gone
        return padded.index_select(axis, torch.tensor(index, device=output.device))


@dataclass(frozen=True)
class Pick:
    """A forward pre-hook that hands a linear the channels that it still reads.

    Attributes:
        keep: the channels, ascending.
    """

    keep: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments with fewer channels."""
        if args:
            return (self._of(module, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._of(module, kwargs[name])}

    def _of(self, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
        return value.index_select(channel_axis(module), torch.tensor(self.keep, device=value.device))
