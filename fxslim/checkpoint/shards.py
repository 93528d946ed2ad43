"""Write narrowed shards: every tensor is read, narrowed and written in pieces; what is done is written down."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fxslim.checkpoint.files import INDEX, WEIGHTS, Shard, Stored, header_of
from fxslim.checkpoint.keys import Keys, Piece, Weights
from fxslim.errors import InputError, UnsupportedModelError
from fxslim.passes.folding.fold import folded
from fxslim.passes.narrow import Change, changes
from fxslim.passes.rows import Rows
from fxslim.plan import Plan
from fxslim.site import SitePlan

PIECE = 1 << 25
"""How many bytes of a tensor are read at once."""
DONE = ".fxslim_done.json"
"""What a run has finished: file -> size and checksum. It is taken away at the end."""

Step = Callable[[int], object]
"""Called with a number of bytes that were read."""


@dataclass(frozen=True)
class Written:
    """A tensor to be written.

    Attributes:
        source: the tensor that it is made of.
        target: name and shape that it gets.
        change: what is taken out of it.
        folds: sites whose constants it takes up.
        piece: what it is in the model.
    """

    source: Stored
    target: Stored
    change: Change
    folds: tuple[SitePlan, ...]
    piece: Piece

    def pieces(self, weights: Weights) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the narrowed tensor piece by piece, each with the number of bytes that were read for it."""
        if self.folds:
            yield self.source.bytes, self.change.apply(folded(weights, self.folds)[self.piece.tensor])
            return
        rows = self.source.shape[0] if self.source.shape else 1
        every = (*self.change.cleared, *self.change.removed)
        whole = not self.source.shape or any(row.lead not in (0, None) and row.dim == 0 for row in every)
        step = rows if whole else max(1, PIECE * rows // max(self.source.bytes, 1))
        for first in range(0, rows, max(step, 1)):
            last = min(first + step, rows)
            part = self.source.read() if whole else self.source.read(first, last)
            change = self.change if whole else self.change.on(partial(Rows.between, first=first, last=last))
            yield part.nbytes, change.apply(part)


def targets(shards: Sequence[Shard], keys: Keys, plan: Plan, aliases: Mapping[str, str]) -> dict[str, list[Written]]:
    """Return what goes into every file.

    Args:
        shards: the dense files.
        keys: which tensor of the model each stored one is.
        plan: what is taken out.
        aliases: further names of the model's tensors -> canonical names.

    Raises:
        UnsupportedModelError: something is to be taken out of a tensor that is computed from what is stored.
    """
    change = {aliases.get(name, name): own for name, own in changes(plan).items()}
    biases: dict[str, list[SitePlan]] = {}
    for part in plan.sites:
        for bias in dict.fromkeys(fold.bias for fold in part.folds):
            folds = tuple(fold for fold in part.folds if fold.bias == bias)
            biases.setdefault(aliases.get(bias, bias), []).append(part.model_copy(update={"folds": folds}))
    stored = {piece.tensor for piece in keys.pieces.values()}
    for name in (change.keys() | biases.keys()) & keys.opaque.keys():
        raise UnsupportedModelError(f"{name} is not stored, but computed while loading ({keys.opaque[name]}); {LOAD}")
    for name in (change.keys() | biases.keys()) - stored:
        raise UnsupportedModelError(f"the plan narrows {name}, which is not stored; {LOAD}")
    names = {(piece.tensor, piece.expert, piece.first): name for name, piece in keys.pieces.items()}
    made: dict[str, list[Written]] = {}
    for shard in shards:
        every = [keys.pieces[one.name] for one in shard.tensors if one.name in keys.pieces]
        several = [_written(piece, names, change.get(piece.tensor, Change()), tuple(biases.get(piece.tensor, ())))
                   for piece in every]  # fmt: skip
        kept = [one for one in several if one is not None]
        made[shard.file.name] = sorted(kept, key=lambda one: -one.target.dtype.itemsize)  # no tensor is misaligned
    return {name: every for name, every in made.items() if every}


LOAD = "load the model, narrow it with fxslim.slim and save it with fxslim.save_pretrained."


def _written(
    piece: Piece, names: Mapping[tuple[str, int | None, int], str], change: Change, folds: tuple[SitePlan, ...]
) -> Written | None:
    """Return what becomes of a stored tensor; None for an expert that goes, whose name the next one takes."""
    name = piece.stored.name
    if folds and (piece.expert is not None or piece.dim is not None):
        raise UnsupportedModelError(f"a constant is folded into {piece.tensor}, which is stored in parts; {LOAD}")
    if piece.expert is not None:
        gone = [row for row in change.removed if row.dim == 0]
        kept = np.flatnonzero(~np.any([row.gone for row in gone], axis=0)) if gone else None
        if kept is not None:
            if piece.expert not in kept:
                return None
            name = names[piece.tensor, int(np.searchsorted(kept, piece.expert)), piece.first]
        rest = Change(change.cleared, tuple(row for row in change.removed if row.dim != 0))
        change = rest.on(lambda row: row.of_expert(piece.expert or 0))
    if piece.own_dim is not None:
        change = change.on(lambda row: _part(row, piece))
    shape = list(piece.stored.shape)
    for row in change.removed:
        shape[row.dim] = int((~row.gone[0] if row.gone.ndim == 2 else ~row.gone).sum())
    target = dataclasses.replace(piece.stored, name=name, shape=tuple(shape), file=Path())
    return Written(piece.stored, target, change, folds, piece)


def _part(row: Rows, piece: Piece) -> Rows:
    """Return the rows of a tensor that is joined with others, by its own numbers."""
    if row.dim != piece.own_dim:
        return row
    return dataclasses.replace(row, gone=row.gone[..., piece.first : piece.first + piece.length])


def write_shards(folder: Path, files: Mapping[str, Sequence[Written]], weights: Weights, metadata: Mapping[str, str],
                 step: Step) -> None:  # fmt: skip
    """Write every file that is not there yet, and the index."""
    done = _done(folder)
    for name, tensors in files.items():
        path = folder / name
        if name in done and path.is_file() and _checksum(path) == done[name]:
            step(sum(one.source.bytes for one in tensors))
            continue
        partial = path.with_suffix(".partial")
        done[name] = _write(partial, tensors, weights, metadata, step)
        partial.replace(path)
        _note(folder, done)
    if list(files) != [WEIGHTS]:
        _write_index(folder, files)


def _write(path: Path, tensors: Sequence[Written], weights: Weights, metadata: Mapping[str, str], step: Step) -> str:
    """Write one file to disk; return its checksum."""
    checksum = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        begin = header_of(tuple(one.target for one in tensors), metadata)
        file.write(begin)
        checksum.update(begin)
        for one in tensors:
            count = 0
            for read, tensor in one.pieces(weights):
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                checksum.update(data)
                sent = 0
                while sent < len(data):
                    sent += file.write(data[sent:]) or 0
                count += len(data)
                step(read)
            if count != one.target.bytes:
                raise InputError(f"{one.source.name} changed while it was read; start again.")
        os.fsync(file.fileno())
    return checksum.hexdigest()


def _checksum(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 24):
            checksum.update(data)
    return checksum.hexdigest()


def _done(folder: Path) -> dict[str, str]:
    """Return what an earlier run has finished."""
    try:
        found = json.loads((folder / DONE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _note(folder: Path, done: Mapping[str, str]) -> None:
    new = folder / f"{DONE}.new"
    new.write_text(json.dumps(done), encoding="utf-8")
    new.replace(folder / DONE)


def _write_index(folder: Path, files: Mapping[str, Sequence[Written]]) -> None:
    every = [(one.target, name) for name, tensors in files.items() for one in tensors]
    total = sum(target.bytes for target, _ in every)
    weight_map = dict(sorted((target.name, name) for target, name in every))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
