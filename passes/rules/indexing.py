"""Indexing by data: pass where labels are constant along the indexed axis, else pin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxslim.labels import CONSTANT, Value
from fxslim.passes.rules.counted import picked as picked_by_row
from fxslim.passes.rules.counted import written as written_by_row
from fxslim.passes.rules.movement import concatenate
from fxslim.passes.rules.routing import pin_numbers, tie_numbers
from fxslim.passes.rules.walk import Walk, concrete, fixed, parameter, pin_axis, rule, sizes


@rule("aten.embedding")
def embedding(walk: Walk, node: fx.Node) -> Value:
    """Rows stay, because any may be looked up; columns pass."""
    table, index = walk.value(node.args[0]), walk.value(node.args[1])
    pin_axis(walk, table, 0, "indexed by data", node)
    _pin_all(walk, node, index)
    shape = sizes(node)
    columns = tuple(own.reshape((1,) * (len(shape) - 1) + (-1,)) for own in table.labels if own.shape[0] == 1)
    return Value(shape, columns, _data(walk, node, index), index.looked_up)


def _pin_all(walk: Walk, node: fx.Node, value: Value) -> None:
    for labels in value.labels:
        walk.relations.pin(labels, walk.relations.pin_label("used as an index", node.name))


def _data(walk: Walk, node: fx.Node, index: Value) -> int:
    """What a table returns for the user's integers is data; for positions it is a constant."""
    if index.origin != CONSTANT:
        return index.origin
    return walk.relations.pin_label("looked up by an input of the model", node.name) if index.looked_up else CONSTANT


@rule("aten.index", "aten._unsafe_index")
def index(walk: Walk, node: fx.Node) -> Any:
    """Advanced indexing: labels that do not vary along the indexed axes pass."""
    value = walk.value(node.args[0])
    indices = list(node.args[1])  # type: ignore[arg-type]
    shape = sizes(node)
    picks = [axis for axis, argument in enumerate(indices) if argument is not None]
    if len(picks) == 1 and indices[picks[0]] in walk.known:
        known = walk.known[indices[picks[0]]]
        if known.dtype != torch.bool and known.ndim == 1:
            return walk.move(value, lambda t: t.index_select(picks[0], known % value.shape[picks[0]]), shape)
    by_row = picked_by_row(walk, node)
    if by_row is not None:
        return by_row[1]
    read = [walk.value(argument) for argument in indices if argument is not None]
    for own in read:
        _pin_all(walk, node, own)
    picked = len(picks) == 1 and tie_numbers(walk, node, value.along(picks[0]), read[0])
    if len(picks) > 1:
        for own in read:
            pin_numbers(walk, node, own)
    masks = any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices)
    passed = []
    axis = 0
    indexed: list[int] = []
    reason: int | None = None
    for argument in indices:
        width = argument.meta["val"].ndim if argument is not None and masks else 1
        if argument is not None:
            indexed.extend(range(axis, axis + width))
        axis += width
    for labels in value.labels:
        if picked and any(labels.shape[i] > 1 for i in indexed):
            continue
        if any(labels.shape[i] > 1 for i in indexed):
            reason = walk.relations.pin_label("indexed by data", node.name)
            walk.relations.pin(labels, reason)
            continue
        passed.append(_indexed(labels, indexed, len(shape)))
    operands = [value, *read]
    origin = next((own.origin for own in operands if own.origin != CONSTANT), CONSTANT)
    if origin != CONSTANT and reason is not None:
        origin = reason
    looked_up = any(own.looked_up for own in operands)
    if origin == CONSTANT and looked_up and value.labels:
        origin = walk.relations.pin_label("looked up by an input of the model", node.name)
    return Value(shape, tuple(passed), origin, looked_up, value.indexes)


def _indexed(labels: torch.Tensor, indexed: list[int], rank: int) -> torch.Tensor:
    """Lay labels out after advanced indexing: axes next to each other are replaced in place, others in front."""
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    kept = [size for axis, size in enumerate(labels.shape) if axis not in indexed]
    created = (1,) * (rank - len(kept))
    front = indexed[0] if together else 0
    return labels.reshape(*kept[:front], *created, *kept[front:])


@rule("aten.index_select", "aten.gather", "aten.take_along_dim")
def select(walk: Walk, node: fx.Node) -> Value:
    """Pick coordinates of one axis by data."""
    gathers = "index_select" not in str(node.target)
    position = {True: ("index", 1, "dim", 2), False: ("index", 2, "dim", 1)}["take_along" in str(node.target)]
    value = walk.value(node.args[0])
    chosen = walk.value(parameter(node, position[0], position[1]))
    axis = int(concrete(parameter(node, position[2], position[3], 0))) % max(len(value.shape), 1)
    known = None if gathers else walk.known.get(parameter(node, position[0], position[1]))
    if known is not None:
        return walk.move(value, lambda t: t.index_select(axis, known % value.shape[axis]), sizes(node))
    if not tie_numbers(walk, node, value.along(axis), chosen):
        pin_axis(walk, value, axis, "indexed by data", node)
    shape = sizes(node)
    rest = tuple(own for own in value.labels if own.shape[axis] == 1)
    source = Value(shape, rest, value.origin, value.looked_up, value.indexes)
    if not gathers:
        _pin_all(walk, node, chosen)
        origin = _data(walk, node, chosen) or value.origin
        return Value(shape, rest, origin, value.looked_up or chosen.looked_up, value.indexes)
    joined = walk.join([source, dataclasses.replace(chosen, indexes=None)], shape)
    return dataclasses.replace(joined, indexes=value.indexes)


def scattered(node: fx.Node, shape: Sequence[int]) -> tuple[int, range]:
    """Return the axis into which a piece is written, and where."""
    axis = int(concrete(parameter(node, "dim", 2, 0))) % len(shape)
    if "select_scatter" in str(node.target):
        index = int(concrete(parameter(node, "index", 3))) % shape[axis]
        return axis, range(index, index + 1)
    start, end, step = (concrete(parameter(node, n, p, d)) for n, p, d in
                        (("start", 3, None), ("end", 4, None), ("step", 5, 1)))  # fmt: skip
    return axis, range(shape[axis])[slice(start, end, step)]


@rule("aten.slice_scatter", "aten.select_scatter")
def write(walk: Walk, node: fx.Node) -> Any:
    """Write a piece into an axis: what is written over goes with the piece."""
    value, piece = walk.value(node.args[0]), walk.value(node.args[1])
    shape = sizes(node)
    axis, chosen = scattered(node, shape)
    labelled = any(own.along(axis) is not None for own in (value, piece) if len(own.shape) == len(shape))
    if chosen.step != 1 or (labelled and not fixed(node, axis)):
        return walk.opaque(node, f"no rule for {node.target} with a stride, or at places given by data")
    if "select_scatter" in str(node.target):
        whole = (*piece.shape[:axis], 1, *piece.shape[axis:])
        piece = walk.move(piece, lambda t: t.unsqueeze(axis), whole)

    if not fixed(node, axis):
        spread = Value(shape, piece.labels, piece.origin, piece.looked_up)
        return walk.join([value, spread], shape)

    def part(start: int, stop: int) -> Value:
        width = (*shape[:axis], stop - start, *shape[axis + 1 :])
        return walk.move(value, lambda t: t.narrow(axis, start, stop - start), width)

    inner = walk.join([part(chosen.start, chosen.stop), piece], piece.shape)
    parts = [part(0, chosen.start), inner, part(chosen.stop, shape[axis])]
    return concatenate(walk, [own for own in parts if own.shape[axis]], axis, shape)


@rule("aten.index_put")
def put(walk: Walk, node: fx.Node) -> Any:
    """Write one number where a mask says so, which is pointwise, or into every row; other writing has no rule."""
    by_row = written_by_row(walk, node)
    if by_row is not None:
        return by_row
    value, number = walk.value(node.args[0]), walk.value(node.args[2])
    indices = list(node.args[1])  # type: ignore[arg-type]
    masks = [index for index in indices if index is not None]
    masked = len(masks) == len(indices) == 1 and masks[0].meta["val"].dtype == torch.bool
    if not masked or number.labels or number.shape not in ((), (1,)) or parameter(node, "accumulate", 3, False):
        return scatter(walk, node)
    mask = walk.value(masks[0])
    spread = (*mask.shape, *(1,) * (len(value.shape) - len(mask.shape)))
    return walk.join([value, walk.move(mask, lambda t: t.reshape(spread), spread)], value.shape)


@rule("aten.scatter", "aten.scatter_add", "aten.index_add", "aten.index_copy", "aten.masked_scatter",
      "aten.scatter_reduce")  # fmt: skip
def scatter(walk: Walk, node: fx.Node) -> Any:
    """Writes at places given by data: only unlabelled values pass."""
    operands = walk.operands(node)
    chosen = walk.value(parameter(node, "index", 2))
    if chosen.indexes is not None and str(getattr(node.target, "overloadpacket", "")) == "aten.scatter":
        return _chosen(walk, node, chosen)
    if any(operand.labels for operand in operands):
        return walk.opaque(node, f"written at places given by data ({node.target})")
    origin = next((operand.origin for operand in operands if operand.origin != CONSTANT), CONSTANT)
    return walk.bare(node, origin, looked_up=any(operand.looked_up for operand in operands))


def _chosen(walk: Walk, node: fx.Node, chosen: Value) -> Any:
    """Write where the numbers of what was selected say: the axis is that of the coordinates they stand for."""
    value, piece = walk.value(node.args[0]), walk.value(parameter(node, "src", 3))
    axis = int(concrete(parameter(node, "dim", 1))) % len(value.shape)
    labels = value.along(axis)
    assert chosen.indexes is not None
    if piece.labels or chosen.labels or any(own is not labels for own in value.labels):
        pin_numbers(walk, node, chosen)
        return walk.opaque(node, f"written at places given by data ({node.target})")
    if labels is None and value.shape[axis] == chosen.indexes.numel() and value.origin == CONSTANT:
        pin_numbers(walk, node, chosen)  # an axis that cannot be resized
    elif not tie_numbers(walk, node, labels, chosen) and labels is not None:
        return walk.opaque(node, f"written at places given by data ({node.target})")
    return Value(value.shape, value.labels, chosen.origin, value.looked_up or chosen.looked_up)
