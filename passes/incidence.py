"""Tables over the components of a program's labels: which rows, leaves and nodes belong to each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix
from torch import fx

from fxslim.labels import Value
from fxslim.passes.annotate import Labels
from fxslim.passes.rules.walk import Use
from fxslim.program import Program


class Incidence:
    """Which tensor rows a component owns, what lies below and above it, and where it is carried.

    Args:
        program: the program.
        labels: its labels.

    Attributes:
        keys: every labelled dimension of the model's tensors: (name, dimension).
        rows: the component of each of its rows, by key.
    """

    def __init__(self, program: Program, labels: Labels) -> None:
        self.program = program
        self.labels = labels
        self.components = labels.components
        self.keys = list(labels.starts)
        self.rows = {key: labels.of(*key, program.tensors[key[0]].shape[key[1]]) for key in self.keys}

    @cached_property
    def incoming(self) -> set[tuple[str, int]]:
        """Tensor dimensions that are summed over somewhere."""
        return self.keys_with(self.labels.contracted)

    @cached_property
    def outgoing(self) -> set[tuple[str, int]]:
        """Tensor dimensions that become an output's axis somewhere."""
        return self.keys_with(self.labels.produced)

    def keys_with(self, uses: tuple[Use, ...]) -> set[tuple[str, int]]:
        """Return the tensor dimensions that some uses are of."""
        starts = np.array([self.labels.starts[key] for key in self.keys])
        firsts = [int(use.labels.min()) for use in uses]
        return {self.keys[int(i)] for i in np.searchsorted(starts, firsts, side="right") - 1} if firsts else set()

    @cached_property
    def counts(self) -> csr_matrix:
        """Rows that a component owns in each tensor dimension.  (components, dimensions)"""
        rows = np.concatenate([self.rows[key] for key in self.keys])
        columns = np.repeat(np.arange(len(self.keys)), [len(self.rows[key]) for key in self.keys])
        shape = (len(self.components.pinned), len(self.keys))
        return csr_matrix((np.ones(len(rows), dtype=np.int64), (rows, columns)), shape=shape)

    @cached_property
    def reach(self) -> csr_matrix:
        """Leaves below each component.  (components, components), bool"""
        children = self.components.children.tocsr()
        parent = np.asarray(children.sum(axis=1)).reshape(-1) > 0
        total, level = children.copy(), children
        while True:
            level = level @ children
            if level.nnz == 0:
                break
            total = total + level
        keep = csr_matrix((~parent).astype(np.int64)[None, :].repeat(1, axis=0))
        return total.multiply(keep).tocsr()

    @cached_property
    def reached(self) -> csc_matrix:
        """The same, to be read by leaf."""
        return self.reach.tocsc()

    def alike(self) -> Iterator[np.ndarray]:
        """Yield leaves that own the same number of rows in the same tensors, in the order of their consumer."""
        counts = self.counts
        is_parent = np.zeros(len(self.components.pinned), dtype=bool)
        is_parent[self.components.edges[:, 0]] = True
        consumed = np.zeros(len(self.components.pinned), dtype=bool)
        for use in self.labels.contracted:
            consumed[self.components.of[use.labels.numpy()]] = True
        consumed[list(self.labels.routed)] = True
        leaves = np.flatnonzero(~is_parent & ~self.components.pinned & consumed)
        weights = np.random.default_rng(0).integers(1, 1 << 40, size=len(self.keys))
        signature = np.asarray(counts[leaves] @ weights).reshape(-1)
        order = self._order()
        for value in dict.fromkeys(signature[np.argsort(order[leaves], kind="stable")].tolist()):
            members = leaves[signature == value]
            yield members[np.argsort(order[members], kind="stable")]

    def apart(self, leaves: np.ndarray) -> list[np.ndarray]:
        """Tell leaves apart that own as many rows, and have other components above them: hidden and value channels."""
        weights = np.random.default_rng(1).integers(1, 1 << 40, size=len(self.keys))
        signatures = np.asarray(self.counts @ weights).reshape(-1)
        kinds: dict[tuple[int, ...], list[int]] = {}
        for leaf in leaves.tolist():
            above = self.reached.indices[self.reached.indptr[leaf] : self.reached.indptr[leaf + 1]]
            kinds.setdefault(tuple(sorted(signatures[above].tolist())), []).append(leaf)
        return [np.array(members) for members in kinds.values()]

    def _order(self) -> np.ndarray:
        """Return where each component first appears among the consumers' rows."""
        order = np.full(len(self.components.pinned), np.iinfo(np.int64).max)
        position = 0
        for key in self.keys:
            if key in self.incoming:
                rows = self.rows[key]
                np.minimum.at(order, rows, position + np.arange(len(rows)))
                position += len(rows)
        for use in self.labels.produced:  # experts: no consumer sums over them
            own = self.components.of[use.labels.numpy()]
            if self.labels.routed.intersection(own.tolist()):
                np.minimum.at(order, own, position + np.arange(len(own)))
                position += len(own)
        return order

    def above(self, leaves: np.ndarray) -> dict[int, np.ndarray]:
        """Return the components above a family that stand for a proper part of it: component -> leaf positions."""
        place = {int(leaf): i for i, leaf in enumerate(leaves)}
        column = self.reached[:, leaves]
        above: dict[int, np.ndarray] = {}
        for component in np.unique(column.indices):
            below = self.reach[int(component)].indices
            if len(below) < len(leaves) and all(int(leaf) in place for leaf in below):
                above[int(component)] = np.sort([place[int(leaf)] for leaf in below])
        return above

    def nodes(self, leaves: np.ndarray) -> list[fx.Node]:
        """Return the nodes whose values carry labels of a family or of what is above it."""
        mine = np.zeros(len(self.components.pinned), dtype=bool)
        mine[leaves] = True
        mine[np.unique(self.reached[:, leaves].indices)] = True
        return [node for node, present in self.present if mine[present].any()]

    @cached_property
    def present(self) -> list[tuple[fx.Node, np.ndarray]]:
        """Components that each node's value carries."""
        rows = []
        for node, value in self.labels.values.items():
            items = value if isinstance(value, tuple) else (value,)
            own = [labels.reshape(-1).numpy() for item in items if isinstance(item, Value) for labels in item.labels]
            if own and node.op == "call_function":
                rows.append((node, np.unique(self.components.of[np.concatenate(own)])))
        return rows
