"""Narrow a site in its linears alone, where no integer of the module says its width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import nn

from fxslim.edit import SpreadEdit
from fxslim.plan import Plan
from fxslim.program import named_tensors
from fxslim.site import SitePlan, Slice
from fxslim.spread import CONVOLUTIONS

OUTPUT_DIM = {"in_features": 0, "in_channels": 0, "nx": 1}
"""Attribute by which a linear is known -> the dimension of its weight that holds its outputs."""


Side = tuple[str, Literal["input", "output"]]
"""Path of a linear, and ``input`` or ``output``."""


def can_spread(model: nn.Module, part: SitePlan) -> bool:
    """Tell whether a site can be narrowed in its linears: all its consumers and one producer at least are such."""
    sides = _sides(model, part)
    consumers = sum(piece.role == "in" for piece in part.site.slices)
    return len([side for _, side in sides if side == "input"]) == consumers < len(sides)


def spread_edits(model: nn.Module, plan: Plan, parts: Sequence[SitePlan]) -> tuple[SpreadEdit, ...]:
    """Return the edits that let some sites be narrowed in their linears. Tables and scales between these stay.

    Args:
        model: the dense model.
        plan: everything else that is narrowed, with its edits.
        parts: the sites.
    """
    others = plan.model_copy(update={"sites": plan.cut()}).removed_rows()
    gone: dict[Side, np.ndarray] = {}
    around: dict[Side, np.ndarray] = {}
    for part in parts:
        for side, piece in _sides(model, part).items():
            removed = piece.removed(part.taken)
            around[side] = others.get((piece.tensor, piece.dim), np.zeros_like(removed))
            gone[side] = gone.get(side, np.zeros_like(removed)) | removed
    made = []
    for (path, name), removed in gone.items():
        there = ~around[path, name]
        keep = tuple(np.flatnonzero(~removed[there]).tolist())
        made.append(SpreadEdit(module=path, name=name, size=int(there.sum()), keep=keep))
    return tuple(made)


def _sides(model: nn.Module, part: SitePlan) -> dict[Side, Slice]:
    """Return the sides of linears that a site's slices are, leaving out every other slice."""
    owners = _owners(model)
    sides: dict[Side, Slice] = {}
    for piece in part.site.slices:
        path, _, leaf = piece.tensor.rpartition(".")
        alone = leaf == "weight" and owners.get(piece.tensor) == (path,)
        if alone and _is_side(model.get_submodule(path), piece.dim, piece.role):
            sides[path, "input" if piece.role == "in" else "output"] = piece
    return sides


def _owners(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Return the modules that hold each tensor, by its canonical name."""
    canonical = {id(tensor): name for name, tensor in named_tensors(model).items()}
    owners: dict[str, tuple[str, ...]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first = canonical.get(id(tensor), name)
        owners[first] = (*owners.get(first, ()), name.rpartition(".")[0])
    return owners


def _is_side(module: nn.Module, dim: int, role: str) -> bool:
    """Tell whether a dimension of a module's weight is that side of a linear (or of a plain convolution)."""
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and dim == (0 if role == "out" else 1)
    output = next((OUTPUT_DIM[name] for name in OUTPUT_DIM if name in vars(module)), None)
    return output is not None and dim == (output if role == "out" else 1 - output)
