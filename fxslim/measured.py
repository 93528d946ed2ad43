"""Sizes that data decide: what they are on the example, so that example shapes fit together.

A trace gives a number that is read off a tensor (lengths of pieces, how many entries a mask has) a symbol without a
value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxslim.functional import mutates
from fxslim.program import MEASURED


def measure(graph: fx.Graph, given: Mapping[str, Any]) -> None:
    """Compute the sizes that data decide from example values, as far as the graph can be run that far.

    Args:
        graph: a traced graph.
        given: placeholder -> its tensor or number.
    """
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            for place, size in _open_sizes(node):
                env, symbol = size.node.shape_env, size.node.expr
                if not symbol.is_Symbol or not env.is_unbacked_symint(symbol) or symbol in MEASURED.get(env, {}):
                    continue
                try:
                    value = _run(node, given, values)
                except Exception:  # noqa: BLE001 - weights on meta, or an operation that does not run by itself
                    return
                number = value.shape[place] if isinstance(value, torch.Tensor) else value
                MEASURED.setdefault(env, {})[symbol] = int(number)


def _open_sizes(node: fx.Node) -> list[tuple[int, Any]]:
    value = node.meta.get("val") if node.op == "call_function" else None
    sizes = list(value.shape) if isinstance(value, torch.Tensor) else [value]
    return [(place, size) for place, size in enumerate(sizes) if isinstance(size, torch.SymInt)]


def _run(node: fx.Node, given: Mapping[str, Any], values: dict[fx.Node, Any]) -> Any:
    """Compute a node and what it reads, each once."""
    pending = [node]
    while pending:
        current = pending[-1]
        missing = [read for read in current.all_input_nodes if read not in values]
        if missing and current not in values:
            pending.extend(missing)
            continue
        pending.pop()
        if current in values:
            continue
        if current.op == "placeholder":
            values[current] = given[current.name]
        elif current.op == "call_function" and not mutates(current):
            args, kwargs = fx.node.map_arg((current.args, current.kwargs), values.__getitem__)
            values[current] = current.target(*args, **kwargs)  # type: ignore[operator]
        else:
            raise RuntimeError(f"{current.name} cannot be run by itself")
    return values[node]
