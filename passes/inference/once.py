"""Compute once what several nodes compute of the same values."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxslim.passes.inference.draft import Draft
from fxslim.passes.inference.fold import repeatable
from fxslim.passes.inference.views import leaving
from fxslim.pipeline import Facts


@dataclass(frozen=True)
class ComputeOnce:
    """Let every reader of equal operations read the first of them.

    Requires: no operation writes into its operands. Ensures: operations that draw numbers stay apart, and
    so do results.
    """

    requires: ClassVar[tuple[type, ...]] = (Draft,)
    ensures: ClassVar[tuple[type, ...]] = (Draft,)

    def run(self, facts: Facts) -> Facts:
        """Merge."""
        draft = facts.get(Draft).copied()
        kept = leaving(draft.graph)
        first: dict[Hashable, fx.Node] = {}
        for node in list(draft.graph.nodes):
            if node in kept or (node.op != "get_attr" and not repeatable(node)):
                continue
            same = first.setdefault(_key(node), node)
            if same is not node:
                node.replace_all_uses_with(same)
                draft.graph.erase_node(node)
        return facts.adding(draft.holding(draft.tensors))


def _key(node: fx.Node) -> Hashable:
    """Return what equal operations have in common; 1, 1.0 and True are different arguments, and so are 0.0 and -0.0."""
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return node.op, node.target, str(spec), tuple(map(_plain, leaves))


def _plain(leaf: Any) -> Hashable:
    return leaf if isinstance(leaf, fx.Node | torch.dtype | torch.device) else (type(leaf), repr(leaf))
