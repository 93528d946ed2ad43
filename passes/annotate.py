"""Put labels on every coordinate of a program and relate them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from fxslim.labels import CONSTANT, Components, Pin, Value, solve
from fxslim.passes.loosen import loosen
from fxslim.passes.rules import contraction, indexing, movement, pointwise, reduction, routing  # noqa: F401 - fill RULES
from fxslim.passes.rules.walk import RULES, Selection, Use, Walk, concrete
from fxslim.program import Program, hint

SHAPE_ONLY = ("aten.sym_size", "aten.sym_numel", "aten.sym_stride", "aten.sym_storage_offset", "aten.sym_is_contiguous")
ASSERTIONS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range",
              "aten.sym_constrain_range_for_size")  # fmt: skip
POSITIONS = ("aten.arange", "aten.linspace", "aten.scalar_tensor", "aten.eye", "aten.tril_indices",
             "aten.triu_indices", "aten.bartlett_window", "aten.hann_window")  # fmt: skip
REGION_INPUT = "an input of a region that is traced by itself"
REGION_OUTPUT = "an output of a region that is traced by itself"

MOST_KNOWN = 1 << 16
"""Largest constant of whole numbers that is followed through a graph."""


@dataclass(frozen=True)
class Labels:
    """Labels of a program.

    Attributes:
        values: node -> Value, or a tuple of Values.
        starts: (tensor name, dimension) -> first label of that dimension; the others follow.
        components: the solved relations.
        contracted: uses of parameters along an axis that is summed over.
        produced: uses of parameters along an axis that becomes an output's.
        unknown: operations without a rule -> first node.
        pins: pin label -> reason.
        scores: components of the heads of score products (two activations multiplied).
        ties: component -> the operation that tied coordinates along an axis.
        known: node -> whole numbers that are constants of the graph.
        selections: where coordinates compete to be selected, those that may go.
        competing: the same, and those that stay.
        routed: components of coordinates that data selects, and that nothing sums over.
    """

    values: Mapping[fx.Node, Any]
    starts: Mapping[tuple[str, int], int]
    components: Components
    contracted: tuple[Use, ...]
    produced: tuple[Use, ...]
    unknown: Mapping[str, str]
    pins: Mapping[int, Pin]
    scores: frozenset[int]
    ties: Mapping[int, str]
    known: Mapping[fx.Node, torch.Tensor] = field(default_factory=dict)
    selections: tuple[Selection, ...] = ()
    competing: tuple[Selection, ...] = ()
    routed: frozenset[int] = frozenset()

    def tied_by(self, component: int) -> str:
        """Return ``", tied by <operation>"`` for a component whose coordinates an operation tied along an axis."""
        return f" (tied by {self.ties[component]})" if component in self.ties else ""

    def of(self, tensor: str, dim: int, size: int) -> np.ndarray:
        """Return the component of every coordinate of a tensor's dimension; size-1 dimensions stay."""
        start = self.starts.get((tensor, dim))
        return self.components.of[start : start + size] if start is not None else np.zeros(size, dtype=np.int64)


def annotate(program: Program) -> Labels:
    """Walk a program's graph once and solve the relations.

    Ensures: every operation either has a rule or pins what it reads, with the reason.
    """
    walk = Walk(routing=routing.on_the_way(program))
    starts = _tensors(walk, program)
    whole = not program.regions
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in program.tensor_of:
                walk.values[node] = _input(walk, node, f"input {node.name!r} of the model" if whole else REGION_INPUT)
            elif program.tensor_name(node) in program.constants:
                _remember(walk, node, program.tensors[program.tensor_of[node.name]])
        elif node.op == "call_function":
            walk.node = node
            _compute(walk, node)
            walk.values[node] = _apply(walk, node)
        elif node.op == "output":
            label = walk.relations.pin_label("an output of the model" if whole else REGION_OUTPUT, node.name)
            for operand in walk.operands(node):
                for labels in operand.labels:
                    walk.relations.pin(labels, label)
                if operand.indexes is not None:
                    walk.relations.pin(operand.indexes, label)
    competing = [*(selection.labels for selection in walk.selections), *walk.indexed]
    made = [use.labels for use in walk.produced]
    components = _routed(walk, loosen(walk.relations, walk.tied, made=made, whole=competing))
    scores = [labels.reshape(-1).numpy() for labels in walk.scores]
    return Labels(
        values=walk.values,
        starts=starts,
        components=components,
        scores=frozenset(np.unique(components.of[np.concatenate(scores)]).tolist()) if scores else frozenset(),
        ties={int(components.of[label]): name for label, name in reversed(walk.tied)},
        contracted=tuple(walk.contracted),
        produced=tuple(walk.produced),
        unknown=walk.unknown,
        pins=walk.relations.pins,
        known=walk.known,
        selections=tuple(s for s in walk.selections if not components.pinned[components.of[s.labels.numpy()]].any()),
        competing=tuple(walk.selections),
        routed=_components(components, walk.indexed),
    )


def _components(components: Components, labels: Sequence[torch.Tensor]) -> frozenset[int]:
    """Return the components of labels that may go."""
    every = np.concatenate([np.zeros(0, dtype=np.int64), *(own.reshape(-1).numpy() for own in labels)])
    own = np.unique(components.of[every])
    return frozenset(own[~components.pinned[own]].tolist())


def _routed(walk: Walk, components: Components) -> Components:
    """Pin what competes to be selected, unless it is picked by its number alone and nothing sums over it."""
    picked = _components(components, walk.indexed) - _components(components, [use.labels for use in walk.contracted])
    pinned = False
    for selection in walk.selections:
        own = components.of[selection.labels.numpy()]
        if components.pinned[own].all() or set(np.unique(own).tolist()) <= picked:
            continue
        label = walk.relations.pin_label(f"selected by value ({selection.node.target})", selection.node.name)
        walk.relations.pin(selection.labels, label)
        pinned = True
    return _routed(walk, solve(walk.relations)) if pinned else components


def _remember(walk: Walk, node: fx.Node, tensor: torch.Tensor) -> None:
    """Keep a tensor of whole numbers that the graph holds as a constant."""
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    if whole and tensor.device.type != "meta" and tensor.numel() <= MOST_KNOWN:
        walk.known[node] = tensor.detach().cpu()


def _compute(walk: Walk, node: fx.Node) -> None:
    """Compute a node that reads nothing but constants of the graph."""
    read = node.all_input_nodes
    if not read or not all(argument in walk.known for argument in read):
        return
    if not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].is_floating_point():
        return
    keywords = {name: value for name, value in node.kwargs.items() if name != "device"}
    args: tuple[Any, ...] = fx.node.map_arg(node.args, walk.known.__getitem__)
    kwargs: dict[str, Any] = fx.node.map_arg(keywords, walk.known.__getitem__)
    if operation(node) == "aten.to" and "device" in str(node.target):
        walk.known[node] = args[0].to(node.meta["val"].dtype)
        return
    _remember(walk, node, node.target(*args, **kwargs))  # type: ignore[operator]


def _tensors(walk: Walk, program: Program) -> dict[tuple[str, int], int]:
    """Give each dimension of each tensor labels of its own."""
    starts: dict[tuple[str, int], int] = {}
    made: dict[str, Value] = {}
    for node in program.graph.nodes:
        name = program.tensor_name(node)
        if name is None:
            continue
        if name not in made:
            tensor = program.tensors[name]
            labels = []
            floating = tensor.is_floating_point() or tensor.is_complex()
            for dim, size in enumerate(tensor.shape):
                if size > 1 and floating and name not in program.constants:
                    own = walk.relations.fresh(size)
                    starts[name, dim] = int(own[0])
                    labels.append(own.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)]))
            made[name] = Value(tuple(tensor.shape), tuple(labels))
            if labels and name in program.held:
                pin = walk.relations.pin_label(f"its weight is {program.held[name]}", node.name)
                for own in labels:
                    walk.relations.pin(own, pin)
        walk.values[node] = made[name]
    return starts


def _input(walk: Walk, node: fx.Node, reason: str) -> Value | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    shape = tuple(hint(size) for size in value.shape)
    if value.is_floating_point() or value.is_complex():
        return Value(shape, (), walk.relations.pin_label(reason, node.name), True)
    return Value(shape, (), CONSTANT, True)


def operation(node: fx.Node) -> str:
    """Return an operation's name without overload, such as ``"aten.linear"``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else str(node.target)


def _apply(walk: Walk, node: fx.Node) -> Any:
    name = operation(node)
    if node.target is operator.getitem:
        source = walk.values.get(node.args[0])  # type: ignore[arg-type]
        return source[int(concrete(node.args[1]))] if isinstance(source, tuple) else None
    if name in ASSERTIONS or name.startswith(SHAPE_ONLY):
        return None
    if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        for operand in walk.operands(node):  # a number read off a tensor, such as item()
            if operand.labels:
                walk.opaque(node, f"read as a number by {name}", pins=[operand])
        return None
    for operand in walk.operands(node) if name not in routing.AWARE else ():
        routing.pin_numbers(walk, node, operand)
    if name in POSITIONS:
        return walk.bare(node, CONSTANT)
    handler = RULES.get(name)
    if handler is None and pointwise.is_pointwise(node):
        handler = pointwise.pointwise
    if handler is None:
        return _unknown(walk, node, name)
    try:
        return handler(walk, node)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())[:120]
        return walk.opaque(node, f"the rule for {name} does not cover this call ({type(error).__name__}: {said})")


def _unknown(walk: Walk, node: fx.Node, name: str) -> Any:
    operands = walk.operands(node)
    if any(operand.labels for operand in operands):
        walk.unknown.setdefault(name, node.name)
        return walk.opaque(node, f"no rule for {name}")
    origin = next((operand.origin for operand in operands if operand.origin != CONSTANT), CONSTANT)
    return walk.bare(node, origin, looked_up=any(operand.looked_up for operand in operands))
