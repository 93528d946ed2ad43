"""How a module inside a model is called: its arguments by name, and whether they are what was traced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.errors import InputError
from fxslim.program import SizeRange, hint, is_symbolic

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Values that a trace fixes, and that can be compared with what it fixed."""


def signature_of(module: nn.Module) -> inspect.Signature:
    """Return the signature of a module's own ``forward``, without annotations."""
    parameters = inspect.signature(type(module).forward.__get__(module)).parameters.values()
    return inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, in one order, without those that are their parameter's default.

    Raises:
        InputError: an argument cannot be given by its name.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"its arguments do not fit its forward: {error}") from error
    named: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest = {key: value[key] for key in sorted(value)}
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise InputError(f"it takes {name!r} by position alone")
        elif not _same(value, parameter.default):
            named[name] = value
    return named | rest


def _same(value: Any, other: Any) -> bool:
    """Tell whether two plain values are the same; tensors and objects never are."""
    return isinstance(value, PLAIN) and type(value) is type(other) and bool(value == other)


@dataclass(frozen=True)
class Leaf:
    """What was traced for one tensor.

    Attributes:
        name: what to call it in errors.
        dtype: its dtype.
        rank: its number of axes.
        fixed: axis -> the only size that it can have.
        limits: axis -> smallest and largest size.
        shared: axis -> the name of its size; axes of one name have one size.
    """

    name: str
    dtype: torch.dtype
    rank: int
    fixed: Mapping[int, int]
    limits: Mapping[int, tuple[int, int | None]]
    shared: Mapping[int, str]

    def misfit(self, value: Any, sizes: dict[str, int]) -> str | None:
        """Say why a value is not what was traced; remember the sizes of open axes."""
        if not isinstance(value, torch.Tensor):
            return f"{self.name} is no tensor"
        if value.dtype != self.dtype or value.ndim != self.rank:
            return f"{self.name} is {value.dtype} of {value.ndim} axes instead of {self.dtype} of {self.rank}"
        for axis, size in enumerate(value.shape):
            low, high = self.limits.get(axis, (0, None))
            known = sizes.setdefault(self.shared[axis], size) if axis in self.shared else self.fixed.get(axis, size)
            if size != known or size < low or (high is not None and size > high):
                return f"{self.name} has size {size} along axis {axis}"
        return None


@dataclass(frozen=True)
class Entry:
    """What a region was traced for.

    Attributes:
        spec: structure of the arguments by name.
        leaves: for every leaf a Leaf, or the plain value that it has to have.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    def misfit(self, arguments: Mapping[str, Any]) -> str | None:
        """Say why a call is not what was traced, or return None."""
        leaves, spec = pytree.tree_flatten(dict(arguments))
        if spec != self.spec:
            return f"it is called with {', '.join(arguments) or 'nothing'} in another structure"
        sizes: dict[str, int] = {}
        for leaf, wanted in zip(leaves, self.leaves, strict=True):
            if not isinstance(wanted, Leaf):
                if not _same(leaf, wanted):
                    return f"it is called with {leaf!r:.40} instead of {wanted!r:.40}"
            elif (reason := wanted.misfit(leaf, sizes)) is not None:
                return reason
        return None


def entry(example: Mapping[str, Any], inputs: tuple[str, ...], ranges: tuple[SizeRange, ...], graph: fx.Graph) -> Entry:
    """Return what a region was traced for.

    Args:
        example: its arguments by name.
        inputs: placeholder names of their leaves, in order.
        ranges: sizes for which the trace holds.
        graph: the graph that holds the placeholders.
    """
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    leaves = []
    for name, leaf in zip(inputs, pytree.tree_leaves(dict(example)), strict=True):
        if not isinstance(leaf, torch.Tensor):
            leaves.append(leaf)
            continue
        shape = nodes[name].meta["val"].shape
        leaves.append(
            Leaf(
                name=str(nodes[name].target),
                dtype=leaf.dtype,
                rank=leaf.ndim,
                fixed={axis: hint(size) for axis, size in enumerate(shape) if not is_symbolic(size)},
                limits={limit.axis: (limit.low, limit.high) for limit in ranges if limit.input == name},
                shared={axis: str(size.node.expr) for axis, size in enumerate(shape) if _is_symbol(size)},
            )
        )
    return Entry(pytree.tree_structure(dict(example)), tuple(leaves))


def _is_symbol(size: Any) -> bool:
    """Tell whether an open size is one of its own, not computed from others."""
    return is_symbolic(size) and bool(size.node.expr.is_symbol)
