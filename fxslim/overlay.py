"""A config for one module: some fields replaced, everything else read from (and written to) the shared config.

An overlay has the shared config's own ``__dict__``; the fields that it replaces are properties of its class. So nothing
intercepts attribute access, and compilers that trace it see an ordinary object.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_OWN = ("_fxslim_config", "_fxslim_fields")


class _Overlay:
    """Mixin of all overlays; every one has a class of its own."""

    _fxslim_config: Any
    _fxslim_fields: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return overlay, (self._fxslim_config, self._fxslim_fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return overlay(copy.deepcopy(self._fxslim_config, memo), self._fxslim_fields)

    def __copy__(self) -> Any:
        return overlay(copy.copy(self._fxslim_config), self._fxslim_fields)


class _Delegate(_Overlay):
    """An overlay of an object without a ``__dict__`` to share."""

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self)._fxslim_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(type(self)._fxslim_config, name, value)


def overlay(config: Any, fields: dict[str, Any]) -> Any:
    """Return a view of ``config`` with some fields replaced; later changes of the shared config show through."""
    if isinstance(config, _Overlay):
        fields = {**config._fxslim_fields, **fields}
        config = config._fxslim_config
    name = f"{type(config).__name__}Overlay"
    space: dict[str, Any] = {field: _replaced(config, field, value) for field, value in fields.items()}
    space |= {"_fxslim_config": config, "_fxslim_fields": dict(fields), "__module__": __name__}
    renamed = getattr(type(config), "attribute_map", None)  # transformers' names for other fields
    if isinstance(renamed, dict):
        space["attribute_map"] = {key: other for key, other in renamed.items() if key not in fields}
    if not isinstance(getattr(config, "__dict__", None), dict):
        return object.__new__(type(name, (_Delegate,), space))
    try:
        made: Any = object.__new__(type(name, (_Overlay, type(config)), space))
    except TypeError:  # a class of C's, such as SimpleNamespace, makes its instances itself
        made = object.__new__(type(name, (_Overlay,), space))
    object.__setattr__(made, "__dict__", config.__dict__)
    return made


def _replaced(config: Any, field: str, value: Any) -> property:
    def write(self: Any, new: Any) -> None:
        if self.__dict__ is config.__dict__:
            setattr(config, field, new)
        else:  # a new instance of the same class, with fields of its own
            self.__dict__[field] = new

    return property(lambda self: value, write)


def underlying(config: Any) -> Any:
    """Return the shared config behind an overlay (or the config itself)."""
    return config._fxslim_config if isinstance(config, _Overlay) else config


def own_config(module: nn.Module) -> None:
    """Give a model a config of its own, in place: another model may have been built from the same."""
    config = underlying(getattr(module, "config", None))
    if not hasattr(config, "to_dict"):
        return
    copies: dict[int, Any] = {}  # those of configs within it as well
    copy.deepcopy(config, copies)
    for child in module.modules():
        for name, value in vars(child).items():
            shared = underlying(value)
            if hasattr(shared, "to_dict") and id(shared) in copies:
                own = copies[id(shared)]
                vars(child)[name] = own if shared is value else overlay(own, value._fxslim_fields)
