"""Do the rows of attention weights sum to one on every input? Only then does a constant value pass through them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxslim.passes.annotate import ASSERTIONS, POSITIONS, operation
from fxslim.passes.folding.facts import COPIES, moved
from fxslim.passes.rules.movement import CREATIONS, MOVES, SPLITS
from fxslim.passes.rules.walk import concrete, parameter, sizes
from fxslim.program import Program

HIDDEN = "a mask may hide all positions from a row of the attention"
DROPOUT = "attention dropout changes the sums of the rows"
UNKNOWN = "the model does not run in training mode, where attention may have dropout"
SINKS = "part of the softmax is cut off, as with attention sinks"
GATED = "the softmax is scaled or gated"
OTHER = "the rows of the attention do not come straight from a softmax"

SOFTMAX = ("aten.softmax", "aten._softmax", "aten._safe_softmax")
PRODUCTS = ("aten.matmul", "aten.bmm", "aten.mm", "aten.einsum", "aten.linear", "aten.addmm", "aten.baddbmm")
SCALES = ("aten.mul", "aten.div")
SUMS = ("aten.add", "aten.sub", "aten.rsub", "aten.baddbmm")
CHOICES = ("aten.where", "aten.masked_fill", "aten.full", "aten.full_like", "aten.fill", "aten.scalar_tensor",
           "aten.zeros_like", "aten.ones_like", *CREATIONS)  # fmt: skip
SHAPES = (*MOVES, *SPLITS, *COPIES, "aten.expand", "aten.broadcast_to", "aten.repeat", "aten.cat",
          "aten.neg", "aten.tanh", "aten.index", "aten.embedding", "aten.gather", "aten.dropout",
          "aten.tril", "aten.triu", "aten.repeat_interleave")  # fmt: skip


def unequal(program: Program, node: Any) -> str | None:
    """Return why the last axis of attention weights may not sum to one, or None where it does.

    Numbers are assumed to be finite: a row of a softmax that is not NaN sums to one.
    """
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = operation(node)
        source = node.args[0] if node.args else None
        if name in SOFTMAX:
            axis = int(concrete(parameter(node, "dim", 1)))
            if axis % len(sizes(node)) != len(sizes(node)) - 1:
                return OTHER
            return None if bounded(program, source) else HIDDEN
        if name == "aten.dropout" and parameter(node, "p", 1):
            return DROPOUT
        if name in SCALES:
            return GATED
        if name in ("aten.slice", "aten.narrow", "aten.select") and not _keeps_last(node, source):
            return SINKS
        if name not in (*COPIES, *MOVES, "aten.dropout", "aten.expand") or not _keeps_last(node, source):
            return OTHER
        node = source
    return OTHER


def _keeps_last(node: fx.Node, source: Any) -> bool:
    """Tell whether a data movement moves whole rows along the last axis."""
    name = operation(node)
    if not isinstance(source, fx.Node) or not sizes(source) or not sizes(node):
        return False
    before, after = source.meta["val"].shape[-1], node.meta["val"].shape[-1]
    if str(before) != str(after):  # open sizes may agree by chance in the example
        return False
    places = torch.arange(sizes(source)[-1]).expand(sizes(source))
    if name in (*COPIES, "aten.dropout", "aten.expand"):
        return True
    return bool((moved(node, places) == torch.arange(sizes(node)[-1])).all())


def bounded(program: Program, node: Any) -> bool:
    """Tell whether scores are finite whatever the inputs are: products are, unless a mask holds infinities."""
    return _bound(program, node, {}) is not None


def _bound(program: Program, node: Any, seen: dict[fx.Node, bool | None]) -> bool | None:
    """Return whether a value may be as large as its dtype's limit; None where it may be infinite."""
    if isinstance(node, bool | int | float):
        return None if not math.isfinite(node) else abs(node) > LARGE
    if isinstance(node, tuple | list):
        return _largest([_bound(program, item, seen) for item in node])
    if not isinstance(node, fx.Node):
        return False
    if node not in seen:
        seen[node] = _bound_of(program, node, seen)
    return seen[node]


LARGE = 1e4
"""Numbers above this are stand-ins for infinity (the smallest limit, float16's, is 65504)."""


def _bound_of(program: Program, node: fx.Node, seen: dict[fx.Node, bool | None]) -> bool | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    tensor = program.tensor_name(node)
    if tensor is not None:
        own = program.tensors[tensor]
        return bool((own.abs() > LARGE).any()) if bool(own.isfinite().all()) else None
    name = operation(node)
    if node.op != "call_function" or name in ASSERTIONS:
        return None
    if name in PRODUCTS and name != "aten.baddbmm":
        return False
    if name in POSITIONS and name != "aten.scalar_tensor":
        return False
    reads: list[Any] = [node.args[0]] if name == "aten.baddbmm" else [*node.args, *node.kwargs.values()]
    if name in SHAPES:  # their numbers are axes and places
        reads = list(node.all_input_nodes)
    if name in COPIES:
        source = node.args[0]
        bound = _bound(program, source, seen)
        narrower = isinstance(source, fx.Node) and _limit(value) < _limit(source.meta["val"])
        return None if bound and narrower else bound
    bounds = [_bound(program, argument, seen) for argument in reads]
    if name in SUMS:
        return None if sum(bool(bound) for bound in bounds) > 1 else _largest(bounds)
    if name in SCALES:
        divides = name == "aten.div" and not isinstance(node.args[1], int | float)
        return None if divides or any(bounds) else _largest(bounds)
    return _largest(bounds) if name in (*CHOICES, *SHAPES) else None


def _limit(value: torch.Tensor) -> float:
    return torch.finfo(value.dtype).max if value.is_floating_point() else math.inf


def _largest(bounds: list[bool | None]) -> bool | None:
    return None if None in bounds else any(bounds)
