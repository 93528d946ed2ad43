"""Fold constants into biases: what a consumer made of a channel that never changes moves into what it adds anyway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from fxslim.errors import PlanError
from fxslim.site import Fold, SitePlan


def folded(tensors: Mapping[str, torch.Tensor], parts: Iterable[SitePlan]) -> dict[str, torch.Tensor]:
    """Return the biases that take up constants, by name; on ``meta`` there is nothing to compute.

    Args:
        tensors: canonical tensor name -> dense tensor.
        parts: what is taken out.

    Raises:
        PlanError: a bias does not exist, or does not fit its weight.
    """
    made: dict[str, torch.Tensor] = {}
    for part in parts:
        for fold in part.folds:
            check_fold(tensors, fold)
            bias = made.get(fold.bias, tensors[fold.bias]).detach()
            weight = tensors[fold.tensor].detach()
            if "meta" not in (bias.device.type, weight.device.type):
                made[fold.bias] = _plus(bias, weight, fold)
    return made


def _plus(bias: torch.Tensor, weight: torch.Tensor, fold: Fold) -> torch.Tensor:
    """Return ``bias + weight[:, rows] @ values``, summed in float64; a kernel is summed over."""
    rows = torch.tensor(fold.rows, device=weight.device)
    columns = weight.index_select(fold.dim, rows).movedim(fold.dim, 0).cpu().double()
    columns = columns.reshape(*columns.shape[:2], -1).sum(dim=-1)
    total = torch.tensor(fold.values, dtype=torch.float64) @ columns
    return (bias.cpu().double() + total).to(bias.dtype).to(bias.device)


def check_fold(tensors: Mapping[str, torch.Tensor], fold: Fold) -> None:
    """Raise PlanError unless a fold's bias is as long as its weight has outputs."""
    bias, weight = tensors.get(fold.bias), tensors.get(fold.tensor)
    if bias is None or weight is None:
        raise PlanError(f"the plan folds into {fold.bias}, which the model does not have.")
    outputs = [size for dim, size in enumerate(weight.shape[:2]) if dim != fold.dim]
    if fold.dim > 1 or list(bias.shape) != outputs or any(row >= weight.shape[fold.dim] for row in fold.rows):
        raise PlanError(
            f"the plan folds {fold.tensor} {tuple(weight.shape)} into {fold.bias} {tuple(bias.shape)}, which does not "
            "fit: it was made for another model, or is already applied."
        )


def fills(parts: Iterable[SitePlan]) -> dict[tuple[str, int], np.ndarray]:
    """Return what masks put in the place of what goes: zero, or the constant.  (tensor, dim) -> (size,)"""
    found: dict[tuple[str, int], np.ndarray] = {}
    for part in parts:
        sizes = {(piece.tensor, piece.dim): piece.size for piece in part.site.slices}
        for fold in part.folds:
            key = (fold.tensor, fold.dim)
            values = found.setdefault(key, np.zeros(sizes[key]))
            values[list(fold.rows)] = fold.values
    return found
