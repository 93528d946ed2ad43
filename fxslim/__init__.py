"""Make trained transformers physically smaller, and prove that masked and narrowed are the same.

Names are looked up on first use: ``import fxslim`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxslim import count, errors, inc, timer
    from fxslim.api import Inspection, Report, compile, inspect, masked, plan, slim, verify
    from fxslim.checkpoint.plan import plan_checkpoint
    from fxslim.checkpoint.slim import slim_checkpoint
    from fxslim.draw.page import save_report as save_report
    from fxslim.draw.write import draw
    from fxslim.errors import FxslimError
    from fxslim.export import export
    from fxslim.harness import benchmark
    from fxslim.hf import from_pretrained, push_to_hub, save_pretrained
    from fxslim.plan import Plan
    from fxslim.targets import macs, memory, params, speedup
    from fxslim.training.callback import PruningCallback
    from fxslim.training.config import Distillation, PruningConfig, WeightMasks
    from fxslim.training.oneshot import sparsify
    from fxslim.training.pruner import Pruner
    from fxslim.transcript import Transcript

__version__ = "0.1.0"

_SUBMODULES = frozenset({"count", "errors", "inc", "timer"})
_HOMES = MappingProxyType(
    {
        **dict.fromkeys(("compile", "inspect", "masked", "plan", "slim", "verify"), "fxslim.api"),
        **dict.fromkeys(("Inspection", "Report"), "fxslim.api"),
        **dict.fromkeys(("from_pretrained", "push_to_hub", "save_pretrained"), "fxslim.hf"),
        "plan_checkpoint": "fxslim.checkpoint.plan",
        "slim_checkpoint": "fxslim.checkpoint.slim",
        "draw": "fxslim.draw.write",
        "save_report": "fxslim.draw.page",
        "FxslimError": "fxslim.errors",
        "benchmark": "fxslim.harness",
        "export": "fxslim.export",
        **dict.fromkeys(("macs", "memory", "params", "speedup"), "fxslim.targets"),
        "Plan": "fxslim.plan",
        **dict.fromkeys(("Distillation", "PruningConfig", "WeightMasks"), "fxslim.training.config"),
        "Pruner": "fxslim.training.pruner",
        "sparsify": "fxslim.training.oneshot",
        "PruningCallback": "fxslim.training.callback",
        "Transcript": "fxslim.transcript",
    }
)
"""Public name -> the module that defines it."""

__all__ = [
    "Distillation",
    "FxslimError",
    "Inspection",
    "Plan",
    "Pruner",
    "PruningCallback",
    "PruningConfig",
    "Report",
    "Transcript",
    "WeightMasks",
    "__version__",
    "benchmark",
    "compile",
    "count",
    "draw",
    "errors",
    "export",
    "from_pretrained",
    "inc",
    "inspect",
    "macs",
    "masked",
    "memory",
    "params",
    "plan",
    "plan_checkpoint",
    "push_to_hub",
    "save_pretrained",
    "slim",
    "slim_checkpoint",
    "sparsify",
    "speedup",
    "timer",
    "verify",
]


class _Package(ModuleType):
    """The package itself: ``fxslim.plan`` stays the function when the submodule of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"fxslim.{name}")
    if name in _HOMES:
        value: object = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fxslim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
