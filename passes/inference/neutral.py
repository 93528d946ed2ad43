"""Take out what hands its operand through: dropout in eval mode, copies, casts to the dtype that is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxslim.passes.inference.draft import Draft, Run
from fxslim.passes.inference.views import given, leaving
from fxslim.passes.steps import argument, name_of
from fxslim.pipeline import Facts

HANDED = frozenset("detach alias lift_fresh lift_fresh_copy".split())
DROPOUTS = frozenset("dropout feature_dropout alpha_dropout feature_alpha_dropout".split())
CASTS = frozenset("to _to_copy type_as".split())
COPIES = frozenset("clone contiguous".split())
WHOLE = (torch.int64, torch.int32, torch.bool)
FLOATS = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Seen:
    """What a value was in one run."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class DropNeutral:
    """Let readers of an operation that changes nothing read its operand.

    Requires: no operation writes into its operands. Ensures: what is taken out changes nothing for any input that the
    graph takes: dtypes are looked at with inputs of several kinds of numbers.
    """

    requires: ClassVar[tuple[type, ...]] = (Draft,)
    ensures: ClassVar[tuple[type, ...]] = (Draft,)

    def run(self, facts: Facts) -> Facts:
        """Take out."""
        draft = facts.get(Draft).copied()
        seen, kept, theirs = list(observed(draft)), leaving(draft.graph), given(draft.graph)
        for node in list(draft.graph.nodes):
            if node in kept or (name_of(node) in COPIES and node.args[0] in theirs):
                continue
            if node.op == "call_function" and _neutral(node, seen):
                node.replace_all_uses_with(node.args[0])
                draft.graph.erase_node(node)
        return facts.adding(draft.holding(draft.tensors))


def _neutral(node: fx.Node, seen: list[dict[fx.Node, Seen]]) -> bool:
    """Tell whether a node returns its first operand, whatever that is."""
    name, operand = name_of(node), node.args[0] if node.args else None
    if not isinstance(operand, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if name in HANDED:
        return True
    if name in DROPOUTS:
        return argument(node, 2, "train") is False
    if name == "slice":
        start, end, step = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
        return start in (None, 0) and end in (None, sys.maxsize) and step in (None, 1)
    runs = [(own[operand], own[node]) for own in seen if operand in own and node in own]
    if name == "expand":
        sizes: Any = argument(node, 1, "size")
        same = all(_is_size(size, operand, axis) for axis, size in enumerate(sizes))
        return same and bool(runs) and all(before == after for before, after in runs)
    return name in CASTS | COPIES and bool(runs) and all(before == after for before, after in runs)


def _is_size(size: Any, operand: fx.Node, axis: int) -> bool:
    """Tell whether a size is the operand's own."""
    if isinstance(size, fx.Node):
        return name_of(size) == "sym_size" and size.args == (operand, axis)
    return bool(size == -1)


def observed(draft: Draft) -> Iterator[dict[fx.Node, Seen]]:
    """Yield what values are, in every size, with every input as another kind of number, and in other memory layouts.

    What raises on the way tells as much as was seen until then: the graph does not take such inputs.
    """
    for leaves in (*draft.samples, *_other_kinds(draft.samples[0]), *_other_layouts(draft.samples[0])):
        found: dict[fx.Node, Seen] = {}

        def show(node: fx.Node, value: Any, found: dict[fx.Node, Seen] = found) -> None:
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                found[node] = Seen(value.dtype, value.device, tuple(value.shape), value.stride())

        with torch.no_grad(), suppress(Exception):
            Run(draft, show).run(*leaves)
        yield found


def _other_kinds(leaves: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield inputs of which one holds other numbers: all kinds that the check of a call tells not apart."""
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            kinds = FLOATS if leaf.is_floating_point() else WHOLE
            yield from ((*leaves[:place], leaf.to(kind), *leaves[place + 1 :]) for kind in kinds if kind != leaf.dtype)


def _other_layouts(leaves: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the same inputs, each with another axis of its tensors last in memory."""
    for axis in range(max((leaf.ndim for leaf in leaves if isinstance(leaf, torch.Tensor)), default=0)):
        yield tuple(
            leaf.movedim(axis, -1).contiguous().movedim(-1, axis)
            if isinstance(leaf, torch.Tensor) and axis < leaf.ndim
            else leaf
            for leaf in leaves
        )
