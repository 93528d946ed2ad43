"""Which tensor of a model each tensor of a checkpoint is: what transformers renames and joins while it loads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fxslim.checkpoint.files import Shard, Stored, read_shard
from fxslim.errors import InputError, UnsupportedModelError
from fxslim.lazy import Lazy, Spilled, reserve
from fxslim.sharing import named_once


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is a tensor of the model, or a part of one.

    Attributes:
        stored: the tensor in the file.
        tensor: canonical name of the model's tensor.
        expert: its number along dimension 0, where tensors of the experts are stacked; None where they are not.
        dim: dimension of the model's tensor along which parts are joined; None where they are not.
        first: where it begins along that dimension.
    """

    stored: Stored
    tensor: str
    expert: int | None = None
    dim: int | None = None
    first: int = 0

    @property
    def own_dim(self) -> int | None:
        """Return the stored tensor's dimension along which it is joined with others."""
        return self.dim if self.dim is None or self.expert is None else self.dim - 1

    @property
    def length(self) -> int:
        """Return how many rows it has along that dimension."""
        return 1 if self.own_dim is None else self.stored.shape[self.own_dim]


@dataclass(frozen=True)
class Keys:
    """How a checkpoint's tensors and a model's belong together.

    Attributes:
        pieces: name in the file -> what it is; names that the model does not know are left out.
        opaque: canonical name -> why nothing can be taken out of it: it is computed from what is stored.
        unread: names in the files that the model does not read.
    """

    pieces: Mapping[str, Piece]
    opaque: Mapping[str, str]
    unread: tuple[str, ...]


def keys_of(model: PreTrainedModel, shards: Sequence[Shard]) -> Keys:
    """Find out which tensor of a model each stored tensor is.

    Args:
        model: the model's skeleton, on ``meta``.
        shards: what is stored.

    Raises:
        InputError: shapes differ, or the checkpoint lacks tensors that the model has.
    """
    return _Matching(model).match([stored for shard in shards for stored in shard.tensors])


@dataclass
class _Matching:
    """State of one matching."""

    model: PreTrainedModel
    pieces: dict[str, Piece] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        transforms = get_model_conversion_mapping(self.model)
        self.renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self.converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self.wanted = self.model.state_dict()
        self.aliases = named_once(self.model)[1]

    def match(self, every: Sequence[Stored]) -> Keys:
        joined: dict[str, tuple[WeightConverter, dict[str, list[Stored]]]] = {}
        for stored in sorted(every, key=lambda one: dot_natural_key(one.name)):
            name, pattern = self._renamed(stored.name)
            if name not in self.wanted:
                self.unread.append(stored.name)
            elif pattern is None:
                self._shaped(stored.name, stored.shape, name)
                self.pieces[stored.name] = Piece(stored, self._canonical(name))
            else:
                converter = next(one for one in self.converters if pattern in one.source_patterns)
                joined.setdefault(name, (converter, {}))[1].setdefault(pattern, []).append(stored)
        for name, (converter, parts) in joined.items():
            self._join(name, converter, parts)
        self._complete()
        return Keys(self.pieces, self.opaque, tuple(self.unread))

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """Return the model's name of a stored tensor, and the pattern of the conversion that it is part of."""
        prefix = self.model.base_model_prefix
        found, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.wanted)
        if found not in self.wanted and name in self.wanted:
            found, pattern = rename_source_key(name, [], [], prefix, self.wanted)
        return found, pattern

    def _canonical(self, name: str) -> str:
        return self.aliases.get(name, name)

    def _shaped(self, stored: str, shape: Sequence[int], name: str) -> None:
        expected = tuple(self.wanted[name].shape)
        if tuple(shape) != expected:
            raise InputError(
                f"the checkpoint's {stored} has shape {tuple(shape)}, but {name} of {type(self.model).__name__} has "
                f"{expected}: config.json and weights do not belong together."
            )

    def _join(self, name: str, converter: WeightConverter, parts: Mapping[str, list[Stored]]) -> None:
        """Take up the parts of a tensor that transformers stacks and joins."""
        steps = converter.operations
        stacked = isinstance(steps[0], MergeModulelist) and steps[0].dim == 0
        rest = steps[1:] if stacked else steps
        join = rest[0] if len(rest) == 1 and isinstance(rest[0], Concatenate) else None
        known, dim = not rest or join is not None, None if join is None else join.dim
        order = [parts[pattern] for pattern in converter.source_patterns if pattern in parts]
        if not known or len(converter.target_patterns) != 1 or (stacked and dim == 0):
            for target in converter.target_patterns:
                every = name.replace(converter.target_patterns[0], target)
                self.opaque[self._canonical(every)] = " and ".join(type(step).__name__ for step in steps)
            return
        made, shape = self._pieces(self._canonical(name), order, stacked, dim)
        self._shaped(made[0].stored.name, shape, name)
        self.pieces.update({piece.stored.name: piece for piece in made})

    def _pieces(
        self, name: str, order: Sequence[Sequence[Stored]], stacked: bool, dim: int | None
    ) -> tuple[list[Piece], tuple[int, ...]]:
        """Return the parts of a tensor and its shape."""
        made: list[Piece] = []
        first = 0
        for several in order:
            for number, stored in enumerate(several):
                made.append(Piece(stored, name, number if stacked else None, dim, first))
                if not stacked:
                    first += made[-1].length
            if stacked and dim is not None:
                first += made[-1].length
        shape = list(made[0].stored.shape)
        own = made[0].own_dim
        if own is not None:
            shape[own] = first
        if any(
            [size for at, size in enumerate(piece.stored.shape) if at != own] !=
            [size for at, size in enumerate(shape) if at != own]
            for piece in made
        ):  # fmt: skip
            raise InputError(f"the checkpoint's parts of {name} have different shapes.")
        return made, (len(order[0]), *shape) if stacked else tuple(shape)

    def _complete(self) -> None:
        """Raise InputError where a tensor of the model is not stored."""
        there = {piece.tensor for piece in self.pieces.values()} | self.opaque.keys()
        optional = self.model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in self.wanted
            if self._canonical(name) not in there and not any(re.search(pattern, name) for pattern in optional)
        ]
        if missing:
            raise InputError(
                f"the checkpoint lacks {', '.join(missing[:5])} of {type(self.model).__name__}, which would be made up "
                "at random; save the whole model with save_pretrained first."
            )


def repaired_keys(keys: Keys, repaired: Spilled) -> Keys:
    """Return keys that lead to repaired tensors in the place of the checkpoint's own.

    Raises:
        UnsupportedModelError: a repaired tensor is stored in parts.
    """
    pieces = dict(keys.pieces)
    for name, piece in keys.pieces.items():
        if piece.tensor in repaired:
            if piece.expert is not None or piece.dim is not None:
                raise UnsupportedModelError(
                    f"{piece.tensor} is stored in parts and cannot be repaired there; load the model, narrow it with "
                    "fxslim.slim, or leave the repair out with repair=False."
                )
            (stored,) = read_shard(repaired.files[piece.tensor]).tensors
            pieces[name] = replace(piece, stored=replace(stored, name=name))
    return replace(keys, pieces=pieces)


class Weights(Lazy):
    """The tensors of a model, by canonical name, read from a checkpoint when they are asked for."""

    def __init__(self, keys: Keys, model: Mapping[str, torch.Tensor], *, kept: int) -> None:
        """Read through ``keys``; what is not stored (buffers, constants of a trace) comes from ``model``."""
        super().__init__(model, kept)
        self._pieces: dict[str, list[Piece]] = {}
        for piece in keys.pieces.values():
            self._pieces.setdefault(piece.tensor, []).append(piece)
        self._opaque = keys.opaque
        self._model = model

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, in the model's shape and dtype."""
        if name in self._opaque:
            raise UnsupportedModelError(
                f"{name} is not stored: transformers computes it while it loads ({self._opaque[name]}). Load the "
                "model, and save it with save_pretrained(folder, save_original_format=False) first."
            )
        model, pieces = self._model[name], self._pieces.get(name)
        if pieces is None:
            return model
        own = _joined(pieces, model)
        return nn.Parameter(own, requires_grad=False) if isinstance(model, nn.Parameter) else own


def _joined(pieces: Sequence[Piece], model: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the model's shape and dtype."""
    if pieces[0].expert is None and pieces[0].dim is None:
        return pieces[0].stored.read().to(model.dtype)
    whole = torch.empty(model.shape, dtype=model.dtype)
    for piece in pieces:
        place = whole if piece.expert is None else whole[piece.expert]
        if piece.own_dim is not None:
            place = place.narrow(piece.own_dim, piece.first, piece.length)
        place.copy_(piece.stored.read())
    return whole


def place(model: PreTrainedModel) -> None:
    """Give a skeleton on ``meta`` reserved memory; buffers that no checkpoint holds get their numbers."""
    reserve(model)
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    tensor._is_hf_initialized = name not in module._non_persistent_buffers_set
    model.initialize_weights()
