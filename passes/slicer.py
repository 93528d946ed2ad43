"""Which rows of which tensors follow the units of a family, and how they are masked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import fx

from fxslim.passes.annotate import operation
from fxslim.passes.incidence import Incidence
from fxslim.passes.rules.contraction import PICKS
from fxslim.passes.rules.movement import COPIES, MOVES
from fxslim.passes.rules.walk import Use
from fxslim.program import Program, module_path, shape_of
from fxslim.site import Slice, blocks_of


class Slicer:
    """Makes the slices of families.

    Args:
        known: the tables of the program's labels.
    """

    def __init__(self, known: Incidence) -> None:
        self.known = known
        self.program, self.labels, self.components = known.program, known.labels, known.components

    def slices(self, leaves: np.ndarray, above: dict[int, np.ndarray], unit_of: np.ndarray) -> tuple[Slice, ...]:
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
        for key, rows in self.known.rows.items():
            if involved[rows].any():
                slices.extend(self._slice(key, single[rows], rows, shared, int(unit_of.max()) + 1))
        return tuple(slices)

    def _slice(
        self, key: tuple[str, int], single: np.ndarray, rows: np.ndarray, shared: dict[int, tuple[int, ...]], units: int
    ) -> Iterator[Slice]:
        """Yield the slice whose rows belong to one unit each, and the one whose rows belong to several."""
        tensor, dim = key
        role: Literal["in", "out"] = "in" if key in self.known.incoming else "out"
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
        size = len(self.known.rows[key])
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


def _call_of(node: fx.Node) -> str:
    """Return which call of which module an operation came from, as far as the trace tells calls apart."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    return str(list(stack)[-1])
