"""Which class of transformers a checkpoint's config names, and skeletons of it without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from fxslim.errors import InputError, StorageError, UnsupportedModelError

PLAN_FILE = "fxslim_plan.json"


def model_class(
    config: PreTrainedConfig, *, source: str | PathLike[str] | None = None, **where: Any
) -> type[PreTrainedModel]:
    """Return the class that a checkpoint's config names, or the bare model if it names none.

    Args:
        config: the config.
        source: folder or hub name of code that comes with the checkpoint, where that is trusted.
        where: which revision of it, and so on.

    Raises:
        UnsupportedModelError: transformers has no class of that name, or no model for this config.
    """
    for name in config.architectures or ():
        references = getattr(config, "auto_map", None) or {}
        for reference in references.values():
            if source is not None and isinstance(reference, str) and reference.rpartition(".")[2] == name:
                return cast("type[PreTrainedModel]", get_class_from_dynamic_module(reference, fspath(source), **where))
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
        code = " It has code of its own: pass trust_remote_code=True if you trust it." if references else ""
        raise UnsupportedModelError(
            f"the config asks for {name}, which transformers {transformers.__version__} does not have; load the model "
            f"in Python with its own code and call fxslim.slim on it.{code}"
        )
    try:
        bare = MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(f"transformers has no model for a {type(config).__name__}.") from error
    return cast("type[PreTrainedModel]", bare[0] if isinstance(bare, tuple | list) else bare)


def load_dense(name: str | PathLike[str], *, dtype: str = "auto") -> PreTrainedModel:
    """Load a model from a local folder or by its hub name, as the class that its config names.

    Args:
        name: folder or hub name.
        dtype: as in ``PreTrainedModel.from_pretrained``; ``auto`` is the dtype it was saved in.

    Raises:
        InputError: there is no such model.
        StorageError: its files cannot be read.
        UnsupportedModelError: see `model_class`.
    """
    config = dense_config(name)
    with reading(name):
        model: PreTrainedModel = model_class(config).from_pretrained(fspath(name), config=config, dtype=dtype)
    return model


def skeleton(name: str | PathLike[str]) -> PreTrainedModel:
    """Build a model on the meta device from its config alone: enough to analyse it, and free of its weights."""
    config = dense_config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{name} is quantized; narrow the original model and quantize the result.")
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)._from_config(config)
    model.eval()
    return model


@contextmanager
def reading(name: str | PathLike[str]) -> Iterator[None]:
    """Say what is missing or cut short where a checkpoint's files cannot be read.

    Raises:
        StorageError: a file cannot be read.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the files of {name} cannot be read: {first_line(error)}. A file may be missing or cut short: fetch or "
            "copy the checkpoint again."
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_there(name: str | PathLike[str]) -> None:
    """Raise InputError for what can only be a folder and is not there; hub names have at most one slash."""
    path = Path(name)
    local = isinstance(name, PathLike) or path.is_absolute() or len(path.parts) > 2 or fspath(name).startswith(".")
    if local and not path.is_dir():
        raise InputError(f"there is no folder {name}.")


def dense_config(name: str | PathLike[str]) -> PreTrainedConfig:
    """Read the config of a dense model from a local folder or by its hub name."""
    check_there(name)
    narrowed = (Path(name) / PLAN_FILE).exists()
    try:
        config = None if narrowed else cast(PreTrainedConfig, AutoConfig.from_pretrained(fspath(name)))
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read as a model: {first_line(error)}") from error
    if config is None or getattr(config, "fxslim", None) is not None:
        raise InputError(f"{name} is narrowed already; load it with fxslim.from_pretrained.")
    return config


def is_narrowed(name: str | PathLike[str]) -> bool:
    """Tell whether a local folder holds a plan, in a file or in its config."""
    if (Path(name) / PLAN_FILE).exists():
        return True
    try:
        found = json.loads((Path(name) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # whoever loads it says what is wrong
    return isinstance(found, dict) and found.get("fxslim") is not None
