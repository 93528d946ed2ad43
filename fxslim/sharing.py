"""Copies that share their tensors with the original, and what fxslim must not touch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxslim.errors import UnsupportedModelError
from fxslim.program import Program, named_tensors


def share(module: nn.Module, *, buffers: bool = True, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """Copy a module tree that shares every parameter with the original.

    Args:
        module: the original.
        buffers: whether buffers, and weights that a forward renormalises in place, are shared as well.
        instead: id of an object that is not copied -> what stands in its place.

    Raises:
        UnsupportedModelError: the module holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(instead or {})
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, torch.Tensor):  # a stored activation cannot be copied again with its history
                memo[id(value)] = value if value.is_leaf else value.detach()
        for parameter in child._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = parameter
        for buffer in child._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer if buffers else buffer.detach().clone()
    for child in module.modules():
        if not buffers and getattr(child, "max_norm", None) is not None and isinstance(child.weight, nn.Parameter):
            memo[id(child.weight)] = nn.Parameter(child.weight.detach().clone(), child.weight.requires_grad)
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be copied ({str(error).splitlines()[0]}); take what copy.deepcopy refuses "
            "(locks, generators, stored activations) off the model first."
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, and put every module back into the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched_on_failure(module: nn.Module) -> Iterator[None]:
    """Put a module's tensors, hooks, attributes and classes back if anything fails inside, an interrupt included."""
    before = [(child, type(child), _state(child)) for child in module.modules()]
    try:
        yield
    except BaseException:
        for child, kind, state in before:
            child.__class__ = kind
            vars(child).clear()
            for name, (value, table) in state.items():
                if table is not None:  # the very table: handles of hooks refer to it
                    value.clear()
                    value.update(table)
                vars(child)[name] = value
        raise


def _state(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Return a module's attributes, and what those that are tables hold."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}


def without_caches(module: nn.Module) -> None:
    """Turn key/value caches off everywhere in a (copied) module: caches are no graph outputs."""
    for child in module.modules():
        config = getattr(child, "config", None)
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False
        if isinstance(vars(child).get("use_cache"), bool):
            child.use_cache = False  # type: ignore[assignment]


def refuse(model: nn.Module) -> None:
    """Raise UnsupportedModelError for models that fxslim must not touch."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantized; narrow the original model and quantize the result."
        )
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # whoever attaches adapters has imported it
    for name, child in model.named_modules():
        if tuners is not None and isinstance(child, tuners.BaseTunerLayer):
            raise UnsupportedModelError(
                f"{name} has an adapter of peft, whose rank is no width of the model: merge adapters first, with "
                "model = model.merge_and_unload(), and narrow that; new ones can be attached to what comes out."
            )
        module_name = type(child).__module__
        if module_name.startswith(("torch.ao.nn", "torch.nn.quantized", "bitsandbytes")):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a quantized {type(child).__name__}; narrow the original model and "
                "quantize the result."
            )
    for name, child in model.named_modules():
        if next(offloading(child), None) is not None:
            raise UnsupportedModelError(
                f"{name or 'the model'} is offloaded by accelerate: its weights are not there when they are "
                "looked at. fxslim.plan takes it as it is, and fxslim.slim_checkpoint(folder, out, plan) narrows the "
                "folder that it came from; where it fits into memory, load it without device_map."
            )
    if next(iter(model.parameters()), None) is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters: there is nothing to narrow.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_mkldnn:
            raise UnsupportedModelError(
                f"{name} is laid out for products of oneDNN alone (prepack=True): give the model, or the graph that "
                f"this {type(model).__name__} was made of."
            )
        subclass = type(tensor) not in (nn.Parameter, torch.Tensor, nn.Buffer) and not hasattr(tensor, "fake_mode")
        if tensor.is_quantized or (subclass and type(tensor.data) is not torch.Tensor):
            raise UnsupportedModelError(
                f"{name} is stored as {type(tensor).__name__} ({tensor.dtype}), which cannot be sliced exactly; "
                "narrow the original model and quantize or shard the result. A checkpoint that fits on no single "
                "device is narrowed with fxslim.slim_checkpoint, and sharded when it is loaded."
            )


def offloading(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks with which accelerate keeps a module's own tensors elsewhere between calls."""
    waiting = [getattr(module, "_hf_hook", None)]
    for hook in waiting:
        waiting.extend(getattr(hook, "hooks", ()))
        if getattr(hook, "offload", False):
            yield hook


def named_once(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Name every parameter and buffer once; further names of the same tensor become aliases."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) in first:
            if first[id(tensor)] != name:
                aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def rebound(program: Program, model: nn.Module) -> Program:
    """Return a program whose tensors are those that a model has now, under the names of the traced one's."""
    tensors, _ = named_once(model)
    return replace(program, tensors={name: tensors.get(name, tensor) for name, tensor in program.tensors.items()})


def transient_names(model: nn.Module) -> frozenset[str]:
    """Return the names of buffers that are not part of the state dict."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    )
