"""Which values share memory with what a graph returns or is given."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import fx

from fxslim.passes.steps import name_of

UNSAID = frozenset(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout type_as sum_to_size einsum meshgrid broadcast_tensors "
    "atleast_1d atleast_2d atleast_3d".split()
)
"""Operations that may hand an operand through without their schema saying so."""


def leaving(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return what the graph returns, and what that is a view of: a caller may write into it, and sees its strides.

    A pass leaves these nodes alone. So nothing that is stored or given leaves that did not leave before, and no value
    leaves twice.
    """
    found: set[fx.Node] = set()
    for output in graph.find_nodes(op="output"):
        found.update(_walk(output.all_input_nodes, viewed))
    return frozenset(found)


def given(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the inputs and what may be a view of them: only the caller knows their strides."""
    return frozenset(_walk(graph.find_nodes(op="placeholder"), _views))


def viewed(node: fx.Node) -> list[fx.Node]:
    """Return what a node's value may share memory with."""
    if node.op != "call_function":
        return []
    target = node.target
    if target is operator.getitem:
        return node.all_input_nodes[:1]
    if not isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes if isinstance(target, torch._ops.HigherOrderOperator) else []
    if any(result.alias_info is not None for result in target._schema.returns):
        return node.all_input_nodes[:1]
    return node.all_input_nodes if name_of(node) in UNSAID else []


def _views(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if node in viewed(user)]


def _walk(start: Iterable[fx.Node], further: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(further(node))
    return found
