"""Calibration data: any iterable of batches, as a list of keyword inputs with the number of tokens that count."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxslim.errors import InputError
from fxslim.inputs import bind

LABELS = ("labels", "label", "start_positions", "end_positions", "next_sentence_label")
"""What a batch may hold for the loss of a task; no model needs it for its outputs."""
ROWS = 32
"""Rows of a dataset that make one batch."""
MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        inputs: keyword inputs of the model's forward.
        labels: what was given for a loss.
        tokens: how many tokens (rows, where there are no sequences) count: padding does not.
    """

    inputs: Mapping[str, Any]
    labels: Mapping[str, torch.Tensor]
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """Batches to calibrate on, in the order in which they are used.

    Attributes:
        batches: the batches.
        example: inputs to trace the model with: at least two rows of at least three tokens, where there are as many.
    """

    batches: tuple[Batch, ...]
    example: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Return how many tokens count."""
        return sum(batch.tokens for batch in self.batches)

    def part(self, tokens: int) -> tuple[Batch, ...]:
        """Return batches spread evenly over all, with about as many tokens; at least one."""
        count = max(1, min(len(self.batches), round(len(self.batches) * tokens / max(self.tokens, 1))))
        step = len(self.batches) / count
        return tuple(self.batches[int((i + 0.5) * step)] for i in range(count))


def calibration(model: nn.Module, given: Any, *, max_tokens: int | None = None, seed: int = 0) -> Calibration:
    """Read calibration data.

    Args:
        model: the model that it is for.
        given: an iterable of batches: dicts of keyword inputs, tuples of positional ones, or tensors (a ``DataLoader``,
            a list, a generator); or a dataset, whose rows are put into batches of 32 and padded. Labels are optional.
        max_tokens: use no more tokens than this, drawn from all batches; the first ones of what has no length.
        seed: of that draw.

    Raises:
        InputError: there is nothing, or something else than batches.
    """
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise InputError(f"max_tokens={max_tokens!r}: give a whole number of at least 1.")
    batches = _read(model, given, MAX_TOKENS if max_tokens is None else max_tokens)
    if not batches:
        raise InputError("calibration= holds no batch; give an iterable of batches, such as a DataLoader.")
    _alike(batches)
    chosen = _drawn(batches, MAX_TOKENS if max_tokens is None else max_tokens, seed)
    if not any(batch.tokens for batch in chosen):
        raise InputError("calibration= holds padding alone: every attention_mask is zero.")
    return Calibration(tuple(chosen), dict(max(chosen, key=_rank).inputs))


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
    for number, item in enumerate(_items(given, model)):
        try:
            batches.append(_batch(model, item))
        except InputError as error:
            raise InputError(f"calibration batch {number}: {error}") from error
        if not isinstance(given, Sized) and sum(batch.tokens for batch in batches) > tokens:
            break
    return batches


def _items(given: Any, model: nn.Module) -> Iterator[Any]:
    if hasattr(given, "column_names") and hasattr(given, "__getitem__"):
        yield from _rows(given, model)
        return
    if isinstance(given, torch.Tensor | Mapping | str) or not isinstance(given, Iterable):
        raise InputError(
            f"calibration= takes an iterable of batches, not one {type(given).__name__}; put a single batch in a list."
        )
    for item in given:
        if not isinstance(item, torch.Tensor | Mapping | tuple | list):
            raise InputError(
                f"calibration= holds a {type(item).__name__}; every batch must be a dict of inputs, a tuple of "
                "positional inputs or one tensor. Tokenize text first."
            )
        yield item


def _rows(dataset: Any, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Put rows of a dataset into batches; sequences are padded behind, and masked."""
    names = [name for name in dataset.column_names if name not in LABELS]
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    for start in range(0, len(dataset), ROWS):
        rows = [dataset[i] for i in range(start, min(start + ROWS, len(dataset)))]
        columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in names if _numeric(rows[0][name])}
        if not columns:
            raise InputError(f"the dataset has no column of numbers ({list(names)}); tokenize it first.")
        if "input_ids" in columns and "attention_mask" not in columns:
            columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        yield {name: _stacked(values, pad if name.endswith("input_ids") else 0) for name, values in columns.items()}


def _stacked(values: list[torch.Tensor], pad: int) -> torch.Tensor:
    if not values[0].ndim:
        return torch.stack(values)
    return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=pad)


def _numeric(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return bool(len(value)) and _numeric(value[0])
    return isinstance(value, int | float | torch.Tensor)


def _batch(model: nn.Module, item: Any) -> Batch:
    labels: dict[str, torch.Tensor] = {}
    if isinstance(item, Mapping):
        labels = {name: item[name] for name in LABELS if isinstance(item.get(name), torch.Tensor)}
        item = {name: value for name, value in item.items() if name not in LABELS}
    if "labels" in labels and "decoder_input_ids" not in item:
        shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)  # as the model does it for its loss
        item = {**item, "decoder_input_ids": shifted(labels=labels["labels"])} if callable(shifted) else item
    (inputs,) = bind(model, item)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim and not value.shape[0]:
            raise InputError(f"{name} holds no rows.")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinite values.")
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = {name: value.to(place) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return Batch(inputs, {name: value.to(place) for name, value in labels.items()}, _tokens(inputs))


def _tokens(inputs: Mapping[str, Any]) -> int:
    """Count the tokens that are no padding."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return int(mask.count_nonzero())
    first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    return first.numel() if first.ndim == 2 and not first.is_floating_point() else first.shape[0] if first.ndim else 1


def _drawn(batches: list[Batch], tokens: int, seed: int) -> list[Batch]:
    """Return batches drawn without replacement, in their order, with no more tokens than asked (at least one)."""
    if sum(batch.tokens for batch in batches) <= tokens:
        return batches
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    total = 0
    for i in order:
        if not chosen or total + batches[i].tokens <= tokens:
            chosen.append(i)
            total += batches[i].tokens
    return [batches[i] for i in sorted(chosen)]


def _rank(batch: Batch) -> tuple[bool, int]:
    """Rank batches as examples: enough rows and places first, then small ones."""
    first = next(value for value in batch.inputs.values() if isinstance(value, torch.Tensor))
    enough = first.ndim > 0 and first.shape[0] >= 2 and (first.ndim < 2 or first.shape[1] >= 3)
    return enough, -first.numel()
