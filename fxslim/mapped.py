"""Work on more tensors than memory holds: while a mode is on, large ones are in files, and pages come as they are used.

They are plain tensors over mapped memory. After every operation the pages that it has read or written are given back,
and what meets large tensors most (products, copies, selections of rows) goes block by block.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LARGE = 1 << 20
"""Tensors of as many bytes are in files."""
BLOCK = 1 << 25
"""How many bytes of a tensor are worked on at once."""

SUFFIX = ".mapped"
"""How names of such files end."""

aten = torch.ops.aten


class Mapped(TorchDispatchMode):
    """Puts every large tensor that an operation makes on the CPU into a file, and keeps none of its pages in memory.

    A file has no name any more once it is mapped: it is gone with its tensor, even if the process is killed.
    """

    def __init__(self, folder: Path) -> None:
        """Make files in ``folder``, which exists."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder = folder
        self.error: OSError | None = None

    def __exit__(self, *raised: Any) -> None:
        """Leave; raise OSError where the disk could not take a tensor, whatever was made of that error."""
        super().__exit__(*raised)
        if self.error is not None:
            raise self.error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        way = WAYS.get(func)
        result = None if way is None else way(self, *args, **kwargs)
        if result is None:
            result = func(*args, **kwargs)
            if not func._schema.is_mutable:
                given = {_storage(tensor) for tensor in _plain((args, kwargs))}
                result = pytree.tree_map_only(Tensor, lambda tensor: self._moved(tensor, given), result)
        release(*_plain((args, kwargs, result)))
        return result

    def _moved(self, tensor: Tensor, given: set[int]) -> Tensor:
        """Return a result, in a file if it is large and no view of what was given."""
        if not is_large(tensor) or is_mapped(tensor) or _storage(tensor) in given:
            return tensor
        made = self.like(torch.empty_like(tensor, device="meta"))
        _copy(made, tensor)
        return made

    def like(self, shaped: Tensor) -> Tensor:
        """Make a tensor of zeros in a file.

        Args:
            shaped: a tensor on ``meta``, dense, with the shape, strides and dtype that it gets.
        """
        size = shaped.numel() * shaped.dtype.itemsize
        path = self.folder / f"{uuid4().hex}{SUFFIX}"
        try:
            with path.open("wb") as file:
                _reserve(file.fileno(), size)
            storage = torch.UntypedStorage.from_file(str(path), True, size)
        except OSError as error:
            self.error = error
            raise
        finally:
            path.unlink(missing_ok=True)
        return torch.empty(0, dtype=shaped.dtype).set_(storage, 0, shaped.shape, shaped.stride())


def _reserve(file: int, size: int) -> None:
    """Make a file of zeros that the disk has room for: writing to a mapped page without room would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(min(size, BLOCK))
    for first in range(0, size, BLOCK):
        os.write(file, zeros[: size - first])


def is_large(tensor: Tensor) -> bool:
    """Tell whether a tensor belongs into a file: a plain one on the CPU, large by itself."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested
    return plain and tensor.device.type == "cpu" and tensor.numel() * tensor.dtype.itemsize >= LARGE


def is_mapped(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory is that of a file of ours: others may be mapped without being written back."""
    return str(tensor.untyped_storage().filename).endswith(SUFFIX)


def release(*tensors: Tensor) -> None:
    """Give the pages of mapped tensors back; their numbers are in the files."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if _ADVISE is not None and storage.nbytes() >= LARGE and is_mapped(tensor):
            _ADVISE(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)


_ADVISE: Any = ctypes.CDLL(None).madvise if os.name == "posix" else None


def _plain(tree: Any) -> list[Tensor]:
    """Return the tensors with memory on the CPU."""
    return [
        leaf for leaf in pytree.tree_leaves(tree)
        if type(leaf) in (Tensor, nn.Parameter) and leaf.device.type == "cpu" and leaf.layout == torch.strided
        and not leaf.is_nested
    ]  # fmt: skip


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _outer(tensor: Tensor) -> int:
    """Return the axis along which blocks of a tensor lie in memory one after the other."""
    return max(range(tensor.ndim), key=lambda axis: tensor.stride(axis) * (tensor.shape[axis] > 1))


def _blocks(tensor: Tensor, axis: int) -> Iterator[tuple[int, int]]:
    """Yield the first index of every block along an axis, and how many it has."""
    size = tensor.shape[axis]
    step = max(1, BLOCK * size // (tensor.numel() * tensor.dtype.itemsize))
    for first in range(0, size, step):
        yield first, min(step, size - first)


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into another one of the same shape, block by block."""
    axis = _outer(target)
    for block in _blocks(target, axis):
        target.narrow(axis, *block).copy_(source.narrow(axis, *block))
        release(target, source)


# Ways to run operations: each returns the result, or None for what is not large.


def _empty(mode: Mapped, size: Sequence[int], **options: Any) -> Tensor | None:
    if torch.device(options.get("device") or "cpu").type != "cpu":
        return None
    dtype = options.get("dtype") or torch.get_default_dtype()
    if math.prod(size) * dtype.itemsize < LARGE or options.get("layout") not in (None, torch.strided):
        return None
    form = options.get("memory_format") or torch.contiguous_format
    return mode.like(torch.empty(size, dtype=dtype, device="meta", memory_format=form))


def _copied(mode: Mapped, source: Tensor, **options: Any) -> Tensor | None:
    if torch.device(options.get("device") or "cpu").type != "cpu" or source.device.type != "cpu":
        return None
    form = options.get("memory_format") or torch.preserve_format
    shaped = torch.empty_like(source, dtype=options.get("dtype"), device="meta", memory_format=form)
    if not is_large(source) or shaped.numel() * shaped.dtype.itemsize < LARGE:
        return None
    made = mode.like(shaped)
    _copy(made, source)
    return made


def _selected(mode: Mapped, source: Tensor, dim: int, index: Tensor) -> Tensor | None:
    size = list(source.shape)
    size[dim] = index.numel()
    if not is_large(source) or math.prod(size) * source.dtype.itemsize < LARGE:
        return None
    made = mode.like(torch.empty(size, dtype=source.dtype, device="meta"))
    axis, dim = _outer(made), dim % source.ndim
    for block in _blocks(made, axis):
        part = (source, index.narrow(0, *block)) if axis == dim else (source.narrow(axis, *block), index)
        made.narrow(axis, *block).copy_(part[0].index_select(dim, part[1]))
        release(made, source)
    return made


def _gathered(mode: Mapped, source: Tensor, dim: int, index: Tensor, **options: Any) -> Tensor | None:
    if not is_large(source) or index.numel() * source.dtype.itemsize < LARGE:
        return None
    made = mode.like(torch.empty(index.shape, dtype=source.dtype, device="meta"))
    axis, dim = _outer(made), dim % source.ndim
    for block in _blocks(made, axis):
        part = source if axis == dim else source.narrow(axis, *block)
        made.narrow(axis, *block).copy_(part.gather(dim, index.narrow(axis, *block)))
        release(made, source)
    return made


def _joined(mode: Mapped, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    if not all(map(is_large, tensors)) or len({tensor.dtype for tensor in tensors}) > 1:
        return None
    made = mode.like(torch.cat([torch.empty_like(tensor, device="meta") for tensor in tensors], dim))
    first = 0
    for tensor in tensors:
        _copy(made.narrow(dim, first, tensor.shape[dim]), tensor)
        first += tensor.shape[dim]
    return made


def _stacked(mode: Mapped, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    return _joined(mode, [tensor.unsqueeze(dim) for tensor in tensors], dim)


def _written(mode: Mapped, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor | None:
    if not is_large(target) or source.device.type != "cpu":
        return None
    _copy(target, source.expand_as(target))
    return target


def _filled(mode: Mapped, target: Tensor, mask: Tensor, value: Any) -> Tensor | None:
    if not is_large(target):
        return None
    axis, everywhere = _outer(target), mask.expand_as(target)
    for block in _blocks(target, axis):
        target.narrow(axis, *block).masked_fill_(everywhere.narrow(axis, *block), value)
        release(target)
    return target


def _rows_filled(mode: Mapped, target: Tensor, dim: int, index: Tensor, value: Any) -> Tensor | None:
    if not is_large(target):
        return None
    mask = torch.zeros(target.shape[dim], dtype=torch.bool).index_fill_(0, index, True)
    return _filled(mode, target, mask.reshape(-1, *[1] * (target.ndim - 1 - dim % target.ndim)), value)


def _product(mode: Mapped, one: Tensor, other: Tensor, add: Tensor | None = None, **scales: Any) -> Tensor | None:
    if not is_large(other) or _outer(other) != 1:
        return None
    parts = []
    for block in _blocks(other, 1):
        if add is None:
            parts.append(torch.mm(one, other.narrow(1, *block)))
        else:
            own = add.expand(len(one), other.shape[1]).narrow(1, *block)
            parts.append(torch.addmm(own, one, other.narrow(1, *block), **scales))
        release(other)
    return torch.cat(parts, dim=1)


def _sum(mode: Mapped, add: Tensor, one: Tensor, other: Tensor, **scales: Any) -> Tensor | None:
    return _product(mode, one, other, add, **scales)


WAYS: Mapping[Any, Callable[..., Any]] = {
    aten.empty.memory_format: _empty,
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten.index_select.default: _selected,
    aten.gather.default: _gathered,
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.copy_.default: _written,
    aten.masked_fill_.Scalar: _filled,
    aten.index_fill_.int_Scalar: _rows_filled,
    aten.mm.default: _product,
    aten.addmm.default: _sum,
}
"""How operations on large tensors go block by block. Any other runs as it is, and what it has touched is given back."""
