"""How much memory one call needs beyond the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Run a call once and return the most bytes of tensors that it holds at a time beyond what was there before.

    On CUDA, the allocator's own count. Elsewhere the storages of what operations return are added up while they live;
    what a kernel takes and gives back inside one operation is not seen.
    """
    if device.type == "cuda":
        call()  # workspaces of libraries stay
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    living = _Living()
    with living:
        call()
    return living.peak


class _Living(TorchDispatchMode):
    """Adds up the storages that operations made and that still live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_mkldnn and _key(leaf) not in given | self.known:
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key, size = tensor.untyped_storage(), _key(tensor), tensor.untyped_storage().nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else int(tensor.untyped_storage()._cdata)  # oneDNN keeps its memory itself
