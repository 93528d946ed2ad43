"""Lay weights out once as oneDNN multiplies them on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxslim.passes.inference.draft import Draft, add, is_alone, reads
from fxslim.passes.inference.fuse import Linear, linear_of
from fxslim.pipeline import Facts

mkldnn = torch.ops.mkldnn
SMALL = 2**18
"""Elements of a weight up to which oneDNN's own work for a product (some 30 µs) takes what packing saves."""


def dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes in which oneDNN multiplies on this CPU."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return frozenset()
    own = {torch.float32: True, torch.bfloat16: mkldnn._is_mkldnn_bf16_supported(),
           torch.float16: mkldnn._is_mkldnn_fp16_supported()}  # fmt: skip
    return frozenset(dtype for dtype, known in own.items() if known)


@dataclass(frozen=True)
class Prepack:
    """Put products with packed weights in the place of products with stored ones.

    At few rows a product waits for its weights, and packed ones come in the order in which they are needed. Requires:
    no pass after this one looks into tensors. Ensures: weights that anything else reads as well, under whatever name,
    stay as they are, so that the result holds none twice; so do small ones, and biases.
    """

    requires: ClassVar[tuple[type, ...]] = (Draft,)
    ensures: ClassVar[tuple[type, ...]] = (Draft,)

    def run(self, facts: Facts) -> Facts:
        """Pack."""
        draft, known = facts.get(Draft).copied(), dtypes()
        tensors = dict(draft.tensors)
        read = reads(draft.graph, tensors)
        for linear in [*filter(None, map(linear_of, draft.graph.nodes))]:
            weight, *bias = (tensors[str(node.target)] for node in linear.stored)
            alone = is_alone(linear.weight, tensors, read)
            large = weight.ndim == 2 and weight.numel() > SMALL
            quick = weight.device.type == "cpu" and weight.dtype in known
            added = all((own.dtype, *own.shape) == (weight.dtype, weight.shape[linear.axis]) for own in bias)
            if alone and large and quick and added:
                _pack(draft.graph, linear, tensors)
        return facts.adding(draft.holding(tensors))


def _pack(graph: fx.Graph, linear: Linear, tensors: dict[str, torch.Tensor]) -> None:
    """Put a product with a packed weight in the place of one.

    Where packing is told how many rows there will be, products of few rows gain less: it is not.
    """
    weight = tensors[str(linear.weight.target)]
    rows_are_results = weight if linear.axis == 0 else weight.T
    packed: torch.Tensor = mkldnn._reorder_linear_weight(rows_are_results.contiguous())
    with graph.inserting_before(linear.node):
        own = graph.get_attr(add(tensors, "packed", packed))
        args: tuple[Any, ...] = (linear.operand, own, linear.bias, "none", [], "")
        product = graph.call_function(mkldnn._linear_pointwise.default, args)
    product.meta.update(linear.node.meta)  # for pictures
    linear.node.replace_all_uses_with(product)
    graph.erase_node(linear.node)
