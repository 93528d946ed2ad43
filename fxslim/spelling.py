"""One spelling for what export may write in several ways, so that passes meet one form."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxslim.errors import TraceError
from fxslim.program import is_symbolic

REGION_OPS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
SHAPED_LIKE = {
    torch.ops.aten.view_as.default: torch.ops.aten.reshape.default,
    torch.ops.aten.reshape_as.default: torch.ops.aten.reshape.default,
    torch.ops.aten.expand_as.default: torch.ops.aten.expand.default,
}
"""Operations that take a shape from another tensor, and what they do with it."""


def inline_regions(graph: fx.Graph) -> None:
    """Inline the bodies of ``no_grad`` and ``autocast(enabled=False)`` regions."""
    owner: Any = graph.owning_module
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in REGION_OPS:
            continue
        position = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        body_node: Any = node.args[position]
        if str(node.target) == "wrap_with_autocast" and node.args[2]:  # (device, dtype, enabled, cache, body, ...)
            raise TraceError("the model runs a region under autocast; trace it with autocast off.")
        body: Any = owner.get_submodule(body_node.target)
        copies: dict[fx.Node, Any] = {}
        inner = iter(node.args[position + 1 :])
        for sub in body.graph.nodes:
            if sub.op == "placeholder":
                copies[sub] = next(inner)
        with graph.inserting_before(node):
            results = graph.graph_copy(body.graph, copies)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
        if not body_node.users:
            graph.erase_node(body_node)
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in REGION_OPS:
            inline_regions(graph)
            return


def spell_shapes(graph: fx.Graph) -> None:
    """Spell out the shapes that operations take from another tensor, so that passes meet one form."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in SHAPED_LIKE:
            continue
        value, like = node.args
        with graph.inserting_before(node):
            sizes = [_size_node(graph, like, axis, size) for axis, size in enumerate(node.meta["val"].shape)]
        node.target = SHAPED_LIKE[node.target]
        node.args = (value, sizes)


def _size_node(graph: fx.Graph, like: Any, axis: int, size: Any) -> Any:
    if not is_symbolic(size):
        return int(size)
    read = graph.call_function(torch.ops.aten.sym_size.int, (like, axis))
    read.meta["val"] = size
    return read
