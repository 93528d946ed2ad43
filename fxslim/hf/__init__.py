"""Models of transformers on disk: load a dense one, save a narrowed one, load that back.

A narrowed folder is an ordinary checkpoint plus ``fxslim_plan.json``.
"""

from __future__ import annotations

from fxslim.hf.classes import PLAN_FILE, dense_config, is_narrowed, load_dense, model_class, skeleton
from fxslim.hf.load import from_pretrained
from fxslim.hf.save import BESIDE_THE_MODEL, copy_beside, push_to_hub, save_pretrained

__all__ = [
    "BESIDE_THE_MODEL",
    "PLAN_FILE",
    "copy_beside",
    "dense_config",
    "from_pretrained",
    "is_narrowed",
    "load_dense",
    "model_class",
    "push_to_hub",
    "save_pretrained",
    "skeleton",
]
