"""Where attention drops entries at random while a model trains: the trace saw it in eval mode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fxslim.sharing import share

CALLS: Mapping[Any, str] = {
    functional.dropout: "p",
    functional.multi_head_attention_forward: "dropout_p",
    functional.scaled_dot_product_attention: "dropout_p",
}
"""Functions that modules call with a probability, and what they call it."""
POSITION = {"dropout_p": 4}
"""Where a builtin function takes it."""


def dropping(model: nn.Module, inputs: Mapping[str, Any]) -> frozenset[str] | None:
    """Run a copy of a model in training mode; return the paths of modules that call a dropout or an attention with one.

    Args:
        model: the model; it stays as it is.
        inputs: keyword inputs.

    Returns:
        None where the model does not run in training mode.
    """
    twin = share(model, buffers=False).train()
    watch = _Watch()
    for path, module in twin.named_modules():
        module.register_forward_pre_hook(functools.partial(watch.enter, path))
        module.register_forward_hook(watch.leave)
    try:
        with torch.no_grad(), watch:
            twin(**inputs)
    except Exception:  # noqa: BLE001 - training may need inputs that the user did not give
        return None
    return frozenset(watch.found)


class _Watch(TorchFunctionMode):
    """Records the modules in which a function is called with a probability to drop."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[str] = []
        self.found: set[str] = set()

    def enter(self, path: str, module: nn.Module, args: Any) -> None:
        """Note that a module is called."""
        self.entered.append(path)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Note that a module returns."""
        self.entered.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CALLS and _probability(func, args, kwargs):
            self.found.add(self.entered[-1] if self.entered else "")
        return func(*args, **kwargs)


def _probability(func: Any, args: Any, kwargs: Mapping[str, Any]) -> float:
    """Return with which probability a call drops entries."""
    name = CALLS[func]
    if inspect.isfunction(func):
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        return float(given.arguments[name]) if given.arguments["training"] else 0.0
    place = POSITION[name]
    return float(kwargs.get(name, args[place] if len(args) > place else 0.0))
