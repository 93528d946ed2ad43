"""Have transformers read files where it maps them: mapped memory is not aligned, and stays as long as the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from fxslim.checkpoint.files import Stored, read_shard

NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
"""The variable by which transformers is told to load without threads."""


def reading_whole(original: type[PreTrainedModel]) -> Any:
    """Return a ``_load_pretrained_model`` for a subclass that reads one tensor after the other."""

    def read(model: Any, state_dict: Any, files: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        with _one_by_one():
            if state_dict is None and files and all(file.endswith(".safetensors") for file in files):
                shards = [read_shard(Path(file)) for file in files]
                state_dict = {stored.name: _Unread(stored) for shard in shards for stored in shard.tensors}
            return cast(Any, original)._load_pretrained_model(model, state_dict, files, *args, **kwargs)

    return staticmethod(read)


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Have transformers read one tensor after the other: its threads keep memory of their own, up to a tenth more."""
    before = os.environ.get(NO_THREADS)
    os.environ[NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_THREADS]
        else:
            os.environ[NO_THREADS] = before


class _Unread:
    """A tensor in a file, not read yet; it is read into memory of torch's own, and nothing is there twice."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = self._stored.read()
        return whole if index is Ellipsis else whole[index]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        """Return the dtype, as safetensors spells it."""
        return self._stored.code
