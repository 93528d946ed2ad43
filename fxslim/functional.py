"""Replace in-place operations by the functional ones they stand for, where nobody else sees the memory."""

from __future__ import annotations

import torch
from torch import fx


def functionalize(graph: fx.Graph) -> bool:
    """Rewrite a graph's in-place operations; return whether none is left.

    An operation that writes into ``x`` becomes one that returns a new value, which later readers of ``x`` read. That
    holds where ``x`` is made by the graph, no view of the same memory is read afterwards, and the result has the dtype
    that was written into. Anything else is left as it is.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    left = False
    for node in list(graph.nodes):
        if not mutates(node):
            continue
        target = _functional(node)
        if target is None or not _alone(node, place):
            left = True
            continue
        written = node.args[0]
        assert isinstance(written, fx.Node)
        node.target = target
        later = [user for user in written.users if place[user] > place[node]]
        for user in later:
            user.replace_input_with(written, node)
    return not left


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
    return overload if floating <= {written.dtype} else None


def _alone(node: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Tell whether nothing but the written value itself is read of its memory after an operation."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    shared, pending = set[fx.Node](), [written]
    while pending:
        current = pending.pop()
        if current in shared:
            continue
        shared.add(current)
        if current.op != "call_function":
            return False  # an input or a tensor of the model
        if _is_view(current):
            pending.extend(n for n in current.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt))
        pending.extend(user for user in current.users if _is_view(user) and place[user] < place[node])
    others = shared - {written}
    return not any(place[user] > place[node] for other in others for user in other.users)


def _is_view(node: fx.Node) -> bool:
    """Tell whether a result may share memory with what it was made from (pieces of a split do)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function"  # getitem
    return any(result.alias_info is not None for result in schema.returns)
