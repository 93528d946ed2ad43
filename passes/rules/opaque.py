"""Calls of modules that are not traced: whatever they are given stays, and so does whatever meets their results."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxslim.passes.rules.walk import Walk, rule
from fxslim.program import module_path


@rule("fxslim.opaque")
def opaque(walk: Walk, node: fx.Node) -> Any:
    """Pin everything that goes in or comes out; a result is never a constant, whatever it was given."""
    return walk.opaque(node, f"it goes into or comes out of {module_path(node)}, which cannot be traced")
