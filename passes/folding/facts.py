"""Facts: which elements of a value are the same number for every input, and what that number is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxslim.passes.annotate import operation
from fxslim.passes.folding.dropouts import dropping
from fxslim.passes.rules.movement import COPIES as CASTS
from fxslim.passes.rules.movement import MOVES, anyhow
from fxslim.passes.rules.walk import concrete, sizes
from fxslim.program import Program, is_symbolic

COPIES = (*CASTS, "aten.lift_fresh_copy", "aten.type_as")
SMALL = 1 << 16
"""Elements up to which a tensor of the model is cast or computed with; larger ones are only viewed."""

VARIES, CONSTANT = 0, 1


@dataclass(frozen=True)
class Fact:
    """What is known of a value, element by element.

    Attributes:
        state: VARIES, CONSTANT, or 2 + number of the reason for which something constant no longer is.  int16, of the
            value's rank, of size 1 along the axes along which neither it nor ``value`` varies.
        value: the number, where the state is CONSTANT; anything elsewhere. Same shape, the value's dtype.
    """

    state: torch.Tensor
    value: torch.Tensor

    @property
    def constant(self) -> torch.Tensor:
        """Return which elements are constant."""
        return self.state == CONSTANT

    @property
    def zero(self) -> torch.Tensor:
        """Return which elements are always zero."""
        return self.constant & (self.value == 0)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Fact:
        """Move both tensors."""
        return Fact(function(self.state), function(self.value))

    def rank(self, rank: int) -> Fact:
        """Add axes of size 1 in front."""
        return self.map(lambda t: t.reshape((1,) * (rank - t.ndim) + tuple(t.shape)))

    def over(self, axes: Sequence[int]) -> Fact:
        """Return what holds for every coordinate of some axes alike; they become size 1."""
        state, value = self.state, self.value
        for axis in axes:
            if state.shape[axis] > 1:
                first = state.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
                same = ((state == first[0]) & ((value == first[1]) | (state != CONSTANT))).all(dim=axis, keepdim=True)
                state, value = torch.where(same, first[0], VARIES), first[1]
        return Fact(state, value)


def fact(state: torch.Tensor, value: torch.Tensor) -> Fact | None:
    """Return a compact fact, or None where nothing is known; a constant that is not finite is none."""
    state, value = torch.broadcast_tensors(state, value)
    state = torch.where((state == CONSTANT) & ~value.isfinite(), VARIES, state)
    if not bool(state.any()):
        return None
    for axis, size in enumerate(state.shape):
        if size > 1 and bool((state == state.narrow(axis, 0, 1)).all() & (value == value.narrow(axis, 0, 1)).all()):
            state, value = state.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    return Fact(state, value)


Result = Fact | tuple[Fact | None, ...] | None
Rule = Callable[["Tracker", fx.Node], Result]
RULES: dict[str, Rule] = {}
"""Rules by operation name. An operation without one returns nothing that is known."""
SOURCES: set[str] = set()
"""Operations that can return something constant although nothing that they read is."""


def rule(*names: str, source: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        SOURCES.update(names if source else ())
        return function

    return register


class NumberlessError(Exception):
    """A tensor is on ``meta``."""


@dataclass
class Tracker:
    """State of one walk over a graph.

    Attributes:
        program: the program; its tensors hold numbers.
        model: the model that it is of, to see what it does in training mode.
        facts: node -> what is known of it.
        reasons: why something constant was lost, by number.
    """

    program: Program
    model: nn.Module
    facts: dict[fx.Node, Result] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @cached_property
    def dropping(self) -> frozenset[str] | None:
        """Return the modules that call a dropout in training mode; None where that cannot be seen."""
        return dropping(self.model, self.program.call.example)

    def known(self, argument: Any) -> Fact | None:
        """Return what is known of an activation."""
        found = self.facts.get(argument) if isinstance(argument, fx.Node) else None
        return found if isinstance(found, Fact) else None

    def operand(self, argument: Any) -> Fact | None:
        """Return what is known of an activation, or of a small tensor of the model."""
        tensor = self.tensor(argument)
        if tensor is None:
            return self.known(argument)
        if tensor.numel() > SMALL or not tensor.is_floating_point():
            return None
        own = tensor.cpu()
        return fact(torch.ones((1,) * own.ndim, dtype=torch.int16), own)

    def laid(self, argument: Any, rank: int) -> Fact:
        """Return what is known of any operand, plain numbers included, with a rank."""
        if isinstance(argument, bool | int | float):
            found = fact(torch.ones((), dtype=torch.int16), torch.tensor(float(argument), dtype=torch.float64))
        else:
            found = self.operand(argument)
        return (found or Fact(torch.zeros((), dtype=torch.int16), torch.zeros(()))).rank(rank)

    def lost(self, reason: str) -> int:
        """Return the state of what was constant and is not for a reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return 2 + self.reasons.index(reason)

    def losing(self, known: Fact, which: torch.Tensor, reason: str) -> Fact | None:
        """Return a fact that has lost some of its constants."""
        which = known.constant & which
        if not bool(which.any()):
            return known
        return fact(torch.where(which, self.lost(reason), known.state.int()).to(torch.int16), known.value)

    def tensor(self, argument: Any) -> torch.Tensor | None:
        """Return a tensor of the model as a node views it; sizes of the inputs play no part in it."""
        if not isinstance(argument, fx.Node):
            return None
        return self._tensor(argument)

    def _tensor(self, node: fx.Node) -> torch.Tensor | None:
        name = self.program.tensor_name(node)
        if name is not None:
            own = self.program.tensors[name].detach()
            if own.device.type == "meta":
                raise NumberlessError(name)
            return own
        done = operation(node)
        if node.op != "call_function" or done not in (*MOVES, *COPIES) or len(node.all_input_nodes) != 1:
            return None
        source = self.tensor(node.args[0])
        value = node.meta.get("val")
        if source is None or not isinstance(value, torch.Tensor) or any(map(is_symbolic, value.shape)):
            return None
        if done in COPIES:  # a cast never makes anything nonzero of a zero
            return source.to(value.dtype) if source.numel() <= SMALL else source
        view: torch.Tensor = moved(node, source)
        return view


def moved(node: fx.Node, tensor: torch.Tensor) -> Any:
    """Run a data movement on a tensor that has the full shape of what the node reads."""
    arguments = tuple(concrete(argument) for argument in node.args[1:])
    keywords = {name: concrete(argument) for name, argument in node.kwargs.items()}
    return anyhow(node.target)(tensor, *arguments, **keywords)


def full(tensor: torch.Tensor, node: Any) -> torch.Tensor:
    """Expand a fact's tensor to the example shape of the node it belongs to."""
    return tensor.expand(sizes(node))
