"""Watch modules while the masked model runs: what they take and return, and the integers that they read."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.overlay import underlying
from fxslim.passes.paths import Path, tensors_of

IMPLEMENTATION_FIELD = "_attn_implementation"
KEPT = (bool, int, float, str, torch.dtype, torch.device, nn.Module)
"""Arguments that no call changes."""


@dataclass
class Recorded:
    """One call of a module: a private copy of what went in, what came out (``through``: as it went in), and how."""

    args: Any
    kwargs: Any
    out: list[torch.Tensor]
    through: frozenset[int]
    path: Path
    attention: str | None


@dataclass
class Watch:
    """Calls of one module, the integers it read while it ran, and the modules that read an attention implementation."""

    calls: list[Recorded] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    read: dict[tuple[str, str, str], int] = field(default_factory=dict)


@contextmanager
def watching(model: nn.Module, watches: Mapping[str, Watch], way: Path) -> Iterator[None]:
    """Record what modules take, return and read, while the model runs along a path."""
    with _recording(model, watches):
        handles = []
        if not way.generate and not way.fused:
            for path, seen in watches.items():
                handles.extend(_record_calls(model.get_submodule(path), seen, way))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _record_calls(module: nn.Module, seen: Watch, way: Path) -> list[Any]:
    pending: list[tuple[Any, Any]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        pending.append(private((args, kwargs)))

    def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        taken, named = pending.pop()
        if not any(call.path is way for call in seen.calls):  # one call of each path is enough
            results = [t.detach().clone() for t in tensors_of(out)]
            through = _through(tensors_of((taken, named)), results)
            seen.calls.append(Recorded(taken, named, results, through, way, _implementation(module)))

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _through(taken: list[torch.Tensor], out: list[torch.Tensor]) -> frozenset[int]:
    """Return which results are what went in: others take them from here, so that they have to stay whole."""
    return frozenset(
        i for i, t in enumerate(out) if any(t.shape == own.shape and bool((t == own).all()) for own in taken)
    )


def shared_config(module: nn.Module) -> Any:
    """Return the first config that a module or one inside it holds, without overlays."""
    return next((underlying(c) for m in module.modules() if (c := vars(m).get("config")) is not None), None)


def _implementation(module: nn.Module) -> str | None:
    return getattr(shared_config(module), IMPLEMENTATION_FIELD, None)


def private(tree: Any) -> Any:
    """Copy a call's arguments: tensors, and objects that a call may change, such as caches."""
    return pytree.tree_map(_copied, tree)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone()
    if leaf is None or isinstance(leaf, KEPT) or hasattr(leaf, "to_dict"):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # noqa: BLE001 - objects refuse copies in any way they like; the call then gets the original
        return leaf


@contextmanager
def _recording(model: nn.Module, watches: Mapping[str, Watch]) -> Iterator[None]:
    """Record the integers that modules read from themselves and from their config, while the context is open."""
    swapped: list[tuple[nn.Module, type]] = []
    configs: list[tuple[nn.Module, Any]] = []
    try:
        for path, seen in watches.items():
            for name, module in model.get_submodule(path).named_modules():
                full = f"{path}.{name}".strip(".") if name else path
                if type(module).__module__.startswith("torch.nn.modules.linear"):
                    continue
                config = vars(module).get("config")
                if config is not None and not isinstance(config, dict | str | int):
                    configs.append((module, config))
                    module.config = _reader(config, functools.partial(_note_config, seen, full))
                swapped.append((module, type(module)))
                _swap(module, lambda n, v, full=full, seen=seen: seen.read.setdefault(("attribute", full, n), v))
        yield
    finally:
        for module, kind in reversed(swapped):  # nested modules are watched twice
            module.__class__ = kind
        for module, config in reversed(configs):
            module.config = config


def _swap(module: nn.Module, note: Any) -> None:
    """Give one module a class that reports the integers read from its instance."""
    kind = type(module)

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if type(value) is int and name in object.__getattribute__(self, "__dict__"):
            note(name, value)
        return value

    module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def _note_config(seen: Watch, module: str, name: str, value: Any) -> None:
    if name == IMPLEMENTATION_FIELD:
        if module not in seen.attention:
            seen.attention.append(module)
    else:
        seen.read.setdefault(("config", module, name), value)


def _reader(config: Any, note: Any) -> Any:
    """Return a view of a config that reports the integers read from it."""
    from fxslim.overlay import _OWN, overlay

    view = overlay(config, {})
    kind: Any = type(view)

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if (type(value) is int and name not in _OWN) or name == IMPLEMENTATION_FIELD:
            note(name, value)
        return value

    object.__setattr__(view, "__class__", type(kind.__name__, (kind,), {"__getattribute__": read}))
    return view
