"""Replace in-place operations by the functional ones they stand for, where nobody else sees the memory."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

PIECES = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}
"""Views of a piece -> the operation that puts another piece in its place, which takes the same arguments."""
VIEWS = (*PIECES, torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.unsqueeze.default)
"""Operations that always return a view, and can return it again."""
OVERWRITES = ("copy_", "fill_", "zero_")
"""Operations that keep the dtype they write into, whatever they write."""
OPEN = 1 << 62
"""Ends of slices from which on nothing is cut off."""


def functionalize(graph: fx.Graph) -> bool:
    """Rewrite a graph's in-place operations; return whether none is left.

    An operation that writes into ``x`` becomes one that returns a new value, which later readers of ``x`` read. Where
    it writes into a piece of ``x``, the new piece is put into its place, and views of ``x`` read afterwards are
    taken again. That holds where ``x`` is made by the graph and the result has the dtype that was written into.
    Anything else is left as it is.
    """
    place: dict[fx.Node, float] = {node: i for i, node in enumerate(graph.nodes)}
    left = False
    for node in list(graph.nodes):
        if not mutates(node):
            continue
        target = _functional(node)
        if target is None:
            left = True
        elif _alone(node, place):
            written: Any = node.args[0]
            node.target = target
            for reader in _readers(written, node, place):
                reader.replace_input_with(written, node)
        elif not _put_back(node, target, place):
            left = True
    return not left


def _readers(value: fx.Node, node: fx.Node, place: Mapping[fx.Node, float]) -> list[fx.Node]:
    """Return what reads a value after an operation."""
    return [user for user in value.users if place[user] > place[node]]


def _put_back(node: fx.Node, target: Any, place: dict[fx.Node, float]) -> bool:
    """Make an operation functional that writes into a piece of a value, or of whose memory views are read later."""
    pieces, whole = _pieces(node)
    if whole.op != "call_function" or _is_view(whole):
        return False
    views: list[Any]
    _, *views = sorted(_shared(whole, node, place), key=place.__getitem__)
    readers = {name: _readers(name, node, place) for name in (whole, *views, node)}
    again = {view for view in views if readers[view]} | {piece for piece in pieces[:1] if readers[node]}
    for view in reversed(views):
        if view in again and view.args[0] is not whole:
            again.add(view.args[0])
    if any(view.target not in VIEWS or view.kwargs for view in again):
        return False
    node.target = target
    made = [node]

    def add(function: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        with node.graph.inserting_after(made[-1]):
            made.append(node.graph.call_function(function, args))
        made[-1].meta = {**node.meta, "val": like.meta["val"]}
        return made[-1]

    value = node
    for piece in pieces:
        if not _is_all(piece):
            value = add(PIECES[piece.target], (piece.args[0], value, *piece.args[1:]), piece.args[0])
    newer = {whole: value}
    for view in (view for view in views if view in again):
        newer[view] = add(view.target, (newer[view.args[0]], *view.args[1:]), view)
    if pieces and readers[node]:  # what is written into the result later is written into the whole
        newer[node] = newer[pieces[0]]
    for old, new in newer.items():
        for reader in readers[old]:
            reader.replace_input_with(old, new)
    place.update({one: place[node] + i / len(made) for i, one in enumerate(made)})
    return True


def _pieces(node: fx.Node) -> tuple[list[Any], Any]:
    """Return the views through which an operation writes, innermost first, and the value that they are pieces of."""
    whole: Any = node.args[0]
    pieces = []
    while whole.op == "call_function" and whole.target in PIECES and not whole.kwargs:
        pieces.append(whole)
        whole = whole.args[0]
    return pieces, whole


def _is_all(piece: fx.Node) -> bool:
    """Tell whether a piece is the whole value."""
    if piece.target is not torch.ops.aten.slice.Tensor:
        return False
    start, end, *step = (*piece.args[2:], None, None)[:3]
    return start in (None, 0) and (end is None or (isinstance(end, int) and end >= OPEN)) and step in ([], [None], [1])


def mutates(node: fx.Node) -> bool:
    """Tell whether an operation writes into what it reads."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _functional(node: fx.Node) -> object | None:
    """Return the functional operation of an in-place one, where it returns the same dtype."""
    schema = node.target._schema  # type: ignore[union-attr]
    namespace, _, name = schema.name.partition("::")
    writes = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    if not name.endswith("_") or name.endswith("__") or writes != schema.arguments[:1]:
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = getattr(packet, schema.overload_name or "default", None)
    if overload is None:
        return None
    values = [argument.meta.get("val") for argument in node.all_input_nodes]
    floating = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
    written: torch.Tensor = node.meta["val"]
    return overload if floating <= {written.dtype} or name in OVERWRITES else None


def _alone(node: fx.Node, place: Mapping[fx.Node, float]) -> bool:
    """Tell whether nothing but the written value itself is read of its memory after an operation."""
    written: Any = node.args[0]
    shared = _shared(written, node, place)
    if any(one.op != "call_function" for one in shared):
        return False  # an input or a tensor of the model
    return not any(_readers(other, node, place) for other in shared - {written})


def _shared(value: fx.Node, node: fx.Node, place: Mapping[fx.Node, float]) -> set[fx.Node]:
    """Return the names that a value's memory has before an operation."""
    shared, pending = set[fx.Node](), [value]
    while pending:
        current = pending.pop()
        if current in shared:
            continue
        shared.add(current)
        if current.op == "call_function" and _is_view(current):
            pending.extend(n for n in current.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt))
        pending.extend(user for user in current.users if _is_view(user) and place[user] < place[node])
    return shared


def _is_view(node: fx.Node) -> bool:
    """Tell whether a result may share memory with what it was made from (pieces of a split do)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None and node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    if schema is None:
        return node.op == "call_function"
    return any(result.alias_info is not None for result in schema.returns)
