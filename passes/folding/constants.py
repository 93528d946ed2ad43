"""Constants: which channels hold the same number for every input, found by walking a graph once, op by op.

Activations are assumed to be finite: nothing but zero is 0 · x. A dropout that rests in eval mode is the identity: in
training mode what is folded for a constant is the mean of what dropout made of it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from fxslim.passes.annotate import operation
from fxslim.passes.folding import products  # noqa: F401 - fills RULES
from fxslim.passes.folding.facts import (
    CONSTANT,
    COPIES,
    RULES,
    SOURCES,
    VARIES,
    Fact,
    NumberlessError,
    Result,
    Tracker,
    fact,
    full,
    moved,
    rule,
)
from fxslim.passes.rules.movement import MOVES, SPLITS
from fxslim.passes.rules.pointwise import LIKE_POINTWISE, is_pointwise
from fxslim.passes.rules.walk import Use, concrete, parameter, sizes
from fxslim.program import Program, is_symbolic

DROPOUT = "dropout is active whenever the model runs"
PRODUCT = "they are multiplied by data"
PADDED = "padding adds another value"


@dataclass(frozen=True)
class Constants:
    """What is constant in a program.

    Attributes:
        facts: node -> what is known of its value; only nodes of which something is known.
        reasons: why something constant was lost, by number (states of 2 and more).
    """

    facts: Mapping[fx.Node, Result]
    reasons: tuple[str, ...] = ()

    def along(self, use: Use) -> tuple[np.ndarray, np.ndarray] | None:
        """Return state and value of every coordinate that a product sums over, or None where nothing is known."""
        found = self.facts.get(use.activation) if use.activation is not None else None
        if not isinstance(found, Fact) or use.axis is None:
            return None
        axis = use.axis % found.state.ndim
        over = found.over([other for other in range(found.state.ndim) if other != axis])
        size = (use.labels.numel(),)
        return over.state.reshape(-1).expand(size).numpy(), over.value.reshape(-1).double().expand(size).numpy()


def constants(program: Program, model: nn.Module) -> Constants:
    """Find what is constant; nothing where weights are on ``meta``."""
    tracker = Tracker(program, model)
    try:
        with torch.no_grad():
            for node in program.graph.nodes:
                if node.op == "call_function":
                    found = _apply(tracker, node)
                    if isinstance(found, Fact) or (isinstance(found, tuple) and any(found)):
                        tracker.facts[node] = found
    except NumberlessError:
        return Constants({})
    return Constants(tracker.facts, tuple(tracker.reasons))


def _apply(tracker: Tracker, node: fx.Node) -> Result:
    if node.target is operator.getitem:
        parts = tracker.facts.get(node.args[0])  # type: ignore[arg-type]
        return parts[int(concrete(node.args[1]))] if isinstance(parts, tuple) else None
    name = operation(node)
    if name not in SOURCES and not any(argument in tracker.facts for argument in node.all_input_nodes):
        return None
    if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        return None
    found = RULES.get(name)
    if found is None and (is_pointwise(node) or name in LIKE_POINTWISE):
        found = pointwise
    return found(tracker, node) if found is not None else None


@rule(*MOVES, "aten.repeat", "aten.repeat_interleave")
def move(tracker: Tracker, node: fx.Node) -> Result:
    """Move facts like the values."""
    known = tracker.known(node.args[0])
    by_data = operation(node) == "aten.repeat_interleave" and not isinstance(parameter(node, "repeats", 1), int)
    if known is None or by_data:
        return None
    out = known.map(lambda t: moved(node, full(t, node.args[0])))
    return fact(out.state, out.value)


@rule(*SPLITS)
def split(tracker: Tracker, node: fx.Node) -> Result:
    """Move facts into each of the parts."""
    known = tracker.known(node.args[0])
    if known is None:
        return None
    states, values = (moved(node, full(t, node.args[0])) for t in (known.state, known.value))
    return tuple(fact(state, value) for state, value in zip(states, values, strict=True))


@rule("aten.expand", "aten.broadcast_to")
def expand(tracker: Tracker, node: fx.Node) -> Result:
    """Copies hold what the original holds."""
    known = tracker.known(node.args[0])
    return known and known.rank(len(sizes(node)))


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(tracker: Tracker, node: fx.Node) -> Result:
    """Put facts side by side; along an axis of open size what holds must hold for all parts."""
    rank = len(sizes(node))
    axis = int(concrete(parameter(node, "dim", 1, 0))) % rank
    parts = [part for part in node.args[0] if sizes(part) != (0,)]  # type: ignore[union-attr,arg-type]
    facts = [tracker.laid(part, rank).map(lambda t, part=part: full(t, part)) for part in parts]  # type: ignore[misc]
    joined = Fact(torch.cat([f.state for f in facts], axis), torch.cat([f.value for f in facts], axis))
    if is_symbolic(node.meta["val"].shape[axis]):
        joined = joined.over([axis])
    return fact(joined.state, joined.value)


@rule("aten.pad", "aten.constant_pad_nd")
def pad(tracker: Tracker, node: fx.Node) -> Result:
    """A constant stays constant where it is padded with itself."""
    known = tracker.known(node.args[0])
    if known is None:
        return None
    rank = len(sizes(node))
    known = known.over([rank - 1 - i // 2 for i, width in enumerate(concrete(node.args[1])) if width])
    named = operation(node) == "aten.pad"
    if named and parameter(node, "mode", 2, "constant") != "constant":
        return known
    filled = parameter(node, "value", 3 if named else 2) or 0
    return tracker.losing(known, known.value != filled, PADDED)


@rule("aten.dropout")
def dropout(tracker: Tracker, node: fx.Node) -> Result:
    """The identity in eval mode; one that is always active leaves zeros alone."""
    known = tracker.known(node.args[0])
    active = parameter(node, "train", 2) and parameter(node, "p", 1)
    return tracker.losing(known, known.value != 0, DROPOUT) if active and known else known


@rule("aten.mul", source=True)
def multiply(tracker: Tracker, node: fx.Node) -> Result:
    """Zero times anything is zero."""
    rank = len(sizes(node))
    first, second = (tracker.laid(argument, rank) for argument in node.args[:2])
    state, value = _product(tracker, first, second, [tracker.known(argument) is not None for argument in node.args[:2]])
    return fact(state, value.to(node.meta["val"].dtype))


def _product(tracker: Tracker, first: Fact, second: Fact, flows: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return state and value of a product; a constant that flows and meets data is lost."""
    zero, both = first.zero | second.zero, first.constant & second.constant
    meets = ~both & ((first.constant & flows[0]) | (second.constant & flows[1]))
    state = torch.maximum(first.state, second.state)
    state = torch.where(state > CONSTANT, state, VARIES)
    if bool((meets & ~zero).any()):
        state = torch.where(meets & (state == VARIES), tracker.lost(PRODUCT), state)
    state = torch.where(zero | both, CONSTANT, state).to(torch.int16)
    value = first.value * second.value
    return state, torch.where(zero, torch.zeros_like(value), value)


@rule("aten.where", "aten.masked_fill")
def choose(tracker: Tracker, node: fx.Node) -> Result:
    """What is chosen between two equal constants is constant."""
    chosen = node.args[1:3] if operation(node) == "aten.where" else (node.args[0], node.args[2])
    first, second = (tracker.laid(argument, len(sizes(node))) for argument in chosen)
    same = first.constant & second.constant & (first.value == second.value)
    state = torch.where(same, CONSTANT, VARIES).to(torch.int16)
    return fact(state, first.value.to(node.meta["val"].dtype))


@rule("aten.glu")
def glu(tracker: Tracker, node: fx.Node) -> Result:
    """The first half times the sigmoid of the second."""
    known = tracker.known(node.args[0])
    if known is None:
        return None
    axis = int(parameter(node, "dim", 1, -1))
    halves = zip(*(full(t, node.args[0]).chunk(2, axis) for t in (known.state, known.value)), strict=True)
    (state, value), (gate, raw) = halves
    return fact(*_product(tracker, Fact(state, value), Fact(gate, raw.sigmoid()), (True, True)))


def pointwise(tracker: Tracker, node: fx.Node) -> Result:
    """Run the very operation on the constants, where all operands are constant."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if random or operation(node).endswith("_like"):
        return None
    reads = {argument: tracker.operand(argument) for argument in node.all_input_nodes}
    known = {argument: found for argument, found in reads.items() if found is not None}
    if len(known) < len(reads):
        return None
    rank = len(sizes(node))
    try:
        state = functools.reduce(_both, (found.rank(rank).state for found in known.values()))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n].value)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, NotImplementedError):  # no such kernel, or a call that names a device or a shape
        return None
    made = fact(state, result.cpu()) if isinstance(result, torch.Tensor) and result.ndim <= rank else None
    fits = made is not None and all(own in (1, size) for own, size in zip(made.state.shape, sizes(node), strict=True))
    return made if fits else None


def _both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the state of what two operands give: constant if both are, lost if one is and the other does not vary."""
    either = torch.maximum(first, second)
    return torch.where((first == VARIES) | (second == VARIES), VARIES, either).to(torch.int16)


for _name in COPIES:
    RULES.setdefault(_name, pointwise)
