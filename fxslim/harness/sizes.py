"""Inputs in other sizes: the given ones, repeated and cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxslim.errors import InputError

PLAIN = (Tensor, bool, int, float, str, type(None))
"""What inputs may consist of: a cache would grow while it is timed."""


def resized(inputs: Mapping[str, Any], *, batch: int | None = None, length: int | None = None) -> dict[str, Any]:
    """Return inputs with another batch and another length.

    Rows are repeated in their order, and so are positions. What has a length is told by the inputs themselves: the
    second axis of whole numbers with two axes (tokens, masks), and whatever else has that size there.

    Args:
        inputs: keyword inputs.
        batch: size of the first axis, which all tensors share; None for as it is.
        length: size of the second axis of tokens; None for as it is.

    Raises:
        InputError: tensors do not share a batch, or none has a length, where that is asked for; or something is
            neither a tensor nor plain.
    """
    rows, tokens = batch_of(inputs), length_of(inputs)
    odd = [type(leaf).__name__ for leaf in pytree.tree_leaves(dict(inputs)) if not isinstance(leaf, PLAIN)]
    if odd:
        raise InputError(f"inputs are tensors and plain values; a {odd[0]} may change from call to call.")
    if batch is not None and rows is None:
        raise InputError("batches= is for inputs whose tensors share their first axis; these do not.")
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


def batch_of(inputs: Mapping[str, Any]) -> int | None:
    """Return how many rows the inputs have, where they share them; a first axis of 1 stands for all rows."""
    sizes = {leaf.shape[0] for leaf in _tensors(inputs) if leaf.ndim}
    return int(max(sizes)) if len(sizes - {1}) <= 1 and sizes else None


def length_of(inputs: Mapping[str, Any]) -> int | None:
    """Return how many tokens a row has; None where there are none."""
    whole = [leaf for leaf in _tensors(inputs) if leaf.ndim == 2 and not leaf.is_floating_point()]
    return int(whole[0].shape[1]) if whole else None


def _tensors(inputs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
