"""Mask weights of a trained model in one go: magnitude, Wanda and SparseGPT, on calibration data, without training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.asked import Globs, globs, nearest
from fxslim.batches import Batch
from fxslim.calibration import calibration
from fxslim.errors import InputError, RequestError
from fxslim.passes.choose import part_of
from fxslim.training.config import KINDS, WeightMasks
from fxslim.training.lowest import lowest
from fxslim.training.patterns import Layer, Pattern, pattern_of
from fxslim.training.read import in_order, unseen
from fxslim.training.weights import chosen_layers

METHODS = ("sparsegpt", "wanda", "magnitude")
DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it (Frantar and Alistarh 2023, section 4)."""
BLOCK = 128
"""Columns whose weights compete in SparseGPT, and after which the rest of the matrix is updated."""


def sparsify(
    model: nn.Module,
    *,
    fraction: float | None = None,
    pattern: str = "1x1",
    method: str | None = None,
    calibration: Any = None,
    kinds: Sequence[str] = KINDS,
    include: Globs = None,
    skip: Globs = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a model with zeros in its weights. It is no smaller and no faster, but for sparse kernels.

    On GPUs that have them, ``torch.sparse.to_sparse_semi_structured(weight)`` makes a 2:4 weight of a half-precision
    Linear one that is.

    Args:
        model: a trained model. It is not changed.
        fraction: of the weights of every layer that goes; with ``N:M`` it is N/M and need not be said.
        pattern: ``1x1``, or N of every M inputs such as ``2:4``; by magnitude any of `fxslim.WeightMasks`.
        method: ``sparsegpt`` (with calibration data, the default) takes weights out by the error that the others
            cannot make up for, and makes up for the rest; ``wanda`` by weight times norm of the input; ``magnitude``
            (without, the default).
        calibration: an iterable of batches: see `fxslim.plan`. Padding does not count.
        kinds: kinds of layers: ``Linear`` (and Conv1D of transformers), ``Conv``.
        include: globs over module paths: only there.
        skip: globs over module paths: not there.
        max_tokens: use no more calibration data than this.
        seed: for what is drawn.

    Raises:
        RequestError: a keyword means nothing, or there is no layer to work on.
        InputError: the calibration data does not fit.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    chosen = ("magnitude" if calibration is None else "sparsegpt") if method is None else method
    if chosen not in METHODS:
        raise RequestError(f"method={method!r} is none of {', '.join(METHODS)}.{nearest(str(method), METHODS)}")
    if (chosen == "magnitude") != (calibration is None):
        idle = "calibration= does nothing with" if chosen == "magnitude" else "calibration= is missing for"
        raise RequestError(f"{idle} method={chosen!r}.")
    asked = WeightMasks(fraction=fraction, pattern=pattern, kinds=tuple(kinds))
    form = pattern_of(pattern)
    if chosen != "magnitude" and form.drop is None and form != Pattern(1, 1):
        raise RequestError(f"method={chosen!r} takes single weights or N of every M, not pattern={pattern!r}.")
    made = copy.deepcopy(model)
    found, refused = chosen_layers(made, asked, globs(include), globs(skip))
    if chosen != "magnitude":
        refused += [(layer.path, reason) for layer in found if (reason := unseen(layer))]
        found = [layer for layer in found if not unseen(layer)]
    for path, reason in refused:
        warnings.warn(f"{path}: weights stay: {reason}", stacklevel=2)
    if not found:
        raise RequestError("there is no layer whose weights could be masked.")
    assert asked.fraction is not None
    if chosen == "magnitude":
        for layer in found:
            _store(layer, _cut(layer.matrix(layer.weight.detach()), None, form, asked.fraction))
        return made
    data = _read(made, calibration, max_tokens, seed)
    solve = _sparsegpt if chosen == "sparsegpt" else _wanda
    goes = asked.fraction
    in_order(made, found, data, lambda layer, gram: _store(layer, solve(layer, gram, form, goes)))
    return made


def _read(model: nn.Module, given: Any, max_tokens: int | None, seed: int) -> Sequence[Batch]:
    return calibration(model, given, max_tokens=max_tokens, seed=seed).batches


@torch.no_grad()
def _store(layer: Layer, matrix: Tensor) -> None:
    layer.weight.data.copy_(layer.stored(matrix).to(layer.weight.dtype))


def _cut(matrix: Tensor, norms: Tensor | None, pattern: Pattern, fraction: float) -> Tensor:
    """Zero the lowest weights: of the matrix by magnitude; of every output, times the norms of inputs, by Wanda."""
    scores = matrix.abs().double() if norms is None else matrix.abs().double() * norms
    if pattern.drop is not None:
        chosen = torch.ones(matrix.shape[0], matrix.shape[1] // pattern.columns, dtype=torch.bool, device=matrix.device)
        gone = pattern.spread(chosen, scores)
    elif norms is not None:
        gone = torch.zeros_like(matrix, dtype=torch.bool)
        count = part_of(fraction, matrix.shape[1])
        gone.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], value=True)
    else:
        blocks = pattern.summed(scores)
        taken = lowest(blocks.reshape(-1), part_of(fraction, blocks.numel())).reshape(blocks.shape)
        gone = pattern.spread(taken, scores)
    return matrix.masked_fill(gone, 0)


def _wanda(layer: Layer, gram: Tensor, pattern: Pattern, fraction: float) -> Tensor:
    """Zero the weights of every output with the smallest ``|W|·‖x‖₂`` (Sun et al. 2024, equation 1)."""
    return _cut(layer.matrix(layer.weight.detach()), gram.diagonal().sqrt(), pattern, fraction)


def _sparsegpt(layer: Layer, gram: Tensor, pattern: Pattern, fraction: float) -> Tensor:
    """Zero weights column by column, and let the columns that follow make up for it (Frantar and Alistarh 2023).

    With ``H = 2 X Xᵀ + λI`` and the upper Cholesky factor U of ``H⁻¹``, a weight of column j goes by ``w²/U_jj²``, and
    its row loses ``w/U_jj · U_j,j:``. Single weights compete within 128 columns over all outputs, N of M in their M.
    """
    weight = layer.matrix(layer.weight.detach()).double().clone()
    gram = 2 * gram
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    upper = _factor(gram)
    width, scale = weight.shape[1], upper.diagonal().square()
    gone = torch.zeros_like(weight, dtype=torch.bool)
    start = 0
    while start < width:
        size = BLOCK if pattern.drop is None else max(BLOCK // pattern.columns, 1) * pattern.columns
        end = min(start + size, width)
        errors = torch.zeros(len(weight), end - start, dtype=weight.dtype, device=weight.device)
        if pattern.drop is None:
            scores = weight[:, start:end].square() / scale[start:end]
            count = part_of(fraction, weight.shape[0] * end) - int(gone.sum())
            gone[:, start:end] = lowest(scores.reshape(-1), count).reshape(scores.shape)
        for j in range(start, end):
            if pattern.drop is not None and (j - start) % pattern.columns == 0:
                group = slice(j, j + pattern.columns)
                order = (weight[:, group].square() / scale[group]).argsort(dim=1, stable=True)[:, : pattern.drop]
                gone[:, group] = gone[:, group].scatter(1, order, value=True)
            error = weight[:, j].masked_fill(~gone[:, j], 0) / upper[j, j]
            weight[:, j:end] -= torch.outer(error, upper[j, j:end])
            errors[:, j - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
        start = end
    return weight.masked_fill(gone, 0)


def _factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse; with more damping where it does not exist.  (in, in)"""
    damping = DAMPING * float(gram.diagonal().mean())
    for _ in range(8):
        held = gram.clone()
        held.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(held)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                upper: Tensor = factor
                return upper
        damping *= 10
    raise InputError("what a layer reads holds NaN or infinite values: check the calibration data.")
