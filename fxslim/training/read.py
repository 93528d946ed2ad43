"""What layers read while calibration data flows, block after block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxslim.batches import Batch
from fxslim.training.patterns import Layer


def unseen(layer: Layer) -> str:
    """Say why what a layer reads cannot be laid out as rows; nothing where it can."""
    module = layer.module
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return "" if layer.kind == "Linear" else "convolutions over volumes are not looked at"
    fine = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return "" if fine else "grouped and specially padded convolutions are not looked at"


class _EnoughError(Exception):
    """Ends a run of the model behind the last layer that is looked at."""


def in_order(
    model: nn.Module, every: Sequence[Layer], data: Sequence[Batch], solve: Callable[[Layer, Tensor], None]
) -> None:
    """Work on layers in the order in which they run; each sees what the ones before have become.

    Layers of one numbered part of the model (a block) are looked at in one run.

    Args:
        model: the model.
        every: the layers.
        data: batches to run.
        solve: changes a layer, given the sum of ``x xᵀ`` over what it reads, (in, in) in float64.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    order: dict[str, int] = {}
    with _watching(every, lambda layer, rows: order.__setitem__(layer.path, order.get(layer.path, 0) + 1)):
        _run(model, data[0])
    known = {layer.path: layer for layer in every}
    idle = sorted(known.keys() - order.keys())
    if idle:
        warnings.warn(f"{', '.join(idle)}: weights stay: no call of the module was seen", stacklevel=3)
    for _, paths in groupby(order, key=_block):
        own = [known[path] for path in paths]
        grams = {layer.path: _empty(layer) for layer in own}
        for batch in data:
            _look(model, own, batch, grams, order)
        for layer in own:
            solve(layer, grams[layer.path])
    for module, mode in modes.items():
        module.training = mode


def _block(path: str) -> str:
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _empty(layer: Layer) -> Tensor:
    width = layer.matrix(layer.weight).shape[1]
    return torch.zeros(width, width, dtype=torch.float64, device=layer.weight.device)


def _look(
    model: nn.Module, own: Sequence[Layer], batch: Batch, grams: Mapping[str, Tensor], calls: Mapping[str, int]
) -> None:
    left = {layer.path: calls[layer.path] for layer in own}

    def look(layer: Layer, value: Tensor) -> None:
        rows = _rows(layer, value, batch).to(grams[layer.path])
        grams[layer.path] += rows.T @ rows
        left[layer.path] -= 1
        if not any(count > 0 for count in left.values()):
            raise _EnoughError

    with _watching(own, look):
        _run(model, batch)


@torch.no_grad()
def _run(model: nn.Module, batch: Batch) -> None:
    with suppress(_EnoughError):
        model(**batch.inputs)


@contextmanager
def _watching(own: Sequence[Layer], look: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    def hook(layer: Layer) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(layer, args[0] if args else next(iter(kwargs.values())))

        return seen

    handles = [layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(layer: Layer, value: Tensor, batch: Batch) -> Tensor:
    """Return what a layer multiplies its weights with, without padding.  (rows, in)"""
    if isinstance(layer.module, nn.Conv1d | nn.Conv2d):
        return _patches(layer.module, value)
    masks = [
        mask.bool().to(value.device)
        for name in ("attention_mask", "decoder_attention_mask")
        if isinstance(mask := batch.inputs.get(name), Tensor) and mask.ndim == 2 and mask.shape == value.shape[:-1]
    ]
    if masks:
        value = value[torch.stack(masks).any(0)]
    return value.reshape(-1, value.shape[-1])


def _patches(module: nn.Conv1d | nn.Conv2d, value: Tensor) -> Tensor:
    """Return what a kernel sees at each of its places, input channels fastest.  (rows, in)"""
    kernel, stride, padding, dilation = (
        _pair(x) for x in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    image = value.float() if value.dtype.itemsize < 4 else value
    if isinstance(module, nn.Conv1d):
        image, padding = image.unsqueeze(2), (0, padding[1])
    patches = functional.unfold(image, kernel, dilation, padding, stride).unflatten(1, (module.in_channels, -1))
    rows: Tensor = patches.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    return rows


def _pair(value: Any) -> tuple[int, int]:
    return (1, int(value[0])) if len(value) == 1 else (int(value[0]), int(value[1]))
