"""Retrain-free pruning: gradients of masks on a few batches, and a choice that minds how they go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fxslim.errors import InputError, RequestError
from fxslim.inc.config import Wish
from fxslim.inc.data import call, inputs_and_target, placed
from fxslim.inc.translate import Finder, native
from fxslim.plan import Note
from fxslim.site import units_by_group
from fxslim.training.units import MaskedSite, MaskedUnits


def rearranged(gradients: np.ndarray, count: int) -> np.ndarray:
    """Choose which masks go so that their gradients, added up, are short (Kwon et al. 2022, section 4.2).

    Start with the ``count`` shortest; then offer every other one in ascending order, and send back whichever of all
    leaves the shortest sum.

    Args:
        gradients: of every mask, on every batch.  (masks, batches)
        count: how many go.

    Returns:
        Which go.  (masks,) bool
    """
    gone = np.zeros(len(gradients), dtype=bool)
    if not count:
        return gone
    order = np.square(gradients).sum(1).argsort(kind="stable")
    chosen = order[:count].tolist()
    total = gradients[chosen].sum(0)
    for index in order[count:].tolist():
        chosen.append(index)
        total = total + gradients[index]
        without = np.square(total - gradients[chosen]).sum(1)
        back = chosen.pop(int(without.argmin()))
        total = total - gradients[back]
    gone[chosen] = True
    return gone


def retrain_free(model: nn.Module, wish: Wish, dataloader: Any, loss_func: Any) -> list[Note]:
    """Mask units by Σ(∂L/∂m)² over batches, rearranged at every site; the model's columns become zero.

    Args:
        model: a copy that is worked on.
        wish: what is asked: ``channelx1`` on feed-forward blocks, or ``mha``.
        dataloader: batches.
        loss_func: (outputs, target) -> loss; None for the loss that the model returns.

    Raises:
        RequestError: it is about something else than units.
        InputError: there is no loss.
    """
    config, notes = native(wish, finder := Finder(model, dataloader))
    if config is None:
        return notes
    if not config.units:
        raise RequestError(
            "pruning_type='retrain_free' takes whole channels and heads: pattern='mha', or 'channelx1' on the op_names "
            "that parse_auto_slim_config returns."
        )
    for parameter in model.parameters():
        parameter.requires_grad_()
    units = MaskedUnits(model, finder.found, config)
    gradients = _gradients(model, units, dataloader, loss_func)
    for own in units.sites:
        own.score = torch.from_numpy(np.square(gradients[own.site.name]).sum(1)).to(own.score)
    units.update(lambda last: last)
    for own in units.sites:
        own.gone = _rearranged(own, gradients[own.site.name])
    units.fold()
    units.release()
    model.zero_grad()
    return [*notes, *units.notes]


def _rearranged(own: MaskedSite, gradients: np.ndarray) -> np.ndarray:
    gone = np.zeros_like(own.gone)
    for members in units_by_group(own.site) if own.site.groups is not None else [np.arange(own.site.units)]:
        gone[members] = rearranged(gradients[members], int(own.gone[members].sum()))
    return gone


def _gradients(model: nn.Module, units: MaskedUnits, dataloader: Any, loss_func: Any) -> dict[str, np.ndarray]:
    """Return ∂L/∂m of every unit on every batch: Σ W·∂L/∂W over what reads it.  site -> (units, batches)"""
    found: dict[str, list[np.ndarray]] = {own.site.name: [] for own in units.sites}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for batch in dataloader:
        model.zero_grad()
        _loss(model, placed(model, batch), loss_func).backward()
        for own, sums in zip(units.sites, units.sums(), strict=True):
            found[own.site.name].append(sums.double().cpu().numpy())
    for module, mode in modes.items():
        module.training = mode
    return {name: np.stack(several, axis=1) for name, several in found.items()}


def _loss(model: nn.Module, batch: Any, loss_func: Any) -> Any:
    if loss_func is not None:
        inputs, target = inputs_and_target(model, batch)
        return loss_func(call(model, inputs), target)
    output = call(model, batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise InputError("retrain_free needs a loss: batches with labels, or loss_func=(outputs, target) -> loss.")
    return loss
