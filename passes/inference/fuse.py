"""Multiply once by the weights of several linears that read the same value: queries, keys and values, gate and up."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxslim.passes.inference.draft import Draft, add, is_alone, reads
from fxslim.passes.inference.views import leaving
from fxslim.pipeline import Facts

aten = torch.ops.aten
LAYOUT = frozenset({aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype, aten.set_.source_Tensor})
"""Operations that read how a value lies in memory: pieces of a value lie otherwise than values of their own."""


@dataclass(frozen=True)
class Linear:
    """A product with a stored matrix.

    Attributes:
        node: the product.
        operand: what is multiplied.
        weight: the ``get_attr`` node of the matrix.
        bias: that of the bias, or None.
        axis: the matrix's axis of results.
    """

    node: fx.Node
    operand: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    axis: int

    @property
    def stored(self) -> tuple[fx.Node, ...]:
        """Return the nodes of its tensors."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class FuseLinears:
    """Join linears of one operand that stand next to each other, and split what they return.

    Those further on, such as keys and values of a decoder's next layers, stay apart: all of them would be in memory at
    once. Requires: no operation writes into its operands. Ensures: tensors that anything else reads as well, under
    whatever name, stay as they are; so do linears whose value leaves, and views of the pieces copy where they have to.
    """

    requires: ClassVar[tuple[type, ...]] = (Draft,)
    ensures: ClassVar[tuple[type, ...]] = (Draft,)

    def run(self, facts: Facts) -> Facts:
        """Fuse."""
        draft = facts.get(Draft).copied()
        if any(node.target in LAYOUT for node in draft.graph.nodes):
            return facts
        tensors, kept = dict(draft.tensors), leaving(draft.graph)
        groups: list[tuple[Any, list[Linear]]] = []
        read = reads(draft.graph, tensors)
        for linear in filter(None, map(linear_of, draft.graph.nodes)):
            key = None if linear.node in kept else _key(linear, tensors, read)
            if key is None or not groups or groups[-1][0] != key:
                groups.append((key, []))
            groups[-1][1].append(linear)
        joined = [group for _, group in groups if len(group) > 1]
        for group in joined:
            _join(draft.graph, group, tensors)
        if joined:
            _reshape(draft.graph)
        return facts.adding(draft.holding(tensors))


def linear_of(node: fx.Node) -> Linear | None:
    """Return a node as a product with a stored matrix, or None."""
    if node.op != "call_function" or node.kwargs:
        return None
    args: tuple[Any, ...] = node.args
    if node.target is aten.linear.default:
        operand, weight, bias, axis = args[0], args[1], (*args, None)[2], 0
    elif node.target is aten.addmm.default:
        bias, operand, weight, axis = *args, 1
    elif node.target in (aten.mm.default, aten.matmul.default):
        operand, weight, bias, axis = *args, None, 1
    else:
        return None
    stored = _is_stored(weight) and (bias is None or _is_stored(bias))
    return Linear(node, operand, weight, bias, axis) if stored else None


def _key(linear: Linear, tensors: Mapping[str, torch.Tensor], read: Counter[int]) -> Any:
    """Return what linears have in common that can be joined; None for one that cannot be."""
    stored = [tensors[str(node.target)] for node in linear.stored]
    alone = all(is_alone(node, tensors, read) for node in linear.stored)
    sizes = [tuple(own.shape) for own in stored]
    if not alone or len(sizes[0]) != 2 or any(size != (sizes[0][linear.axis],) for size in sizes[1:]):
        return None
    return linear.node.target, linear.operand, [(own.dtype, own.device) for own in stored]


def _is_stored(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _join(graph: fx.Graph, group: list[Linear], tensors: dict[str, torch.Tensor]) -> None:
    """Put one product and a split in the place of several products."""
    first = group[0]
    sizes = [tensors[str(linear.weight.target)].shape[linear.axis] for linear in group]
    target: Any = first.node.target

    def together(nodes: list[fx.Node], axis: int) -> fx.Node:
        return graph.get_attr(add(tensors, "joined", torch.cat([tensors[str(node.target)] for node in nodes], axis)))

    with graph.inserting_before(first.node):
        weight = together([linear.weight for linear in group], first.axis)
        biases = [linear.bias for linear in group if linear.bias is not None]
        if target is aten.addmm.default:
            args: tuple[Any, ...] = (together(biases, 0), first.operand, weight)
        else:
            args = (first.operand, weight, *([together(biases, 0)] if biases else []))
        product = graph.call_function(target, args)
        pieces = graph.call_function(aten.split_with_sizes.default, (product, sizes, -1))
        made = [graph.call_function(operator.getitem, (pieces, place)) for place in range(len(group))]
    values = [linear.node.meta.get("val") for linear in group]
    if isinstance(value := values[0], torch.Tensor):  # for pictures
        product.meta.update(first.node.meta, val=value.new_empty((*value.shape[:-1], sum(sizes))))
        pieces.meta.update(first.node.meta, val=values)
    for linear, piece in zip(group, made, strict=True):
        piece.meta.update(linear.node.meta)
        linear.node.replace_all_uses_with(piece)
        graph.erase_node(linear.node)


def _reshape(graph: fx.Graph) -> None:
    """Let views copy where they have to."""
    for target in (aten.view.default, aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = aten.reshape.default
