"""Fit what is left of a matrix to what the whole one returned: ridge regression towards its own weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxslim.passes.fitting.moments import Moments

RIDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.5)
"""Ridges to choose from, in units of the mean of the inputs' second moments."""
ROWS_PER_INPUT = 4
"""Rows that every kept input needs for a matrix of its own to be fitted (Kwon et al. 2022 scale units instead)."""


Repair = Literal["refit", "scale", "bias"]
"""What may be fitted: a consumer's matrix, one factor for each unit, or its bias; the bias moves in all of them."""


@dataclass(frozen=True)
class Refit:
    """A fitted matrix.

    Attributes:
        matrix: weights of the kept inputs.  (kept, out)
        shift: what is added to the bias: ``mean(t) - mean(x[keep]) @ matrix``.  (out,)
        ridge: the ridge that was chosen, relative; infinite where the weights stayed as they were.
        error: error on the rows that judge, relative to the targets.
        plain: the same, of the weights as they were.
        how: ``refit``, ``scaled`` (one factor for each unit) or ``sliced`` (as they were).
    """

    matrix: Tensor
    shift: Tensor
    ridge: float
    error: float
    plain: float
    how: str


def solve(moments: Moments, weight: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """Return ``argmin |x[keep] V - t|² + r |V - W[keep]|²``, ``r`` relative to the mean second moment.

    ``V = (H_SS + rI)⁻¹ (R_S + r W_S)``; with targets ``t = x W`` that is ``W_S + (H_SS + rI)⁻¹ H_SP W_P``.

    Args:
        moments: of the inputs and the targets.
        weight: the whole matrix.  (in, out)
        keep: inputs that are left.  (kept,)
        ridge: the ridge.
    """
    inner = moments.xx[keep][:, keep]
    r = ridge * scale(moments)
    right = moments.xt[keep] + r * weight[keep]
    found: Tensor = torch.cholesky_solve(right, factor(inner, r))
    return found


def scale(moments: Moments) -> float:
    """Return the mean second moment of the inputs: the unit of ridges."""
    return max(float(moments.xx.diagonal().mean()), 1e-30)


def factor(inner: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of a matrix plus a ridge, which grows tenfold until there is one."""
    ridge = max(ridge, 1e-12 * float(inner.diagonal().max()), 1e-30)
    for _ in range(16):
        lower, failed = torch.linalg.cholesky_ex(raised(inner, ridge))  # reads the lower triangle alone
        if not failed:
            made: Tensor = lower
            return made
        ridge *= 10
    raise ArithmeticError("second moments hold NaN or infinite values")


def raised(inner: Tensor, ridge: float) -> Tensor:
    """Return a matrix with more on its diagonal."""
    made = inner.clone()
    made.diagonal().add_(ridge)
    return made


def refit(
    fitting: Moments,
    judging: Moments,
    every: Moments,
    weight: Tensor,
    keep: Tensor,
    owner: Sequence[int] | Tensor,
    ridges: Sequence[float] = RIDGES,
    how: Repair = "refit",
) -> Refit:
    """Fit the kept inputs' weights, with the ridge that does best on rows that were not fitted.

    Where there are too few rows for that, one factor for each unit is fitted; where neither helps on the rows that
    judge, the weights stay as they are.

    Args:
        fitting: moments to choose the ridge with.
        judging: moments to judge by.
        every: moments of all rows, for the result.
        weight: the whole matrix.  (in, out)
        keep: inputs that are left.  (kept,)
        owner: unit of every input.  (in,)
        ridges: ridges to choose from.
        how: what may be fitted: the whole matrix, one factor for each unit, or the bias alone.
    """
    plain = judging.error(weight[keep], keep)
    if how == "bias":
        return sliced(every, weight, keep, plain)
    best, ridge, done = plain, float("inf"), "sliced"
    if how == "refit" and fitting.count >= ROWS_PER_INPUT * len(keep):
        found, candidate = _lowest(lambda r: judging.error(solve(fitting, weight, keep, r), keep), ridges)
        if found < best:
            best, ridge, done = found, candidate, "refit"
    else:
        error = judging.error(scaled(fitting, weight, keep, owner), keep)
        if error < best:
            best, done = error, "scaled"
    if done == "sliced":
        return sliced(every, weight, keep, plain)
    matrix = solve(every, weight, keep, ridge) if done == "refit" else scaled(every, weight, keep, owner)
    return Refit(matrix, every.t - every.x[keep] @ matrix, ridge, best, plain, done)


def _lowest(error: Callable[[float], float], ridges: Sequence[float]) -> tuple[float, float]:
    """Return the lowest error and its ridge: from the middle downhill, since errors fall towards one ridge and rise."""
    at = len(ridges) // 2
    best = error(ridges[at])
    for step in (-1, 1):
        moved = False
        while 0 <= at + step < len(ridges) and (found := error(ridges[at + step])) < best:
            at, best, moved = at + step, found, True
        if moved:
            break
    return best, ridges[at]


def sliced(moments: Moments, weight: Tensor, keep: Tensor, error: float = math.nan) -> Refit:
    """Return the weights of the kept inputs as they were, with the bias that keeps the mean (An et al. 2023)."""
    matrix = weight[keep]
    return Refit(matrix, moments.t - moments.x[keep] @ matrix, math.inf, error, error, "sliced")


def scaled(
    moments: Moments, weight: Tensor, keep: Tensor, owner: Sequence[int] | Tensor, ridge: float = 0.01
) -> Tensor:
    """Return the kept weights with one factor for each unit, fitted by least squares towards one.

    Mask tuning of Kwon et al. 2022 (section 4.3), with a ridge in the place of their clipping.
    """
    owned = torch.as_tensor(owner, device=weight.device)[keep]
    units, place = torch.unique(owned, return_inverse=True)
    kept = weight[keep]
    pairs = moments.xx[keep][:, keep] * (kept @ kept.T)
    spread = torch.zeros(len(units), len(keep), dtype=weight.dtype, device=weight.device)
    spread[place, torch.arange(len(keep), device=weight.device)] = 1.0
    inner = spread @ pairs @ spread.T
    right = spread @ (moments.xt[keep] * kept).sum(1)
    r = ridge * float(inner.diagonal().mean())
    factors = torch.cholesky_solve((right + r)[:, None], factor(inner, r))[:, 0]
    return kept * factors[place][:, None]
