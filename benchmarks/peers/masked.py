"""What a pruned model should compute, told from its weights alone, whichever tool has made it.

Where a linear of the pruned model has fewer input columns than that of the dense one, the columns that are left are
looked for in the dense weight. All others are zeroed in a copy of the dense model: the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.peers.models import Subject, matrices


def kept_columns(small: Tensor, dense: Tensor) -> list[int]:
    """Return which columns of a dense matrix those of a small one are, bit by bit.

    Raises:
        ValueError: rows went too, or a column is none of the dense ones, or more than one.
    """
    if len(small) != len(dense):
        raise ValueError(f"has {len(small)} of {len(dense)} rows and fewer columns: it cannot be told what they are")
    kept = []
    for place, column in enumerate(small.T):
        found = (dense == column[:, None]).all(0).nonzero().flatten().tolist()
        if len(found) != 1:
            raise ValueError(f"column {place} is {len(found)} columns of the dense weight")
        kept += found
    return kept


def narrowed(dense: nn.Module, small: nn.Module) -> dict[str, list[int]]:
    """Return the columns that are left, for every linear that lost some.

    Raises:
        ValueError: a linear is missing, or its columns cannot be told.
    """
    found, after = {}, matrices(small)
    for name, weight in matrices(dense).items():
        if name not in after:
            raise ValueError(f"{name} is missing")
        if after[name].shape[1] == weight.shape[1]:
            continue
        try:
            found[name] = kept_columns(after[name], weight)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    return found


def masked(dense: nn.Module, kept: Mapping[str, list[int]]) -> nn.Module:
    """Return a copy of the dense model in which all other columns are zero."""
    reference = copy.deepcopy(dense)
    for name, weight in matrices(reference).items():
        if name in kept:
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[kept[name]] = False
            weight[:, gone] = 0
    return reference


@dataclass(frozen=True)
class Gone:
    """What went, counted from the columns of what reads it.

    Attributes:
        channels: part of the FFN's channels.
        heads: part of the heads: those of which no column is left.
        cut: heads of which some columns are left and others are not.
    """

    channels: float
    heads: float
    cut: int


def gone(subject: Subject, dense: nn.Module, kept: Mapping[str, list[int]]) -> Gone:
    """Count what went."""
    before = {name: weight.shape[1] for name, weight in matrices(dense).items()}
    down, attended = subject.roles.linears(dense, "down"), subject.roles.linears(dense, "attended")
    channels = sum(before[name] - len(kept[name]) for name in down if name in kept)
    whole = cut = 0
    for name in attended:
        if name in kept:
            width = before[name] // subject.heads
            left = torch.bincount(torch.tensor(kept[name]) // width, minlength=subject.heads)
            whole += int((left == 0).sum())
            cut += int(((left > 0) & (left < width)).sum())
    return Gone(channels / sum(before[name] for name in down), whole / (subject.heads * len(attended)), cut)


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run a model in float64 and return the tensors of its output in order."""
    wide = {key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()}  # fmt: skip
    with torch.no_grad():
        result = copy.deepcopy(model).double().eval()(**wide)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of outputs, relative to the largest value of each.

    Raises:
        ValueError: shapes differ.
    """
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1] or not expected:
        raise ValueError(f"outputs of shapes {shapes[0]}, expected {shapes[1]}")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
