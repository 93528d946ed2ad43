"""The API of Intel Neural Compressor's pruner and of its companion's trainer, on fxslim: see MIGRATING.md.

Names are looked up on first use: ``import fxslim.inc`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxslim.inc import metrics
    from fxslim.inc.auto_slim import model_slim, parse_auto_slim_config
    from fxslim.inc.config import WeightPruningConfig
    from fxslim.inc.metrics import Metric
    from fxslim.inc.pruning import CompressionManager, PruningCallbacks, prepare_compression, prepare_pruning
    from fxslim.inc.trainer import NLPTrainer

_HOMES = MappingProxyType(
    {
        "CompressionManager": "pruning",
        "Metric": "metrics",
        "NLPTrainer": "trainer",
        "PruningCallbacks": "pruning",
        "WeightPruningConfig": "config",
        "model_slim": "auto_slim",
        "parse_auto_slim_config": "auto_slim",
        "prepare_compression": "pruning",
        "prepare_pruning": "pruning",
    }
)
"""Public name -> the module that defines it."""

__all__ = [
    "CompressionManager",
    "Metric",
    "NLPTrainer",
    "PruningCallbacks",
    "WeightPruningConfig",
    "metrics",
    "model_slim",
    "parse_auto_slim_config",
    "prepare_compression",
    "prepare_pruning",
]


def __getattr__(name: str) -> object:
    if name == "metrics":
        return importlib.import_module("fxslim.inc.metrics")
    if name in _HOMES:
        value: object = getattr(importlib.import_module(f"fxslim.inc.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fxslim.inc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
