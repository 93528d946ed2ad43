"""Moments of what a consumer reads and of what it should return, in two parts: to fit with, and to judge by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxslim.passes.fitting.processes import shared

HELD = 4096
"""Rows that are multiplied at once: adding up wide matrices in float64 takes longer than multiplying few rows."""
BLOCKS = 4
"""A square is computed in so many blocks a side, each pair of two once."""
WIDE = 4096
"""Inputs from which sums are kept in float32: a float64 matrix of 11008 channels takes 0.97 GB."""


@dataclass(frozen=True)
class Moments:
    """Moments over rows (tokens), which may count unequally, centred where the consumer has a bias that can move.

    Attributes:
        count: rows that are no copies of others.
        x: mean of the inputs, zero where nothing is centred.  (in,)
        t: mean of the targets.  (out,)
        xx: mean of ``x xᵀ``.  (in, in)
        xt: mean of ``x tᵀ``.  (in, out)
        tt: mean of ``|t|²``.
        variance: of the inputs, centred or not.  (in,)
    """

    count: int
    x: Tensor
    t: Tensor
    xx: Tensor
    xt: Tensor
    tt: float
    variance: Tensor

    def error(self, matrix: Tensor, keep: Tensor) -> float:
        """Return the mean squared error of ``x[keep] @ matrix``, relative to the targets'.  matrix: (kept, out)"""
        inner = self.xx[keep][:, keep]
        found = self.tt - 2 * (matrix * self.xt[keep]).sum() + (matrix * (inner @ matrix)).sum()
        return max(float(found), 0.0) / max(self.tt, 1e-30)


class Sums:
    """Sums over rows, for the two parts apart; they add up over batches and over processes.

    Args:
        inputs: width of the inputs.
        outputs: width of the targets.
        device: where the sums live.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        dtype = torch.float32 if inputs >= WIDE or device.type == "mps" else torch.float64
        self.count = torch.zeros(2, dtype=torch.float64, device=device)
        self.mass = torch.zeros(2, dtype=torch.float64, device=device)
        self.x = torch.zeros(2, inputs, dtype=torch.float64, device=device)
        self.t = torch.zeros(2, outputs, dtype=torch.float64, device=device)
        self.xx = torch.zeros(2, inputs, inputs, dtype=dtype, device=device)
        self.xt = torch.zeros(2, inputs, outputs, dtype=dtype, device=device)
        self.tt = torch.zeros(2, dtype=torch.float64, device=device)
        self._held: tuple[list[tuple[Tensor, Tensor, Tensor]], ...] = ([], [])

    def add(
        self, x: Tensor, t: Tensor, judged: Tensor, weights: Tensor | None = None, copied: Tensor | None = None
    ) -> None:
        """Add rows.

        Args:
            x: inputs.  (rows, in)
            t: targets.  (rows, out)
            judged: which rows belong to the part that judges.  (rows,) bool
            weights: how much every row counts; one each by default.  (rows,)
            copied: which rows are there already: they do not count as rows.  (rows,) bool
        """
        weights = torch.ones(len(x), device=x.device) if weights is None else weights
        for part, held in enumerate(self._held):
            rows = judged if part else ~judged
            self.count[part] += rows.sum() if copied is None else (rows & ~copied).sum()
            held.append((x[rows], t[rows], weights[rows]))
            if sum(len(own) for own, _, _ in held) >= HELD:
                self._multiply(part)

    def _multiply(self, part: int) -> None:
        """Multiply the rows that are held."""
        if not self._held[part]:
            return
        x, t, weights = (torch.cat(own) for own in zip(*self._held[part], strict=True))
        self._held[part].clear()
        x, t = _wide(x), _wide(t)
        scale = weights.to(x)[:, None]
        heavy_x, heavy_t = x * scale, t * scale
        self.mass[part] += scale.double().sum()
        self.x[part] += heavy_x.double().sum(0)
        self.t[part] += heavy_t.double().sum(0)
        _add_square(self.xx[part], x * scale.sqrt())
        self.xt[part] += heavy_x.T @ t
        self.tt[part] += (heavy_t.double() * t.double()).sum()

    def _settle(self) -> None:
        for part in (0, 1):
            self._multiply(part)

    def share(self) -> None:
        """Add up over the processes of ``torch.distributed``, where there are any."""
        self._settle()
        for tensor in (self.count, self.mass, self.x, self.t, self.xx, self.xt, self.tt):
            shared(tensor)

    def moments(self, part: int | None = None, *, centred: bool) -> Moments:
        """Return the moments of one part, or of both."""
        self._settle()
        parts = [0, 1] if part is None else [part]
        n = max(float(self.mass[parts].sum()), 1e-30)
        x, t = self.x[parts].sum(0) / n, self.t[parts].sum(0) / n
        xx, xt = self.xx[parts].sum(0).double() / n, self.xt[parts].sum(0).double() / n
        tt = float(self.tt[parts].sum()) / n
        variance = (xx.diagonal() - x.square()).clamp_min(0.0)
        if centred:
            xx, xt, tt = xx - torch.outer(x, x), xt - torch.outer(x, t), tt - float(t @ t)
        else:
            x, t = torch.zeros_like(x), torch.zeros_like(t)
        return Moments(int(self.count[parts].sum()), x, t, xx, xt, tt, variance)


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Add ``rowsᵀ rows``, block by block; what is above the diagonal is what is below it."""
    starts = range(0, len(total), -(-len(total) // BLOCKS) or 1)
    for i in starts:
        for j in starts:
            if j > i:
                break
            own, other = slice(i, i + starts.step), slice(j, j + starts.step)
            block = rows[:, own].T @ rows[:, other]
            total[own, other] += block
            if i != j:
                total[other, own] += block.T


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
