"""Work on more tensors than memory holds: while a mode is on, large ones are in files, and read as they are used.

Models run as they are. After every operation the pages that it has touched are given back, and what meets large tensors
most (products, copies, selections of rows) goes block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.mapped import is_mapped, mapped, release

LARGE = 1 << 20
"""From how many bytes on a tensor is in a file."""
BLOCK = 1 << 25
"""How many bytes of a tensor are worked on at once."""

Block = tuple[int, int]
"""Where a block begins along an axis, and how long it is."""


class OutOfCore(TorchDispatchMode):
    """Puts every large tensor that an operation makes on the CPU into a file."""

    supports_higher_order_operators = True

    def __init__(self, folder: Path) -> None:
        """Make files in ``folder``, which exists."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder = folder
        self.error: OSError | None = None

    def __exit__(self, *raised: Any) -> None:
        """Leave; raise OSError where the disk could not take a tensor, whatever a model has made of that."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        if self.error is not None and (raised[0] is None or issubclass(raised[0], Exception)):
            raise self.error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
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
        if not _is_large(tensor) or is_mapped(tensor) or _storage(tensor) in given:
            return tensor
        return _copy(self.make(torch.empty_like(tensor, device="meta")), tensor)

    def make(self, shaped: Tensor) -> Tensor:
        """Make a tensor in a file: see `mapped`."""
        try:
            return mapped(shaped, self.folder)
        except OSError as error:
            self.error = error
            raise


def _is_plain(tensor: Any) -> bool:
    """Tell whether something is a tensor with memory of its own kind on the CPU: no fake, sparse or nested one."""
    kind = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return kind and tensor.layout == torch.strided and not tensor.is_nested


def _plain(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if _is_plain(leaf)]


def _is_large(tensor: Tensor) -> bool:
    return _is_plain(tensor) and tensor.numel() * tensor.dtype.itemsize >= LARGE


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _outer(tensor: Tensor) -> int:
    """Return the axis along which a tensor's parts lie in memory one after the other."""
    return max(range(tensor.ndim), key=lambda axis: tensor.stride(axis) * (tensor.shape[axis] > 1))


def _blocks(tensor: Tensor, axis: int) -> Iterator[Block]:
    size = tensor.shape[axis]
    step = max(1, BLOCK * size // (tensor.numel() * tensor.dtype.itemsize))
    for first in range(0, size, step):
        yield first, min(step, size - first)


def _fill(target: Tensor, source: Tensor, part: Callable[[int, Block], Tensor]) -> Tensor:
    """Fill a tensor with what is made of another one: ``part`` returns it for a block along an axis of the target."""
    axis = _outer(target)
    for block in _blocks(target, axis):
        target.narrow(axis, *block).copy_(part(axis, block))
        release(target, source)
    return target


def _copy(target: Tensor, source: Tensor) -> Tensor:
    return _fill(target, source, lambda axis, block: source.narrow(axis, *block))


# How operations go block by block: each returns the result, or None where nothing is large.


def _empty(mode: OutOfCore, size: Sequence[int], **options: Any) -> Tensor | None:
    dtype = options.get("dtype") or torch.get_default_dtype()
    if not _here(options) or math.prod(size) * dtype.itemsize < LARGE:
        return None
    form = options.get("memory_format") or torch.contiguous_format
    return mode.make(torch.empty(size, dtype=dtype, device="meta", memory_format=form))


def _copied(mode: OutOfCore, source: Tensor, **options: Any) -> Tensor | None:
    dtype = options.get("dtype") or source.dtype
    if not _is_large(source) or source.numel() * dtype.itemsize < LARGE or not _here(options):
        return None
    form = options.get("memory_format") or torch.preserve_format
    return _copy(mode.make(torch.empty_like(source, dtype=dtype, device="meta", memory_format=form)), source)


def _here(options: Mapping[str, Any]) -> bool:
    """Tell whether options of an operation ask for a plain tensor on the CPU."""
    place, layout = torch.device(options.get("device") or "cpu"), options.get("layout") or torch.strided
    return place.type == "cpu" and layout == torch.strided


def _selected(mode: OutOfCore, source: Tensor, dim: int, index: Tensor) -> Tensor | None:
    size = list(source.shape)
    size[dim] = index.numel()
    if not _is_large(source) or math.prod(size) * source.dtype.itemsize < LARGE:
        return None
    dim = dim % source.ndim

    def part(axis: int, block: Block) -> Tensor:
        if axis == dim:
            return source.index_select(dim, index.narrow(0, *block))
        return source.narrow(axis, *block).index_select(dim, index)

    return _fill(mode.make(torch.empty(size, dtype=source.dtype, device="meta")), source, part)


def _gathered(mode: OutOfCore, source: Tensor, dim: int, index: Tensor, **options: Any) -> Tensor | None:
    if not _is_large(source) or index.numel() * source.dtype.itemsize < LARGE:
        return None

    def part(axis: int, block: Block) -> Tensor:
        own = source if axis == dim % source.ndim else source.narrow(axis, *block)
        return own.gather(dim, index.narrow(axis, *block))

    return _fill(mode.make(torch.empty(index.shape, dtype=source.dtype, device="meta")), source, part)


def _joined(mode: OutOfCore, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    if not all(map(_is_large, tensors)) or len({tensor.dtype for tensor in tensors}) > 1:
        return None
    made = mode.make(torch.cat([torch.empty_like(tensor, device="meta") for tensor in tensors], dim))
    first = 0
    for tensor in tensors:
        _copy(made.narrow(dim, first, tensor.shape[dim]), tensor)
        first += tensor.shape[dim]
    return made


def _stacked(mode: OutOfCore, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    return _joined(mode, [tensor.unsqueeze(dim) for tensor in tensors], dim)


def _written(mode: OutOfCore, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor | None:
    if not _is_large(target) or not _is_plain(source) or _storage(target) == _storage(source):
        return None
    return _copy(target, source.expand_as(target))


def _masked(mode: OutOfCore, target: Tensor, mask: Tensor, value: Any) -> Tensor | None:
    if not _is_large(target):
        return None
    axis, everywhere = _outer(target), mask.expand_as(target)
    for block in _blocks(target, axis):
        target.narrow(axis, *block).masked_fill_(everywhere.narrow(axis, *block), value)
        release(target)
    return target


def _rows(mode: OutOfCore, target: Tensor, dim: int, index: Tensor, value: Any) -> Tensor | None:
    if not _is_large(target):
        return None
    mask = torch.zeros(target.shape[dim], dtype=torch.bool).index_fill_(0, index, True)
    return _masked(mode, target, mask.reshape(-1, *[1] * (target.ndim - 1 - dim % target.ndim)), value)


def _product(mode: OutOfCore, one: Tensor, other: Tensor) -> Tensor | None:
    return _sum(mode, one.new_zeros(()), one, other, beta=0)


def _sum(mode: OutOfCore, add: Tensor, one: Tensor, other: Tensor, **scales: Any) -> Tensor | None:
    if not _is_large(other) or _outer(other) != 1:
        return None
    added, parts = add.expand(len(one), other.shape[1]), []
    for block in _blocks(other, 1):
        parts.append(torch.addmm(added.narrow(1, *block), one, other.narrow(1, *block), **scales))
        release(other)
    return torch.cat(parts, dim=1)


def _grouped(mode: OutOfCore, one: Tensor, other: Tensor, ends: Tensor | None = None, *rest: Any) -> Tensor | None:
    if not _is_large(other) or (one.ndim, other.ndim) != (2, 3) or ends is None or any(rest):
        return None
    made, first = one.new_zeros(len(one), other.shape[2]), 0
    for expert, last in enumerate(ends.tolist()):
        rows = one[first:last]
        whole = _product(mode, rows, other[expert])
        made[first:last] = rows @ other[expert] if whole is None else whole
        release(other)
        first = last
    return made


aten = torch.ops.aten
WAYS: Mapping[Any, Callable[..., Tensor | None]] = {
    aten.empty.memory_format: _empty,
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten.index_select.default: _selected,
    aten.gather.default: _gathered,
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.copy_.default: _written,
    aten.masked_fill_.Scalar: _masked,
    aten.index_fill_.int_Scalar: _rows,
    aten.mm.default: _product,
    aten.addmm.default: _sum,
    aten._grouped_mm.default: _grouped,
}
"""Operations that go block by block. Any other one runs as it is, on all of the tensors that it is given."""
