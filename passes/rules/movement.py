"""Data movement: run the very operation on the labels. Axes that an operation creates get labels of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxslim.labels import CONSTANT, Value, axes_of, clusters, compact, merge
from fxslim.passes.rules.walk import Walk, concrete, fixed, multiple, origin_of, parameter, rule, sizes
from fxslim.program import hint

MOVES = (
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.transpose", "aten.permute", "aten.t", "aten.slice",
    "aten.select", "aten.squeeze", "aten.unsqueeze", "aten.flatten", "aten.unflatten", "aten.movedim", "aten.swapaxes",
    "aten.swapdims", "aten.narrow", "aten.flip", "aten.roll", "aten.unfold", "aten.numpy_T", "aten.mT",
    "aten.adjoint", "aten.diagonal", "aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.rot90", "aten.ravel",
    "aten.matrix_H", "aten.moveaxis",
)  # fmt: skip
COPIES = ("aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.detach", "aten.alias")
"""Casts and copies: the values stay where they are."""
SPLITS = (
    "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split", "aten.unsafe_split",
    "aten.unsafe_chunk",
)  # fmt: skip


def _call(node: fx.Node) -> Callable[..., Any]:
    """Return a node's operation, to be run on labels."""
    return anyhow(node.target)


def anyhow(target: Any) -> Callable[..., Any]:
    """Return an operation that moves labels as it moves values, whatever strides the labels have."""
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    made: Callable[..., Any] = torch.ops.aten.reshape.default if target in views else target
    return made


@rule(*MOVES)
def move(walk: Walk, node: fx.Node) -> Value:
    """Move labels like the values."""
    arguments = tuple(concrete(argument) for argument in node.args[1:])
    keywords = {name: concrete(argument) for name, argument in node.kwargs.items()}
    return walk.move(walk.value(node.args[0]), lambda t: _call(node)(t, *arguments, **keywords), sizes(node))


@rule(*SPLITS)
def split(walk: Walk, node: fx.Node) -> tuple[Value, ...]:
    """Move labels into each of the parts."""
    arguments = tuple(concrete(argument) for argument in node.args[1:])
    keywords = {name: concrete(argument) for name, argument in node.kwargs.items()}
    value = walk.value(node.args[0])
    shape = value.shape
    if "split" in str(node.target) and value.along(int(concrete(parameter(node, "dim", 2, 0)))) is None:
        made = (tuple(hint(size) for size in part.shape) for part in node.meta["val"])
        return tuple(Value(own, value.labels, value.origin, value.looked_up) for own in made)
    parts = [_call(node)(labels.expand(shape), *arguments, **keywords) for labels in value.labels]
    shapes = [tuple(part.shape) for part in _call(node)(torch.empty(shape, device="meta"), *arguments, **keywords)]
    pieces = []
    for i, own in enumerate(shapes):
        moved = tuple(compact(part[i]) for part in parts)
        walk.pin_single(moved)
        pieces.append(walk.tidy(Value(own, moved, value.origin, value.looked_up)))
    return tuple(pieces)


@rule("aten.expand", "aten.broadcast_to")
def expand(walk: Walk, node: fx.Node) -> Value:
    """Axes created by a constant size carry labels: children of what is copied, or labels of their own."""
    value = walk.value(node.args[0])
    shape = sizes(node)
    missing = len(shape) - len(value.shape)
    before = (1,) * missing + value.shape
    labels = tuple(own.reshape((1,) * missing + tuple(own.shape)) for own in value.labels)
    created = [axis for axis in range(len(shape)) if before[axis] == 1 and shape[axis] > 1 and fixed(node, axis)]
    return _copies(walk, Value(shape, labels, value.origin, value.looked_up), created)


def _copies(walk: Walk, value: Value, created: list[int]) -> Value:
    """Give the created axes of a value labels: a copy is a child of its original."""
    if not created:
        return value
    rank = len(value.shape)
    axis_shape = [value.shape[axis] if axis in created else 1 for axis in range(rank)]
    count = 1
    for size in axis_shape:
        count *= size
    if not value.labels:
        own = tuple(
            walk.relations.fresh(value.shape[axis]).reshape([-1 if a == axis else 1 for a in range(rank)])
            for axis in created
        )
        return Value(value.shape, own, value.origin, value.looked_up)
    originals = torch.broadcast_tensors(*value.labels)[0].shape
    full = [max(size, extra) for size, extra in zip(originals, axis_shape, strict=True)]
    total = 1
    for size in full:
        total *= size
    copies = walk.relations.fresh(total).reshape(full)
    for labels in value.labels:
        walk.relations.parent(labels, copies)
    return Value(value.shape, (copies,), value.origin, value.looked_up)


def repeat_axis(walk: Walk, value: Value, axis: int, times: int) -> Value:
    """Repeat each coordinate of an axis ``times`` times in a row; copies are children of their originals."""
    axis %= len(value.shape)
    shape = (*value.shape[: axis + 1], times, *value.shape[axis + 1 :])
    labels = tuple(own.unsqueeze(axis + 1) for own in value.labels)
    mine = tuple(own for own in labels if own.shape[axis] > 1)  # what varies along other axes alone is not copied
    copied = _copies(walk, Value(shape, mine or labels, value.origin, value.looked_up), [axis + 1])
    others = tuple(own for own in labels if own.shape[axis] == 1) if mine else ()
    copied = Value(shape, (*copied.labels, *others), value.origin, value.looked_up)
    merged = (*value.shape[:axis], value.shape[axis] * times, *value.shape[axis + 1 :])
    return walk.move(copied, lambda t: t.reshape(merged), merged)


@rule("aten.repeat_interleave")
def repeat_interleave(walk: Walk, node: fx.Node) -> Any:
    """Repeat by a constant along one axis."""
    times, axis = parameter(node, "repeats", 1), parameter(node, "dim", 2)
    value = walk.value(node.args[0])
    if not isinstance(times, int) or axis is None:
        if not value.labels:
            return walk.bare(node, value.origin, looked_up=value.looked_up)
        return walk.opaque(node, "repeat_interleave by data")
    if value.along(axis) is None and not fixed(node, axis % len(value.shape)):  # rows of a batch
        return Value(sizes(node), value.labels, value.origin, value.looked_up)
    return repeat_axis(walk, value, axis, times) if times > 1 else value


@rule("aten.repeat", "aten.tile")
def repeat(walk: Walk, node: fx.Node) -> Value:
    """Repeat whole axes: a new leading factor for every axis, merged into it."""
    value = walk.value(node.args[0])
    times = tuple(concrete(parameter(node, "repeats", 1)))
    shape = (1,) * (len(times) - len(value.shape)) + value.shape
    paired = [size for pair in zip(times, shape, strict=True) for size in pair]
    spread = tuple(
        own.reshape([s for size in (1,) * (len(times) - own.ndim) + tuple(own.shape) for s in (1, size)])
        for own in value.labels
    )
    created = [2 * axis for axis, count in enumerate(times) if count > 1 and (fixed(node, axis) or value.labels)]
    created = [axis for axis in created if fixed(node, axis // 2)]
    copied = _copies(walk, Value(tuple(paired), spread, value.origin, value.looked_up), created)
    return walk.move(copied, lambda t: t.reshape(sizes(node)), sizes(node))


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(walk: Walk, node: fx.Node) -> Value:
    """Concatenate labels along the axis, join the operands on all other axes."""
    operands = [walk.value(argument) for argument in node.args[0]]  # type: ignore[union-attr]
    operands = [operand for operand in operands if operand.shape != (0,)]
    shape = sizes(node)
    return concatenate(walk, operands, int(concrete(parameter(node, "dim", 1, 0))) % len(shape), shape)


@rule("aten.stack")
def stack(walk: Walk, node: fx.Node) -> Value:
    """Concatenate along a new axis."""
    shape = sizes(node)
    axis = int(concrete(parameter(node, "dim", 1, 0))) % len(shape)
    operands = [
        walk.move(walk.value(argument), lambda t: t.unsqueeze(axis), (*shape[:axis], 1, *shape[axis + 1 :]))
        for argument in node.args[0]  # type: ignore[union-attr]
    ]
    return concatenate(walk, operands, axis, shape)


def concatenate(walk: Walk, operands: list[Value], axis: int, shape: tuple[int, ...]) -> Value:
    """Combine operands along an axis."""
    relations = walk.relations
    origin, looked_up = origin_of(operands), any(operand.looked_up for operand in operands)
    every = [labels for operand in operands for labels in operand.labels]
    marker = torch.empty([2 if a == axis else 1 for a in range(len(shape))], device="meta")
    merged: list[torch.Tensor] = []
    for axes, members in clusters([*every, marker] if every else []):
        if axis not in axes:
            labels = merge(relations, axes, members)
            for operand in operands:
                walk.settle(labels, axes, operand)
            merged.append(labels)
            continue
        parts = []
        for operand in operands:
            own = [labels for labels in operand.labels if axes_of(labels) & axes]
            full = [operand.shape[a] if a in axes else 1 for a in range(len(shape))]
            if own:
                parts.append(merge(relations, frozenset().union(*map(axes_of, own)), own).expand(full))
            elif operand.origin != CONSTANT:
                parts.append(torch.full((1,) * len(shape), operand.origin).expand(full))
            else:
                others = [1 if a == axis else size for a, size in enumerate(full)]
                count = 1
                for size in others:
                    count *= size
                # A constant can be gathered on the other axes, so those get labels that go with whatever meets them.
                own_labels = relations.fresh(count) if count > 1 else torch.tensor([CONSTANT])
                parts.append(own_labels.reshape(others).expand(full))
        merged.append(compact(torch.cat(parts, dim=axis)))
    return walk.tidy(Value(shape, tuple(merged), origin, looked_up))


@rule("aten.pad", "aten.constant_pad_nd")
def pad(walk: Walk, node: fx.Node) -> Any:
    """Pad with coordinates that stay; along an axis of several labelled ones, all coordinates go together."""
    value = walk.value(node.args[0])
    widths = concrete(node.args[1])
    shape = sizes(node)
    padded = {len(shape) - 1 - i // 2 for i, width in enumerate(widths) if width}
    tied = (own if axes_of(own) <= padded else walk.tie_along(own, sorted(padded)) for own in value.labels)
    value = dataclasses.replace(value, labels=tuple(tied))
    if parameter(node, "mode", 2, "constant") not in ("constant", 0) and any(
        axes_of(labels) & padded for labels in value.labels
    ):
        return walk.opaque(node, "padding a labelled axis with its own values")
    if any(axes_of(labels) & padded and len(axes_of(labels)) > 1 for labels in value.labels):  # all of them padded
        return walk.opaque(node, "padding an axis of several labelled ones")
    moved = (torch.nn.functional.pad(labels.expand(value.shape), widths, value=CONSTANT) for labels in value.labels)
    kept = tuple(  # along an axis without labels, what is added goes with the rest
        compact(own) if axes_of(labels) & padded else labels for own, labels in zip(moved, value.labels, strict=True)
    )
    return Value(shape, kept, value.origin, value.looked_up)


CREATIONS = (
    "aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones", "aten.new_full",
    "aten.new_empty",
)  # fmt: skip


@rule(*CREATIONS)
def create(walk: Walk, node: fx.Node) -> Value:
    """Axes whose size is a constant of the graph, or holds one (batch times heads), get labels: it can be rewritten."""
    shape = sizes(node)
    created = [axis for axis, size in enumerate(shape) if size > 1 and (fixed(node, axis) or multiple(node, axis))]
    return _copies(walk, Value(shape), created)
