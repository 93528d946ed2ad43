"""Plain tensors whose memory is that of a file: pages of it are read when they are used, and can be given back."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

SUFFIX = f".{uuid4().hex}.mapped"
"""How names of such files end in this process: pages of nobody else's file are given back."""
ZEROS = bytes(1 << 20)

_ADVISE: Any = ctypes.CDLL(None).madvise if os.name == "posix" else None


def mapped(shaped: Tensor, folder: Path) -> Tensor:
    """Make a tensor of zeros in a file that has no name any more: it is gone with its tensor, or with the process.

    Args:
        shaped: a dense tensor on ``meta``, with the shape, strides and dtype that it gets.
        folder: where the file is.

    Raises:
        OSError: the disk cannot take it.
    """
    size = shaped.numel() * shaped.dtype.itemsize
    path = folder / f"{uuid4().hex}{SUFFIX}"
    try:
        with path.open("xb") as file:
            _reserve(file.fileno(), size)
        storage = _storage(path, size)
    finally:
        path.unlink(missing_ok=True)
    return torch.empty(0, dtype=shaped.dtype).set_(storage, 0, shaped.shape, shaped.stride())


def _storage(path: Path, size: int) -> Any:
    try:
        return torch.UntypedStorage.from_file(str(path), True, size)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"it cannot be mapped: {str(error).splitlines()[0]}", str(path)) from error


def _reserve(file: int, size: int) -> None:
    """Give a file its size; what is written to mapped memory without room on the disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for first in range(0, size, len(ZEROS)):
        os.write(file, ZEROS[: size - first])


def is_mapped(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory is that of a file of ours; changes in other mappings may be kept in no file."""
    return str(tensor.untyped_storage().filename).endswith(SUFFIX)


def release(*tensors: Tensor) -> None:
    """Give the pages of mapped tensors back to the system; their numbers stay."""
    for tensor in tensors:
        if _ADVISE is not None and is_mapped(tensor):
            storage = tensor.untyped_storage()
            _ADVISE(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)
