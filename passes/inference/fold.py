"""Compute once what is computed of parameters, buffers and numbers alone."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxslim.dtypes import limit_of
from fxslim.passes.inference.draft import Draft, add, put, storage
from fxslim.passes.inference.views import leaving
from fxslim.pipeline import Facts

SMALL = 1 << 20
"""Bytes that a constant may take beyond those of the tensors that nobody reads any more because of it."""
PLAIN = (bool, int, float, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
"""Values that generated code can spell out."""
PYTHON = (operator.__name__, "_operator", math.__name__)
"""Modules whose functions return the same for the same numbers."""


@dataclass(frozen=True)
class FoldConstants:
    """Put tensors and numbers in the place of what computes them anew at every call.

    Requires: no operation writes into its operands. Ensures: sizes of inputs stay open, and what is stored instead is
    small, or no larger than what it is made of and nobody else reads. What leaves is computed anew at every call.
    """

    requires: ClassVar[tuple[type, ...]] = (Draft,)
    ensures: ClassVar[tuple[type, ...]] = (Draft,)

    def run(self, facts: Facts) -> Facts:
        """Fold."""
        draft = facts.get(Draft).copied()
        graph, tensors = draft.graph, dict(draft.tensors)
        values, kept = _values(graph, tensors), leaving(graph)
        for node in reversed(list(graph.nodes)):  # the last constant of a chain first: the rest of it is not read then
            if node.op != "call_function" or node not in values or node in kept:
                continue
            if not node.users:
                graph.erase_node(node)
                continue
            value = values[node]
            if isinstance(value, PLAIN):
                put(node, value)
            elif isinstance(value, torch.Tensor) and _fits(node, value := _loadable(value), values):
                with graph.inserting_before(node):
                    made = graph.get_attr(add(tensors, "constant", value))
                node.replace_all_uses_with(made)
                graph.erase_node(node)
        return facts.adding(draft.holding(tensors))


def _values(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
    """Return the value of every node that is the same at every call."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "get_attr":
                values[node] = tensors[node.target]
            elif repeatable(node) and all(read in values for read in node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def repeatable(node: fx.Node) -> bool:
    """Tell whether a node returns the same whenever it reads the same."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        known = node.target.namespace in ("aten", "prims") and "empty" not in node.target.__name__
        return known and not node.is_impure() and torch.Tag.nondeterministic_seeded not in node.target.tags
    return node.target in (builtins.getattr, limit_of) or getattr(node.target, "__module__", "") in PYTHON


def _fits(node: fx.Node, value: torch.Tensor, values: Mapping[fx.Node, Any]) -> bool:
    """Tell whether a constant may be stored."""
    gone = {node}
    freed: dict[int, int] = {}
    pending = [node]
    while pending:
        for read in pending.pop().all_input_nodes:
            if read in gone or not set(read.users) <= gone:
                continue
            gone.add(read)
            pending.append(read)
            if read.op == "get_attr":
                freed[storage(values[read])] = _bytes(values[read])
    mine = 0 if storage(value) in {storage(values[n]) for n in values if n.op == "get_attr"} else _bytes(value)
    return mine <= sum(freed.values()) + SMALL


def _loadable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that can be loaded into: elements that share their memory, as expanded ones do, cannot be."""
    shared = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if shared else tensor


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
