"""A cut: labels together with what is removed, and what that leaves of every value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxslim.errors import NarrowError
from fxslim.labels import Value, axes_of
from fxslim.passes.annotate import Labels


@dataclass(frozen=True)
class Cut:
    """Removed components of a program's labels.

    Attributes:
        labels: the labels.
        removed: component -> whether it goes, closed under parents.
    """

    labels: Labels
    removed: np.ndarray

    def touches(self, value: object) -> bool:
        """Tell whether anything of a value goes."""
        if isinstance(value, tuple):
            return any(self.touches(item) for item in value)
        return isinstance(value, Value) and any(not bool(self.kept(own).all()) for own in value.labels)

    def kept(self, labels: torch.Tensor) -> torch.Tensor:
        """Return which coordinates stay, in the (compact) shape of a label tensor."""
        components = self.labels.components.of[labels.numpy()]
        return torch.from_numpy(np.asarray(~self.removed[components]))

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return a value's example shape after the cut.

        Raises:
            NarrowError: what is left is neither a box nor uniform along one axis.
        """
        shape = list(value.shape)
        for labels in value.labels:
            for axis, size in _box(self.kept(labels)).items():
                shape[axis] = size
        return tuple(shape)

    def positions(self, value: Value, axis: int) -> torch.Tensor | None:
        """Return the kept positions along an axis, or None where they differ over the other axes."""
        axis %= len(value.shape)
        labels = value.along(axis)
        if labels is None:
            return torch.arange(value.shape[axis])
        kept = self.kept(labels)
        others = [a for a in range(kept.ndim) if a != axis]
        along = kept.any(dim=others) if others else kept
        if not others:
            return torch.nonzero(along).reshape(-1)
        rows = kept.movedim(axis, -1).reshape(-1, kept.shape[axis])
        rows = rows[rows.any(dim=1)]
        return torch.nonzero(along).reshape(-1) if bool((rows == along).all()) else None

    def before(self, value: Value, axis: int, place: int) -> int | None:
        """Return how many coordinates stay before a place along an axis, or None where it differs over other axes."""
        axis %= len(value.shape)
        labels = value.along(axis)
        if labels is None:
            return place
        rows = self.kept(labels).movedim(axis, -1).reshape(-1, value.shape[axis])
        counts = rows[rows.any(dim=1), :place].sum(dim=1).unique()
        return int(counts) if counts.numel() == 1 else None

    def differs(self, operand: Value, value: Value, axis: int) -> bool:
        """Tell whether an operand keeps other coordinates along an axis than a result, which keeps others in each row.

        Args:
            operand: the operand, whose axes are aligned with the result's at the last one.
            value: the result.
            axis: the axis, from the last one (-1) backwards.
        """
        labels, mine = value.along(axis), operand.along(axis)
        if labels is None:
            return False
        kept = self.kept(labels)
        own = torch.ones((), dtype=torch.bool) if mine is None else self.kept(mine)
        if not any(not _is_box(mask) and _uniform_axis(mask) - mask.ndim == axis for mask in (kept, own)):
            return False
        return bool(((kept != own) & kept.any(dim=axis, keepdim=True)).any())

    def compress(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        """Take what stays of a tensor that has the value's shape (size-1 axes are left alone)."""
        for labels in value.labels:
            kept = self.kept(labels)
            if bool(kept.all()):
                continue
            sizes = _box(kept)
            full = [max(s, 1) for s in tensor.shape]
            axes = sorted(axes_of(labels))
            if any(tensor.shape[a] != labels.shape[a] for a in axes):
                tensor = tensor.expand([labels.shape[a] if a in axes else full[a] for a in range(tensor.ndim)])
            positions = {axis: _any_but(kept, axis) for axis in axes}
            if int(kept.sum()) == int(np.prod([int(mask.sum()) for mask in positions.values()])):
                for axis, mask in positions.items():
                    tensor = tensor.index_select(axis, torch.nonzero(mask).reshape(-1))
                continue
            last = _uniform_axis(kept)
            order = [a for a in range(tensor.ndim) if a not in axes] + [a for a in axes if a != last] + [last]
            lead = [tensor.shape[a] for a in order if a not in axes]
            chosen = torch.nonzero(kept.permute(order).reshape(-1)).reshape(-1)
            picked = tensor.permute(order).reshape(*lead, -1).index_select(len(lead), chosen)
            picked = picked.reshape([*lead, *[sizes[a] for a in order if a in axes]])
            tensor = picked.permute([order.index(a) for a in range(tensor.ndim)])
        return tensor


def _box(kept: torch.Tensor) -> dict[int, int]:
    """Return the size that stays along each axis of a mask of what stays."""
    axes = sorted(axes_of(kept)) or []
    if not axes:
        return {}
    if not bool(kept.any()):
        raise NarrowError("nothing would be left of a value; keep at least one unit")
    sizes = {axis: int(_any_but(kept, axis).sum()) for axis in axes}
    total = int(kept.sum())
    if total == int(np.prod([sizes[axis] for axis in axes])):
        return sizes
    uniform = _uniform_axis(kept)
    counts = kept.sum(dim=uniform)
    count = int(counts.max())
    present = counts > 0
    if bool((counts[present] == count).all()):
        sizes[uniform] = count
        if int(present.sum()) * count == int(np.prod([sizes[axis] for axis in axes])):
            return sizes
    raise NarrowError("what is left of a value is not a box")


def _any_but(kept: torch.Tensor, axis: int) -> torch.Tensor:
    others = [a for a in range(kept.ndim) if a != axis]
    return kept.any(dim=others) if others else kept


def _uniform_axis(kept: torch.Tensor) -> int:
    """Return the axis along which positions may differ: the last one whose counts are uniform."""
    axes = sorted(axes_of(kept))
    for axis in reversed(axes):
        counts = kept.sum(dim=axis)
        present = counts[counts > 0]
        rest = kept.any(dim=axis)
        if bool((present == present.max()).all()) and _is_box(rest):
            return axis
    return axes[-1]


def _is_box(kept: torch.Tensor) -> bool:
    axes = sorted(axes_of(kept))
    if len(axes) < 2:
        return True
    return int(kept.sum()) == int(np.prod([int(_any_but(kept, axis).sum()) for axis in axes]))


def closed(labels: Labels, leaves: Sequence[int] | np.ndarray, members: np.ndarray | None = None) -> Cut:
    """Return the cut that removes these leaf components and every parent among ``members`` that loses all children."""
    removed = np.zeros(len(labels.components.pinned), dtype=bool)
    removed[np.asarray(leaves, dtype=np.int64)] = True
    may = None
    if members is not None:
        may = np.zeros_like(removed)
        may[members] = True
    return Cut(labels, labels.components.removed(removed, may))
