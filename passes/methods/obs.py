"""Optimal brain surgeon by units: what the sum loses when the other units make up for the one that goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxslim.passes.fitting.curve import Curve, Items
from fxslim.passes.fitting.refit import factor, raised, scale
from fxslim.passes.fitting.seen import Read, Seen

DAMPING = 0.01
STEP = 32
"""Most single channels that go before all are scored again."""
SHRINK = 8
"""The state shrinks whenever an eighth of what was left is gone."""
REFACTOR = 2
"""The inverse is computed anew whenever half of what was left is gone, so that rounding does not add up."""


def obs(seen: Seen, items: Items, *, damping: float = DAMPING, step: int | None = None) -> Curve:
    """Take out the unit with the smallest ``tr(W_gᵀ ([H⁻¹]_gg)⁻¹ W_g)``, let the others make up for it, and so on.

    ZipLM (Kurtic et al. 2023, section 3.1) and OSSCAR (Meng et al. 2024), with ``H = E[x xᵀ] + rI``. Of several
    consumers, the scores add up. ``W`` is first fitted to the targets. Errors are measured by what the model's output
    makes of them, where that is known.

    Args:
        seen: the site.
        items: what may go.
        damping: ``r``, relative to the mean second moment.
        step: how many channels of one input each go before scores are computed again; a 48th of them by default, at
            most 32 (two copies of one channel score alike, and only one of them may go).
    """
    reads = [_Surgery(read, items, damping) for read in seen.reads]
    if not reads:
        raise ValueError(f"{seen.site.name}: nothing was seen of its consumers")
    alive = [own.copy() for own in items.classes]
    count = items.steps
    step = max(min(STEP, len(items.units) // 48), 1) if step is None else step
    many = step if len(alive) == 1 and all(read.width == 1 for read in reads) else 1
    steps: list[tuple[int, ...]] = []
    damage = [0.0]
    while len(steps) < count:
        now = min(many, count - len(steps))
        scores = sum(read.scores() for read in reads)
        picked = [own[np.argsort(scores[own], kind="stable")[:now]] for own in alive]  # type: ignore[index]
        alive = [own[~np.isin(own, gone)] for own, gone in zip(alive, picked, strict=True)]
        lost = sum(read.remove(np.concatenate(picked)) for read in reads)
        own_scores = np.array([sum(scores[gone[i]] for gone in picked) for i in range(now)])  # type: ignore[index]
        share = own_scores / own_scores.sum() if own_scores.sum() > 0 else np.full(now, 1 / now)
        for i in range(now):
            steps.append(tuple(sorted(unit for gone in picked for unit in items.units[gone[i]])))
            damage.append(damage[-1] + float(lost * share[i]))
    whole = sum(read.whole for read in reads)
    return Curve(tuple(steps), np.array(damage) / max(whole, 1e-300))


def damped(read: Read, damping: float) -> tuple[Tensor, Tensor]:
    """Return second moments plus a ridge, and their products with the targets in the metric.  (in, in), (in, out)

    Inputs that are always zero get weights of zero: they cost nothing, and go first.
    """
    moments = read.moments
    ridge = damping * scale(moments)
    inner, pull = raised(moments.xx, ridge), read.measured(moments.xt + ridge * read.weight)
    dead = moments.xx.diagonal() + moments.x.square() == 0
    inner.diagonal()[dead], pull[dead] = 1.0, 0.0
    return inner, pull


@dataclass
class _Surgery:
    """The state of one consumer: the inverse of its damped second moments, and its weights as they adapt."""

    read: Read
    items: Items
    damping: float

    def __post_init__(self) -> None:
        self.inner, self.pull = damped(self.read, self.damping)
        device = self.inner.device
        self.columns = [torch.from_numpy(self.read.consumer.columns(u)).to(device) for u in self.items.units]
        widths = {len(own) for own in self.columns}
        self.width = widths.pop() if len(widths) == 1 else 0
        self.left = torch.ones(len(self.inner), dtype=torch.bool, device=device)
        self.place = torch.arange(len(self.inner), device=device)
        self.inverse: Tensor = self.inner
        self.weight: Tensor = self.pull
        self._refresh()
        self.whole = max(float((self.weight * self.pull).sum()), 1e-300)

    def scores(self) -> np.ndarray:
        """Return what each item would cost now; infinite for those that are gone.  (items,)"""
        if self.width == 1:
            at = torch.cat(self.columns)
            here = self.place[at]
            found = self.weight[here].square().sum(1) / self.inverse.diagonal()[here]
            return torch.where(self.left[at], found, torch.inf).cpu().numpy()
        return np.array([self._cost(own) if len(own) and bool(self.left[own[0]]) else np.inf for own in self.columns])

    def _cost(self, columns: Tensor) -> float:
        here = self.place[columns]
        block, weight = self.inverse[here][:, here], self.weight[here]
        return float((weight * torch.linalg.solve(block, weight)).sum())

    def remove(self, items: np.ndarray) -> float:
        """Take items out; return what that costs."""
        gone = torch.cat([self.columns[int(item)] for item in items])
        here = self.place[gone]
        block = self.inverse[here][:, here]
        update = torch.linalg.solve(block, torch.cat([self.inverse[here], self.weight[here]], dim=1))
        rows, weights = update.split([self.inverse.shape[1], self.weight.shape[1]], dim=1)
        cost = float((self.weight[here] * weights).sum())
        across = self.inverse[:, here]
        self.weight.addmm_(across, weights, alpha=-1)
        self.inverse.addmm_(across, rows, alpha=-1)
        self.left[gone] = False
        count = int(self.left.sum())
        if count and count <= self.fresh * (1 - 1 / REFACTOR):
            self._refresh()
        elif count and count <= len(self.inverse) * (1 - 1 / SHRINK):
            self._shrink()
        return cost

    def _shrink(self) -> None:
        """Drop what is gone."""
        at = self.left.nonzero()[:, 0]
        here = self.place[at]
        self.inverse, self.weight = self.inverse[here][:, here], self.weight[here]
        self._settle(at)

    def _refresh(self) -> None:
        """Compute the inverse and the weights of what is left anew."""
        at = self.left.nonzero()[:, 0]
        self.inverse = torch.cholesky_inverse(factor(self.inner[at][:, at], 0.0))
        self.weight = self.inverse @ self.pull[at]
        self.fresh = len(at)
        self._settle(at)

    def _settle(self, at: Tensor) -> None:
        self.place.zero_()
        self.place[at] = torch.arange(len(at), device=at.device)
