"""Pruners on data: SparseGPT, Wanda and retrain-free, in one go."""

from __future__ import annotations

import copy
import glob
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxslim.errors import RequestError
from fxslim.inc.config import Wish
from fxslim.inc.data import inputs_of
from fxslim.inc.retrain_free import retrain_free
from fxslim.inc.translate import layers_of
from fxslim.plan import Note
from fxslim.training.oneshot import sparsify

METHODS = {"sparse_gpt": "sparsegpt", "wanda": "wanda"}


def pruned(model: nn.Module, wishes: Sequence[Wish], dataloader: Any, loss_func: Any) -> list[Note]:
    """Prune a model on data; it is changed when everything has succeeded.

    Args:
        model: the model.
        wishes: what is asked, one after the other.
        dataloader: batches.
        loss_func: see `fxslim.inc.prepare_pruning`.

    Returns:
        What to know of it.

    Raises:
        RequestError: a pattern or an option does not go with the type.
    """
    notes: list[Note] = []
    made = copy.deepcopy(model)
    for wish in wishes:
        if wish.kind == "retrain_free":
            notes += retrain_free(made, wish, dataloader, loss_func)
        elif wish.fraction:
            made = _sparsified(made, wish, dataloader, notes)
    with torch.no_grad():
        for own, other in zip(model.parameters(), made.parameters(), strict=True):
            own.copy_(other)
    return notes


def _sparsified(model: nn.Module, wish: Wish, dataloader: Any, notes: list[Note]) -> nn.Module:
    if wish.pattern == "mha":
        raise RequestError(f"pruning_type={wish.kind!r} masks weights: take pattern='1x1' or 'N:M', not 'mha'.")
    chosen = layers_of(wish, model, notes)
    return sparsify(
        model,
        fraction=wish.fraction,
        pattern=wish.pattern,
        method=METHODS[wish.kind],
        calibration=list(inputs_of(model, dataloader)),
        kinds=tuple(dict.fromkeys(layer.kind for layer in chosen)),
        include=tuple(glob.escape(layer.path) for layer in chosen),
    )
