"""Batches of calibration data, as keyword inputs of a model: read from dicts, tuples, tensors and rows of datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.errors import InputError
from fxslim.inputs import bind
from fxslim.program import forward_parameters

LABELS = ("labels", "label", "start_positions", "end_positions", "next_sentence_label")
"""What a batch may hold for the loss of a task; no model needs it for its outputs."""
ROWS = 32
"""Rows of a dataset that make one batch."""
IGNORED = -100
"""What stands in labels where there is nothing to say."""


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

    @property
    def rows(self) -> int:
        """Return how many sequences there are: the first size of the first tensor that has one."""
        return next((leaf.shape[0] for leaf in tensors(dict(self.inputs)) if leaf.ndim), 0)


def items(given: Any, model: nn.Module) -> Iterator[Any]:
    """Yield batches as they were given; rows of a dataset are put into batches.

    Raises:
        InputError: these are no batches.
    """
    if hasattr(given, "column_names"):
        if isinstance(given.column_names, Mapping):
            raise InputError(f"calibration= holds several datasets, {list(given.column_names)}; give one of them.")
        yield from _rows(given, model)
        return
    if not isinstance(given, Iterable) and hasattr(given, "__getitem__"):
        raise InputError(f"calibration= takes batches, not the rows of a {type(given).__name__}; give a DataLoader.")
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


def _rows(dataset: Iterable[Mapping[str, Any]], model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Put rows of a dataset into batches; sequences are padded behind, and masked. Other columns are left out."""
    taken = forward_parameters(model)[0]
    config = getattr(model, "config", None)
    fill = {"input_ids": getattr(config, "pad_token_id", None) or 0, "labels": IGNORED}
    left = iter(dataset)
    while rows := list(islice(left, ROWS)):
        known = [name for name in rows[0] if name in (*taken, *LABELS) or not taken]
        names = [name for name in known if _numeric(rows[0][name])]
        if not set(names) - set(LABELS):
            raise InputError(f"the dataset has no column of numbers for the model: {list(rows[0])}. Tokenize it.")
        columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in names}
        if "input_ids" in columns and "attention_mask" not in columns:
            columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        yield {name: _stacked(values, fill.get(name, 0)) for name, values in columns.items()}


def _stacked(values: list[torch.Tensor], pad: int) -> torch.Tensor:
    if not values[0].ndim:
        return torch.stack(values)
    return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=pad)


def _numeric(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return bool(len(value)) and _numeric(value[0])
    return isinstance(value, int | float | torch.Tensor)


def read(model: nn.Module, item: Any) -> Batch:
    """Read one batch, where the model is.

    Raises:
        InputError: the model does not take it, or it holds no numbers to calibrate on.
    """
    labels: dict[str, torch.Tensor] = {}
    if isinstance(item, Mapping):
        labels = {name: item[name] for name in LABELS if isinstance(item.get(name), torch.Tensor)}
        item = {name: value for name, value in item.items() if name not in LABELS}
        if not tensors(item) and any(isinstance(value, list) and _numeric(value) for value in item.values()):
            raise InputError(
                f"{next(iter(item))} is a list of numbers: give tensors (tokenizers: return_tensors='pt')."
            )
        if "labels" in labels and not any(name.startswith("decoder_input") for name in item):
            item = {**item, **_shifted(model, labels["labels"])}
    (inputs,) = bind(model, item)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs, labels = (pytree.tree_map_only(torch.Tensor, lambda t: _own(t, place), one) for one in (inputs, labels))
    for name, value in inputs.items():
        for leaf in tensors(value):
            if leaf.ndim and not leaf.shape[0]:
                raise InputError(f"{name} holds no rows.")
            if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise InputError(f"{name} holds NaN or infinite values.")
    return Batch(inputs, labels, count(inputs))


def _own(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Return a tensor where the model is, for use outside of inference mode too."""
    moved = tensor.to(place)
    return moved.clone() if moved.is_inference() else moved


def tensors(inputs: Any) -> list[torch.Tensor]:
    """Return the tensors of inputs, in their order."""
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def _shifted(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a decoder's inputs, as a model makes them of the labels of its loss, and which of them count."""
    config: Any = getattr(model, "config", None)
    pairs = getattr(config, "is_encoder_decoder", False) and labels.ndim == 2 and not labels.is_floating_point()
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    names = forward_parameters(model)[0]
    if not pairs or "decoder_input_ids" not in names:
        return {}
    if callable(shift):
        ids: torch.Tensor = shift(labels=labels)
    else:
        start, pad = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
        if start is None:
            return {}
        ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        ids = ids.masked_fill(ids == IGNORED, pad or 0)
    counts = labels != IGNORED
    counts[:, 0] = True  # the start token; a row without any has nothing to attend to
    mask = {"decoder_attention_mask": counts.long()} if "decoder_attention_mask" in names else {}
    return {"decoder_input_ids": ids, **mask}


def count(inputs: Mapping[str, Any]) -> int:
    """Count the tokens that are no padding."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return int(mask.count_nonzero())
    first = tensors(inputs)[0]
    return first.numel() if first.ndim == 2 and not first.is_floating_point() else first.shape[0] if first.ndim else 1
