"""A config for one module: some fields replaced, everything else read from (and written to) the shared config."""

from __future__ import annotations

import copy
from typing import Any

_OWN = ("_fxslim_config", "_fxslim_fields")


class _Overlay:
    """Mixin that answers some fields itself and delegates all others."""

    def __getattribute__(self, name: str) -> Any:
        if name in _OWN or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(self, name)
        fields = object.__getattribute__(self, "_fxslim_fields")
        if name in fields:
            return fields[name]
        return getattr(object.__getattribute__(self, "_fxslim_config"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_fxslim_config"), name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        config = object.__getattribute__(self, "_fxslim_config")
        return overlay, (config, object.__getattribute__(self, "_fxslim_fields"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        config = object.__getattribute__(self, "_fxslim_config")
        return overlay(copy.deepcopy(config, memo), object.__getattribute__(self, "_fxslim_fields"))

    def __copy__(self) -> Any:
        config = object.__getattribute__(self, "_fxslim_config")
        return overlay(copy.copy(config), object.__getattribute__(self, "_fxslim_fields"))


def overlay(config: Any, fields: dict[str, Any]) -> Any:
    """Return a view of ``config`` with some fields replaced; later changes of the shared config show through."""
    if isinstance(config, _Overlay):
        fields = {**object.__getattribute__(config, "_fxslim_fields"), **fields}
        config = object.__getattribute__(config, "_fxslim_config")
    kind = type(f"{type(config).__name__}Overlay", (_Overlay, type(config)), {})
    try:
        made: Any = object.__new__(kind)
    except TypeError:  # a class of C's, such as SimpleNamespace, makes its instances itself
        made = object.__new__(type(kind.__name__, (_Overlay,), {}))
    object.__setattr__(made, "_fxslim_config", config)
    object.__setattr__(made, "_fxslim_fields", dict(fields))
    return made


def underlying(config: Any) -> Any:
    """Return the shared config behind an overlay (or the config itself)."""
    return object.__getattribute__(config, "_fxslim_config") if isinstance(config, _Overlay) else config
