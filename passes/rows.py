"""Rows of tensors: take them out, or zero them, the same everywhere or others for every expert."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fxslim.errors import PlanError
from fxslim.plan import SitePlan


def without(tensor: torch.Tensor, dim: int, gone: np.ndarray, lead: int | None) -> torch.Tensor:
    """Take rows out of a tensor.

    Args:
        tensor: the tensor.
        dim: the dimension whose rows go.
        gone: which rows, (size,); or which of every expert, (experts, size).
        lead: the dimension that counts the experts, where rows differ between them.

    Raises:
        PlanError: experts would keep different numbers of rows.
    """
    if gone.ndim == 1:
        return tensor.index_select(dim, torch.from_numpy(np.flatnonzero(~gone)).to(tensor.device))
    assert lead is not None
    counts = (~gone).sum(axis=1)
    if len(set(counts.tolist())) > 1:
        raise PlanError(f"experts would keep {counts.min()} to {counts.max()} rows; each has to keep equally many.")
    rows = torch.from_numpy(np.nonzero(~gone)[1].reshape(len(gone), -1)).to(tensor.device)
    spread = rows.reshape(*rows.shape, *[1] * (tensor.ndim - 2))
    front = tensor.movedim((lead, dim), (0, 1))
    return front.take_along_dim(spread, dim=1).movedim((0, 1), (lead, dim)).contiguous()


def clear(tensor: torch.Tensor, dim: int, gone: np.ndarray, lead: int | None) -> None:
    """Zero rows of a tensor in place; see `without`."""
    if gone.ndim == 1:
        tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(gone)).to(tensor.device), 0)
        return
    assert lead is not None
    mask = torch.from_numpy(gone).to(tensor.device)
    tensor.movedim((lead, dim), (0, 1)).masked_fill_(mask.reshape(*mask.shape, *[1] * (tensor.ndim - 2)), 0)


def cleared(
    tensors: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor], part: SitePlan
) -> dict[str, torch.Tensor]:
    """Return a site's consumers with zeros in the columns of all units that go, by name.

    Args:
        tensors: the dense tensors.
        changed: those among them that are to be read from here instead.
        part: the site's plan.
    """
    made: dict[str, torch.Tensor] = {}
    for piece in part.site.slices:
        if piece.role == "in":
            before = made.get(piece.tensor, changed.get(piece.tensor, tensors[piece.tensor]))
            made[piece.tensor] = before.detach().clone()
            clear(made[piece.tensor], piece.dim, piece.per_expert(piece.removed(part.gone)), piece.lead)
    return made
