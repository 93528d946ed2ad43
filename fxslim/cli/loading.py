"""Load a model from disk, whether it is narrowed or not."""

from __future__ import annotations

from typing import Any

from fxslim import hf
from fxslim.cli.options import Dtype


def load(name: str, dtype: Dtype) -> Any:
    """Return the model in a folder or under a hub name, ready to infer."""
    if not hf.is_narrowed(name):
        return hf.load_dense(name, dtype=dtype.value)
    return hf.from_pretrained(name, dtype=dtype.value)
