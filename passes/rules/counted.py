"""Indexing by data beside a count of an axis, ``x[arange(len(x))[:, None], chosen]``: every entry stays in its row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxslim.labels import CONSTANT, Value, axes_of
from fxslim.passes.rules.movement import COPIES
from fxslim.passes.rules.routing import pin_numbers
from fxslim.passes.rules.walk import Walk, origin_of, parameter, sizes

SHAPES = ("aten.unsqueeze", "aten.view", "aten.reshape", "aten.squeeze", "aten.slice", *COPIES)
"""What may stand between a count and where it is used, as long as its numbers are all there in their order."""


@dataclass(frozen=True)
class Counted:
    """Indices of several axes in a row, one of which counts its axis.

    Attributes:
        axis: the axis that is counted.
        place: which axis of the indices counts it.
        rank: how many axes the indices have.
        axes: the indexed axes.
        size: how long the counted axis is.
    """

    axis: int
    place: int
    rank: int
    axes: tuple[int, ...]
    size: int


def counted(node: fx.Node) -> Counted | None:
    """Return what is counted in an index or an index_put, or None."""
    source: Any = node.args[0]
    read: list[fx.Node | None] = list(node.args[1])  # type: ignore[arg-type]
    axes = tuple(axis for axis, index in enumerate(read) if index is not None)
    given = [index for index in read if index is not None]
    whole = not any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in given)
    if len(axes) < 2 or not whole or axes != tuple(range(axes[0], axes[-1] + 1)):
        return None
    rank = max(len(sizes(index)) for index in given)
    for axis, index in zip(axes, given, strict=True):
        size = source.meta["val"].shape[axis]
        own = [place for place, length in enumerate(sizes(index)) if length > 1]
        if len(own) == 1 and _same(index.meta["val"].shape[own[0]], size) and _counts(index, size):
            return Counted(axis, own[0] + rank - len(sizes(index)), rank, axes, sizes(source)[axis])
    return None


def _counts(index: Any, size: Any) -> bool:
    """Tell whether an index is the numbers from zero up to a size, in their order."""
    while isinstance(index, fx.Node) and str(getattr(index.target, "overloadpacket", "")) in SHAPES:
        index = index.args[0]
    if not isinstance(index, fx.Node) or not _same(index.meta["val"].numel(), size):
        return False
    target = str(index.target)
    first = 0 if target == "aten.arange.default" else index.args[0] if target.startswith("aten.arange.start") else None
    return isinstance(first, int) and first == 0 and bool(parameter(index, "step", 2, 1) == 1)


def _same(first: Any, second: Any) -> bool:
    """Tell whether two sizes are the same number, or the same expression."""
    one, other = (getattr(getattr(size, "node", None), "expr", size) for size in (first, second))
    return bool(one == other)


def picked(walk: Walk, node: fx.Node, more: tuple[Value, ...] = ()) -> tuple[Counted, Value] | None:
    """Return the labels of what a node picks (or writes over), joined with the indices and some more; None: no rule.

    The other indexed axes are tied: any of their coordinates may be picked. Axes are those of the result of an index.
    """
    form = counted(node)
    value = walk.value(node.args[0])
    if form is None or value.along(form.axis) is None:
        return None
    read = {axis: walk.value(index) for axis, index in enumerate(node.args[1]) if index is not None}  # type: ignore[arg-type]
    places = {axis: form.place - form.rank + len(own.shape) for axis, own in read.items() if axis != form.axis}
    if any(at >= 0 and read[axis].shape[at] > 1 and read[axis].along(at) is None for axis, at in places.items()):
        return None  # other places for each row, by numbers that have no labels there
    behind = len(value.shape) - form.axes[-1] - 1
    chosen = []
    for axis, at in places.items():
        own = read[axis]
        pin_numbers(walk, node, own)
        for labels in own.labels:
            if axes_of(labels) != {at}:
                walk.relations.pin(labels, walk.relations.pin_label("used as an index", node.name))
        chosen.append(_behind(dataclasses.replace(own, indexes=None), behind))
    origin = origin_of((*more, *chosen, value))
    others = [axis for axis in form.axes if axis != form.axis]
    kept = []
    for labels in value.labels:
        if axes_of(labels) <= set(others):
            walk.relations.pin(labels, walk.relations.pin_label("indexed by data", node.name))
        else:
            kept.append(_to_result(walk.tie_along(labels, others), form))
    shape = _result(node, value, read, form)
    source = Value(shape, tuple(kept), origin, value.looked_up)
    more = tuple(dataclasses.replace(own, origin=origin) for own in more)
    return form, walk.join([source, *chosen, *more], shape)


def _result(node: fx.Node, value: Value, read: dict[int, Value], form: Counted) -> tuple[int, ...]:
    indices = torch.broadcast_shapes(*(own.shape for own in read.values()))
    return (*value.shape[: form.axes[0]], *indices, *value.shape[form.axes[-1] + 1 :])


def _behind(value: Value, count: int) -> Value:
    """Put axes of size 1 behind a value's own."""
    ones = (1,) * count
    labels = tuple(own.reshape(*own.shape, *ones) for own in value.labels)
    return dataclasses.replace(value, shape=(*value.shape, *ones), labels=labels)


def _to_result(labels: torch.Tensor, form: Counted) -> torch.Tensor:
    """Lay labels of the indexed value out as in the result: the counted axis stands among those of the indices."""
    indices = [labels.shape[form.axis] if place == form.place else 1 for place in range(form.rank)]
    return labels.reshape(*labels.shape[: form.axes[0]], *indices, *labels.shape[form.axes[-1] + 1 :])


def _from_result(labels: torch.Tensor, form: Counted) -> torch.Tensor:
    """Lay labels of the result out as in the value that is indexed."""
    first = form.axes[0]
    indexed = [labels.shape[first + form.place] if axis == form.axis else 1 for axis in form.axes]
    return labels.reshape(*labels.shape[:first], *indexed, *labels.shape[first + form.rank :])


def written(walk: Walk, node: fx.Node) -> Value | None:
    """Return the labels of what an index_put returns, or None where there is no rule."""
    value, piece = walk.value(node.args[0]), walk.value(node.args[2])
    form = counted(node)
    if form is None or value.along(form.axis) is None:
        return None
    first = form.axes[0] - (len(value.shape) - len(form.axes) + form.rank - len(piece.shape))
    spots = [first + place for place in range(form.rank) if place != form.place and first + place >= 0]
    if any(axes_of(labels) & set(spots) for labels in piece.labels) or origin_of((piece, value)) == CONSTANT:
        return None
    found = picked(walk, node, (piece,))
    if found is None:
        return None
    _, joined = found
    labels = tuple(_from_result(own, form) for own in joined.labels)
    return Value(value.shape, labels, joined.origin, joined.looked_up)


def pick(tensor: torch.Tensor, form: tuple[int, int, int], indices: list[torch.Tensor | None]) -> torch.Tensor:
    """Index, counting an axis as long as it is now."""
    return torch.ops.aten.index.Tensor(tensor, _counting(tensor, form, indices))  # type: ignore[no-any-return]


def put(
    tensor: torch.Tensor,
    form: tuple[int, int, int],
    indices: list[torch.Tensor | None],
    piece: torch.Tensor,
    accumulate: bool = False,
) -> torch.Tensor:
    """Write at indices, counting an axis as long as it is now."""
    return torch.ops.aten.index_put.default(tensor, _counting(tensor, form, indices), piece, accumulate)  # type: ignore[no-any-return]


def _counting(
    tensor: torch.Tensor, form: tuple[int, int, int], indices: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    axis, place, rank = form
    shape = [-1 if own == place else 1 for own in range(rank)]
    count = torch.arange(tensor.shape[axis], device=tensor.device).reshape(shape)
    return [count if own == axis else index for own, index in enumerate(indices)]
