"""What was found out about a model, kept for later calls for as long as the model stays what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from fxslim.pipeline import Facts

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
OPAQUE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
"""Objects that are what they are: nothing inside them is looked at."""
IGNORED = ("training",)
"""Attributes of modules that no trace depends on."""


@dataclass(frozen=True)
class Analysis:
    """A model, its example inputs, and what passes found out about them.

    Attributes:
        model: the user's model.
        example_inputs: what the user gave, or None.
        facts: what was found.
        state: the model and the inputs as they were.
    """

    model: nn.Module
    example_inputs: Any
    facts: Facts
    state: State

    def holds(self) -> bool:
        """Tell whether model and inputs are still what they were when they were traced."""
        return self.state.rows == state_of(self.model, self.example_inputs).rows


@dataclass(frozen=True)
class State:
    """Everything about some objects that a trace may depend on, without the numbers in their tensors.

    Tensors count as changed when they are replaced or written to (``tensor.data`` is a way around that; graphs read
    the numbers in weights and buffers when they run, and only what Python made of numbers is part of a trace).

    Attributes:
        rows: what is there, to be compared.
        held: the objects, so that no other one gets the identity of one of them.
    """

    rows: tuple[Any, ...]
    held: tuple[Any, ...]


def state_of(*roots: Any) -> State:
    """Walk through objects and everything that they hold: attributes, items, tensors, other objects."""
    rows: list[Any] = []
    held: dict[int, Any] = {}
    waiting: list[Any] = list(reversed(roots))
    while waiting:
        one = waiting.pop()
        if isinstance(one, PLAIN):
            rows.append((type(one), repr(one)))
            continue
        rows.append((type(one), id(one)))
        if id(one) in held:
            continue
        held[id(one)] = one
        if isinstance(one, torch.Tensor):
            version = -1 if one.is_inference() else one._version
            rows.append((version, one.shape, one.dtype, one.device, one.requires_grad))
            continue
        inside = _inside(one)
        rows.append(tuple(name for name, _ in inside))
        waiting.extend(value for _, value in reversed(inside))
    return State(tuple(rows), tuple(held.values()))


def _inside(one: Any) -> list[tuple[str, Any]]:
    """Return what an object holds, by name."""
    if isinstance(one, OPAQUE):
        return []
    found = [] if not hasattr(one, "__dict__") else [(k, v) for k, v in vars(one).items() if k not in IGNORED]
    if isinstance(one, Mapping):
        found += [(repr(key), value) for key, value in one.items()]
    elif isinstance(one, list | tuple):
        found += [(str(i), value) for i, value in enumerate(one)]
    elif isinstance(one, set | frozenset):
        found += [(str(i), value) for i, value in enumerate(sorted(one, key=repr))]
    return found
