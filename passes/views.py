"""Canonical views of a program: one linear, one attention, however the operations are spelled.

A linear is ``linear``, ``addmm``, ``mm``, ``matmul``, ``einsum`` or a convolution with kernel 1, by a parameter.
An attention is ``scaled_dot_product_attention``, or matmul - (scale, mask) - softmax - (cast, dropout) - matmul.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from fxslim.flow import AttendView, LinearView, Step, Via
from fxslim.passes.steps import COPIES, SHAPED, SPLITS, TRANSPOSES, argument, name_of, step_of
from fxslim.program import Program

__all__ = ["AttendView", "LinearView", "Views", "attend_view", "linear_view"]

SOFTMAXES = frozenset(("softmax", "_softmax", "_safe_softmax"))
SLICES = frozenset(("getitem", "slice", "narrow"))
CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
AFTER_SOFTMAX = Via.MOVE | Via.AFFINE | Via.CURVE
BEFORE_SOFTMAX = AFTER_SOFTMAX | Via.JOIN | Via.PRODUCT  # a join adds sink columns


def linear_view(program: Program, node: fx.Node) -> LinearView | None:
    """Return a node as the product of an activation and a parameter matrix, or None."""
    name = name_of(node)
    if name == "linear":
        return _product(program, node, node.args[0], node.args[1], argument(node, 2, "bias"), (1, 0))
    if name == "addmm":
        return _product(program, node, node.args[1], node.args[2], node.args[0], (0, 1))
    if name in ("mm", "matmul"):
        return _product(program, node, node.args[0], node.args[1], None, (0, 1))
    if name == "bmm":
        return _picked(program, node)
    if name in ("_grouped_mm", "grouped_mm_fallback"):
        return _product(program, node, node.args[0], node.args[1], None, (1, 2), rank=3)
    if name == "einsum":
        return _einsum(program, node)
    if name in CONVOLUTIONS and argument(node, 6, "groups") in (None, 1):
        weight = _matrix(program, node.args[1])
        if weight is not None and set(program.tensors[weight.name].shape[2:]) == {1}:
            return _product(program, node, node.args[0], node.args[1], argument(node, 2, "bias"), (1, 0),
                            rank=len(weight.dims))  # fmt: skip
    return None


def attend_view(program: Program, node: fx.Node) -> AttendView | None:
    """Return a node as softmax attention, or None. For many nodes, ask one :class:`Views`."""
    return Views(program).attend(node)


@dataclass(frozen=True)
class _Matrix:
    """A parameter behind wrappers: its name, the stored dimension behind each of the value's, whether data picks."""

    name: str
    dims: tuple[int, ...]
    picked: bool = False


def _matrix(program: Program, node: object) -> _Matrix | None:
    """Look through casts, transposes, slices and picks of entries at a parameter."""
    turns: list[fx.Node] = []
    picked = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = name_of(node)
        if name in TRANSPOSES:
            turns.append(node)
        elif name == "index" and len(node.args[1]) == 1:  # type: ignore[arg-type]
            picked = True
        elif name not in COPIES and name not in SPLITS - {"unbind"} and name not in SLICES:
            return None
        node = node.args[0]
    stored = program.tensor_name(node)
    if stored is None:
        return None
    dims = list(range(program.tensors[stored].ndim))
    for turn in reversed(turns):
        dims = _turned(turn, dims)
    return _Matrix(stored, tuple(dims), picked)


def _turned(node: fx.Node, dims: list[int]) -> list[int]:
    if name_of(node) == "permute":
        return [dims[axis] for axis in node.args[1]]  # type: ignore[union-attr, index]
    if len(node.args) == 3 and all(isinstance(axis, int) for axis in node.args[1:]):
        one, other = node.args[1:]
        turned = list(dims)
        turned[one], turned[other] = dims[other], dims[one]  # type: ignore[index]
        return turned
    return dims[::-1]


def _product(
    program: Program,
    node: fx.Node,
    operand: object,
    weight: object,
    bias: object,
    axes: tuple[int, int],
    rank: int = 2,
) -> LinearView | None:
    """Build the view of ``operand`` times ``weight``; ``axes`` are the weight's contracted and resulting dimensions."""
    matrix = _matrix(program, weight)
    if matrix is None or not isinstance(operand, fx.Node) or len(matrix.dims) != rank:
        return None
    vector = _matrix(program, bias)
    contracted, resulting = axes
    return LinearView(
        node,
        operand,
        matrix.name,
        vector.name if vector is not None and len(vector.dims) == 1 else None,
        matrix.dims[contracted],
        matrix.dims[resulting],
    )


def _picked(program: Program, node: fx.Node) -> LinearView | None:
    """Read a product of every row with a matrix of its own, picked by data from a parameter (E, …, …)."""
    for operand, weight, axes in ((node.args[0], node.args[1], (1, 2)), (node.args[1], node.args[0], (2, 1))):
        matrix = _matrix(program, weight)
        if matrix is not None and matrix.picked:
            return _product(program, node, operand, weight, None, axes, rank=3)
    return None


def _einsum(program: Program, node: fx.Node) -> LinearView | None:
    """Read an einsum of an activation and a parameter matrix that contracts one letter and adds one."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    for weight in (1, 0):
        letters, other = terms[weight], terms[1 - weight]
        contracted = [i for i, letter in enumerate(letters) if letter in other and letter not in output]
        resulting = [i for i, letter in enumerate(letters) if letter not in other and letter in output]
        if len(letters) == 2 and len(contracted) == len(resulting) == 1:
            axes = (contracted[0], resulting[0])
            view = _product(program, node, operands[1 - weight], operands[weight], None, axes)
            if view is not None:
                return view
    return None


class Views:
    """All views of one program, each made once; what :mod:`fxslim.match` asks about operations."""

    def __init__(self, program: Program) -> None:
        views = ((node, linear_view(program, node)) for node in program.graph.nodes)
        self.linears: Mapping[fx.Node, LinearView] = {node: view for node, view in views if view is not None}
        self._flowing = _flowing(program, self.linears)
        self._step = partial(step_of, flows=self._flowing.__contains__)
        self._steps: dict[fx.Node, Step | None] = {}
        self._attends: dict[fx.Node, AttendView | None] = {}

    def linear(self, node: fx.Node) -> LinearView | None:
        """Return the node as a linear, or None."""
        return self.linears.get(node)

    def attend(self, node: fx.Node) -> AttendView | None:
        """Return the node as an attention, or None."""
        if node not in self._attends:
            self._attends[node] = self._attend(node)
        return self._attends[node]

    def step(self, node: fx.Node) -> Step | None:
        """Return how values flow through the node, or None where they do not."""
        if node not in self._steps:
            self._steps[node] = None if node in self.linears else self._step(node)
        return self._steps[node]

    def _attend(self, node: fx.Node) -> AttendView | None:
        if name_of(node) == "scaled_dot_product_attention":
            query, key, value = node.args[:3]
            assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
            return AttendView(node, query, key, value, "sdpa")
        operands = self._factors(node)
        for probabilities, value in (operands, operands[::-1]) if operands else ():
            softmax = next((n for n in self._behind(probabilities, AFTER_SOFTMAX) if name_of(n) in SOFTMAXES), None)
            if softmax is None:
                continue
            scores = (self._factors(source) for source in self._behind(softmax.args[0], BEFORE_SOFTMAX))
            query_key = next((pair for pair in scores if pair), None)
            if query_key:
                return AttendView(node, *query_key, value, "explicit")
        return None

    def _factors(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return the operands of a product of two values, or None."""
        name = name_of(node)
        if node in self.linears:
            return None
        operands: object = None
        if name in ("matmul", "bmm"):
            operands = node.args[:2]
        elif name == "baddbmm":
            operands = node.args[1:3]
        elif name == "einsum":
            operands = node.args[1]
        if not isinstance(operands, list | tuple) or len(operands) != 2:
            return None
        left, right = operands
        return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None

    def _behind(self, node: object, allowed: Via) -> list[fx.Node]:
        """Return where walks through the allowed steps end, along every operand, first operands first."""
        ends: list[fx.Node] = []
        pending, seen = [node], set()
        while pending:
            current = pending.pop()
            if not isinstance(current, fx.Node) or current in seen:
                continue
            seen.add(current)
            step = self.step(current)
            if step is None or step.via not in allowed:
                ends.append(current)
            else:
                pending.extend(edge.node for edge in reversed(step.edges))
        return ends


def _flowing(program: Program, linears: Mapping[fx.Node, LinearView]) -> frozenset[fx.Node]:
    """Return the nodes that carry activations: linears, and what depends on both a parameter and an input.

    Masks, positions and the tables made from them depend on one of the two at most: they are side inputs.
    """
    trained: set[fx.Node] = set()
    given: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = program.tensor_name(node)
            if name is None:
                given.add(node)
            elif isinstance(program.tensors[name], torch.nn.Parameter):
                trained.add(node)
        elif node in linears:
            trained.add(node)
            given.add(node)
        elif name_of(node) == "index" and _matrix(program, node) is not None:
            trained.add(node)  # what data picks of a parameter is a weight or a bias
        elif name_of(node) not in SHAPED and isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            operands = node.all_input_nodes
            if any(operand in trained for operand in operands):
                trained.add(node)
            if any(operand in given for operand in operands):
                given.add(node)
    return frozenset(trained & given)
