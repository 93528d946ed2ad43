"""What every label rule works with: the walk over a graph, and joining operands element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxslim.labels import CONSTANT, Relations, Value, axes_of, clusters, combine, compact, merge
from fxslim.program import hint, is_symbolic, module_path

Rule = Callable[["Walk", fx.Node], Any]
RULES: dict[str, Rule] = {}
"""Rules by the operation's name without overload, such as ``"aten.linear"``."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Use:
    """One axis of a parameter in one product.

    Attributes:
        node: the product.
        labels: the parameter's labels along the axis.
        activation: the argument that the parameter multiplies.
        axis: the axis of the activation that meets the parameter's (only where it is summed over).
        weight: the argument that is the parameter, or is computed from it.
    """

    node: fx.Node
    labels: torch.Tensor
    activation: fx.Node | None = None
    axis: int | None = None
    weight: fx.Node | None = None


@dataclass(frozen=True)
class Selection:
    """One place where coordinates compete: removed ones must be minus infinity there.

    Attributes:
        node: a top-k, a softmax or a maximum on the way to one.
        source: what it reads.
        labels: labels of the coordinates, of the rank of what it reads.
        count: how many a top-k takes; 0 elsewhere.
    """

    node: fx.Node
    source: fx.Node
    labels: torch.Tensor
    count: int = 0


@dataclass
class Walk:
    """State of one walk over a graph: labels of the nodes so far, relations, and where parameters are contracted.

    Attributes:
        values: node -> Value, or a tuple of Values for operations with several results.
        relations: ties, parents, pins.
        contracted: uses of parameters along an axis that is summed over.
        produced: uses of parameters along an axis that becomes the output's.
        unknown: names of operations without a rule, with the first node of each.
        scores: labels that are left on products of two activations: the heads of attention scores.
        tied: (a label, the operation) where coordinates were tied along an axis.
        known: node -> whole numbers that are constants of the graph.
        node: the node that is being walked.
        routing: nodes on the way to a top-k.
        selections: where coordinates compete.
        indexed: labels whose coordinates are picked by the numbers of what was selected.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    relations: Relations = field(default_factory=Relations)
    contracted: list[Use] = field(default_factory=list)
    produced: list[Use] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    scores: list[torch.Tensor] = field(default_factory=list)
    tied: list[tuple[int, str]] = field(default_factory=list)
    known: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    node: fx.Node | None = None
    routing: frozenset[fx.Node] = frozenset()
    selections: list[Selection] = field(default_factory=list)
    indexed: list[torch.Tensor] = field(default_factory=list)

    def tie_along(self, labels: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """Tie labels along axes, remember which operation did it, and return them with those axes of size 1."""
        if self.node is not None and any(labels.shape[axis] > 1 for axis in axes):
            module = module_path(self.node)
            self.tied.append((int(labels.reshape(-1)[0]), f"{self.node.target}{' in ' + module if module else ''}"))
        return self.relations.tie_along(labels, axes)

    def value(self, argument: Any) -> Value:
        """Return the labels of an argument; plain numbers carry none."""
        if isinstance(argument, fx.Node):
            found = self.values.get(argument)
            if isinstance(found, Value):
                return found
        return Value(())

    def operands(self, node: fx.Node) -> list[Value]:
        """Return the labels of every tensor that a node reads, lists included."""
        found: list[Value] = []
        for argument in node.all_input_nodes:
            value = self.values.get(argument)
            if isinstance(value, Value):
                found.append(value)
            elif isinstance(value, tuple):
                found.extend(item for item in value if isinstance(item, Value))
        return found

    def join(self, operands: Sequence[Value], shape: Sequence[int], *, meets: bool = False) -> Value:
        """Combine operands that are broadcast against each other, element by element.

        Equal axes tie, an operand that is broadcast along a labelled axis is a parent, a constant (a bias, a table,
        anything computed from parameters and positions alone) is a parent of the data it meets and free to be
        gathered, and an unlabelled axis of data pins what it meets.

        Args:
            operands: what is combined.
            shape: the result's.
            meets: whether data that has to stay whole may be gathered here (``passes/loosen.py`` decides).
        """
        shape = tuple(shape)
        padded = [_pad(operand, len(shape)) for operand in operands]
        constant = {id(labels) for operand in padded if operand.origin == CONSTANT for labels in operand.labels}
        merged = []
        for axes, members in clusters([labels for operand in padded for labels in operand.labels]):
            data = [labels for labels in members if id(labels) not in constant]
            covers = bool(data) and frozenset().union(*map(axes_of, data)) == axes
            gathers = self.meet(axes, data, padded) if meets else None
            if gathers is not None:
                data, members = [gathers], [gathers, *(own for own in members if id(own) in constant)]
            if covers and len(data) < len(members):
                labels = merge(self.relations, axes, data)
                for own in members:
                    if id(own) in constant:
                        self.relations.parent(own, labels)
            elif data and len(data) < len(members):  # the table may meet other data elsewhere
                labels = combine(self.relations, members)
            else:
                labels = merge(self.relations, axes, members)
            for operand in padded:
                if gathers is None or not _is_bare(operand, axes):  # what meets pins by itself
                    self.settle(labels, axes, operand)
            merged.append(labels)
        return Value(shape, tuple(merged), origin_of(operands), any(operand.looked_up for operand in operands))

    def meet(self, axes: frozenset[int], data: list[torch.Tensor], operands: list[Value]) -> torch.Tensor | None:
        """Let labels of data meet others, and data without labels on these axes; return the result's, if they do."""
        full = [labels for labels in data if axes_of(labels) == axes]
        bare = [operand.origin for operand in operands if _is_bare(operand, axes)]
        if self.node is None or not full or (not bare and all(torch.equal(full[0], labels) for labels in data)):
            return None
        others = [labels for labels in data if axes_of(labels) != axes]
        return self.relations.meet(self.node.name, full, others, bare)

    def settle(self, labels: torch.Tensor, axes: frozenset[int], operand: Value) -> None:
        """Tie labels along axes that an operand of data has without labels; pin them where it has all of them."""
        if operand.origin == CONSTANT:
            return
        bare = _bare_axes(operand, axes)
        if bare and len(bare) == len(axes):
            self.relations.pin(labels, operand.origin)
        elif bare:
            self.tie_along(labels, bare)

    def reduce(self, value: Value, axes: Sequence[int], *, keepdim: bool) -> Value:
        """Tie labels along axes and remove the axes (or leave size 1)."""
        axes = sorted(axis % len(value.shape) for axis in axes)
        tied = [self.tie_along(labels, axes) for labels in value.labels]
        if keepdim:
            shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
            return self.tidy(Value(shape, tuple(tied), value.origin, value.looked_up))
        keep = [axis for axis in range(len(value.shape)) if axis not in axes]
        shape = tuple(value.shape[axis] for axis in keep)
        dropped = tuple(labels.reshape([labels.shape[axis] for axis in keep]) for labels in tied)
        return self.tidy(Value(shape, dropped, value.origin, value.looked_up))

    def tie_axes(self, value: Value, axes: Sequence[int]) -> Value:
        """Tie labels along axes; the value keeps its shape and labels."""
        for labels in value.labels:
            self.tie_along(labels, [axis % len(value.shape) for axis in axes])
        return value

    def move(self, value: Value, function: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]) -> Value:
        """Run a data movement on every label tensor."""
        moved = tuple(compact(function(labels.expand(value.shape))) for labels in value.labels)
        self.pin_single(moved)
        return self.tidy(Value(tuple(shape), moved, value.origin, value.looked_up, value.indexes))

    def pin_single(self, moved: Sequence[torch.Tensor]) -> None:
        """Pin what a data movement picks alone: an axis of one coordinate carries no labels any more."""
        for labels in moved:
            if labels.numel() == 1 and self.node is not None:
                reason = f"one channel of it is picked by {self.node.target}"
                self.relations.pin(labels, self.relations.pin_label(reason, self.node.name))

    def tidy(self, value: Value) -> Value:
        """Drop label tensors that vary no more, and merge those that came to share an axis."""
        merged = [self._meet(axes, members) for axes, members in clusters(value.labels)]
        return Value(value.shape, tuple(merged), value.origin, value.looked_up, value.indexes)

    def _meet(self, axes: frozenset[int], members: list[torch.Tensor]) -> torch.Tensor:
        """Merge labels that came to share axes: heads and channels, each repeated for the other, in one flat axis."""
        if len(members) > 1 and all(labels.unique().numel() < labels.numel() for labels in members):
            return combine(self.relations, members)
        return merge(self.relations, axes, members)

    def opaque(self, node: fx.Node, reason: str, *, pins: Sequence[Value] | None = None) -> Any:
        """Pin every label that a node reads, and return a result that pins whatever it meets."""
        label = self.relations.pin_label(reason, node.name)
        for operand in self.operands(node) if pins is None else pins:
            for labels in operand.labels:
                self.relations.pin(labels, label)
        return self.bare(node, label)

    def bare(self, node: fx.Node, origin: int, *, looked_up: bool = False) -> Any:
        """Return a node's result without labels."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return Value(sizes(node), (), origin, looked_up)
        if isinstance(value, tuple | list):
            shapes = [tuple(hint(s) for s in item.shape) if isinstance(item, torch.Tensor) else () for item in value]
            return tuple(Value(shape, (), origin, looked_up) for shape in shapes)
        return None


def _bare_axes(value: Value, axes: frozenset[int]) -> list[int]:
    """Return the axes of several coordinates along which a value has no labels."""
    labelled = frozenset().union(*(axes_of(own) for own in value.labels))
    return [axis for axis in axes if value.shape[axis] > 1 and axis not in labelled]


def _is_bare(value: Value, axes: frozenset[int]) -> bool:
    """Tell whether a value is data that pins what it meets: it has several coordinates on all axes, and no labels."""
    return value.origin != CONSTANT and len(_bare_axes(value, axes)) == len(axes)


def _pad(value: Value, rank: int) -> Value:
    missing = rank - len(value.shape)
    if missing <= 0:
        return value
    ones = (1,) * missing
    labels = tuple(own.reshape(ones + tuple(own.shape)) for own in value.labels)
    return Value(ones + value.shape, labels, value.origin, value.looked_up)


def pin_axis(walk: Walk, value: Value, axis: int, reason: str, node: fx.Node) -> None:
    """Pin what varies along one axis of a value."""
    labels = value.along(axis)
    if labels is not None:
        walk.relations.pin(labels, walk.relations.pin_label(reason, node.name))


def origin_of(operands: Sequence[Value]) -> int:
    """Return the first origin that is data, or CONSTANT."""
    return next((operand.origin for operand in operands if operand.origin != CONSTANT), CONSTANT)


def sizes(node: fx.Node) -> tuple[int, ...]:
    """Return the example shape of a node's tensor."""
    return tuple(hint(size) for size in node.meta["val"].shape)


def concrete(argument: Any) -> Any:
    """Replace symbolic numbers in an argument by their example values."""
    if isinstance(argument, fx.Node):
        value = argument.meta.get("val")
        return hint(value) if isinstance(value, int | torch.SymInt) else value
    if isinstance(argument, tuple | list):
        return type(argument)(concrete(item) for item in argument)
    return hint(argument) if isinstance(argument, torch.SymInt) else argument


def parameter(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """Return an argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def fixed(node: fx.Node, axis: int) -> bool:
    """Tell whether a size of a node's tensor is a constant of the graph."""
    return not is_symbolic(node.meta["val"].shape[axis])


def multiple(node: fx.Node, axis: int) -> bool:
    """Tell whether a size of a node's tensor is a constant of the graph times an open size."""
    size = node.meta["val"].shape[axis]
    return is_symbolic(size) and bool(size.node.expr.as_coeff_Mul()[0] > 1)
