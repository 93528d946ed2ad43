"""Training mode without its randomness: what a module computes, and reads, only while it is trained.

Dropout does nothing, random numbers are seeded, buffers (the statistics of batch norms) are put back afterwards, and no
parameter is written. What is still random after that cannot be compared between two models of different sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SEED = 0

IDENTITIES = frozenset(
    getattr(holder, f"{name}{end}")
    for holder in (F, torch)
    for name in (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
        "feature_alpha_dropout",
    )
    for end in ("", "_")
    if hasattr(holder, f"{name}{end}")
)
"""Functions that return their first argument when nothing is dropped."""
PROBABILITIES: Mapping[Any, int] = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}
"""Functions that take ``dropout_p``, and where."""


class _NoDropout(TorchFunctionMode):
    """Lets every function of torch that drops values drop none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in IDENTITIES:
            return args[0] if args else given["input"]
        if func in PROBABILITIES:
            place = PROBABILITIES[func]
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                given["dropout_p"] = 0.0
        return func(*args, **given)


class _NoWrites(TorchDispatchMode):
    """Stops a model before it writes into its parameters: they are the user's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            taken = [*zip(func._schema.arguments, args, strict=False)]
            taken += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in (kwargs or {})]
            written = [value for argument, value in taken if argument.is_write]
            for leaf in pytree.tree_leaves(written):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata in self.storages:
                    raise RuntimeError(f"{func} writes into a parameter")
        return func(*args, **(kwargs or {}))


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Run in training mode and drop nothing; modes and buffers are put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module._buffers, dict(module._buffers)) for module, _ in modes]
    values = {id(t): (t, t.detach().clone()) for _, table in buffers for t in table.values() if t is not None}
    try:
        for module, _ in modes:
            module.training = True
        with _NoDropout():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for table, before in buffers:
            table.clear()
            table.update(before)
        for tensor, value in values.values():
            tensor.data.copy_(value)


@contextmanager
def drawing(model: nn.Module, seed: int = SEED) -> Iterator[None]:
    """Let a model draw the same numbers every time, and put every generator back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=_devices(model)):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def repeatable(model: nn.Module, run: Callable[[nn.Module], list[torch.Tensor]]) -> bool:
    """Tell whether a model can be run in training mode, and returns the same whatever it draws.

    Args:
        model: the dense model.
        run: runs it, and returns its results.
    """
    try:
        with _NoWrites(model):
            with training(model), drawing(model):
                before = _drawn(model)
                first = run(model)
                if _drawn(model) == before:
                    return bool(first)
            with training(model), drawing(model, SEED + 1):
                second = run(model)
    except Exception:  # noqa: BLE001 - training may need targets, larger batches, anything
        return False
    pairs = zip(first, second, strict=False)
    same = all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    return bool(first) and len(first) == len(second) and same


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _drawn(model: nn.Module) -> tuple[Any, ...]:
    """Return the state of every generator that a model may draw from."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(model))]
    _, keys, *rest = np.random.get_state()
    return (*(state.numpy().tobytes() for state in states), np.asarray(keys).tobytes(), *rest, random.getstate())
