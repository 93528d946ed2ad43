"""Calibration data: any iterable of batches, as a list of keyword inputs with the number of tokens that count."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.batches import Batch, count, items, read, tensors
from fxslim.errors import InputError

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """Batches to calibrate on, in the order in which they are used.

    Attributes:
        batches: the batches.
        example: inputs to trace the model with: two rows or more, and at least three tokens where there are as many.
    """

    batches: tuple[Batch, ...]
    example: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Return how many tokens count."""
        return sum(batch.tokens for batch in self.batches)


def calibration(model: nn.Module, given: Any, *, max_tokens: int | None = None, seed: int = 0) -> Calibration:
    """Read calibration data.

    Args:
        model: the model that it is for.
        given: an iterable of batches: dicts of keyword inputs, tuples of positional ones, or tensors (a ``DataLoader``,
            a list, a generator); or a dataset, whose rows are put into batches of 32 and padded. Labels are optional.
        max_tokens: use no more tokens than this, drawn from all batches; the first ones of what has no length. One row
            is always used.
        seed: of that draw.

    Raises:
        InputError: there is nothing, or something else than batches.
    """
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise InputError(f"max_tokens={max_tokens!r}: give a whole number of at least 1.")
    most = MAX_TOKENS if max_tokens is None else max_tokens
    with torch.inference_mode(False):  # what is read is to be differentiated
        batches = _read(model, given, most)
    if not batches:
        raise InputError("calibration= holds no batch; give an iterable of batches, such as a DataLoader.")
    _alike(batches)
    chosen = _drawn(batches, most, seed)
    if not any(batch.tokens for batch in chosen):
        raise InputError("calibration= holds padding alone: every attention_mask is zero.")
    return Calibration(tuple(chosen), _twice(max(chosen, key=_rank).inputs))


def _alike(batches: Sequence[Batch]) -> None:
    """Refuse batches that hold other inputs than the first one: one graph is traced for all of them."""
    names = [{name for name, value in batch.inputs.items() if value is not None} for batch in batches]
    first = names[0]
    for number, own in enumerate(names):
        other = first ^ own
        if other:
            name = sorted(other)[0]
            have, lack = (0, number) if name in first else (number, 0)
            raise InputError(
                f"calibration batch {have} has {name}, batch {lack} has not; give every batch the same inputs"
                + (" (a mask of ones where nothing is padding)." if name.endswith("mask") else ".")
            )


def _read(model: nn.Module, given: Any, tokens: int) -> list[Batch]:
    """Read batches: all of them, so that some can be drawn, or as many as are used of what has no end."""
    batches: list[Batch] = []
    for number, item in enumerate(items(given, model)):
        try:
            batches.append(read(model, item))
        except InputError as error:
            raise InputError(f"calibration batch {number}: {error}") from error
        if not _ends(given) and sum(batch.tokens for batch in batches) > tokens:
            break
    return batches


def _ends(given: Any) -> bool:
    """Tell whether data has a length; a loader of a dataset without one says that it has, and then raises."""
    try:
        return len(given) >= 0
    except TypeError:
        return False


def _drawn(batches: list[Batch], tokens: int, seed: int) -> list[Batch]:
    """Return batches drawn without replacement, in their order, with no more tokens than asked (one row at least)."""
    if sum(batch.tokens for batch in batches) <= tokens:
        return batches
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    total = 0
    for i in order:
        if total + batches[i].tokens <= tokens:
            chosen.append(i)
            total += batches[i].tokens
    return [batches[i] for i in sorted(chosen)] or [_cut(batches[order[0]], tokens)]


def _cut(batch: Batch, tokens: int) -> Batch:
    """Return as many of a batch's first rows as hold no more tokens; one at least."""
    held = tensors([dict(batch.inputs), dict(batch.labels)])
    whole = held[0].shape[0] if held[0].ndim else 1
    if any(not own.ndim or own.shape[0] != whole for own in held):
        return batch
    for rows in range(whole, 0, -1):
        inputs, labels = ({name: pytree.tree_map_only(torch.Tensor, lambda t, n=rows: t[:n], value)
                           for name, value in own.items()} for own in (batch.inputs, batch.labels))  # fmt: skip
        if rows == 1 or count(inputs) <= tokens:
            return Batch(inputs, labels, count(inputs))
    return batch


def _rank(batch: Batch) -> tuple[bool, int]:
    """Rank batches as examples: enough rows and places first, then small ones."""
    first = tensors(batch.inputs)[0]
    enough = first.ndim > 0 and first.shape[0] >= 2 and (first.ndim < 2 or first.shape[1] >= 3)
    return enough, -first.numel()


def _twice(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with two rows where there is one of each: a trace takes a size of one for the only one there is."""
    if any(not leaf.ndim or leaf.shape[0] != 1 for leaf in tensors(inputs)):
        return dict(inputs)
    return dict(pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]), dict(inputs)))
