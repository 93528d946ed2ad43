"""Small functions with named weights, traced and labelled, for tests that say exactly what must follow what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.inputs import bind
from fxslim.passes import pipelines as lines
from fxslim.passes.annotate import Labels, annotate
from fxslim.passes.cut import Cut, closed
from fxslim.passes.planning import subject
from fxslim.pipeline import Facts
from fxslim.program import Program
from fxslim.trace import trace

Coordinates = Mapping[tuple[str, int], Iterable[int]]
"""(tensor name, dimension) -> rows."""


class Function(nn.Module):
    """A function of one input and of named weights; ``sizes`` say their shapes.

    Weights are drawn from the shape alone, so that equal shapes under equal names give equal weights.
    """

    def __init__(self, function: Callable[[Any, Tensor], Any], **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for number, (name, shape) in enumerate(sizes.items()):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(noise / (shape[-1] if shape else 1) ** 0.5))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def numbers(*shape: int, seed: int = 7) -> Tensor:
    """Return fixed normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def traced(model: nn.Module, inputs: Any) -> Program:
    """Trace a module."""
    return trace(model, *bind(model, inputs))


def labelled(
    function: Callable[[Any, Tensor], Any], inputs: Tensor, **sizes: tuple[int, ...]
) -> tuple[Program, Labels]:
    """Trace and label a function of one input."""
    program = traced(Function(function, **sizes), inputs)
    return program, annotate(program)


def known(model: nn.Module, inputs: Any) -> Facts:
    """Return everything that inspecting a module finds."""
    return lines.inspecting().run(subject(model, inputs))


def components(program: Program, labels: Labels, tensor: str, dim: int) -> np.ndarray:
    """Return the component of every row of a tensor's dimension."""
    return labels.of(tensor, dim, program.tensors[tensor].shape[dim])


def cut_rows(program: Program, labels: Labels, rows: Coordinates) -> Cut:
    """Return the cut that removes some rows, and whatever goes with them."""
    gone = [components(program, labels, *key)[list(which)] for key, which in rows.items()]
    return closed(labels, np.concatenate(gone))


def gone_rows(program: Program, cut: Cut) -> dict[tuple[str, int], list[int]]:
    """Return every row of every tensor that a cut removes."""
    found = {}
    for tensor, dim in cut.labels.starts:
        rows = np.flatnonzero(cut.removed[components(program, cut.labels, tensor, dim)])
        if len(rows):
            found[tensor, dim] = rows.tolist()
    return found


def follows(program: Program, labels: Labels, rows: Coordinates) -> dict[tuple[str, int], list[int]]:
    """Return every row that goes when some rows go."""
    return gone_rows(program, cut_rows(program, labels, rows))


def pinned_because(program: Program, labels: Labels, tensor: str, dim: int) -> list[str | None]:
    """Return why each row of a tensor's dimension stays; None for rows that may go."""
    own = components(program, labels, tensor, dim)
    return [labels.components.pins[int(c)].reason if labels.components.pinned[c] else None for c in own]
