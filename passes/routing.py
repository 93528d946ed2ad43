"""Mask experts in a module as it runs: minus infinity wherever they compete to be selected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fxslim.plan import Plan
from fxslim.site import SitePlan

COMPETE = ("softmax", "topk", "sort", "argsort", "max", "amax")
CASTS = ("to", "type", "float", "double", "half", "bfloat16", "contiguous", "detach", "clone", "type_as")
RESHAPES = ("view", "reshape", "unflatten", "flatten", "unsqueeze", "squeeze")
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "embedding", "__getitem__", "gather")


def routers(parts: Iterable[SitePlan]) -> dict[str, np.ndarray]:
    """Return the weights whose products are followed, and which of their rows go.  name -> (experts,) bool"""
    return {name: part.gone for part in parts for name in part.site.roles.get("router", ()) if is_routed(part)}


def is_routed(part: SitePlan) -> bool:
    """Tell whether a site's units are whole experts."""
    return part.site.kind == "experts"


def without_routing(plan: Plan) -> Plan:
    """Return a plan's other sites."""
    return plan.model_copy(update={"sites": tuple(part for part in plan.sites if not is_routed(part))})


class Routing(TorchFunctionMode):
    """Follow what products with a router's weight return, and mask it wherever it competes.

    A mask belongs to the last axes of a tensor. It follows casts of the weight, elementwise operations and reshapes of
    what comes of it; a softmax, a top-k, a sort or a maximum over these axes sees minus infinity.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], gone: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.weights = WeakTensorKeyDictionary()
        self.scores = WeakTensorKeyDictionary()
        for name, own in gone.items():
            self.weights[tensors[name]] = torch.from_numpy(own).to(tensors[name].device)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Mask what competes, call, and follow what comes of it."""
        given = dict(kwargs or {})
        name = str(getattr(func, "__name__", ""))
        source = args[0] if args else given.get("input")
        mask = self.scores.get(source) if isinstance(source, torch.Tensor) else None
        if source is not None and mask is not None and name in COMPETE:
            held = source.masked_fill(mask, float("-inf")) if _over(mask, name, args, given) else source
            args, given = ((held, *args[1:]), given) if args else (args, {**given, "input": held})
        out = func(*args, **given)
        if isinstance(out, torch.Tensor):
            self._follow(name, (*args, *given.values()), source, out)
        return out

    def _follow(self, name: str, operands: tuple[Any, ...], source: Any, out: torch.Tensor) -> None:
        tensors = [own for own in operands if isinstance(own, torch.Tensor)]
        if name in CASTS and isinstance(source, torch.Tensor) and source in self.weights:
            self.weights[out] = self.weights[source]
        if name == "linear":
            mask = next((self.weights[own] for own in tensors if own in self.weights), None)
            if mask is not None and out.shape[-1] == len(mask):
                self.scores[out] = mask
        if name in PRODUCTS or (name in COMPETE and name != "softmax") or not out.is_floating_point():
            return
        mask = self.scores.get(source) if isinstance(source, torch.Tensor) else None
        if mask is None:
            mask = next((self.scores[own] for own in tensors if own in self.scores), None)
        if mask is None:
            return
        if out.shape[out.ndim - mask.ndim :] == mask.shape:
            self.scores[out] = mask
        elif name in RESHAPES:
            ranks = [n for n in range(1, out.ndim + 1) if prod(out.shape[out.ndim - n :]) == mask.numel()]
            if ranks:
                self.scores[out] = mask.reshape(out.shape[out.ndim - ranks[0] :])


def _over(mask: torch.Tensor, name: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
    """Tell whether something competes over the last axes of a tensor, those of its mask."""
    position = 2 if name == "topk" else 1
    dim = given.get("dim", args[position] if len(args) > position else -1)
    rank = (args[0] if args else given["input"]).ndim
    return isinstance(dim, int) and dim % rank >= rank - mask.ndim
