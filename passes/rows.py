"""Rows of tensors: take them out, or zero them, the same everywhere or others for every expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fxslim.errors import PlanError
from fxslim.site import SitePlan


@dataclass(frozen=True)
class Rows:
    """Rows of a dimension of a tensor that go.

    Attributes:
        dim: the dimension.
        gone: which of its rows, (size,); or which of every expert, (experts, size).
        lead: the dimension that counts the experts, where rows differ between them.
    """

    dim: int
    gone: np.ndarray
    lead: int | None = None

    def without(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the rows out of a tensor."""
        return without(tensor, self.dim, self.gone, self.lead)

    def clear(self, tensor: torch.Tensor) -> None:
        """Zero the rows of a tensor in place."""
        clear(tensor, self.dim, self.gone, self.lead)

    def between(self, first: int, last: int) -> Rows:
        """Return them for a tensor that holds a part of dimension 0 only."""
        if 0 in (self.dim, self.lead):
            return dataclasses.replace(self, gone=self.gone[first:last])
        return self

    def of_expert(self, expert: int) -> Rows:
        """Return them for the tensor of one expert, which has no dimension 0 that counts them."""
        assert self.dim != 0 and self.lead in (0, None)
        return Rows(self.dim - 1, self.gone if self.lead is None else self.gone[expert])


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
    for name, rows in columns(part):
        if name not in made:
            made[name] = changed.get(name, tensors[name]).detach().clone()
        rows.clear(made[name])
    return made


def columns(part: SitePlan) -> Iterator[tuple[str, Rows]]:
    """Yield the columns of a site's consumers that belong to units that go, with the tensor's name."""
    for piece in part.site.slices:
        if piece.role == "in":
            yield piece.tensor, Rows(piece.dim, piece.per_expert(piece.removed(part.gone)), piece.lead)
