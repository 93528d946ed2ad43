"""Find sites: group the coordinates that can go into units, and derive which of them may go together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import fx

from fxslim.errors import NarrowError
from fxslim.labels import Value, axes_of
from fxslim.passes.annotate import Labels, operation
from fxslim.passes.cut import closed
from fxslim.passes.resize import check
from fxslim.passes.rules.contraction import GROUPED, PICKS
from fxslim.passes.rules.movement import COPIES, MOVES
from fxslim.passes.rules.walk import Use
from fxslim.program import Program, module_path, shape_of
from fxslim.site import Slice, blocks_of

DRAWS = (0.0, 0.5)
"""Fractions (at least one unit) of the random removals that a constraint has to survive before a site is published."""


ALIGNED = 8
"""How many numbers of two bytes make up 16 bytes."""


@dataclass(frozen=True)
class Family:
    """Leaf components that play the same part: the smallest pieces of one site.

    Attributes:
        leaves: components, ordered by where they lie in the consumer.  (L,)
        members: the leaves and every component above that stands for a part of them alone.
        unit_of: leaf -> unit.  (L,)
        groups: unit -> group, or None where any units may go.
        slices: what follows the units.
        scored: whether the units are the heads of a score product (query times key).
        heads_refused: why the heads do not go where the units are smaller than they; "" elsewhere.
        multiple: the number of units that are left (of one expert) has to be a multiple of this.
        experts: in how many experts the leaves are counted; units are those of the first, of the second, ….
        routers: the weights whose products say which units are selected, where units are whole experts.
        across: whether the units are channels that all units of another family of the same leaves share.
        least: how many units (of every group) have to stay.
        stays: whether something of every group has to stay: what a group stands for is read elsewhere.
    """

    leaves: np.ndarray
    members: np.ndarray
    unit_of: np.ndarray
    groups: tuple[int, ...] | None
    slices: tuple[Slice, ...]
    scored: bool
    heads_refused: str = ""
    multiple: int = 1
    experts: int = 1
    routers: tuple[str, ...] = ()
    across: bool = False
    least: int = 1
    stays: bool = False

    @property
    def units(self) -> int:
        """Return the number of units."""
        return self.channels * self.experts

    @property
    def channels(self) -> int:
        """Return the number of units that the labels tell apart: those of one expert."""
        return int(self.unit_of.max()) + 1


@dataclass(frozen=True)
class Refusal:
    """A consumer whose channels stay, and why; ``inner`` where a single linear produces them (no residual stream)."""

    tensor: str
    channels: int
    reason: str
    inner: bool = False


@dataclass(frozen=True)
class Found:
    """Families that can be narrowed, consumers that cannot, and routers whose experts stay."""

    families: tuple[Family, ...]
    refusals: tuple[Refusal, ...]
    routers: tuple[Refusal, ...] = ()


def find(program: Program, labels: Labels) -> Found:
    """Group labels into families with units and constraints.

    Ensures: random keeps of every family pass through every data movement of the graph as boxes.
    """
    return _Search(program, labels).run()


class _Search:
    """One search; everything it derives is a table over components."""

    def __init__(self, program: Program, labels: Labels) -> None:
        self.program = program
        self.labels = labels
        self.components = labels.components
        self.keys = list(labels.starts)
        self.rows = {key: labels.of(*key, program.tensors[key[0]].shape[key[1]]) for key in self.keys}

    def run(self) -> Found:
        families: list[Family] = []
        refused: dict[int, str] = {}
        for leaves in self._families():
            result = self._family(leaves)
            apart = [leaves] if isinstance(result, Family) else self._apart(leaves)
            for part in apart:
                own = result if len(apart) == 1 else self._family(part)
                if isinstance(own, Family):
                    families.extend((own, *self._across(own)))
                elif own:
                    refused.update(dict.fromkeys(part.tolist(), own))
        taken = {int(leaf) for family in families for leaf in family.leaves}
        routers = {refusal.tensor: refusal for refusal in self._unrouted(taken, refused)}
        return Found(tuple(families), tuple(self._refusals(families, refused)), tuple(routers.values()))

    @cached_property
    def incoming(self) -> set[tuple[str, int]]:
        """Tensor dimensions that are summed over somewhere."""
        return self._keys_with(self.labels.contracted)

    @cached_property
    def outgoing(self) -> set[tuple[str, int]]:
        """Tensor dimensions that become an output's axis somewhere."""
        return self._keys_with(self.labels.produced)

    def _keys_with(self, uses: tuple[Use, ...]) -> set[tuple[str, int]]:
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

    def _families(self) -> Iterator[np.ndarray]:
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

    def _apart(self, leaves: np.ndarray) -> list[np.ndarray]:
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

    def _above(self, leaves: np.ndarray) -> dict[int, np.ndarray]:
        """Return the components above a family that stand for a proper part of it: component -> leaf positions."""
        place = {int(leaf): i for i, leaf in enumerate(leaves)}
        column = self.reached[:, leaves]
        above: dict[int, np.ndarray] = {}
        for component in np.unique(column.indices):
            below = self.reach[int(component)].indices
            if len(below) < len(leaves) and all(int(leaf) in place for leaf in below):
                above[int(component)] = np.sort([place[int(leaf)] for leaf in below])
        return above

    def _family(self, leaves: np.ndarray) -> Family | str:
        """Turn leaves into a family, or say why not."""
        if len(leaves) < 2:
            return f"its channels all go together{self.labels.tied_by(int(leaves[0]))}"
        if self.labels.routed.issuperset(leaves.tolist()):
            return self._routed(leaves)
        above = self._above(leaves)
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
            slices = self._slices(leaves, above, level)
            if not any(piece.role == "in" for piece in slices):
                continue
            if not any((piece.tensor, piece.dim) in self.outgoing for piece in slices):
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
        above = self._above(heads.leaves)
        for level in self._partitions(above, len(heads.leaves)):
            slices = self._slices(heads.leaves, above, level)
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
        made = [piece for piece in slices if (piece.tensor, piece.dim) in self.outgoing and piece.role == "out"]
        return any(((p.owners() >= 0) & ~taken.get((p.tensor, p.dim), np.zeros(p.rows, bool))).any() for p in made)

    def _cross(self, heads: Family, level: np.ndarray) -> bool:
        """Tell whether some heads and some of the channels that they share can go at once."""
        rng = np.random.default_rng(0)
        for fraction in DRAWS:
            first, second = (_draw(rng, count, None, fraction, 1) for count in (heads.units, int(level.max()) + 1))
            if first is None or second is None:
                return False
            gone = heads.leaves[first[heads.unit_of] | second[level]]
            if self._blocks(gone, heads.members, self._nodes(heads.leaves)) is not None:
                return False
        return True

    def _routed(self, leaves: np.ndarray) -> Family | str:
        """Turn whole experts into a family, or say why not."""
        above = self._above(leaves)
        units = np.arange(len(leaves))
        slices = self._slices(leaves, above, units)
        members = np.concatenate([leaves, np.array(list(above), dtype=np.int64)])
        products = [
            use for use in self.labels.produced if np.isin(self.components.of[use.labels.numpy()], leaves).any()
        ]
        routers = tuple(sorted({key[0] for key in self._keys_with(tuple(products)) if key in self.outgoing}))
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
            elif selection.count and np.isin(self.reach[own.reshape(-1)].indices, leaves).all():
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
            signature = self.counts[component].toarray().tobytes()  # keys and values of a fused weight share it
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
        above = set(self.reached[:, leaves].indices.tolist()) & self.labels.scores
        for component in sorted(above):
            if len(np.intersect1d(self.reach[component].indices, leaves)) == len(leaves):
                return f"its heads all go together{self.labels.tied_by(component)}"
        return ""

    def _grids(self, leaves: np.ndarray, above: dict[int, np.ndarray]) -> list[np.ndarray]:
        """Return the partitions by place along each axis of a value over whose several axes the leaves are spread."""
        below = {int(leaf): np.array([i]) for i, leaf in enumerate(leaves)} | above
        found: dict[bytes, np.ndarray] = {}
        for node in self._nodes(leaves):
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

    def _slices(self, leaves: np.ndarray, above: dict[int, np.ndarray], unit_of: np.ndarray) -> tuple[Slice, ...]:
        """Return every tensor dimension that follows the units."""
        single = np.full(len(self.components.pinned), -1)
        single[leaves] = unit_of
        shared: dict[int, tuple[int, ...]] = {}
        for component, below in above.items():
            owners = tuple(np.unique(unit_of[below]).tolist())
            if len(owners) == 1:
                single[component] = owners[0]
            elif len(owners) <= int(unit_of.max()):
                shared[component] = owners
        involved = single >= 0
        involved[list(shared)] = True
        slices: list[Slice] = []
        for key, rows in self.rows.items():
            if involved[rows].any():
                slices.extend(self._slice(key, single[rows], rows, shared, int(unit_of.max()) + 1))
        return tuple(slices)

    def _slice(
        self, key: tuple[str, int], single: np.ndarray, rows: np.ndarray, shared: dict[int, tuple[int, ...]], units: int
    ) -> Iterator[Slice]:
        """Yield the slice whose rows belong to one unit each, and the one whose rows belong to several."""
        tensor, dim = key
        role: Literal["in", "out"] = "in" if key in self.incoming else "out"
        hook = self._hook(key) if role == "in" else None
        direct = role == "out" or not self.computed.intersection(rows.tolist())
        if (single >= 0).any():
            yield Slice(
                tensor=tensor, dim=dim, size=len(rows), role=role, blocks=blocks_of(single), hook=hook, direct=direct
            )
        several = {int(c): shared[int(c)] for c in np.unique(rows) if int(c) in shared}
        if not several:
            return
        groups = np.full(units, -1)
        numbers: dict[tuple[int, ...], int] = {}
        for owners in sorted(set(several.values())):
            if (groups[list(owners)] >= 0).any():
                return  # overlapping owners: these rows stay
            groups[list(owners)] = numbers[owners] = len(numbers)
        if (groups < 0).any():
            return
        owner = np.array([numbers[several[c]] if c in several else -1 for c in rows.tolist()])
        yield Slice(tensor=tensor, dim=dim, size=len(rows), role=role, blocks=blocks_of(owner),
                    groups=tuple(int(g) for g in groups), hook=hook, direct=direct)  # fmt: skip

    @cached_property
    def computed(self) -> frozenset[int]:
        """Components that some product reads through more than a move or a cast of one tensor."""
        found: set[int] = set()
        for use in self.labels.contracted:
            if tensor_behind(self.program, use.weight, (*MOVES, *COPIES, *PICKS)) is None:
                found.update(np.unique(self.components.of[use.labels.numpy()]).tolist())
        return frozenset(found)

    def _hook(self, key: tuple[str, int]) -> str | None:
        """Return the module whose only input ends in the dimension, in each of the calls that use the tensor."""
        owner = key[0].rpartition(".")[0]
        start = self.labels.starts[key]
        size = len(self.rows[key])
        uses = [use for use in self.labels.contracted if start <= int(use.labels.min()) < start + size]
        calls = {(_call_of(use.node), self._entered(use, owner)) for use in uses}
        entered = {node for _, node in calls}
        if len(calls) > len({call for call, _ in calls}):
            return None  # one call reads it with several of its inputs, and a hook masks the first
        return None if None in entered or not self.inputs.get(owner, set()) <= entered else owner

    def _entered(self, use: Use, owner: str) -> fx.Node | None:
        """Return the tensor from outside a module whose last axis a use inside it sums over, if there is one."""
        node, axis = use.activation, use.axis
        if not owner or module_path(use.node) != owner or node is None or axis != len(shape_of(node)) - 1:
            return None
        width = shape_of(node)[-1]
        while node.op == "call_function" and module_path(node) == owner:
            source = node.args[0]
            if operation(node) not in MOVES or not isinstance(source, fx.Node) or shape_of(source)[-1:] != (width,):
                return None
            node = source
        return node

    @cached_property
    def inputs(self) -> dict[str, set[fx.Node]]:
        """Return the tensors from outside that each module's own operations read, parameters left out."""
        found: dict[str, set[fx.Node]] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                path = module_path(node)
                found.setdefault(path, set()).update(
                    argument
                    for argument in node.all_input_nodes
                    if self.program.tensor_name(argument) is None
                    and isinstance(argument.meta.get("val"), torch.Tensor)
                    and (argument.op == "placeholder" or module_path(argument) != path)
                )
        return found

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
        nodes = self._nodes(leaves)
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

    def _nodes(self, leaves: np.ndarray) -> list[fx.Node]:
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

    def _produced_by_one(self, components: np.ndarray) -> bool:
        """Tell whether one linear produces all these channels and this is the only place where they are summed over."""
        owned = np.asarray(self.counts[components].sum(axis=0)).reshape(-1) > 0
        mine = [key for key, own in zip(self.keys, owned.tolist(), strict=True) if own]
        return sum(key in self.outgoing for key in mine) == 1 and sum(key in self.incoming for key in mine) == 1

    def _why(self, distinct: np.ndarray, refused: dict[int, str], noun: str) -> str:
        """Say why coordinates stay, or nothing."""
        pinned = [component for component in distinct.tolist() if self.components.pinned[component]]
        if pinned:
            pin = self.components.pins.get(pinned[0])
            return pin.reason if pin is not None else "it meets a constant"
        if len(distinct) == 1:
            return f"all its {noun} go together{self.labels.tied_by(int(distinct[0]))}"
        return next((refused[c] for c in distinct.tolist() if refused.get(c)), "")

    def _unrouted(self, taken: set[int], refused: dict[int, str]) -> Iterator[Refusal]:
        """Say of every product whose results compete to be selected why all experts stay."""
        products = [(key, np.unique(self.rows[key])) for key in self.keys if key in self.outgoing]
        for selection in self.labels.competing:
            own = np.unique(self.components.of[selection.labels.numpy()])
            if selection.count and not set(own.tolist()) & taken:
                for key, rows in products:
                    if np.isin(rows, own).all():
                        yield Refusal(key[0], len(self.rows[key]), self._why(rows, refused, "experts"))

    def _refusals(self, families: Sequence[Family], refused: dict[int, str]) -> Iterator[Refusal]:
        """Say of every consumer outside the families, and of every producer that several units share, why it stays."""
        sliced = {(piece.tensor, piece.dim) for family in families for piece in family.slices}
        taken = {int(leaf) for family in families for leaf in family.leaves}
        for key in self.keys:
            if key not in self.incoming or key in sliced:
                continue
            rows = self.rows[key]
            distinct = np.unique(rows)
            reason = self._why(distinct, refused, "channels") or "nothing produces its channels"
            yield Refusal(key[0], len(rows), reason, self._produced_by_one(distinct))
        for key in self.keys:
            distinct = np.unique(self.rows[key])
            produced = key in self.outgoing and key not in self.incoming and key not in sliced
            if not produced or self.components.pinned[distinct].any():
                continue
            below = {int(leaf) for component in distinct.tolist() for leaf in self.reach[component].indices}
            if below & taken:
                yield Refusal(key[0], len(distinct), "units that go one by one share its channels")


def tensor_behind(program: Program, node: fx.Node | None, through: tuple[str, ...]) -> str | None:
    """Return the tensor of the model that a value is behind some operations, or None.

    Args:
        program: the program.
        node: the value.
        through: operations that leave it that tensor: moves, casts, picks of entries.
    """
    while node is not None and node.op == "call_function":
        name = operation(node)
        if name not in through or (name not in PICKS and len(node.all_input_nodes) != 1):
            return None
        node = node.all_input_nodes[0]
    return program.tensor_name(node)


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


def _call_of(node: fx.Node) -> str:
    """Return which call of which module an operation came from, as far as the trace tells calls apart."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    return str(list(stack)[-1])
