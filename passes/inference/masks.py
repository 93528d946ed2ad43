"""Turn masks of truth values into numbers once, which every attention that reads them would do by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxslim.passes.inference.draft import Draft
from fxslim.passes.inference.neutral import observed
from fxslim.passes.steps import argument
from fxslim.pipeline import Facts

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AddMasks:
    """Let attentions add zero and minus infinity where they would choose by true and false.

    Torch's attention makes these numbers of a mask before it does anything else. Requires: no operation writes into its
    operands. Ensures: a mask is turned into numbers once for each dtype of queries; masks that one attention reads
    alone stay as they are.
    """

    requires: ClassVar[tuple[type, ...]] = (Draft,)
    ensures: ClassVar[tuple[type, ...]] = (Draft,)

    def run(self, facts: Facts) -> Facts:
        """Turn."""
        draft = facts.get(Draft).copied()
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in draft.graph.find_nodes(op="call_function", target=ATTENTION):
            if isinstance(mask := argument(node, 3, "attn_mask"), fx.Node):
                readers.setdefault(mask, []).append(node)
        if all(len(nodes) == 1 for nodes in readers.values()):
            return facts
        dtypes: dict[fx.Node, set[torch.dtype]] = {}
        for values in observed(draft):
            for node, value in values.items():
                dtypes.setdefault(node, set()).add(value.dtype)
        for mask, nodes in readers.items():
            queries: dict[torch.dtype, list[fx.Node]] = {}
            for node in nodes if dtypes.get(mask) == {torch.bool} else ():
                own = dtypes.get(argument(node, 0, "query"), set())
                if len(own) == 1:
                    queries.setdefault(next(iter(own)), []).append(node)
            for dtype, same in queries.items():
                if len(same) > 1:
                    _add(draft.graph, mask, dtype, same)
        return facts.adding(draft.holding(draft.tensors))


def _add(graph: fx.Graph, mask: fx.Node, dtype: torch.dtype, readers: list[fx.Node]) -> None:
    """Let attentions read zeros for true and minus infinities for false."""
    with graph.inserting_before(readers[0]):
        zeros = graph.call_function(aten.zeros_like.default, (mask,), {"dtype": dtype})
        away = graph.call_function(aten.logical_not.default, (mask,))
        added = graph.call_function(aten.masked_fill.Scalar, (zeros, away, float("-inf")))
    for node in readers:
        node.replace_input_with(mask, added)
