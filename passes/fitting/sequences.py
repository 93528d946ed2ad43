"""Which rows of a value count, which of them judge what was fitted on the others, and which say nothing new."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from fxslim.batches import Batch, tensors
from fxslim.program import Program

JUDGE = 5
"""Every fifth sequence judges what was fitted on the others."""
CHUNK = 64
"""Tokens that go together where there are few sequences."""


@dataclass(frozen=True)
class Rows:
    """Which rows of a value count, and which of them judge.

    Attributes:
        batches: the batches.
        second: nodes that belong to a decoder beside an encoder: its own mask counts there.
        weights: node -> how much every row of every batch counts; one each for other nodes.
    """

    batches: Sequence[Batch]
    second: frozenset[fx.Node]
    weights: Mapping[fx.Node, Sequence[Tensor]] = field(default_factory=dict)

    def mask(self, node: fx.Node, batch: int) -> Tensor | None:
        """Return which tokens count in a node's value.  (B, S)"""
        name = "decoder_attention_mask" if node in self.second else "attention_mask"
        mask = self.batches[batch].inputs.get(name)
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def of(self, node: fx.Node, batch: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which of ``count`` rows count, and which of those judge.  (rows,), (counting rows,) bool"""
        mask = self.mask(node, batch)
        counts = torch.ones(count, dtype=torch.bool, device=device)
        if mask is not None and mask.numel() == count:
            counts = mask.reshape(-1).bool().to(device)
        judges, sequences = self.judges(batch), self.batches[batch].rows
        if judges is not None and count % sequences == 0:
            return counts, judges.to(device)[_owners(count, sequences, device)][counts]
        places = self._places(batch, count, device)
        number = places // CHUNK if count >= JUDGE * CHUNK else places
        return counts, (number % JUDGE == JUDGE - 1)[counts]

    def judges(self, batch: int) -> Tensor | None:
        """Return which sequences of a batch judge; None where there are so few that parts of them do.  (B,) bool

        Copies are on the same side: what was fitted on one cannot be judged by another.
        """
        numbers, total = self._numbers
        if total < 2 * JUDGE or not len(numbers[batch]):
            return None
        return numbers[batch] % JUDGE == JUDGE - 1

    def copied(self, batch: int, count: int, device: torch.device) -> Tensor:
        """Return which of ``count`` rows are of sequences that were there before.  (rows,) bool"""
        sequences = self.batches[batch].rows
        if not sequences or count % sequences:
            return torch.zeros(count, dtype=torch.bool, device=device)
        return self._copies[batch].to(device)[_owners(count, sequences, device)]

    @property
    def copies(self) -> tuple[int, int]:
        """Return how many sequences are copies of others, and how many sequences there are."""
        return sum(int(own.sum()) for own in self._copies), sum(len(own) for own in self._copies)

    def _places(self, batch: int, count: int, device: torch.device) -> Tensor:
        """Return a place for every row; copies have the same."""
        sequences, places = self.batches[batch].rows, torch.arange(count, device=device)
        if not sequences or count % sequences or not self.copies[0]:
            return places
        length = count // sequences
        return self._numbers[0][batch].to(device)[places // length] * length + places % length

    @cached_property
    def _copies(self) -> list[Tensor]:
        seen, found = -1, []
        for own in self._numbers[0]:
            new = torch.zeros(len(own), dtype=torch.bool)
            for i, number in enumerate(own.tolist()):
                new[i] = number > seen
                seen = max(seen, number)
            found.append(~new)
        return found

    @cached_property
    def _numbers(self) -> tuple[list[Tensor], int]:
        """Return a number for every sequence, in their order, the same for copies; and how many there are."""
        known: dict[bytes, int] = {}
        numbers = [torch.tensor([known.setdefault(own, len(known)) for own in fingerprints(batch)], dtype=torch.int64)
                   for batch in self.batches]  # fmt: skip
        return numbers, len(known)


def _owners(count: int, sequences: int, device: torch.device) -> Tensor:
    """Return the sequence of each of ``count`` rows."""
    return torch.arange(count, device=device) // (count // sequences)


def fingerprints(batch: Batch) -> list[bytes]:
    """Return a digest of every sequence of a batch, the same for copies, however padded."""
    mask, rows = batch.inputs.get("attention_mask"), batch.rows
    padded = isinstance(mask, Tensor) and mask.ndim == 2
    held = [value.detach().cpu() for value in tensors(dict(batch.inputs))
            if value is not mask and value.shape[:1] == (rows,)]  # fmt: skip
    places = mask.detach().cpu().bool() if isinstance(mask, Tensor) and padded else None
    found = []
    for row in range(rows):
        own = hashlib.blake2b(digest_size=16)
        for value in held:
            part = value[row]
            if places is not None and value.shape[:2] == places.shape:
                part = part[places[row]]
            own.update(part.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        found.append(own.digest())
    return found


def rows_of(program: Program, batches: Sequence[Batch]) -> Rows:
    """Return which rows count in a program's values."""
    second: set[fx.Node] = set()
    for node in program.graph.nodes:
        own = node.op == "placeholder" and node.name in program.inputs and node.name.startswith("decoder_")
        if own or any(read in second for read in node.all_input_nodes):
            second.add(node)
    return Rows(batches, frozenset(second))
