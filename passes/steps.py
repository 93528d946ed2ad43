"""Say of every ATen operation how values flow through it.

One table for all operations that are not products with parameters or attentions: what it moves, joins, scales, curves
or normalises, and which of its operands flow at all. Side inputs (masks, position tables, norm weights, shapes) are
left out of a step.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from fxslim.flow import Edge, Step, Via


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


SHAPED = _names("empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full")
"""Results that depend on their operand's shape alone."""
COPIES = _names("to _to_copy type_as clone contiguous detach alias lift_fresh lift_fresh_copy")
TRANSPOSES = _names("t numpy_T mT mH adjoint transpose swapaxes swapdims permute movedim moveaxis")
SPLITS = _names("split split_with_sizes chunk tensor_split unbind unsafe_split unsafe_chunk hsplit vsplit dsplit")
DROPOUTS = _names("dropout feature_dropout alpha_dropout native_dropout")
RESHAPES = _names("view _unsafe_view reshape view_as reshape_as squeeze unsqueeze flatten unflatten ravel")
SPREADS = _names("expand expand_as broadcast_to repeat repeat_interleave tile roll flip constant_pad_nd pad")
COMPLEX = _names("view_as_complex view_as_real")
MOVES = COPIES | TRANSPOSES | SPLITS | DROPOUTS | RESHAPES | SPREADS | COMPLEX
CHOICES = _names("slice select narrow index index_select gather take_along_dim getitem")
JOINS = _names("cat concat concatenate stack hstack vstack dstack column_stack complex slice_scatter copy")
SUMS = _names("add sub subtract rsub neg negative positive nan_to_num")
PRODUCTS = _names("mul multiply")
RATIOS = _names("div divide true_divide")
CLAMPS = _names("clamp clip")
MASKS = _names("where masked_fill")
CURVES = _names("hardswish prelu _prelu_kernel log_sigmoid special_expit special_erf absolute")
"""Elementwise operations that PyTorch does not tag as such; the others are recognised by their tag."""
LAYERS = _names("layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm instance_norm batch_norm")
NORMS = LAYERS | _names("mean sum var std var_mean linalg_vector_norm norm amax amin")

Flows = Callable[[fx.Node], bool]


def name_of(node: fx.Node) -> str:
    """Return the name of a node's operation without namespace and overload (``layer_norm``), or ``""``."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", "")


def argument(node: fx.Node, index: int, name: str) -> Any:
    """Return an argument by position or by name, or None."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def step_of(node: fx.Node, flows: Flows) -> Step | None:
    """Return how values flow through a node, or None where they do not.

    Args:
        node: any node that is no product with a parameter.
        flows: whether an operand carries activations (side inputs do not).
    """
    name = name_of(node)
    if name in MOVES:
        return _one(Via.MOVE, node.args[0])
    if name in CHOICES:
        return _choice(node, name, flows)
    if name == "glu":
        return Step(Via.PRODUCT, (Edge(node.args[0], ("glu", 0)), Edge(node.args[0], ("glu", 1), curved=True)))  # type: ignore[arg-type]
    live = _live(node, flows)
    if not live:
        return None
    via = _via(node, name, live)
    return None if via is None else Step(via, tuple(Edge(operand) for operand in live))


def _one(via: Via, operand: object) -> Step | None:
    return Step(via, (Edge(operand),)) if isinstance(operand, fx.Node) else None


def _live(node: fx.Node, flows: Flows) -> list[fx.Node]:
    """Return the operands that flow, in order and with repetition: x * x has two."""
    found: list[fx.Node] = []
    for argument_ in (*node.args, *node.kwargs.values()):
        for item in argument_ if isinstance(argument_, list | tuple) else (argument_,):
            if isinstance(item, fx.Node) and flows(item):
                found.append(item)
    return found


def _via(node: fx.Node, name: str, live: list[fx.Node]) -> Via | None:
    if name in JOINS:
        return Via.JOIN
    if name in NORMS:
        return Via.NORM
    if name in SUMS:
        return Via.AFFINE
    if name in PRODUCTS:
        return Via.AFFINE if len(live) == 1 else Via.PRODUCT
    if name in RATIOS:
        return Via.AFFINE if live == [node.args[0]] else Via.CURVE
    if name in MASKS:  # the condition of where comes first, that of masked_fill second
        return Via.CURVE if node.args[0 if name == "where" else 1] in live else Via.AFFINE
    if name in CLAMPS and _guards(node):
        return Via.AFFINE
    return Via.CURVE if _elementwise(node, name) else None


def _guards(node: fx.Node) -> bool:
    """Tell whether a clamp only bounds values on both sides of zero (no ReLU)."""
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    below = low is None or (isinstance(low, int | float) and low < 0)
    above = high is None or (isinstance(high, int | float) and high > 0)
    return below and above


def _elementwise(node: fx.Node, name: str) -> bool:
    overload = getattr(node.target, "_overloadname", "")
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return tagged or name in CURVES or (name in ("max", "min") and overload == "other")


def _choice(node: fx.Node, name: str, flows: Flows) -> Step | None:
    """Return the choice of a piece; choices by indices that flow themselves (routing) end a walk."""
    operand, rest = node.args[0], node.args[1:]
    if not isinstance(operand, fx.Node) or any(flows(index) for index in _nodes(rest)):
        return None
    if name == "slice" and _whole(node):
        return Step(Via.MOVE, (Edge(operand),))
    if node.target is operator.getitem:
        if name_of(operand) not in SPLITS:  # results of norms and dropouts that return several
            return Step(Via.MOVE, (Edge(operand),)) if rest == (0,) else None
        return Step(Via.MOVE, (Edge(operand, (name_of(operand), _frozen(operand.args[1:]), *rest)),))
    return Step(Via.MOVE, (Edge(operand, (name, _frozen(rest))),))


def _whole(node: fx.Node) -> bool:
    start, end, stride = (argument(node, i, key) for i, key in ((2, "start"), (3, "end"), (4, "step")))
    return start in (0, None) and (end is None or end == sys.maxsize) and stride in (1, None)


def _nodes(value: object) -> list[fx.Node]:
    if isinstance(value, list | tuple):
        return [node for item in value for node in _nodes(item)]
    return [value] if isinstance(value, fx.Node) else []


def _frozen(value: Any) -> Hashable:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
