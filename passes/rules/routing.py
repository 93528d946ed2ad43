"""Routing: what is selected by value, and what the numbers of the selected stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from fxslim.labels import CONSTANT, Value, axes_of
from fxslim.passes.rules.movement import COPIES, MOVES
from fxslim.passes.rules.walk import Selection, Walk, concrete, parameter, rule
from fxslim.program import Program

SOFTMAX = ("aten.softmax", "aten._softmax", "aten._safe_softmax")
BARRIERS = (
    "aten.linear", "aten.mm", "aten.bmm", "aten.matmul", "aten.addmm", "aten.baddbmm", "aten.einsum", "aten.embedding",
    "aten.scaled_dot_product_attention", "aten.layer_norm", "aten.rms_norm",
)  # fmt: skip
"""Operations behind which nothing competes for this selection any more."""
AWARE = (
    *MOVES, *COPIES, "aten.sort", "aten.argsort", "aten.index", "aten.index_select", "aten.scatter",
    "aten.gather", "aten.histc",
)  # fmt: skip
"""Operations whose rules know what numbers of coordinates stand for."""


def operation_name(node: fx.Node) -> str:
    """Return an operation's name without overload."""
    return str(getattr(node.target, "overloadpacket", node.target))


def on_the_way(program: Program) -> frozenset[fx.Node]:
    """Return the nodes between a product and a top-k."""
    found: set[fx.Node] = set()
    pending = [n for node in program.graph.nodes if operation_name(node) == "aten.topk" for n in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in found and operation_name(node) not in BARRIERS:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return frozenset(found)


def competes(walk: Walk, node: fx.Node, value: Value, axis: int) -> bool:
    """Tell whether a softmax is one on the way to a top-k over its axis; then remember it."""
    labels = value.along(axis) if value.shape else None
    if node not in walk.routing or operation_name(node) not in SOFTMAX or labels is None:
        return False
    if axes_of(labels) != {axis % len(value.shape)} or value.origin == CONSTANT:
        return False
    walk.selections.append(Selection(node, node.args[0], labels))  # type: ignore[arg-type]
    return True


def best_of(walk: Walk, node: fx.Node, value: Value, axis: int, count: int = 0) -> Value:
    """Let the best of each group stand for the group, which goes exactly when all of it goes."""
    axis %= len(value.shape)
    labels = value.along(axis)
    if (count == 0 and node not in walk.routing) or labels is None or len(axes_of(labels)) != 2:
        return value
    shape = [1 if a == axis else size for a, size in enumerate(labels.shape)]
    groups = walk.relations.fresh(labels.numel() // labels.shape[axis]).reshape(shape)
    walk.relations.parent(groups, labels)
    walk.selections.append(Selection(node, node.args[0], labels, count))  # type: ignore[arg-type]
    rest = tuple(own for own in value.labels if own is not labels)
    return dataclasses.replace(value, labels=(*rest, groups))


def counts_up(node: fx.Node) -> bool:
    """Tell whether a sum runs over how often each coordinate was selected: what is never selected adds nothing."""
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and operation_name(source) in COPIES:
        source = source.args[0]
    return (
        operation_name(node) == "aten.cumsum" and isinstance(source, fx.Node) and operation_name(source) == "aten.histc"
    )


def pin_numbers(walk: Walk, node: fx.Node, value: Value, reason: str = "") -> None:
    """Pin the coordinates that a value's numbers stand for: somebody reads the numbers themselves."""
    if value.indexes is not None:
        said = reason or f"numbers of what is selected are read by {operation_name(node)}"
        walk.relations.pin(value.indexes, walk.relations.pin_label(said, node.name))


def tie_numbers(walk: Walk, node: fx.Node, labels: torch.Tensor | None, chosen: Value) -> bool:
    """Tie an axis with the coordinates whose numbers pick from it; pin these where the axis is another one."""
    if chosen.indexes is None:
        return False
    if labels is None or len(axes_of(labels)) != 1 or labels.numel() != chosen.indexes.numel():
        pin_numbers(walk, node, chosen)
        return False
    walk.relations.tie(labels.reshape(-1), chosen.indexes)
    walk.indexed.append(chosen.indexes)
    return True


@rule("aten.topk", "aten.sort")
def ordered(walk: Walk, node: fx.Node) -> Any:
    """Select by value: what competes may go, where the numbers of the selected only pick what belongs to them."""
    value = walk.value(node.args[0])
    topk = operation_name(node) == "aten.topk"
    axis = int(concrete(parameter(node, "dim", 2 if topk else 1, -1))) % len(value.shape)
    count = int(concrete(node.meta["val"][0].shape[axis]))
    out = tuple(count if a == axis else size for a, size in enumerate(value.shape))
    labels = value.along(axis)
    numbers = None
    if labels is not None and topk and value.origin != CONSTANT and axes_of(labels) == {axis}:
        walk.selections.append(Selection(node, node.args[0], labels, count))  # type: ignore[arg-type]
        numbers = labels.reshape(-1)
    elif labels is not None and topk and value.origin != CONSTANT and len(axes_of(labels)) == 2:
        value, numbers = best_of(walk, node, value, axis, count), labels.reshape(-1)
    elif labels is not None:
        reason = walk.relations.pin_label(f"selected by value ({node.target})", node.name)
        walk.relations.pin(labels, reason)
        value = dataclasses.replace(value, origin=value.origin if value.origin == CONSTANT else reason)
    rest = tuple(own for own in value.labels if own.shape[axis] == 1)
    values = Value(out, rest, value.origin, value.looked_up, value.indexes)
    return values, dataclasses.replace(values, indexes=numbers)


@rule("aten.histc")
def histogram(walk: Walk, node: fx.Node) -> Any:
    """Count how often each number occurs: one bin for each coordinate."""
    value = walk.value(node.args[0])
    bins, low, high = (
        concrete(parameter(node, n, p, d)) for n, p, d in (("bins", 1, 100), ("min", 2, 0), ("max", 3, 0))
    )
    if value.labels:
        return walk.opaque(node, "no rule for aten.histc")
    if value.indexes is None or (bins, low, high) != (value.indexes.numel(), 0, value.indexes.numel() - 1):
        pin_numbers(walk, node, value)
        return walk.bare(node, value.origin, looked_up=value.looked_up)
    walk.indexed.append(value.indexes)
    return Value((bins,), (value.indexes,), value.origin, value.looked_up)
