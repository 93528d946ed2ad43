"""Prepare a model: make pruning and other parametrizations permanent on a copy, and take its fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fxslim.plan import Fingerprint
from fxslim.program import named_tensors

VOLATILE = ("transformers_version", "_name_or_path", "fxslim", "torch_dtype", "dtype", "architectures")
"""Config fields that say nothing about sizes."""
SAMPLED = 1024
"""Numbers of a parameter that a digest of weights looks at, about."""
AT_ONCE = 64
"""Of those, how many at a time: they are far apart, and a parameter may be in a file."""


def permanent(model: nn.Module) -> nn.Module:
    """Return the model, or a copy that holds the results where masks or parametrizations compute its weights."""
    if not computed(model):
        return model
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    made = copy.deepcopy(model, memo)
    settle(made)
    return made


def settle(model: nn.Module) -> None:
    """Make pruning masks and parametrizations permanent, in place."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
        if parametrize.is_parametrized(module):
            _own_class(module)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: copies share it, and taking a parametrization off changes it."""
    kind = type(module)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, body)


def computed(model: nn.Module) -> bool:
    """Tell whether masks or parametrizations compute any of a model's weights."""
    return any(
        parametrize.is_parametrized(module)
        or any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return what identifies a model's structure: names, shapes, ties, class and whole-number config fields."""
    first: dict[int, str] = {}
    rows = []
    for name, tensor in sorted(named_tensors(model).items(), key=lambda item: item[0]):
        original = first.setdefault(id(tensor), name)
        rows.append([name, list(tensor.shape), "" if original == name else original])
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    fields = to_dict() if callable(to_dict) else {}
    text = json.dumps([type(model).__name__, rows, _whole_numbers(fields)], sort_keys=True)
    return Fingerprint(model_class=type(model).__name__, digest=hashlib.sha256(text.encode()).hexdigest())


def weights_digest(model: nn.Module) -> str:
    """Return what tells a model's weights from the same weights after training: some numbers of every parameter."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        digest.update(f"{name} {tensor.dtype}".encode())
        step = max(1, tensor.numel() // SAMPLED)
        for part in () if tensor.is_meta else tensor.detach().flatten().split(step * AT_ONCE):
            numbers = part[::step].clone(memory_format=torch.contiguous_format)  # one number alone keeps its stride
            digest.update(numbers.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole_numbers(fields: Any) -> Any:
    """Keep the whole numbers of a nested config."""
    if isinstance(fields, dict):
        kept = {str(name): _whole_numbers(value) for name, value in fields.items() if name not in VOLATILE}
        return {name: value for name, value in kept.items() if value not in (None, {}, [])}
    if isinstance(fields, list | tuple):
        return [value for value in map(_whole_numbers, fields) if value not in (None, {}, [])]
    return fields if type(fields) is int else None
