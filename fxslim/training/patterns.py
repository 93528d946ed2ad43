"""Patterns of masked weights: single ones, blocks, N of every M, whole inputs or outputs; and layers as matrices."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxslim.errors import RequestError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FORMS = "'1x1', blocks such as '4x1', N of every M inputs such as '2:4', 'channelx1' or '1xchannel'"


@dataclass(frozen=True)
class Pattern:
    """Which weights of a matrix (outputs, inputs) are chosen together.

    Attributes:
        rows: outputs in a block; 0 for all of them.
        columns: inputs in a block; 0 for all of them.
        drop: how many weights of a chosen block are masked; None for all of them.
    """

    rows: int
    columns: int
    drop: int | None = None

    @property
    def fraction(self) -> float | None:
        """Return the fraction that is masked when every block is chosen; None where that is everything."""
        return None if self.drop is None else self.drop / self.columns

    def block(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the size of a block of a matrix: outputs, inputs."""
        return self.rows or shape[0], self.columns or shape[1]

    def misfit(self, shape: Sequence[int], channels: int) -> str:
        """Say why a matrix cannot be taken apart into blocks; nothing where it can.

        Args:
            shape: of the matrix: outputs, inputs.
            channels: how many inputs are in one place of a convolution's kernel; no block is in two places.
        """
        rows, columns = self.block(shape)
        if shape[0] % rows or (self.columns and channels % columns):
            return f"{shape[0]} outputs by {channels} inputs are no multiple of {rows} by {columns}"
        return ""

    def summed(self, values: Tensor) -> Tensor:
        """Sum over blocks; of those of which a part goes, over the smallest.  (out, in) -> (blocks out, blocks in)"""
        blocks = self._apart(values)
        if self.drop is not None:
            return blocks.squeeze(1).sort(dim=-1).values[..., : self.drop].sum(-1)
        return blocks.sum(dim=(1, 3))

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of every block.  (out, in) -> (blocks out, blocks in)"""
        return self._apart(values).amax(dim=(1, 3))

    def spread(self, chosen: Tensor, values: Tensor) -> Tensor:
        """Return which weights go when blocks are chosen.

        Args:
            chosen: which blocks.  (blocks out, blocks in) bool
            values: the scores of all weights, by which a part of a block is chosen.  (out, in)
        """
        rows, columns = self.block(values.shape)
        every = chosen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        if self.drop is None:
            return every
        order = self._apart(values).sort(dim=-1, stable=True).indices
        part = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : self.drop], value=True)
        return every & part.reshape(values.shape)

    def _apart(self, values: Tensor) -> Tensor:
        """(out, in) -> (blocks out, rows, blocks in, columns)"""
        rows, columns = self.block(values.shape)
        return values.reshape(values.shape[0] // rows, rows, values.shape[1] // columns, columns)


def pattern_of(name: str) -> Pattern:
    """Read a pattern's name.

    Raises:
        RequestError: it is none, or masks everything.
    """
    found = re.fullmatch(r"(\d+|channel)(x|:)(\d+|channel)", name) if isinstance(name, str) else None
    if found is None or (found[1] == found[3] == "channel") or (found[2] == ":" and "channel" in name):
        raise RequestError(f"pattern={name!r}: give {FORMS}.")
    first, second = (0 if part == "channel" else int(part) for part in (found[1], found[3]))
    if "channel" in name and first + second != 1:
        raise RequestError(f"pattern={name!r}: give 'channelx1' or '1xchannel'.")
    if found[2] == ":":
        if not 0 < first < second:
            raise RequestError(f"pattern={name!r}: N:M masks N of every M inputs, with N from 1 up to M - 1.")
        return Pattern(1, second, first)
    if "channel" not in name and not first * second:
        raise RequestError(f"pattern={name!r}: a block has at least one output and one input.")
    return Pattern(first, second)


@dataclass(frozen=True)
class Layer:
    """A layer whose weights can be masked.

    Attributes:
        path: the module's path.
        module: the module.
        kind: ``Linear`` or ``Conv``.
        transposed: whether the weight is stored with the inputs first.
    """

    path: str
    module: nn.Module
    kind: str
    transposed: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """Return the weight as it is now."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def channels(self) -> int:
        """Return the number of inputs, for one place of a kernel."""
        return self.weight.shape[0 if self.transposed else 1]

    def matrix(self, values: Tensor) -> Tensor:
        """Lay something about every weight out as a matrix; of convolutions, the input channels vary fastest.

        Returns:
            (out, in)
        """
        if self.transposed:
            return values.T
        return values.movedim(1, -1).reshape(values.shape[0], -1) if self.kind == "Conv" else values

    def stored(self, matrix: Tensor) -> Tensor:
        """Lay a matrix out as the weight is stored."""
        if self.transposed:
            return matrix.T
        if self.kind != "Conv":
            return matrix
        shape = self.weight.shape
        return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def layers(model: nn.Module, kinds: Iterable[str] = ("Linear", "Conv")) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Return the layers whose weights can be masked, and (path, reason) of those whose weights cannot."""
    hub = sys.modules.get("transformers.pytorch_utils")
    transposed: tuple[type, ...] = () if hub is None else (hub.Conv1D,)
    found: list[Layer] = []
    owners: dict[int, set[str]] = {}
    wanted = tuple(kinds)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(path)
        kind = "Linear" if isinstance(module, (nn.Linear, *transposed)) else ""
        kind = "Conv" if isinstance(module, CONVOLUTIONS) else kind
        if kind in wanted:
            found.append(Layer(path, module, kind, isinstance(module, transposed)))
    fine, refused = [], []
    for layer in found:
        if (
            not isinstance(getattr(layer.module, "weight", None), nn.Parameter)
            or "weight" not in layer.module._parameters
        ):
            refused.append((layer.path, "its weight is computed at every call; make that permanent first"))
        elif len(owners[id(layer.weight)]) > 1:
            others = ", ".join(sorted(owners[id(layer.weight)] - {layer.path}))
            refused.append((layer.path, f"its weight is that of {others} as well"))
        else:
            fine.append(layer)
    return fine, refused
