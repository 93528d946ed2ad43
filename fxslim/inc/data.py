"""What the old tool took as a dataloader: batches of keyword inputs, or of pairs of inputs and a target."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.batches import LABELS
from fxslim.errors import InputError, RequestError
from fxslim.inputs import bind


def check_loader(dataloader: Any, instead: str) -> None:
    """Raise RequestError for something in the place of a dataloader that is none.

    Args:
        dataloader: what was given; None for nothing.
        instead: what may have been meant, such as ``ffn2_sparsity=``.
    """
    if dataloader is None:
        return
    if isinstance(dataloader, str | Mapping | torch.Tensor | nn.Module) or not isinstance(dataloader, Iterable):
        raise RequestError(
            f"dataloader={dataloader!r} is no iterable of batches. What follows the model is the dataloader: say "
            f"{instead} by name."
        )


def check_model(model: Any, call: str, place: str = "first") -> None:
    """Raise RequestError where something else stands in the place of the model."""
    if not isinstance(model, nn.Module):
        raise RequestError(f"{call}: the model comes {place}, and this is a {type(model).__name__}.")


def example_of(model: nn.Module, dataloader: Any) -> Any:
    """Return inputs to trace a model with: None where its config tells what it takes, else the first batch."""
    if dataloader is None:
        return None
    if hasattr(getattr(model, "config", None), "to_dict"):
        with suppress(InputError):
            bind(model, None)
            return None
    try:
        return next(inputs_of(model, dataloader))
    except StopIteration:
        raise InputError("dataloader= holds no batch.") from None


def inputs_of(model: nn.Module, dataloader: Any) -> Iterator[Any]:
    """Yield what a model is called with, of every batch."""
    for batch in dataloader:
        yield inputs_and_target(model, batch)[0]


def inputs_and_target(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Take a batch apart; a pair is positional inputs where ``forward`` takes two, else inputs and a target."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in LABELS}, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = [
            one
            for one in inspect.signature(model.forward).parameters.values()
            if one.kind in kinds and one.default is inspect.Parameter.empty
        ]
        if len(needed) < 2:
            return batch[0], batch[1]
    return batch, None


def placed(model: nn.Module, batch: Any) -> Any:
    """Return a batch where the model is."""
    place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(place), batch)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with what `inputs_and_target` returned."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
