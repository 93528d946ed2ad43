"""Run a model once and record the tree of its module calls: what each was given, returned, and did besides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.calls import by_name, signature_of
from fxslim.errors import InputError
from fxslim.outside import storage


@dataclass
class Call:
    """One call of a module, and the calls inside it.

    Attributes:
        path: the module.
        arguments: what it was given, by name.
        refusal: why that has no names.
        returned: what it returned, with tensors of no memory in the place of tensors.
        secret: what it did beyond computing its result from its arguments and from tensors of the model.
        inner: the calls inside it.
    """

    path: str
    arguments: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    returned: Any = None
    secret: str | None = None
    inner: list[Call] = field(default_factory=list)

    def within(self, paths: frozenset[str]) -> Iterator[Call]:
        """Yield the outermost calls of some modules inside this one, in the order in which they end."""
        for call in self.inner:
            if call.path in paths:
                yield call
            else:
                yield from call.within(paths)


def has_forward(module: nn.Module) -> bool:
    """Tell whether a module can be called."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


@contextmanager
def recording(module: nn.Module, root: Call) -> Iterator[None]:
    """Record the calls of all submodules as a tree, while the context is open."""
    witness = _Witness(root)
    witness.born.update((storage(tensor), 0) for tensor in _tensors(root.arguments))
    handles: list[Any] = []

    def before(path: str, signature: inspect.Signature) -> Callable[..., None]:
        def hook(called: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(path)
            try:
                call.arguments = by_name(signature, args, kwargs)
            except InputError as error:
                call.refusal = str(error)
            witness.enter(call, called, (args, kwargs))

        return hook

    def after(called: nn.Module, args: Any, returned: Any) -> None:
        witness.leave(called, returned)

    try:
        for path, child in module.named_modules():
            if path and has_forward(child):
                hook = before(path, signature_of(child))
                handles.append(child.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
                handles.append(child.register_forward_hook(after, always_call=True))
        with witness:
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Frame:
    """A call that has not ended: when it began, the memory that it was given, and what it could change."""

    call: Call
    since: int
    given: frozenset[int]
    tensors: list[tuple[torch.Tensor, int]]
    state: dict[tuple[int, str], Any]


class _Witness(TorchDispatchMode):
    """Sees which calls read tensors of others, write into what they are given, or keep something."""

    def __init__(self, root: Call) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.root = root
        self.clock = 0
        self.born: dict[int, int] = {}
        self.frames: list[_Frame] = []

    def enter(self, call: Call, module: nn.Module, arguments: Any) -> None:
        """Note the start of a call."""
        (self.frames[-1].call if self.frames else self.root).inner.append(call)
        given = _tensors(arguments)
        written = [(t, t._version) for t in (*given, *module.parameters(), *module.buffers())]
        memory = frozenset(storage(tensor) for tensor in given)
        self.clock += 1
        self.frames.append(_Frame(call, self.clock, memory, written, _state(module)))

    def leave(self, module: nn.Module, returned: Any) -> None:
        """Note the end of the call that began last."""
        frame = self.frames.pop()
        frame.call.returned = pytree.tree_map(_bare, returned)
        if any(tensor._version != version for tensor, version in frame.tensors):
            frame.call.secret = "it writes into a tensor that others see"
        state = _state(module)
        if state.keys() != frame.state.keys() or any(state[key] is not frame.state[key] for key in state):
            frame.call.secret = "it keeps something from call to call"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made_before = func is torch.ops.aten.lift_fresh.default
        read = set() if made_before else {storage(tensor) for tensor in _tensors((args, kwargs or {}))}
        for frame in self.frames:
            if any(self.born.get(one, frame.since) < frame.since and one not in frame.given for one in read):
                frame.call.secret = "it reads a tensor that it is not given"
        result = func(*args, **(kwargs or {}))
        for one in {storage(tensor) for tensor in _tensors(result)} - read - {0}:
            self.born[one] = self.clock
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of a tree that have memory of their own."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.layout == torch.strided]


def _bare(leaf: Any) -> Any:
    """Return a tensor's shape, dtype and device without its memory, or anything else as it is."""
    return Shaped(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


@dataclass(frozen=True)
class Shaped:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _state(module: nn.Module) -> dict[tuple[int, str], Any]:
    """Return every attribute, parameter and buffer of a module and those inside it."""
    state: dict[tuple[int, str], Any] = {}
    for own in module.modules():
        for table in (vars(own), own._parameters, own._buffers):
            state.update(((id(own), name), value) for name, value in table.items())
    return state
