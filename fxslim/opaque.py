"""Parts of a traced module that are not traced: a call of one is a single operation, which nothing looks into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.calls import PLAIN, by_name, same, signature_of
from fxslim.errors import InputError, TraceError
from fxslim.program import Program, hint, is_symbolic
from fxslim.recording import Call, Shaped

LIBRARY = torch.library.Library("fxslim", "DEF")
LIBRARY.define("opaque(Tensor[] given, str call) -> Tensor[]")
OPAQUE = torch.ops.fxslim.opaque.default

_TRACED: dict[str, Opaque] = {}
"""Calls in the trace that is being made."""


@dataclass(frozen=True)
class Result:
    """A tensor that an opaque call returns.

    Attributes:
        sizes: for every axis its size, or which given tensor has this size along which axis.
        dtype: its dtype.
        device: where the trace has it.
    """

    sizes: tuple[int | tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device

    def shape(self, given: Sequence[torch.Tensor]) -> list[int]:
        """Return its shape for what the call is given."""
        return [size if isinstance(size, int) else given[size[0]].shape[size[1]] for size in self.sizes]


@dataclass(frozen=True)
class Opaque:
    """A call of a module inside a traced one.

    Attributes:
        path: the module, inside the traced one.
        spec: structure of its arguments by name.
        leaves: the leaves of its arguments: plain values, and `torch.Tensor` in the place of tensors.
        out_spec: structure of what it returns.
        out: the leaves of that: plain values and Results.
    """

    path: str
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    out: tuple[Any, ...]

    @property
    def results(self) -> list[Result]:
        """Return the tensors that it returns."""
        return [leaf for leaf in self.out if isinstance(leaf, Result)]

    def run(self, module: nn.Module, given: Sequence[torch.Tensor], read: Sequence[int]) -> list[torch.Tensor]:
        """Call the module.

        Args:
            module: the module.
            given: the tensors among its arguments.
            read: which of the tensors that it returns have to have the traced shape.

        Raises:
            InputError: it does not do what it did when the module around it was traced.
        """
        waiting = iter(given)
        leaves = [next(waiting) if leaf is torch.Tensor else leaf for leaf in self.leaves]
        before = [None if tensor.is_inference() else tensor._version for tensor in given]
        out, spec = pytree.tree_flatten(module(**pytree.tree_unflatten(leaves, self.spec)))
        after = [None if tensor.is_inference() else tensor._version for tensor in given]
        plain = spec == self.out_spec and all(
            (isinstance(found, torch.Tensor) and found.dtype == leaf.dtype)
            if isinstance(leaf, Result)
            else same(found, leaf)
            for found, leaf in zip(out, self.out, strict=True)
        )
        made = [leaf for leaf in out if isinstance(leaf, torch.Tensor)]
        shaped = plain and all(list(made[i].shape) == self.results[i].shape(given) for i in read)
        if not shaped or before != after:
            what = "writes into what it is given" if before != after else "returns something else"
            raise InputError(
                f"{self.path}, which was not traced, {what} than when the module around it was compiled. Compile with "
                "example_inputs that lead there, or use fxslim.slim, which keeps the model's own forward."
            )
        return [tensor.contiguous() for tensor in made]


def _shapes(given: list[torch.Tensor], call: str) -> list[torch.Tensor]:
    """Return tensors of the shapes that a call returns."""
    results = _TRACED[call].results
    return [torch.empty(one.shape(given), dtype=one.dtype, device=one.device) for one in results]


torch.library.register_fake("fxslim::opaque", _shapes, lib=LIBRARY)


@contextmanager
def opaque(module: nn.Module, parts: Mapping[str, Sequence[Call]], calls: dict[str, Opaque]) -> Iterator[None]:
    """Let parts of a module be traced as one operation each, while the context is open.

    Args:
        module: a (shared) copy.
        parts: path inside the module -> the calls that were recorded.
        calls: takes the calls that are traced, by the names that they have in the graph.
    """
    _TRACED.update(calls)
    known = set(calls)
    try:
        for path, recorded in parts.items():
            part: Any = module.get_submodule(path)
            part.forward = _stand_in(part, path, recorded)
        yield
    finally:
        calls.update({name: call for name, call in _TRACED.items() if name not in known})
        _TRACED.clear()
        for path in parts:
            vars(module.get_submodule(path)).pop("forward", None)


def _stand_in(part: nn.Module, path: str, recorded: Sequence[Call]) -> Any:
    signature = signature_of(part)

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = by_name(signature, args, kwargs)
        leaves, spec = pytree.tree_flatten(arguments)
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        call = Opaque(path, spec, _marked(path, leaves), *_returned(path, _like(path, arguments, recorded), given))
        name = next((name for name, known in _TRACED.items() if known == call), f"{path} {len(_TRACED)}")
        _TRACED[name] = call
        made = iter(OPAQUE(given, name))
        out = [next(made) if isinstance(leaf, Result) else leaf for leaf in call.out]
        return pytree.tree_unflatten(out, call.out_spec)

    return forward


def _marked(path: str, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return the leaves of arguments without the tensors' values."""
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise TraceError(f"{path} is given no tensor")
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *PLAIN)):
            raise TraceError(f"{path} is given a {type(leaf).__name__}")
    return tuple(torch.Tensor if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)


def _like(path: str, arguments: Mapping[str, Any], recorded: Sequence[Call]) -> Call:
    """Return the recorded call that is like a traced one, but for yes-or-no arguments where there is none."""
    exactly = [call for call in recorded if _look(call.arguments) == _look(arguments)]
    found = exactly or [call for call in recorded if _look(_no_bools(call.arguments)) == _look(_no_bools(arguments))]
    if not found:
        raise TraceError(f"{path} is called in another way than when the model ran")
    if any(call.returned != found[0].returned for call in found):
        raise TraceError(f"what {path} returns differs from call to call")
    return found[0]


def _no_bools(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if type(value) is not bool}


def _look(tree: Any) -> Any:
    """Return what a trace fixes of arguments, at the example's sizes."""
    leaves, spec = pytree.tree_flatten(tree)
    return spec, [
        (leaf.dtype, tuple(map(hint, leaf.shape))) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)
        for leaf in leaves
    ]


def _returned(path: str, call: Call, given: Sequence[torch.Tensor]) -> tuple[pytree.TreeSpec, tuple[Any, ...]]:
    """Return structure and leaves of what a call returns; open sizes are taken from what it is given."""
    leaves, spec = pytree.tree_flatten(call.returned)
    for leaf in leaves:
        if not isinstance(leaf, (Shaped, *PLAIN)):
            raise TraceError(f"{path} returns a {type(leaf).__name__}")
    if not any(isinstance(leaf, Shaped) for leaf in leaves):
        raise TraceError(f"{path} returns no tensor")
    return spec, tuple(_result(leaf, given) if isinstance(leaf, Shaped) else leaf for leaf in leaves)


def _result(leaf: Shaped, given: Sequence[torch.Tensor]) -> Result:
    """Guess which sizes are open: those of a given tensor of the same shape, else those that equal an open one."""
    for number, tensor in enumerate(given):
        if tuple(map(hint, tensor.shape)) == leaf.shape:
            return Result(tuple((number, axis) for axis in range(tensor.ndim)), leaf.dtype, leaf.device)
    sizes = [(number, axis) for number, t in enumerate(given) for axis in range(t.ndim) if is_symbolic(t.shape[axis])]

    def size(axis: int, value: int) -> int | tuple[int, int]:
        equal = [at for at in sizes if hint(given[at[0]].shape[at[1]]) == value]
        return min(equal, key=lambda at: at[1] != axis, default=value)

    return Result(tuple(size(axis, value) for axis, value in enumerate(leaf.shape)), leaf.dtype, leaf.device)


def without_tensors(program: Program, parts: Iterable[str]) -> Program:
    """Return a program that does not take tensors which nothing but its opaque parts can read."""
    within = tuple(f"{path}." for path in parts)
    tensor_of = dict(program.tensor_of)
    for node in program.graph.find_nodes(op="placeholder") if within else ():
        if not node.users and tensor_of.get(node.name, "").startswith(within):
            program.graph.erase_node(node)
            del tensor_of[node.name]
    return replace(program, tensor_of=tensor_of)


def same_around(first: fx.Graph, second: fx.Graph) -> bool:
    """Tell whether two graphs do the same, but for plain arguments of their opaque calls."""

    def lines(graph: fx.Graph) -> list[Any]:
        return [
            (str(node.target), str(node.args[0] if node.target is OPAQUE else node.args), str(node.kwargs))
            for node in graph.nodes
            if node.op != "placeholder"
        ]

    return lines(first) == lines(second)


def opaque_calls(graph: fx.Graph) -> list[fx.Node]:
    """Return the opaque calls of a graph."""
    return list(graph.find_nodes(op="call_function", target=OPAQUE))
