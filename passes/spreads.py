"""Narrow a site in its linears alone, where no integer of the module says its width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from fxslim.plan import Plan, SitePlan, SpreadEdit
from fxslim.program import named_tensors
from fxslim.spread import CONVOLUTIONS

OUTPUT_DIM = {"in_features": 0, "in_channels": 0, "nx": 1}
"""Attribute by which a linear is known -> the dimension of its weight that holds its outputs."""


def spread_edits(model: nn.Module, plan: Plan, parts: Sequence[SitePlan]) -> tuple[SpreadEdit, ...] | None:
    """Return the edits that let some sites be narrowed in their linears, or None where that does not do.

    Every consumer has to be a linear of its own, and one producer at least. Tables and scales between them stay.

    Args:
        model: the dense model.
        plan: everything else that is narrowed, with its edits.
        parts: the sites.
    """
    owners = _owners(model)
    others = plan.model_copy(update={"sites": plan.cut()}).removed_rows()
    gone: dict[tuple[str, str], np.ndarray] = {}
    around: dict[tuple[str, str], np.ndarray] = {}
    for part in parts:
        for piece in part.site.slices:
            path, _, leaf = piece.tensor.rpartition(".")
            fits = leaf == "weight" and owners.get(piece.tensor, ()) == (path,) and _is_side(model, path, piece.dim, piece.role)
            if piece.role == "in" and not fits:
                return None
            if fits:
                key = (path, f"{piece.role}put")
                removed = piece.removed(part.gone)
                gone[key] = gone.get(key, np.zeros_like(removed)) | removed
                around[key] = others.get((piece.tensor, piece.dim), np.zeros_like(removed))
    if not any(side == "output" for _, side in gone):
        return None
    return tuple(
        SpreadEdit(
            module=path,
            name="output" if side == "output" else "input",
            size=int((~around[path, side]).sum()),
            keep=tuple(np.flatnonzero(~removed[~around[path, side]]).tolist()),
        )
        for (path, side), removed in gone.items()
        if (removed & ~around[path, side]).any()
    )


def _owners(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Return the modules that hold each tensor, by its canonical name."""
    canonical = {id(tensor): name for name, tensor in named_tensors(model).items()}
    owners: dict[str, tuple[str, ...]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first = canonical.get(id(tensor), name)
        owners[first] = (*owners.get(first, ()), name.rpartition(".")[0])
    return owners


def _is_side(model: nn.Module, path: str, dim: int, role: str) -> bool:
    """Tell whether a dimension of a module's weight is that side of a linear (or of a plain convolution)."""
    module = model.get_submodule(path)
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and dim == (0 if role == "out" else 1)
    output = next((OUTPUT_DIM[name] for name in OUTPUT_DIM if name in vars(module)), None)
    return output is not None and dim == (output if role == "out" else 1 - output)
