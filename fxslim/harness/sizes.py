"""Inputs in other sizes: the given ones, repeated and cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxslim.errors import InputError


def resized(inputs: Mapping[str, Any], *, batch: int | None = None, length: int | None = None) -> dict[str, Any]:
    """Return inputs with another batch and another length.

    Rows are repeated in their order, and so are positions. What has a length is told by the inputs themselves: the
    second axis of whole numbers with two axes (tokens, masks), and whatever else has that size there.

    Args:
        inputs: keyword inputs.
        batch: size of the first axis, which all tensors share; None for as it is.
        length: size of the second axis of tokens; None for as it is.

    Raises:
        InputError: tensors do not share a batch, or none has a length.
    """
    rows, tokens = batch_of(inputs), length_of(inputs)
    if length is not None and tokens is None:
        raise InputError("lengths= is for inputs with tokens: none of these is a matrix of whole numbers.")

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        if batch is not None and leaf.shape[0] == rows:
            leaf = leaf.index_select(0, torch.arange(batch, device=leaf.device) % rows)
        if length is not None and tokens is not None and leaf.ndim > 1 and leaf.shape[1] == tokens:
            leaf = leaf.index_select(1, torch.arange(length, device=leaf.device) % tokens)
        return leaf

    return dict(pytree.tree_map(made, dict(inputs)))


def batch_of(inputs: Mapping[str, Any]) -> int:
    """Return how many rows the inputs have."""
    sizes = {leaf.shape[0] for leaf in _tensors(inputs) if leaf.ndim}
    if len(sizes) != 1:
        raise InputError(f"the first axis of every input is the batch, and here it has sizes {sorted(sizes)}.")
    return int(sizes.pop())


def length_of(inputs: Mapping[str, Any]) -> int | None:
    """Return how many tokens a row has; None where there are none."""
    whole = [leaf for leaf in _tensors(inputs) if leaf.ndim == 2 and not leaf.is_floating_point()]
    return int(whole[0].shape[1]) if whole else None


def _tensors(inputs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
