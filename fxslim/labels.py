"""Labels: integers on coordinates, and the two relations between them.

Every coordinate that could be removed carries a label. A value of the graph carries a tuple of label tensors; an
element of the value goes as soon as one of its labels goes. ``tie(a, b)`` says that a and b go together;
``parent(p, c)`` says that c may go alone and that p goes exactly when all its children go; ``pin`` says that a label
stays, and why.

Label 0 stands for "constant": computed from parameters, masks and positions alone, and therefore free to be gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

CONSTANT = 0


@dataclass(frozen=True)
class Value:
    """What labels a tensor of the graph carries.

    Attributes:
        shape: example shape.
        labels: label tensors, each of the value's rank, of full size on the axes along which it varies and of size 1
            on all others. No two of them vary along the same axis.
        origin: CONSTANT, or the pin label of what the unlabelled axes of this value come from.
        looked_up: whether integers given by the user flow into it (tokens, positions, masks).
        indexes: labels of the coordinates that the numbers in it stand for, where it holds positions on another axis.
    """

    shape: tuple[int, ...]
    labels: tuple[torch.Tensor, ...] = ()
    origin: int = CONSTANT
    looked_up: bool = False
    indexes: torch.Tensor | None = None

    def along(self, axis: int) -> torch.Tensor | None:
        """Return the label tensor that varies along an axis, if any."""
        axis %= len(self.shape)
        return next((labels for labels in self.labels if labels.shape[axis] > 1), None)


@dataclass(frozen=True)
class Pin:
    """Why a coordinate stays: the reason and the node of the graph where it was decided."""

    reason: str
    node: str


@dataclass(frozen=True)
class Meeting:
    """Computed values that meet element by element.

    Attributes:
        node: the operation, by name.
        result: labels of what comes of them.
        operands: labels of those that vary along all axes along which the result does, of its shape.
        others: labels of those that are broadcast along some of them, parents of the result's.
        bare: pin labels of those that have no labels there, although they are as large: they pin the result.
    """

    node: str
    result: torch.Tensor
    operands: tuple[torch.Tensor, ...]
    others: tuple[torch.Tensor, ...] = ()
    bare: tuple[int, ...] = ()

    @property
    def whole(self) -> range:
        """Return the numbers of what may be gathered: the operands, and what is bare behind them."""
        return range(len(self.operands) + len(self.bare))


@dataclass
class Relations:
    """Ties, parents and pins, collected while walking a graph.

    What meets in a ``Meeting`` is tied with its result, but for what is in ``gathered`` (meeting, operand): that stays
    whole, and what the result keeps is picked from it where they meet.
    """

    size: int = 1
    meetings: list[Meeting] = field(default_factory=list)
    gathered: frozenset[tuple[int, int]] = frozenset()
    ties: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    parents: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    pins: dict[int, Pin] = field(default_factory=dict)
    pinned: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def fresh(self, count: int) -> torch.Tensor:
        """Return ``count`` labels that nothing else carries."""
        start = self.size
        self.size += count
        return torch.arange(start, start + count)

    def pin_label(self, reason: str, node: str) -> int:
        """Return a label that stays, for this reason."""
        label = int(self.fresh(1))
        self.pins[label] = Pin(reason, node)
        return label

    def tie(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Let labels go together, element by element (broadcast)."""
        self.ties.append(_pairs(first, second))

    def parent(self, parent: torch.Tensor, child: torch.Tensor) -> None:
        """Let each parent go exactly when all its children go, element by element (broadcast)."""
        self.parents.append(_pairs(parent, child))

    def meet(
        self,
        node: str,
        operands: Sequence[torch.Tensor],
        others: Sequence[torch.Tensor] = (),
        bare: Sequence[int] = (),
    ) -> torch.Tensor:
        """Return labels of what comes of computed values that meet element by element (see Meeting)."""
        _, number = torch.unique(operands[0], return_inverse=True)
        result = self.fresh(int(number.max()) + 1)[number]
        self.meetings.append(Meeting(node, result, tuple(operands), tuple(others), tuple(bare)))
        for labels in others:
            self.parent(labels, result)
        return result

    def every_tie(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the ties, those of what meets included."""
        met = [
            _pairs(own, meeting.result)
            for i, meeting in enumerate(self.meetings)
            for j, own in enumerate(meeting.operands)
            if (i, j) not in self.gathered
        ]
        return [*self.ties, *met]

    def every_pin(self) -> list[tuple[torch.Tensor, int]]:
        """Return what is pinned, by what meets it included."""
        met = [
            (meeting.result, label)
            for i, meeting in enumerate(self.meetings)
            for k, label in enumerate(meeting.bare, start=len(meeting.operands))
            if (i, k) not in self.gathered
        ]
        return [*self.pinned, *met]

    def tie_along(self, labels: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """Tie labels along axes; return the labels with those axes of size 1."""
        for axis in axes:
            if labels.shape[axis] > 1:
                first = labels.narrow(axis, 0, 1)
                self.tie(labels, first)
                labels = first
        return labels

    def pin(self, labels: torch.Tensor, label: int) -> None:
        """Let labels stay for the reason that belongs to a pin label."""
        self.pinned.append((labels.reshape(-1), label))


def _pairs(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.broadcast_tensors(first, second)
    return first.reshape(-1), second.reshape(-1)


def compact(labels: torch.Tensor) -> torch.Tensor:
    """Shrink every axis along which labels do not vary to size 1."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and (labels.stride(axis) == 0 or bool((labels == labels.narrow(axis, 0, 1)).all())):
            labels = labels.narrow(axis, 0, 1)
    return labels


def axes_of(labels: torch.Tensor) -> frozenset[int]:
    """Return the axes along which compact labels vary."""
    return frozenset(axis for axis, size in enumerate(labels.shape) if size > 1)


def clusters(every: Sequence[torch.Tensor]) -> list[tuple[frozenset[int], list[torch.Tensor]]]:
    """Group label tensors that (transitively) vary along a common axis."""
    groups: list[tuple[frozenset[int], list[torch.Tensor]]] = []
    for labels in every:
        axes, members = axes_of(labels), [labels]
        if not axes:
            continue
        apart = []
        for other_axes, others in groups:
            if axes & other_axes:
                axes, members = axes | other_axes, others + members
            else:
                apart.append((other_axes, others))
        groups = [*apart, (axes, members)]
    return groups


def merge(relations: Relations, axes: frozenset[int], members: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make one label tensor of several that share axes: the finest one, with the others as parents.

    Where none varies along all the axes, each combination gets a fresh label with several parents.
    """
    first = members[0]
    if len(members) == 1:
        return first
    finest = next((labels for labels in members if axes_of(labels) == axes), None)
    if finest is None:
        return combine(relations, members)
    for labels in members:
        if labels is finest:
            continue
        if axes_of(labels) == axes:
            relations.tie(labels, finest)
        else:
            relations.parent(labels, finest)
    return finest


def combine(relations: Relations, members: Sequence[torch.Tensor]) -> torch.Tensor:
    """Give each combination of labels a fresh label, with all of them as parents."""
    full = torch.broadcast_tensors(*members)
    key = torch.zeros_like(full[0])
    for labels in full:
        _, dense = torch.unique(labels, return_inverse=True)
        key = key * (int(dense.max()) + 1) + dense
    combinations, number = torch.unique(key, return_inverse=True)
    finest = relations.fresh(combinations.numel())[number]
    for labels in full:
        relations.parent(labels, finest)
    return finest


@dataclass(frozen=True)
class Components:
    """Solved relations.

    Attributes:
        of: label -> component.  (numpy, int64)
        pinned: component -> whether it stays, directly.
        edges: (E, 2) parent component, child component; distinct, never equal.
        pins: component -> the first reason why it stays.
    """

    of: np.ndarray
    pinned: np.ndarray
    edges: np.ndarray
    pins: dict[int, Pin]

    @cached_property
    def children(self) -> coo_matrix:
        """Boolean matrix, parents by children."""
        count = len(self.pinned)
        ones = np.ones(len(self.edges), dtype=bool)
        return coo_matrix((ones, (self.edges[:, 0], self.edges[:, 1])), shape=(count, count)).tocsr()

    def removed(self, leaves: np.ndarray, may: np.ndarray | None = None) -> np.ndarray:
        """Close a set of removed components under parents: a parent goes exactly when all its children go.

        Args:
            leaves: boolean, one per component.
            may: which parents may go, boolean; what several sites share stays and is gathered. None: all.

        Returns:
            Boolean, one per component.
        """
        removed = leaves.copy()
        if not len(self.edges):
            return removed
        degree = np.asarray(self.children.sum(axis=1)).reshape(-1)
        has_children = degree > 0
        while True:
            gone = np.asarray(self.children @ removed.astype(np.int64)).reshape(-1)
            update = has_children & (gone == degree) & ~self.pinned
            if may is not None:
                update &= may
            if not bool((update & ~removed).any()):
                return removed
            removed |= update

    def starved(self, removed: np.ndarray) -> np.ndarray:
        """Return the components that stay although all their children go.  (components,) bool"""
        if not len(self.edges):
            return np.zeros(len(self.pinned), dtype=bool)
        degree = np.asarray(self.children.sum(axis=1)).reshape(-1)
        gone = np.asarray(self.children @ removed.astype(np.int64)).reshape(-1)
        starved: np.ndarray = self.pinned & (degree > 0) & (gone == degree)
        return starved


def solve(relations: Relations) -> Components:
    """Compute components of ties, fold cycles of parents, and collect pins."""
    of, edges = _only_children(relations)
    if len(edges):
        count = int(of.max()) + 1
        matrix = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
        _, strong = connected_components(matrix, directed=True, connection="strong")
        if int(strong.max()) + 1 < count:
            of = strong[of]
            edges = _edges(of, relations.parents)
    of = of.astype(np.int64)
    pinned = np.zeros(int(of.max()) + 1, dtype=bool)
    pinned[of[CONSTANT]] = True
    reasons: dict[int, Pin] = {}
    own = [(torch.tensor([label]), label) for label in relations.pins]
    for labels, label in [*relations.every_pin(), *own]:
        components = np.unique(of[labels.numpy()])
        pinned[components] = True
        for component in components.tolist():
            reasons.setdefault(component, relations.pins[label])
    return Components(of, pinned, edges, reasons)


def _only_children(relations: Relations) -> tuple[np.ndarray, np.ndarray]:
    """Compute components and edges; a parent of one child goes exactly when the child goes, so they are one."""
    of = _connected(relations.size, relations.every_tie())
    while True:
        edges = _edges(of, relations.parents)
        if not len(edges):
            return of, edges
        degree = np.bincount(edges[:, 0], minlength=int(of.max()) + 1)
        single = edges[degree[edges[:, 0]] == 1]
        if not len(single):
            return of, edges
        count = int(of.max()) + 1
        of = _connected(count, [(torch.from_numpy(single[:, 0]), torch.from_numpy(single[:, 1]))])[of]


def _connected(size: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    if not pairs:
        return np.arange(size)
    first = torch.cat([pair[0] for pair in pairs]).numpy()
    second = torch.cat([pair[1] for pair in pairs]).numpy()
    matrix = coo_matrix((np.ones(len(first), dtype=bool), (first, second)), shape=(size, size))
    _, of = connected_components(matrix, directed=False)
    return np.asarray(of)


def _edges(of: np.ndarray, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    if not pairs:
        return np.zeros((0, 2), dtype=np.int64)
    first = of[torch.cat([pair[0] for pair in pairs]).numpy()].astype(np.int64)
    second = of[torch.cat([pair[1] for pair in pairs]).numpy()].astype(np.int64)
    distinct = first != second
    count = int(of.max()) + 1
    packed = np.unique(first[distinct] * count + second[distinct])
    return np.stack([packed // count, packed % count], axis=1)
