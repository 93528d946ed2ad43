"""Gather per-head tensors where a narrowed module meets the rest of a model that still has all heads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxslim.overlay import overlay, underlying
from fxslim.program import forward_parameters

IMPLEMENTATION = "fxslim_gather"


@dataclass(frozen=True)
class Gather:
    """A forward pre-hook that takes some heads of one argument.

    Attributes:
        name: parameter of ``forward``.
        axis: the axis that holds the heads.
        size: number of heads before; an axis of another size is left alone.
        keep: the heads that are kept.
        rank: number of axes of the argument; any other is left alone (a bias without an axis of heads fits all heads).
        runs: whether the axis holds batch times heads.
    """

    name: str
    axis: int
    size: int
    keep: tuple[int, ...]
    rank: int
    runs: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gather the argument, wherever it was given."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: self.take(kwargs[self.name])}
        position = forward_parameters(module)[0].index(self.name)
        if position < len(args):
            return (*args[:position], self.take(args[position]), *args[position + 1 :]), kwargs
        return args, kwargs

    def take(self, value: Any) -> Any:
        """Return the kept heads of a tensor; anything without that many heads as it is."""
        if not isinstance(value, torch.Tensor) or value.ndim != self.rank:
            return value
        if not self.runs:
            return self._kept(value, self.axis) if value.shape[self.axis] == self.size else value
        if value.shape[self.axis] % self.size:
            return value
        runs = value.unflatten(self.axis, (-1, self.size))
        return self._kept(runs, self.axis + 1).flatten(self.axis, self.axis + 1)

    def _kept(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        """Pick heads one by one: a second narrowing must find that what it picks from has to stay as it is."""
        return torch.stack([value.select(axis, head) for head in self.keep], axis)


def gather_in_attention(module: nn.Module, size: int, keep: tuple[int, ...]) -> None:
    """Let a module's attention function take some heads only of every per-head tensor that it is given.

    The module's config is overlaid with an attention implementation of our own, which hands over to the one that the
    shared config names at that moment.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    before = getattr(module.config, "_fxslim_heads", None)
    if before is not None and len(before[1]) == size:  # narrowed before: of the heads that were kept then
        size, keep = before[0], tuple(before[1][head] for head in keep)
    module.config = overlay(module.config, {"_attn_implementation": IMPLEMENTATION, "_fxslim_heads": (size, keep)})


def _attend(module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    size, keep = module.config._fxslim_heads
    gather = Gather("", 1, size, keep, 4, False)

    def heads(given: Any) -> Any:
        return gather.take(given) if isinstance(given, torch.Tensor) else given

    base = underlying(module.config)._attn_implementation
    if base == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[base]
    rest = {name: heads(given) for name, given in kwargs.items()}
    return attend(module, query, key, value, heads(attention_mask), **rest)
