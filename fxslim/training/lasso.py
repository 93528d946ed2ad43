"""Group lasso: a penalty on the norms of blocks, by its proximal step."""

from __future__ import annotations

import math

from torch import Tensor

from fxslim.training.patterns import Pattern


def shrink(matrix: Tensor, pattern: Pattern, strength: float) -> Tensor:
    """Take the proximal step of ``strength · Σ √size·‖block‖₂``: blocks shrink, and become zero where they are small.

    ``W_b ← W_b · max(0, 1 - strength·√size / ‖W_b‖)`` (Yuan and Lin 2006; Parikh and Boyd 2014, section 6.5.4). It
    never makes a norm larger, and never changes a sign.

    Args:
        matrix: the weights.  (out, in)
        pattern: what a block is.
        strength: learning rate times the penalty's weight.
    """
    rows, columns = pattern.block(matrix.shape)
    apart = matrix.reshape(matrix.shape[0] // rows, rows, matrix.shape[1] // columns, columns)
    norms = (
        apart.float().square().sum(dim=(1, 3), keepdim=True).sqrt()
        if matrix.dtype.itemsize < 8
        else (apart.square().sum(dim=(1, 3), keepdim=True).sqrt())
    )
    factor = (1 - strength * math.sqrt(rows * columns) / norms.clamp_min(1e-30)).clamp_min(0)
    return (apart * factor.to(matrix.dtype)).reshape(matrix.shape)
