"""Trace what looks the same once: nine tenths of most tests would go into tracing the same few models again and again.

A trace depends on a model's classes, attributes and shapes and on its example inputs, not on its weights. Anything that
is not understood here counts as different, so that a model is traced again rather than given another one's graph.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from transformers import GenerationConfig, PretrainedConfig

from fxslim import dtypes
from fxslim.passes import planning
from fxslim.program import MEASURED, Program
from fxslim.sharing import rebound

MOST = 100
"""How many traces a process keeps."""
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
SETTLED = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.GetSetDescriptorType),
    *(property, classmethod, staticmethod, functools.cached_property),
)
"""What stays the same for as long as it is the same object."""
SAID = ("__annotations__", "__orig_bases__", "__parameters__", "__doc__", "__dict__", "__weakref__")
"""What a class says of itself, and nobody runs."""
TABLES = ("_parameters", "_buffers", "_modules", "training")


@contextmanager
def one_trace_each() -> Iterator[None]:
    """Keep the traces that pipelines make, and give them to models that look the same."""
    kept: OrderedDict[Any, tuple[Program, Any]] = OrderedDict()
    original = planning.trace

    def trace(model: nn.Module, *candidates: Mapping[str, Any], **options: Any) -> Program:
        alive: list[Any] = []
        key = repr(
            (_looks(model, alive), [_described(c, alive) for c in candidates], sorted(options.items()), _modes())
        )
        if key in kept:
            kept.move_to_end(key)
            return _apart(rebound(kept[key][0], model))
        program = original(model, *candidates, **options)
        if not _is_measured(program) and all(isinstance(own, SETTLED) or not hasattr(own, "__dict__") for own in alive):
            kept[key] = _apart(program), alive
            if len(kept) > MOST:
                kept.popitem(last=False)
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "trace", trace)
        patch.setattr(dtypes, "trace", trace)
        yield


def _modes() -> tuple[Any, ...]:
    """Return what is switched on around a trace."""
    return (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled())  # fmt: skip


def _apart(program: Program) -> Program:
    """Return a program whose example inputs and constants are nobody else's."""
    example = pytree.tree_map_only(torch.Tensor, torch.clone, dict(program.call.example))
    tensors = {name: own.clone() if name in program.constants else own for name, own in program.tensors.items()}
    return dataclasses.replace(program, call=dataclasses.replace(program.call, example=example), tensors=tensors)


def _is_measured(program: Program) -> bool:
    """Tell whether a trace holds sizes that were measured with the weights."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    sizes = [size for value in values for size in (value.shape if isinstance(value, torch.Tensor) else [value])]
    return any(MEASURED.get(size.node.shape_env) for size in sizes if isinstance(size, torch.SymInt))


def _looks(model: nn.Module, alive: list[Any]) -> Any:
    """Describe everything that a trace of a model may depend on; what is told by its identity is kept alive."""
    rows: list[Any] = []
    numbers: dict[int, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors = [
            (name, numbers.setdefault(id(tensor), len(numbers)), type(tensor), *_shape(tensor),
             None if table == "_parameters" else _content(tensor))
            for table in ("_parameters", "_buffers")
            for name, tensor in vars(module)[table].items() if tensor is not None
        ]  # fmt: skip
        own = {name: value for name, value in vars(module).items() if name not in TABLES}
        children = [(name, id(child) in numbers) for name, child in module._modules.items()]
        rows.append((path, _described(type(module), alive), tensors, _described(own, alive), children,
                     numbers.setdefault(id(module), len(numbers))))  # fmt: skip
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if kind not in (nn.Module, object)}
    own = {kind: {name: value for name, value in vars(kind).items() if name not in SAID} for kind in kinds}
    return rows, sorted(repr((id(kind), _described(members, alive))) for kind, members in own.items())


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _content(tensor: torch.Tensor) -> Any:
    """Return what tells a tensor's numbers, if it has any."""
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return None
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"").hexdigest()


def _described(value: Any, alive: list[Any]) -> Any:
    if isinstance(value, PLAIN):
        return type(value).__name__, repr(value)
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, nn.Parameter, FakeTensor):
        return type(value), *_shape(value), _content(value)
    if isinstance(value, Mapping) and type(value) in (dict, OrderedDict, types.MappingProxyType):
        return [(_described(key, alive), _described(item, alive)) for key, item in value.items()]
    if type(value) in (list, tuple):
        return type(value).__name__, [_described(item, alive) for item in value]
    if type(value) in (set, frozenset):
        return type(value).__name__, sorted(repr(_described(item, alive)) for item in value)
    if type(value) is functools.partial:
        return "partial", _described(value.func, alive), _described((value.args, value.keywords), alive)
    if isinstance(value, PretrainedConfig | GenerationConfig):
        return _described(type(value), alive), _described(vars(value), alive)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        return _described(type(value), alive), _described(vars(value), alive)
    alive.append(value)
    return type(value).__qualname__, id(value)
