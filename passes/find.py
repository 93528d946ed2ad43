"""Find sites: group the coordinates that can go into units, and derive which of them may go together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch import fx

from fxslim.errors import NarrowError
from fxslim.labels import Value, axes_of
from fxslim.passes.annotate import Labels, operation
from fxslim.passes.cut import closed
from fxslim.passes.family import Family, Found
from fxslim.passes.incidence import Incidence
from fxslim.passes.refusals import refusals, unrouted
from fxslim.passes.resize import check
from fxslim.passes.rules.contraction import GROUPED
from fxslim.passes.slicer import Slicer
from fxslim.program import Program
from fxslim.site import Slice

DRAWS = (0.0, 0.5)
"""Fractions (at least one unit) of the random removals that a constraint has to survive before a site is published."""
ALIGNED = 8
"""How many numbers of two bytes make up 16 bytes."""


def find(program: Program, labels: Labels) -> Found:
    """Group labels into families with units and constraints.

    Ensures: random keeps of every family pass through every data movement of the graph as boxes.
    """
    return _Search(program, labels).run()


class _Search:
    """One search, in the tables over a program's components."""

    def __init__(self, program: Program, labels: Labels) -> None:
        self.labels = labels
        self.components = labels.components
        self.known = Incidence(program, labels)
        self.slicer = Slicer(self.known)

    def run(self) -> Found:
        families: list[Family] = []
        refused: dict[int, str] = {}
        for leaves in self.known.alike():
            result = self._family(leaves)
            apart = [leaves] if isinstance(result, Family) else self.known.apart(leaves)
            for part in apart:
                own = result if len(apart) == 1 else self._family(part)
                if isinstance(own, Family):
                    families.extend((own, *self._across(own)))
                elif own:
                    refused.update(dict.fromkeys(part.tolist(), own))
        taken = {int(leaf) for family in families for leaf in family.leaves}
        routers = {refusal.tensor: refusal for refusal in unrouted(self.known, taken, refused)}
        return Found(tuple(families), tuple(refusals(self.known, families, refused)), tuple(routers.values()))

    def _family(self, leaves: np.ndarray) -> Family | str:
        """Turn leaves into a family, or say why not."""
        if len(leaves) < 2:
            return f"its channels all go together{self.labels.tied_by(int(leaves[0]))}"
        if self.labels.routed.issuperset(leaves.tolist()):
            return self._routed(leaves)
        above = self.known.above(leaves)
        partitions = self._partitions(above, len(leaves))
        scored = self._scored(above, len(leaves))
        whole = np.arange(len(leaves))
        members = np.concatenate([leaves, np.array(list(above), dtype=np.int64)])
        levels = [scored] if scored is not None else []
        levels += [whole, *partitions]
        reason = heads = ""
        for level in levels:
            if int(level.max()) < 1:
                continue
            slices = self.slicer.slices(leaves, above, level)
            if not any(piece.role == "in" for piece in slices):
                continue
            if not any((piece.tensor, piece.dim) in self.known.outgoing for piece in slices):
                return reason  # the channels of an input or of a table: nothing produces them
            if not (scored is None or level is scored or np.array_equal(level, whole) or _crosses(level, scored)):
                continue
            found = self._constraint(leaves, members, level, partitions, above)
            if not isinstance(found, str):
                groups, stays = found
                refused = "" if level is scored else heads or self._tied_heads(leaves)
                multiple = self._multiple(leaves, int(level.max()) + 1)
                return Family(leaves, members, level, groups, slices, level is scored, refused, multiple, stays=stays)
            reason = found
            if level is scored:
                heads = reason
        return reason or "its channels all go together"

    def _across(self, heads: Family) -> Iterator[Family]:
        """Yield the value channels that all heads of a score product share: the same leaves, counted the other way.

        A leaf, the channel of one head, goes as soon as one of the two goes.
        """
        if not heads.scored or heads.groups is not None:
            return
        above = self.known.above(heads.leaves)
        for level in self._partitions(above, len(heads.leaves)):
            slices = self.slicer.slices(heads.leaves, above, level)
            if not _crosses(level, heads.unit_of) or not self._produces_more(slices, heads.slices):
                continue
            if self._fails(heads.leaves, heads.members, level, None) is None and self._cross(heads, level):
                yield Family(heads.leaves, heads.members, level, None, slices, scored=False, across=True)
                return

    def _produces_more(self, slices: Sequence[Slice], others: Sequence[Slice]) -> bool:
        """Tell whether some products make rows of these slices that the others do not have."""
        taken: dict[tuple[str, int], np.ndarray] = {}
        for piece in others:
            key, own = (piece.tensor, piece.dim), piece.owners() >= 0
            taken[key] = taken.get(key, False) | own
        made = [piece for piece in slices if (piece.tensor, piece.dim) in self.known.outgoing and piece.role == "out"]
        return any(((p.owners() >= 0) & ~taken.get((p.tensor, p.dim), np.zeros(p.rows, bool))).any() for p in made)

    def _cross(self, heads: Family, level: np.ndarray) -> bool:
        """Tell whether some heads and some of the channels that they share can go at once."""
        rng = np.random.default_rng(0)
        for fraction in DRAWS:
            first, second = (_draw(rng, count, None, fraction, 1) for count in (heads.units, int(level.max()) + 1))
            if first is None or second is None:
                return False
            gone = heads.leaves[first[heads.unit_of] | second[level]]
            if self._blocks(gone, heads.members, self.known.nodes(heads.leaves)) is not None:
                return False
        return True

    def _routed(self, leaves: np.ndarray) -> Family | str:
        """Turn whole experts into a family, or say why not."""
        above = self.known.above(leaves)
        units = np.arange(len(leaves))
        slices = self.slicer.slices(leaves, above, units)
        members = np.concatenate([leaves, np.array(list(above), dtype=np.int64)])
        products = [
            use for use in self.labels.produced if np.isin(self.components.of[use.labels.numpy()], leaves).any()
        ]
        routers = tuple(sorted({key[0] for key in self.known.keys_with(tuple(products)) if key in self.known.outgoing}))
        if not routers or len(slices) < 2:
            return "no product says which of its experts are selected"
        reason = ""
        for groups in (None, *self._partitions(above, len(leaves))):
            least = self._least(leaves, groups)
            failure = self._fails(leaves, members, units, groups, least)
            if failure is None:
                own = None if groups is None else tuple(groups.tolist())
                return Family(leaves, members, units, own, slices, False, routers=routers, least=least)
            reason = reason if groups is None and reason else failure
        return reason

    def _least(self, leaves: np.ndarray, groups: np.ndarray | None) -> int:
        """Return how many experts (of every group) have to stay for every top-k to find as many as it takes."""
        whole = part = 1
        chosen = 1 if groups is None else int(groups.max()) + 1
        for selection in self.labels.selections:
            own = self.components.of[selection.labels.numpy()]
            if np.isin(own, leaves).all() and selection.count:
                if groups is not None and len(axes_of(selection.labels)) > 1:
                    part = max(part, selection.count)
                else:
                    whole = max(whole, selection.count)
            elif selection.count and np.isin(self.known.reach[own.reshape(-1)].indices, leaves).all():
                chosen = min(chosen, selection.count)
        return max(part, -(-whole // chosen))

    def _multiple(self, leaves: np.ndarray, units: int) -> int:
        """Return what the kept number must be a multiple of: grouped products want strides of whole 16 bytes."""
        grouped = [use for use in (*self.labels.contracted, *self.labels.produced) if operation(use.node) in GROUPED]
        met = any(np.isin(self.components.of[use.labels.numpy()], leaves).any() for use in grouped)
        return math.gcd(units, ALIGNED) if met else 1

    def _constraint(
        self,
        leaves: np.ndarray,
        members: np.ndarray,
        level: np.ndarray,
        partitions: list[np.ndarray],
        above: dict[int, np.ndarray],
    ) -> tuple[tuple[int, ...] | None, bool] | str:
        """Return the groups in which equally many units go, None where any may, or why not even that passes.

        With groups comes whether something of each has to stay.
        """
        reason = self._fails(leaves, members, level, None)
        if reason is None:
            return None, False
        staying: tuple[int, ...] | None = None
        for i, candidates in enumerate((partitions, None)):
            for groups in self._grids(leaves, above) if candidates is None else candidates:
                if not _refines(level, groups) or not 1 <= int(groups.max()) < int(level.max()):
                    continue
                failure = self._fails(leaves, members, level, groups)
                own = tuple(int(groups[level == unit][0]) for unit in range(int(level.max()) + 1))
                if failure is None:
                    return own, False
                if staying is None and self._fails(leaves, members, level, groups, whole=False) is None:
                    staying = own
                reason = failure if i == 0 else reason
        return reason if staying is None else (staying, True)

    def _partitions(self, above: dict[int, np.ndarray], count: int) -> list[np.ndarray]:
        """Return the ways in which components above split a family into disjoint parts that cover it."""
        by_signature: dict[tuple[bytes, int], dict[bytes, np.ndarray]] = {}
        for component, below in above.items():
            signature = self.known.counts[component].toarray().tobytes()  # keys and values of a fused weight share it
            by_signature.setdefault((signature, len(below)), {})[below.tobytes()] = below
        found: dict[bytes, np.ndarray] = {}
        for parts in by_signature.values():
            partition = _partition(list(parts.values()), count)
            if partition is not None and 1 < int(partition.max()) + 1 < count:
                found[partition.tobytes()] = partition
        return sorted(found.values(), key=lambda p: -int(p.max()))

    def _scored(self, above: dict[int, np.ndarray], count: int) -> np.ndarray | None:
        """Return the partition into heads of a score product, where there is one."""
        parts = [below for component, below in above.items() if component in self.labels.scores]
        return _partition(list({below.tobytes(): below for below in parts}.values()), count) if parts else None

    def _tied_heads(self, leaves: np.ndarray) -> str:
        """Say that all heads go together where one component of a score product stands above all of a family."""
        above = set(self.known.reached[:, leaves].indices.tolist()) & self.labels.scores
        for component in sorted(above):
            if len(np.intersect1d(self.known.reach[component].indices, leaves)) == len(leaves):
                return f"its heads all go together{self.labels.tied_by(component)}"
        return ""

    def _grids(self, leaves: np.ndarray, above: dict[int, np.ndarray]) -> list[np.ndarray]:
        """Return the partitions by place along each axis of a value over whose several axes the leaves are spread."""
        below = {int(leaf): np.array([i]) for i, leaf in enumerate(leaves)} | above
        found: dict[bytes, np.ndarray] = {}
        for node in self.known.nodes(leaves):
            value = self.labels.values[node]
            for labels in value.labels if isinstance(value, Value) else ():
                components = self.components.of[labels.numpy()]
                axes = sorted(axes_of(labels))
                if len(axes) < 2 or not all(c in below for c in components.reshape(-1).tolist()):
                    continue
                for axis in axes:
                    rows = np.moveaxis(components, axis, 0).reshape(components.shape[axis], -1)
                    parts = [np.unique(np.concatenate([below[c] for c in row.tolist()])) for row in rows]
                    partition = _partition(parts, len(leaves))
                    if partition is not None:
                        found.setdefault(partition.tobytes(), partition)
        return list(found.values())

    def _fails(
        self,
        leaves: np.ndarray,
        members: np.ndarray,
        unit_of: np.ndarray,
        groups: np.ndarray | None,
        least: int = 0,
        *,
        whole: bool = True,
    ) -> str | None:
        """Try random keeps, a whole group among them where it may go; return why one does not pass, or None."""
        rng = np.random.default_rng(0)
        units = int(unit_of.max()) + 1
        parts = None if groups is None else [np.unique(unit_of[groups == g]) for g in range(int(groups.max()) + 1)]
        nodes = self.known.nodes(leaves)
        draws = [_draw(rng, units, parts, fraction, max(least, 1)) for fraction in DRAWS]
        if parts is not None and whole and not least:
            draws.append(np.isin(np.arange(units), parts[-1]))  # a whole group
        for gone in draws:
            if gone is None:
                return "as many are selected as there are" if least else "too few units in a group"
            reason = self._blocks(leaves[gone[unit_of]], members, nodes)
            if reason is not None:
                return reason
        return None

    def _blocks(self, gone: np.ndarray, members: np.ndarray, nodes: Sequence[fx.Node]) -> str | None:
        """Try to remove some leaves; return why it does not pass, or None."""
        cut = closed(self.labels, gone, members)
        starved = np.flatnonzero(self.components.starved(cut.removed))
        if len(starved):
            pin = self.components.pins.get(int(starved[0]))
            return f"part of it has to stay ({pin.reason})" if pin is not None else "part of it has to stay"
        try:
            for node in nodes:
                check(node, cut)
        except NarrowError as error:
            return str(error)
        return None


def _partition(parts: Sequence[np.ndarray], count: int) -> np.ndarray | None:
    """Return part numbers in the order of first appearance, or None where parts overlap or leave something out."""
    number = np.full(count, -1)
    for i, part in enumerate(sorted(parts, key=lambda p: int(p[0]))):
        if (number[part] >= 0).any():
            return None
        number[part] = i
    return None if (number < 0).any() else number


def _crosses(first: np.ndarray, second: np.ndarray) -> bool:
    """Tell whether each part of one partition has something of each part of the other."""
    pairs = np.unique(np.stack([first, second]), axis=1)
    return int(pairs.shape[1]) == (int(first.max()) + 1) * (int(second.max()) + 1)


def _refines(fine: np.ndarray, coarse: np.ndarray) -> bool:
    return all(len(np.unique(coarse[fine == unit])) == 1 for unit in range(int(fine.max()) + 1))


def _draw(
    rng: np.random.Generator, units: int, groups: list[np.ndarray] | None, fraction: float, least: int
) -> np.ndarray | None:
    """Draw units to remove, the same number in every group, of which so many stay at least."""
    gone = np.zeros(units, dtype=bool)
    members = [np.arange(units)] if groups is None else groups
    smallest = min(len(group) for group in members)
    if smallest <= least:
        return None
    for group in members:
        gone[rng.permutation(group)[: min(max(1, int(smallest * fraction)), smallest - least)]] = True
    return gone
