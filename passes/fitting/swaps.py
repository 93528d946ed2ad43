"""Swap units that stay with units that go, for as long as what is left can do better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxslim.passes.fitting.curve import Items
from fxslim.passes.fitting.refit import factor
from fxslim.passes.fitting.seen import Read, Seen
from fxslim.passes.methods.obs import DAMPING, damped

ROUNDS = 5
"""Most times that everything is scored again."""
AT_ONCE = 16
"""A sixteenth of what can be swapped is tried first, then half of that, and so on."""


def swapped(seen: Seen, items: Items, keep: Sequence[int], *, damping: float = DAMPING) -> tuple[int, ...]:
    """Return a choice of the same size that loses no more: local search (OSSCAR, Meng et al. 2024, section 3.3).

    The kept units that cost least to take out change places with those that gain most by coming back, as many of every
    class; only what lowers the error is accepted.

    Args:
        seen: the site.
        items: what may go.
        keep: the units that stay.
        damping: as in `fxslim.passes.methods.obs.obs`.
    """
    reads = [_Fitted(read, items, damping) for read in seen.reads]
    kept = np.array([units[0] in set(keep) for units in items.units])
    most = min(min(int(kept[own].sum()), int((~kept[own]).sum())) for own in items.classes)
    number = -(-most // AT_ONCE)
    error, costs, gains = _scored(reads, kept)
    for _ in range(ROUNDS):
        if not number:
            break
        trial = kept.copy()
        for own in items.classes:
            inside, outside = own[kept[own]], own[~kept[own]]
            trial[inside[np.argsort(costs[inside], kind="stable")[:number]]] = False
            trial[outside[np.argsort(-gains[outside], kind="stable")[:number]]] = True
        now, *scores = _scored(reads, trial)
        if now < error - 1e-9 * abs(error):
            kept, error, (costs, gains) = trial, now, scores
        else:
            number //= 2
    of = {unit for item in np.flatnonzero(kept) for unit in items.units[item]}
    free = {unit for units in items.units for unit in units}
    return tuple(unit for unit in range(seen.site.units) if unit in of or unit not in free)


def _scored(reads: Sequence[_Fitted], kept: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the error of a choice, what each item in it costs to take out, and what each other one gains."""
    found = [read.scored(kept) for read in reads]
    return sum(e for e, _, _ in found), sum(c for _, c, _ in found), sum(g for _, _, g in found)  # type: ignore[return-value]


@dataclass
class _Fitted:
    """One consumer, fitted to what is left."""

    read: Read
    items: Items
    damping: float

    def __post_init__(self) -> None:
        self.inner, self.pull = damped(self.read, self.damping)
        self.columns = [torch.from_numpy(self.read.consumer.columns(u)).to(self.inner.device) for u in self.items.units]

    def scored(self, kept: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Return error, costs and gains; zero where they mean nothing.  float, (items,), (items,)"""
        left = torch.ones(len(self.inner), dtype=torch.bool, device=self.inner.device)
        for item in np.flatnonzero(~kept):
            left[self.columns[item]] = False
        at, gone = left.nonzero()[:, 0], (~left).nonzero()[:, 0]
        inverse = torch.cholesky_inverse(factor(self.inner[at][:, at], 0.0))
        weight = inverse @ self.pull[at]
        across = self.inner[gone][:, at]
        missing = self.pull[gone] - across @ weight
        place = torch.empty(len(left), dtype=torch.long, device=left.device)
        place[at] = torch.arange(len(at), device=left.device)
        place[gone] = torch.arange(len(gone), device=left.device)
        costs, gains = np.zeros(len(kept)), np.zeros(len(kept))
        inside, outside = ([place[self.columns[i]] for i in np.flatnonzero(own)] for own in (kept, ~kept))
        if all(len(own) == 1 for own in (*inside, *outside)):
            rest = self.inner.diagonal()[gone] - (across @ inverse * across).sum(1)
            costs[kept] = _ratios(weight, inverse.diagonal(), inside)
            gains[~kept] = _ratios(missing, rest, outside)
        else:
            whole = self.inner[gone][:, gone] - across @ inverse @ across.T
            costs[kept] = _quotients(weight, inverse, inside)
            gains[~kept] = _quotients(missing, whole, outside)
        return -float((weight * self.pull[at]).sum()), costs, gains


def _ratios(rows: Tensor, diagonal: Tensor, places: Sequence[Tensor]) -> np.ndarray:
    """Return ``|R_g|² / M_gg`` for every group of one row."""
    at = torch.cat([*places, torch.empty(0, dtype=torch.long, device=rows.device)])
    return (rows[at].square().sum(1) / diagonal[at].clamp_min(1e-300)).cpu().numpy()


def _quotients(rows: Tensor, matrix: Tensor, places: Sequence[Tensor]) -> np.ndarray:
    """Return ``tr(R_gᵀ [M_gg]⁻¹ R_g)`` for every group of rows."""
    found = [(rows[own] * torch.linalg.solve(matrix[own][:, own], rows[own])).sum() for own in places]
    return np.array([float(one) for one in found])
