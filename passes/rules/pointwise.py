"""Pointwise operations: tie element by element, broadcast operands are parents."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from fxslim.functional import mutates
from fxslim.labels import CONSTANT, Value
from fxslim.passes.rules.movement import COPIES, MOVES
from fxslim.passes.rules.walk import Walk, rule, sizes

LIKE_POINTWISE = (
    "aten.dropout", "aten.alpha_dropout", "aten.feature_dropout", "aten.contiguous", "aten.clone", "aten.detach",
    "aten.alias", "aten.lift_fresh_copy", "aten.lift_fresh", "aten.to", "aten._to_copy", "aten.where",
    "aten.masked_fill", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like",
    "aten.randn_like", "aten.float", "aten.half", "aten.gelu", "aten.silu", "aten.mish", "aten.hardswish",
    "aten.native_dropout", "aten._conj", "aten.resolve_conj", "aten.resolve_neg", "aten.positive", "aten.copy",
    "aten.fill", "aten.masked_fill_", "aten.bernoulli",
    "aten.selu", "aten.celu", "aten.elu", "aten.rrelu", "aten.softplus", "aten.nan_to_num", "aten.addcmul",
    "aten.addcdiv", "aten.lerp", "aten.type", "aten.bool", "aten.int", "aten.long", "aten.double", "aten.bfloat16",
    "aten.square", "aten.zero", "aten._assert_async", "aten.multiply", "aten.subtract", "aten.divide",
    "aten.true_divide", "aten.floor_divide",
)  # fmt: skip


@rule(*LIKE_POINTWISE)
def pointwise(walk: Walk, node: fx.Node) -> Any:
    """Join every operand element by element."""
    value = node.meta.get("val")
    if str(node.target) == "aten.to.other":
        return cast(walk, node)
    if not isinstance(value, torch.Tensor):
        if isinstance(value, tuple | list):
            joined = walk.join(walk.operands(node), tuple(walk.operands(node)[0].shape))
            return tuple(joined if isinstance(item, torch.Tensor) else None for item in value)
        return None
    joined = walk.join(lent(walk, node), sizes(node), meets=not mutates(node))
    copied = str(getattr(node.target, "overloadpacket", "")) in COPIES
    return dataclasses.replace(joined, indexes=walk.value(node.args[0]).indexes) if copied else joined


LOOKUPS = ("aten.embedding", "aten.index", "aten.index_select")


def lent(walk: Walk, node: fx.Node) -> list[Value]:
    """Return a node's operands; what was only looked up in tables lends itself to computed data.

    A table of position biases may serve many layers, whatever picks its rows: like a constant, it is a parent of the
    data it meets, and gathered there. Where nothing but tables meets (sums of embeddings), they are plain data.
    """
    read = [argument for argument in node.all_input_nodes if isinstance(walk.values.get(argument), Value)]
    tables = [_is_lookup(walk, argument) for argument in read]
    operands = [walk.value(argument) for argument in read]
    computed = any(
        own.labels and own.origin != CONSTANT and not table for own, table in zip(operands, tables, strict=True)
    )
    if not computed or not any(tables):
        return walk.operands(node)
    return [
        dataclasses.replace(own, origin=CONSTANT) if table else own for own, table in zip(operands, tables, strict=True)
    ]


def _is_lookup(walk: Walk, node: fx.Node) -> bool:
    """Tell whether a value is rows of parameters that an index picked, moved, scaled and added up since, no more."""
    name = str(getattr(node.target, "overloadpacket", ""))
    read = [argument for argument in node.all_input_nodes if isinstance(walk.values.get(argument), Value)]
    if node.op != "call_function" or not read:
        return False
    if name in LOOKUPS and read[0] is node.args[0] and _is_table(walk, read[0]):
        return True
    if name in (*MOVES, *COPIES):
        return _is_lookup(walk, read[0])
    labelled = [argument for argument in read if walk.value(argument).labels]
    return name in SUMS and bool(labelled) and all(_is_lookup(walk, argument) for argument in labelled)


SUMS = ("aten.add", "aten.sub", "aten.mul", "aten.div")


def _is_table(walk: Walk, node: fx.Node) -> bool:
    value = walk.value(node)
    return value.origin == CONSTANT and not value.looked_up and bool(value.labels)


@rule("aten.type_as")
def cast(walk: Walk, node: fx.Node) -> Value:
    """Cast the first operand; the second one lends its dtype and nothing else."""
    return walk.join([walk.value(node.args[0])], sizes(node))


@rule("aten.view_as", "aten.reshape_as")
def shaped_like(walk: Walk, node: fx.Node) -> Value:
    """Move into another value's shape; what is left of both has to have the same shape."""
    shape = sizes(node)
    moved = walk.move(walk.value(node.args[0]), lambda t: t.reshape(shape), shape)
    return walk.join([moved, walk.value(node.args[1])], shape)


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(walk: Walk, node: fx.Node) -> Value:
    """Scale the negative part; a weight of several channels belongs to axis 1."""
    value, weight = walk.value(node.args[0]), walk.value(node.args[1])
    if len(weight.shape) == 1 and weight.shape[0] > 1:
        spread = (1, weight.shape[0]) + (1,) * (len(value.shape) - 2)
        weight = walk.move(weight, lambda t: t.reshape(spread), spread)
    return walk.join([value, weight], sizes(node))


@rule("aten.tril", "aten.triu")
def triangle(walk: Walk, node: fx.Node) -> Any:
    """Keep a triangle of the last two axes: where they are labelled, positions matter."""
    value = walk.value(node.args[0])
    if value.along(-1) is not None or value.along(-2) is not None:
        return walk.opaque(node, f"{node.target} over labelled axes")
    return value


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether torch itself calls an operation pointwise."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def joins(node: fx.Node) -> bool:
    """Tell whether an operation joins its operands element by element."""
    return str(getattr(node.target, "overloadpacket", "")) in LIKE_POINTWISE or is_pointwise(node)


@rule("aten.complex", "aten.polar")
def pair(walk: Walk, node: fx.Node) -> Value:
    """Join the two halves of complex numbers."""
    return walk.join(walk.operands(node), sizes(node))


@rule("aten.view_as_real")
def as_real(walk: Walk, node: fx.Node) -> Value:
    """Add an unlabelled axis of two."""
    value = walk.value(node.args[0])
    return walk.move(value, lambda t: t.unsqueeze(-1).expand(*t.shape, 2), sizes(node))


@rule("aten.view_as_complex")
def as_complex(walk: Walk, node: fx.Node) -> Value:
    """Tie real and imaginary parts."""
    return walk.reduce(walk.value(node.args[0]), [-1], keepdim=False)


@rule("aten.glu")
def glu(walk: Walk, node: fx.Node) -> Value:
    """Join the first half of an axis with the second."""
    value = walk.value(node.args[0])
    axis = node.args[1] if len(node.args) > 1 else -1
    shape = sizes(node)
    halves = [walk.move(value, lambda t, i=i: t.chunk(2, axis)[i], shape) for i in (0, 1)]  # type: ignore[misc]
    return walk.join(halves, shape)
