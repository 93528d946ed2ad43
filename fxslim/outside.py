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
        self.inside = False
        self.read: dict[int, str] = {}

    def note(self, tree: Any, reason: str) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self.read.setdefault(storage(leaf), reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.note((args, kwargs or {}), "read outside of the traced regions")
        return func(*args, **(kwargs or {}))


def read_outside(
    shadow: nn.Module, example: Mapping[str, Any], paths: frozenset[str], left: frozenset[str]
) -> dict[int, str]:
    """Return the memory that the model reads outside of its regions: storage -> what was seen.

    Args:
        shadow: a (shared) copy of the model.
        example: what it is called with.
        paths: the regions.
        left: modules inside regions that are not traced.
    """
    reads = _Reads()
    with reads, torch.no_grad(), quiet():

        def enter(path: str, args: Any, kwargs: Any) -> None:
            reads.note((args, kwargs), f"given to {path} as an argument")

        def turn(inside: bool) -> None:
            reads.inside = inside

        with outermost(shadow, paths, left, enter, turn):
            shadow(**pytree.tree_map(private, dict(example)))
    return reads.read


@contextmanager
def outermost(
    model: nn.Module,
    paths: frozenset[str],
    left: frozenset[str],
    enter: Callable[[str, Any, Any], None],
    turn: Callable[[bool], None] = lambda inside: None,
) -> Iterator[None]:
    """Call back when a run of the model enters and leaves some modules; calls inside such calls are part of them.

    Args:
        model: the model.
        paths: the modules.
        left: modules inside them that are no part of them; calls of ``paths`` inside these count again.
        enter: called with path, arguments and keywords, where a run enters a module.
        turn: called with True where a run comes to be inside, with False where it comes to be outside.
    """
    inside = [False]
    handles: list[Any] = []

    def before(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            enters = path in paths and not inside[-1]
            inside.append(path not in left and (enters or inside[-1]))
            if enters:
                enter(path, args, kwargs)
            turn(inside[-1])

        return hook

    def after(*_: Any) -> None:
        inside.pop()
        turn(inside[-1])

    try:
        for path in paths | left:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
