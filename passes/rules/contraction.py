"""Contractions: every matrix product is one rule over named axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxslim.labels import CONSTANT, Value, axes_of
from fxslim.passes.rules.movement import COPIES, MOVES, repeat_axis
from fxslim.passes.rules.walk import Use, Walk, concrete, parameter, pin_axis, rule, sizes
from fxslim.spelling import letters_of


def contract(
    walk: Walk,
    node: fx.Node,
    first: Value,
    second: Value,
    names: tuple[str, str, str],
    *,
    parameters: tuple[bool, bool] | None = None,
) -> Value:
    """Multiply two values and sum over the axes that the output lacks.

    Over a contracted axis a parameter ties its labels with the activation's, coordinate by coordinate; two activations
    tie along the axis as well, because scales and rotary tables depend on its size.

    Args:
        walk: the walk.
        node: the node, for the record of what is contracted where.
        first: left operand.
        second: right operand.
        names: one letter per axis, for first, second and output.
        parameters: which of the two are parameters; None to find out.
    """
    left, right, out = names
    summed = [letter for letter in dict.fromkeys(left + right) if letter not in out]
    space = out + "".join(summed)
    extent = {letter: max(size, 1) for letters, v in ((left, first), (right, second)) for letter, size in
              zip(letters, v.shape, strict=True) if size != 1}  # fmt: skip
    shape = tuple(extent.get(letter, 1) for letter in space)
    operands = [_spread(value, letters, space) for value, letters in ((first, left), (second, right))]
    sums = [space.index(letter) for letter in summed]
    found = [
        (is_parameter(value) and not _is_product(argument)) or _is_picked(walk, argument)
        for value, argument in zip((first, second), _arguments(node), strict=True)
    ]
    weights = found if parameters is None else list(parameters)
    by_weight = weights[0] != weights[1]
    if by_weight:
        weight = operands[weights.index(True)]
        other = operands[weights.index(False)]
        letters = names[weights.index(False)]
        activation = _arguments(node)[weights.index(False)]
        for labels in weight.labels:
            summed_axes = axes_of(labels) & set(sums)
            if not summed_axes:
                walk.produced.append(Use(node, labels.reshape(-1)))
                continue
            axis = letters.index(space[min(summed_axes)]) if len(summed_axes) == 1 else None
            weight_node = _arguments(node)[weights.index(True)]
            walk.contracted.append(Use(node, labels.reshape(-1), activation, axis, weight_node))
            if other.origin == CONSTANT:
                _require_labels(walk, node, labels, other)
    joined = walk.join(operands, shape)
    rest: list[torch.Tensor] = []
    for labels in joined.labels:
        touched = axes_of(labels) & set(sums)
        if not touched:
            rest.append(labels)
        elif by_weight and not _shared(axes_of(labels) - touched, weight):
            once = walk.tie_along(labels, sorted(axes_of(labels) - touched))
            for own in weight.labels:
                if axes_of(own) == touched:  # a parent of what several products sum over would be no leaf
                    walk.relations.tie(own, once)
        else:
            rest.append(walk.tie_along(labels, sorted(touched)))
            walk.scores.extend([] if by_weight else rest[-1:])
    count = len(out)
    kept = tuple(labels.reshape(labels.shape[:count]) for labels in rest)
    return walk.tidy(Value(shape[:count], kept, joined.origin, joined.looked_up))


def _shared(axes: frozenset[int], weight: Value) -> bool:
    """Tell whether a weight has a matrix of its own for each place along some axes: one for each head."""
    return bool(axes) and all(weight.shape[axis] > 1 for axis in axes)


def _arguments(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the two nodes that a product multiplies, in the order of its operands."""
    name = str(node.target)
    if "einsum" in name:
        first, second = list(node.args[1])  # type: ignore[arg-type]
    elif "addmm" in name or "baddbmm" in name or "addmv" in name:
        first, second = node.args[1:3]
    else:
        first, second = node.args[:2]
    return (first if isinstance(first, fx.Node) else None, second if isinstance(second, fx.Node) else None)


def _require_labels(walk: Walk, node: fx.Node, labels: torch.Tensor, other: Value) -> None:
    """Pin a parameter's contracted axis where the other operand is a table without labels."""
    bare = [axis for axis in axes_of(labels) if other.along(axis) is None]
    if bare:
        walk.relations.pin(labels, walk.relations.pin_label("multiplies a table that has no channels", node.name))


def is_parameter(value: Value) -> bool:
    """Tell whether a value is computed from parameters alone and carries their labels."""
    return value.origin == CONSTANT and not value.looked_up and bool(value.labels)


PICKS = ("aten.index", "aten.index_select")
PRODUCTS = ("aten.linear", "aten.mm", "aten.bmm", "aten.matmul", "aten.addmm", "aten.baddbmm", "aten.einsum")


def _is_product(node: fx.Node | None) -> bool:
    """Tell whether a value that needs no input is made by products alone: a projected probe, not a weight."""
    pending, seen, products = [node], set[fx.Node](), False
    while pending:
        current = pending.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if str(getattr(current.target, "overloadpacket", "")) in PRODUCTS:
            products = True
        elif current.op != "call_function":
            return False
        else:
            pending.extend(n for n in current.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
    return products


def _is_picked(walk: Walk, node: fx.Node | None) -> bool:
    """Tell whether a value is one parameter of which data picks entries: the weights of the experts of each token."""
    picked = False
    while node is not None and node.op == "call_function":
        name = str(getattr(node.target, "overloadpacket", ""))
        picked = picked or name in PICKS
        if name not in (*PICKS, *MOVES, *COPIES) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return picked and node is not None and is_parameter(walk.value(node))


def _spread(value: Value, letters: str, space: str) -> Value:
    """Lay a value's axes out in the order of a larger space, size 1 where it has none."""
    if len(set(letters)) != len(letters):
        raise ValueError("repeated axis")

    def lay(sizes_: Sequence[int]) -> list[int]:
        own = dict(zip(letters, sizes_, strict=True))
        return [own.get(letter, 1) for letter in space]

    order = [letters.index(letter) for letter in space if letter in letters]
    labels = tuple(own.permute(order).reshape(lay(own.shape)) for own in value.labels)
    return Value(tuple(lay(value.shape)), labels, value.origin, value.looked_up)


@rule("aten.linear")
def linear(walk: Walk, node: fx.Node) -> Value:
    """``x (..., in) @ weight (out, in).T + bias``."""
    x, weight = walk.value(node.args[0]), walk.value(node.args[1])
    batch = "abcdefgh"[: len(x.shape) - 1]
    kinds = (False, True) if is_parameter(weight) else None
    out = contract(walk, node, x, weight, (batch + "i", "oi", batch + "o"), parameters=kinds)
    bias = parameter(node, "bias", 2)
    return out if bias is None else walk.join([out, walk.value(bias)], sizes(node))


GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
"""Products of rows with one matrix of several each."""


@rule(*GROUPED)
def grouped_matmul(walk: Walk, node: fx.Node) -> Any:
    """Product of rows with one matrix of several each (E, in, out): the matrices share their channels' numbers."""
    x, weight = walk.value(node.args[0]), walk.value(node.args[1])
    if len(x.shape) != 2 or len(weight.shape) != 3 or parameter(node, "bias", 3) is not None:
        return walk.opaque(node, f"no rule for this form of {node.target}")
    offsets, experts = walk.value(parameter(node, "offs", 2)).along(0), weight.along(0)
    if offsets is not None and experts is not None and offsets.numel() == experts.numel():
        walk.relations.tie(experts.reshape(-1), offsets.reshape(-1))
    else:
        pin_axis(walk, weight, 0, "picked by data", node)
        for ends in walk.value(parameter(node, "offs", 2)).labels:
            walk.relations.pin(ends, walk.relations.pin_label(f"no rule for this form of {node.target}", node.name))
    labels = tuple(own.reshape(own.shape[1:]) for own in weight.labels if own.shape[0] == 1)
    matrix = Value(weight.shape[1:], labels, weight.origin, weight.looked_up)
    return contract(walk, node, x, matrix, ("ti", "io", "to"))


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot")
def matmul(walk: Walk, node: fx.Node) -> Value:
    """Matrix product with broadcast batch axes."""
    return _matmul(walk, node, walk.value(node.args[0]), walk.value(node.args[1]))


def _matmul(walk: Walk, node: fx.Node, first: Value, second: Value) -> Value:
    return contract(walk, node, first, second, matmul_names(len(first.shape), len(second.shape)))


def matmul_names(first: int, second: int) -> tuple[str, str, str]:
    """Return one letter per axis of a matrix product's operands, of these ranks, and of its result."""
    rows = "m" if first > 1 else ""
    columns = "n" if second > 1 else ""
    left, right = first - 1 - len(rows), second - 1 - len(columns)
    batch = "abcdefgh"[: max(left, right)]
    return (
        batch[len(batch) - left :] + rows + "k",
        batch[len(batch) - right :] + "k" + columns,
        batch + rows + columns,
    )


@rule("aten.addmm", "aten.baddbmm", "aten.addmv", "aten.addbmm")
def addmm(walk: Walk, node: fx.Node) -> Any:
    """``bias + first @ second``."""
    product = _matmul(walk, node, walk.value(node.args[1]), walk.value(node.args[2]))
    if len(product.shape) != len(sizes(node)):
        return walk.opaque(node, "no rule for summing over the batch of a product")
    return walk.join([product, walk.value(node.args[0])], sizes(node))


@rule("aten.einsum")
def einsum(walk: Walk, node: fx.Node) -> Any:
    """Einstein sums of one or two operands."""
    equation = str(node.args[0]).replace(" ", "")
    values = [walk.value(argument) for argument in node.args[1]]  # type: ignore[union-attr]
    names = letters_of(equation, [len(value.shape) for value in values])
    if names is None or len(values) > 2:
        return walk.opaque(node, f"no rule for einsum {equation!r}")
    if len(values) == 1:
        order = [names[0].index(letter) for letter in names[-1]]
        shape = tuple(values[0].shape[axis] for axis in order)
        summed = [axis for axis, letter in enumerate(names[0]) if letter not in names[-1]]
        kept = [letter for letter in names[0] if letter in names[-1]]
        reduced = walk.reduce(values[0], summed, keepdim=False) if summed else values[0]
        return walk.move(reduced, lambda t: t.permute([kept.index(letter) for letter in names[-1]]), shape)
    return contract(walk, node, values[0], values[1], (names[0], names[1], names[2]))


@rule("aten.scaled_dot_product_attention")
def attention(walk: Walk, node: fx.Node) -> Value:
    """Scores, softmax and weighted sum, as the three operations they stand for."""
    query, key, value = (walk.value(argument) for argument in node.args[:3])
    if parameter(node, "enable_gqa", 7, False):
        times = query.shape[-3] // key.shape[-3]
        if times > 1:
            key, value = repeat_axis(walk, key, -3, times), repeat_axis(walk, value, -3, times)
    batch = "abcdefgh"[: len(query.shape) - 2]
    scores = contract(walk, node, query, key, (batch + "se", batch + "te", batch + "st"))
    mask = parameter(node, "attn_mask", 3)
    if mask is not None:
        scores = walk.join([scores, walk.value(mask)], scores.shape)
    scores = walk.tie_axes(scores, [-1])
    return contract(walk, node, scores, value, (batch + "st", batch + "te", batch + "se"))


def mixed(walk: Walk, node: fx.Node, x: Value) -> Value:
    """Pin what varies along the places alone of (B, C, *places), which a node mixes, and tie every channel's places."""
    kept = []
    for labels in x.labels:
        if axes_of(labels) and 1 not in axes_of(labels):
            walk.relations.pin(labels, walk.relations.pin_label(f"{node.target} mixes its places", node.name))
        else:
            kept.append(walk.tie_along(labels, range(2, labels.ndim)))
    return Value(x.shape, tuple(kept), x.origin, x.looked_up)


def _channels(walk: Walk, node: fx.Node, rank: int) -> Value | None:
    """Return an operand whose places a node mixes, with labels on its channels alone; None where no rule covers it."""
    x = walk.value(node.args[0])
    if len(x.shape) != rank:
        return None
    x = mixed(walk, node, x)
    return x if all(axes_of(labels) == {1} for labels in x.labels) else None


@rule("aten.im2col")
def unfold(walk: Walk, node: fx.Node) -> Any:
    """Lay the places of every window out behind each channel: (B, C, H, W) -> (B, C * window, windows)."""
    x, window = _channels(walk, node, 4), math.prod(concrete(node.args[1]))
    if x is None:
        return walk.opaque(node, f"{node.target} over a labelled axis, or without a batch axis")
    kept = tuple(labels.reshape(1, -1, 1).repeat_interleave(window, 1) for labels in x.labels)
    return Value(sizes(node), kept, x.origin, x.looked_up)


@rule("aten.col2im")
def fold(walk: Walk, node: fx.Node) -> Any:
    """Add windows up again: the places of a window go with their channel."""
    x, window = _channels(walk, node, 3), math.prod(concrete(node.args[2]))
    if x is None:
        return walk.opaque(node, f"{node.target} over a labelled axis, or without a batch axis")
    tied = [walk.tie_along(labels.reshape(-1, window), [1]) for labels in x.labels]
    return Value(sizes(node), tuple(labels.reshape(1, -1, 1, 1) for labels in tied), x.origin, x.looked_up)


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def sample(walk: Walk, node: fx.Node) -> Any:
    """Read the places of (B, C, *places) at (B, *points, coordinates): channels pass, a map goes with its points."""
    maps, points = walk.value(node.args[0]), walk.value(node.args[1])
    rank = len(maps.shape)
    kept = []
    for value, mixes in ((maps, range(2, rank)), (points, range(rank - 1, rank))):
        own = []
        for labels in value.labels:
            if axes_of(labels) <= set(mixes):
                walk.relations.pin(labels, walk.relations.pin_label(f"{node.target} reads places by data", node.name))
            else:
                own.append(walk.tie_along(labels, mixes))
        kept.append(tuple(own))
    read = tuple(labels.movedim(-1, 1) for labels in kept[1])
    shape = sizes(node)
    return walk.join(
        [
            Value((*maps.shape[:2], *(1,) * (rank - 2)), kept[0], maps.origin, maps.looked_up),
            Value((shape[0], 1, *shape[2:]), read, points.origin, points.looked_up),
        ],
        shape,
    )


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def transposed_convolution(walk: Walk, node: fx.Node) -> Any:
    """Contract the channel axis of (B, C, *places) with that of a kernel (in, out, *places)."""
    x, weight = walk.value(node.args[0]), walk.value(node.args[1])
    space, groups = len(weight.shape) - 2, parameter(node, "groups", 6, 1)
    if len(x.shape) != space + 2 or groups != 1:
        return walk.opaque(node, f"no rule for {node.target} in groups, or without a batch axis")
    x = mixed(walk, node, x)
    if any(axes_of(labels) != {1} for labels in x.labels):
        return walk.opaque(node, f"{node.target} over a labelled axis")
    for labels in weight.labels:
        if min(axes_of(labels), default=0) >= 2:
            walk.relations.pin(labels, walk.relations.pin_label("kernel of a convolution", node.name))
    flat = tuple(labels.reshape(labels.shape[:2]) for labels in weight.labels if axes_of(labels) <= {0, 1})
    matrix = Value(weight.shape[:2], flat, weight.origin, weight.looked_up)
    inner = tuple(labels.reshape(labels.shape[:2]) for labels in x.labels)
    product = contract(walk, node, Value(x.shape[:2], inner, x.origin, x.looked_up), matrix, ("bi", "io", "bo"))
    bias = parameter(node, "bias", 2)
    if bias is not None:
        product = walk.join([product, walk.value(bias)], product.shape)
    spread = tuple(own.reshape(tuple(own.shape) + (1,) * space) for own in product.labels)
    return Value(sizes(node), spread, product.origin, product.looked_up)


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(walk: Walk, node: fx.Node) -> Any:
    """Contract the channel axis; a depthwise convolution is pointwise in its channels."""
    x, weight = walk.value(node.args[0]), walk.value(node.args[1])
    space = len(weight.shape) - 2
    out_shape = sizes(node)
    if len(x.shape) != space + 2:
        return walk.opaque(node, "no rule for a convolution without a batch axis")
    groups = parameter(node, "groups", 6, 1)
    x = mixed(walk, node, x)
    if any(axes_of(labels) != {1} for labels in x.labels):
        return walk.opaque(node, "convolution over a labelled axis")
    kernel = weight.labels
    spatial = [labels for labels in kernel if min(axes_of(labels), default=0) >= 2]
    for labels in spatial:
        walk.relations.pin(labels, walk.relations.pin_label("kernel of a convolution", node.name))
    flat = tuple(labels.reshape(labels.shape[:2]) for labels in kernel if axes_of(labels) <= {0, 1})
    matrix = Value(weight.shape[:2], flat, weight.origin, weight.looked_up)
    inner = tuple(labels.reshape(labels.shape[:2]) for labels in x.labels)
    channels = Value(x.shape[:2], inner, x.origin, x.looked_up)
    if groups == 1:
        product = contract(walk, node, channels, matrix, ("bi", "oi", "bo"))
    elif groups == x.shape[1] == weight.shape[0]:
        scale = walk.move(matrix, lambda t: t[:, :1].reshape(1, -1), (1, weight.shape[0]))
        product = walk.join([channels, scale], (x.shape[0], x.shape[1]))
    else:
        return walk.opaque(node, f"a convolution in {groups} groups mixes its channels")
    bias = parameter(node, "bias", 2)
    if bias is not None:
        product = walk.join([product, walk.value(bias)], product.shape)
    spread = tuple(own.reshape(tuple(own.shape) + (1,) * space) for own in product.labels)
    return Value(out_shape, spread, product.origin, product.looked_up)
