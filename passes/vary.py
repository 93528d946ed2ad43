"""How far the inputs of the verification are from those that were traced with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxslim.inputs import BATCH, LENGTH, countable, fresh
from fxslim.program import Program, is_symbolic


@dataclass(frozen=True)
class Vary:
    """How far the inputs of the verification are from the example's.

    Attributes:
        name: what to call the last path.
        batch: another batch, or None.
        length: another length, or None.
        one: the batch of the last path, or None.
        integers: whether integers change.
        at: the position that is repeated in longer inputs, where they do not.
        whole: whether further rows repeat whole ones, or nothing but that position.
    """

    name: str
    batch: int | None = None
    length: int | None = None
    one: int | None = None
    integers: bool = True
    at: int = 0
    whole: bool = True


MOST_PLACES = 16
"""How many positions of integer inputs are tried until one may be repeated."""


def varied(program: Program) -> tuple[Vary, ...]:
    """Return ways to vary inputs, from the furthest to the nearest; the first that the model takes is verified on.

    Some models count special tokens, so that longer inputs have to repeat a position at which none stands, and further
    rows hold as many tokens as there are images, or none.
    """
    length = countable(program)
    places = range(length - 1, max(length - 1 - MOST_PLACES, -1), -1)
    return (
        Vary("batch of one", BATCH + 1, LENGTH + 2, 1),
        Vary("batch of one", BATCH + 1, LENGTH - 2, 1),
        *(Vary("other numbers", BATCH + 1, LENGTH + 2, 1, integers=False, at=at) for at in places),
        *(Vary("other numbers", BATCH + 1, LENGTH + 2, BATCH + 2, integers=False, at=at, whole=False) for at in places),
        Vary("batch of one", BATCH + 1, one=1),
        Vary("other values"),
        Vary("other numbers", integers=False),
    )


def unseen(program: Program, vary: Vary) -> bool:
    """Tell whether a graph would take sizes that inputs varied like this do not show."""
    axes = open_axes(program)
    return (0 in axes and vary.batch is None) or (bool(axes - {0}) and vary.length is None)


def open_axes(program: Program) -> frozenset[int]:
    """Return the axes of the inputs that take other sizes; none where a model is traced in regions."""
    if program.regions:
        return frozenset()
    shapes = [node.meta["val"].shape for node in program.graph.find_nodes(op="placeholder")
              if node.name in program.inputs and isinstance(node.meta["val"], torch.Tensor)]  # fmt: skip
    return frozenset(axis for shape in shapes for axis, size in enumerate(shape) if is_symbolic(size))


def further(program: Program, vary: Vary, seed: int = 1) -> dict[str, Any]:
    """Return inputs that are varied like this."""
    return fresh(
        program, seed=seed, batch=vary.batch, length=vary.length, integers=vary.integers, at=vary.at, whole=vary.whole
    )
