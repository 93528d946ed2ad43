"""Copies of a model in a wider dtype: the reference for what rounds in the model's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.errors import UnsupportedModelError
from fxslim.passes.emit import CompiledModule

LARGE = 1_000_000_000
"""Parameters above which a half-precision model is not copied to float32 for its verification."""


def in_float32(model: nn.Module) -> nn.Module | None:
    """Return a float32 copy of a half-precision model, or None: it is in another one, or too large to be copied."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in floating)
    if not halves or sum(p.numel() for p in floating) > LARGE:
        return None
    return widened(model, torch.float32)


def widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in a wider dtype that takes the model's inputs."""
    copied = copy.deepcopy(model)
    try:
        wide = copied.double() if dtype == torch.float64 else copied.float()  # to() would cut complex tensors
    except UnsupportedModelError:
        if not isinstance(copied, CompiledModule):
            raise
        wide = _rewritten(copied, dtype)
    wide.register_forward_pre_hook(_widen, with_kwargs=True)
    return wide


def _rewritten(graph: CompiledModule, dtype: torch.dtype) -> CompiledModule:
    """Let a graph that cannot be cast compute in a wider dtype, whatever dtype it names.

    Where a dtype is meant, such a graph is not the model; as a reference it is what rounding is measured by.
    """

    def wider(value: Any) -> Any:
        narrow = isinstance(value, torch.dtype) and value.is_floating_point
        return dtype if narrow and torch.finfo(value).bits < torch.finfo(dtype).bits else value

    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = pytree.tree_map(wider, (node.args, dict(node.kwargs)))
            module.recompile()
    nn.Module._apply(graph, lambda t: t.to(dtype) if t.is_floating_point() else t)
    return graph


def _widen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let a model in a wider dtype take its old inputs."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    taken: tuple[Any, dict[str, Any]] = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
    )
    return taken
