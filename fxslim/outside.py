"""See what a model does outside of some of its modules: which tensors it reads there, and how it calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.trace import quiet


def private(leaf: Any) -> Any:
    """Return a copy of a tensor, or anything else as it is."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def storage(tensor: torch.Tensor) -> int:
    """Return what identifies the memory of a tensor."""
    return tensor.untyped_storage().data_ptr()


class _Reads(TorchDispatchMode):
    """Records whose memory is read outside of the regions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = 0
        self.read: dict[int, str] = {}

    def note(self, tree: Any, reason: str) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self.read.setdefault(storage(leaf), reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.note((args, kwargs or {}), "read outside of the traced regions")
        return func(*args, **(kwargs or {}))


def read_outside(shadow: nn.Module, example: Mapping[str, Any], paths: frozenset[str]) -> dict[int, str]:
    """Return the memory that the model reads outside of its regions: storage -> what was seen."""
    reads = _Reads()
    with reads, torch.no_grad(), quiet():

        def enter(path: str, args: Any, kwargs: Any) -> None:
            reads.note((args, kwargs), f"given to {path} as an argument")
            reads.inside += 1

        def leave() -> None:
            reads.inside -= 1

        with outermost(shadow, paths, enter, leave):
            shadow(**pytree.tree_map(private, dict(example)))
    return reads.read


@contextmanager
def outermost(
    model: nn.Module, paths: frozenset[str], enter: Callable[[str, Any, Any], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Call back at the start and the end of every call of some modules, calls inside such calls left out."""
    depth = 0
    handles: list[Any] = []

    def before(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                enter(path, args, kwargs)

        return hook

    def after(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            leave()

    try:
        for path in paths:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
