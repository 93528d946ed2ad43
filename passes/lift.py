"""Count channels inside experts per expert: every expert may lose others, as long as all lose equally many.

Labels give channels that all experts share. Where data picks one expert's rows of every tensor of a family, permuting
the channels of one expert alone changes nothing, so that any choice is as good as the same one everywhere.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx

from fxslim.labels import CONSTANT, Value
from fxslim.passes.annotate import ASSERTIONS, SHAPE_ONLY, Labels, operation
from fxslim.passes.family import Family, Found
from fxslim.passes.rules.contraction import GROUPED
from fxslim.passes.rules.movement import COPIES, MOVES, SPLITS
from fxslim.passes.rules.pointwise import LIKE_POINTWISE, is_pointwise
from fxslim.passes.rules.walk import parameter
from fxslim.program import Program, shape_of
from fxslim.record import MAX_UNITS
from fxslim.site import Slice, blocks_of
from fxslim.spelling import letters_of

SHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze",
          "aten.unsqueeze")  # fmt: skip
"""Moves that leave entries in their order."""
SHUFFLES = ("aten.flip", "aten.roll", "aten.unfold", "aten.diagonal", "aten.pixel_shuffle", "aten.pixel_unshuffle",
            "aten.rot90")  # fmt: skip
UNREAD = (*SHAPE_ONLY, *ASSERTIONS)
"""Operations that read no entries."""
COUNTS = ("aten.histc", "aten.bincount")
PRODUCTS = ("aten.bmm", "aten.matmul", "aten.baddbmm")


def lift(program: Program, labels: Labels, found: Found) -> Found:
    """Count the channels of every family per expert where each of its tensors is read one expert at a time."""
    search = _Lift(program, labels)
    return dataclasses.replace(found, families=tuple(search.family(family) for family in found.families))


@dataclasses.dataclass(frozen=True)
class _Pick:
    """One place where data picks rows of a tensor: the tensor's dimension that is picked from, and by what."""

    node: fx.Node
    lead: int
    by: Hashable


class _Lift:
    def __init__(self, program: Program, labels: Labels) -> None:
        self.program = program
        self.labels = labels
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            name = program.tensor_name(node)
            if name is not None:
                self.nodes.setdefault(name, []).append(node)

    def family(self, family: Family) -> Family:
        """Return a family with its channels counted per expert, or as it is."""
        if (
            family.groups is not None
            or family.scored
            or family.routers
            or any(piece.groups is not None for piece in family.slices)
        ):
            return family
        picks: dict[fx.Node, _Pick] = {}
        leads: list[int] = []
        for piece in family.slices:
            own = self._picks(piece.tensor)
            found = {pick.lead for pick in own or ()}
            if own is None or len(found) != 1 or piece.dim in found or not _in_order(piece, family.units):
                return family
            leads.extend(found)
            picks |= {pick.node: pick for pick in own}
        shapes = [self.program.tensors[piece.tensor].shape for piece in family.slices]
        experts = {shape[lead] for shape, lead in zip(shapes, leads, strict=True)}
        if len(experts) != 1 or len({pick.by for pick in picks.values()}) != 1 or not self._aligned(family, picks):
            return family
        count, units = experts.pop(), family.units
        if count * units > MAX_UNITS:
            return family
        slices = tuple(_of_each(piece, lead, count, units) for piece, lead in zip(family.slices, leads, strict=True))
        groups = tuple(np.repeat(np.arange(count), units).tolist())
        return dataclasses.replace(family, slices=slices, groups=groups, experts=count)

    def _picks(self, tensor: str) -> list[_Pick] | None:
        """Return where data picks a tensor's rows, or None where anything else is done with it."""
        picks: list[_Pick] = []
        pending = [(node, user) for node in self.nodes[tensor] for user in node.users]
        while pending:
            node, user = pending.pop()
            name = operation(user)
            if name in (*MOVES, *COPIES):
                pending.extend((user, further) for further in user.users)
            elif not name.startswith(UNREAD):
                pick = self._pick(tensor, node, user, name)
                if pick is None:
                    return None
                picks.append(pick)
        return picks

    def _pick(self, tensor: str, node: fx.Node, user: fx.Node, name: str) -> _Pick | None:
        if user.op != "call_function" or user.args[:1].count(node) + user.args[1:2].count(node) != 1:
            return None
        if name in GROUPED and user.args[1] is node:
            axis, by = 0, _offsets(parameter(user, "offs", 2))
        elif name == "aten.index" and user.args[0] is node:
            places = [(axis, index) for axis, index in enumerate(user.args[1]) if index is not None]  # type: ignore[arg-type]
            if len(places) != 1:
                return None
            axis, by = places[0][0], _rows(places[0][1])
        elif name == "aten.index_select" and user.args[0] is node and isinstance(user.args[1], int):
            axis, by = user.args[1], _rows(user.args[2])
        else:
            return None
        value = self.labels.values[node]
        along = value.along(axis)
        starts = {start: dim for (name, dim), start in self.labels.starts.items() if name == tensor}
        lead = None if along is None else starts.get(int(along.min()))
        if along is None or lead is None:
            return None
        size = self.program.tensors[tensor].shape[lead]
        first = int(along.min())
        return _Pick(user, lead, by) if along.reshape(-1).tolist() == list(range(first, first + size)) else None

    def _aligned(self, family: Family, picks: dict[fx.Node, _Pick]) -> bool:
        """Tell whether every row that carries the channels stays with its expert, up to the last product."""
        mine = np.zeros(len(self.labels.components.pinned), dtype=bool)
        mine[family.members] = True
        for node, value in self.labels.values.items():
            if node.op != "call_function" or node in picks or node.target is operator.getitem:
                continue
            if not self._carries(value, mine):
                takes = any(self._carries(self.labels.values.get(n), mine) for n in node.all_input_nodes)
                if takes and not self._ends(node, mine):
                    return False
                continue
            items = value if isinstance(value, tuple) else (value,)
            if all(item.origin == CONSTANT and not item.looked_up for item in items if isinstance(item, Value)):
                continue  # the tensors themselves, before anything is picked
            if not self._stays_in_its_row(node, mine):
                return False
        return True

    def _carries(self, value: object, mine: np.ndarray) -> bool:
        items = value if isinstance(value, tuple) else (value,)
        own = [labels for item in items if isinstance(item, Value) for labels in item.labels]
        return any(mine[self.labels.components.of[labels.numpy()]].any() for labels in own)

    def _stays_in_its_row(self, node: fx.Node, mine: np.ndarray) -> bool:
        name = operation(node)
        if name in (*COPIES, *SPLITS) or (name in MOVES and name not in SHUFFLES):
            return True
        if name in GROUPED or name in (*PRODUCTS, "aten.einsum"):
            return self._paired(node, mine)
        if name not in LIKE_POINTWISE and not is_pointwise(node):
            return False
        labelled = [n for n in node.all_input_nodes if self._carries(self.labels.values.get(n), mine)]
        return all(shape_of(n) == shape_of(node) for n in labelled)

    def _ends(self, node: fx.Node, mine: np.ndarray) -> bool:
        """Tell whether a node that takes the channels up is a product of rows with the weights of their own experts."""
        name = operation(node)
        return name.startswith(UNREAD) or (name in (*GROUPED, *PRODUCTS, "aten.einsum") and self._paired(node, mine))

    def _paired(self, node: fx.Node, mine: np.ndarray) -> bool:
        """Tell whether a product multiplies row by row where both sides carry the channels."""
        name = operation(node)
        operands: Any = node.args[1] if name == "aten.einsum" else node.args[name == "aten.baddbmm" :]
        if name == "aten.einsum" and len(operands) != 2:
            return False
        first, second = operands[:2]
        both = [self._carries(self.labels.values.get(n), mine) for n in (first, second)]
        if not all(both) or name in GROUPED:
            return True
        if name != "aten.einsum":
            return shape_of(first)[:-2] == shape_of(second)[:-2]
        letters = letters_of(str(node.args[0]).replace(" ", ""), [len(shape_of(first)), len(shape_of(second))])
        if letters is None:
            return False
        own = [set(letters[2]) & (set(letters[side]) - set(letters[1 - side])) for side in (0, 1)]
        return min(map(len, own)) == 0 and max(map(len, own)) <= 1


def _in_order(piece: Slice, units: int) -> bool:
    """Tell whether every unit has equally many rows, and the first of all units, the second, … are in order."""
    owner = piece.owners()
    order = np.argsort(np.where(owner < 0, units, owner), kind="stable")[: int((owner >= 0).sum())]
    counts = np.bincount(owner[owner >= 0], minlength=units)
    if len(set(counts.tolist())) != 1:
        return False
    return bool((np.diff(order.reshape(units, -1), axis=0) > 0).all())


def _of_each(piece: Slice, lead: int, experts: int, units: int) -> Slice:
    owner = piece.owners()
    every = np.concatenate([np.where(owner >= 0, owner + expert * units, -1) for expert in range(experts)])
    update = {"blocks": blocks_of(every), "lead": lead, "experts": experts, "hook": None}
    return piece.model_copy(update=update)


def _source(node: object, through: Sequence[str]) -> object:
    """Go back through operations of one operand."""
    while isinstance(node, fx.Node) and node.op == "call_function" and operation(node) in through:
        node = node.args[0]
    return node


def _rows(index: object) -> Hashable:
    """Say which experts rows belong to, from the index that picks them."""
    node = _source(index, (*SHAPES, *COPIES))
    for ids in _sorted(node):
        return "sorted", ids
    return "rows", node


def _offsets(offsets: object) -> Hashable:
    """Say which experts rows belong to, from where each expert's rows end: those of the sorted numbers counted."""
    node = _source(offsets, (*COPIES, "aten.cumsum"))
    if not isinstance(node, fx.Node) or operation(node) not in COUNTS:
        return "offsets", node
    counted = _source(node.args[0], (*SHAPES, *COPIES))
    return "sorted", next(_sorted(counted), counted)


def _sorted(node: object) -> Iterator[object]:
    """Yield what a value is in ascending order, where it is something in order."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return
    if node.target is operator.getitem and node.args[1] == 0:
        source = node.args[0]
        if isinstance(source, fx.Node) and operation(source) == "aten.sort" and not _descends(source):
            yield _source(source.args[0], (*SHAPES, *COPIES))
    elif operation(node) == "aten.index":
        ids = _source(node.args[0], (*SHAPES, *COPIES))
        order = _source(node.args[1][0], COPIES)  # type: ignore[index]
        if isinstance(order, fx.Node) and order.target is operator.getitem and order.args[1] == 1:
            order = order.args[0]
        if not isinstance(order, fx.Node) or operation(order) not in ("aten.sort", "aten.argsort") or _descends(order):
            return
        if _source(order.args[0], (*SHAPES, *COPIES)) is ids:
            yield ids


def _descends(node: fx.Node) -> bool:
    """Tell whether something is sorted from the largest on, or in several rows."""
    down = parameter(node, "descending", 2, False)  # where it may be stable, by name alone
    source = node.args[0]
    return bool(down) or not isinstance(source, fx.Node) or len(source.meta["val"].shape) != 1
