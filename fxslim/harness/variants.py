"""The ways in which a model is run: as it is, compiled, in half precision, as one CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxslim.errors import InputError

VARIANTS = ("eager", "inductor", "bf16", "bf16-inductor", "cuda-graph")
"""``bf16`` casts a copy of the model; ``cuda-graph`` replays one captured forward."""


def check_variants(variants: tuple[str, ...], device: torch.device) -> None:
    """Raise InputError for variants that are not known, or not to be had on this device."""
    for name in variants:
        if name not in VARIANTS:
            raise InputError(f"variants={name!r} is none of {', '.join(VARIANTS)}.")
        if name == "cuda-graph" and device.type != "cuda":
            raise InputError(f"variants='cuda-graph' needs models on CUDA; these are on {device}.")


def prepared(model: nn.Module, variant: str) -> nn.Module:
    """Return the module that a variant calls: the model itself, or a copy that shares what it can."""
    if variant.startswith("bf16"):
        model = copy.deepcopy(model).to(torch.bfloat16)
    if variant.endswith("inductor"):
        made: Any = torch.compile(model, dynamic=False)
        return made  # type: ignore[no-any-return]
    return model


@contextmanager
def compiling(variant: str) -> Iterator[None]:
    """Let inductor begin anew, and never fall back to eager in silence: models of one class share their code."""
    if not variant.endswith("inductor"):
        yield
        return
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64):
        yield


def counted(module: nn.Module, variant: str, device: torch.device) -> bool:
    """Tell whether what one forward allocates can be seen: generated code on a CPU, and a graph's replay, hide it."""
    generated = variant.endswith("inductor") or any(m._compiled_call_impl is not None for m in module.modules())
    return variant != "cuda-graph" and (device.type == "cuda" or not generated)


def call_of(module: nn.Module, variant: str, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """Return what runs one forward."""
    if variant.startswith("bf16"):
        inputs = {name: pytree.tree_map(_half, value) for name, value in inputs.items()}
    if variant != "cuda-graph":
        return lambda: module(**inputs)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            module(**inputs)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(**inputs)
    return graph.replay


def _half(leaf: Any) -> Any:
    return leaf.to(torch.bfloat16) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
