"""Find which heads of every ``nn.MultiheadAttention`` stay, from the rows that sites take out of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from fxslim.edit import MultiheadEdit
from fxslim.multihead import is_narrowable
from fxslim.plan import Plan
from fxslim.program import named_tensors
from fxslim.site import SitePlan

PACKED = (("in_proj_weight", 0), ("in_proj_bias", 0))
"""Tensors with the rows of queries, keys and values after one another."""
SINGLE = (("q_proj_weight", 0), ("k_proj_weight", 0), ("v_proj_weight", 0), ("bias_k", 2), ("bias_v", 2))
"""Tensors with the rows of one of them; ``out_proj.weight`` has its columns."""

Gone = Mapping[tuple[int, int], np.ndarray]
"""Which rows go, by the tensor's identity and the dimension."""


def head_edits(model: nn.Module, plan: Plan, parts: Sequence[SitePlan]) -> tuple[MultiheadEdit, ...] | None:
    """Return the edits of every attention that some sites narrow, or None where they take out no whole heads.

    Args:
        model: the dense model.
        plan: the plan that the sites are part of.
        parts: the sites.
    """
    tensors = named_tensors(model)
    rows = plan.model_copy(update={"sites": tuple(parts)}).removed_rows()
    gone = {(id(tensors[name]), dim): removed for (name, dim), removed in rows.items() if removed.any()}
    made = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            heads = _heads(module, gone)
            if heads is None or (heads.any() and not is_narrowable(module)):
                return None
            if heads.any():
                keep = tuple(np.flatnonzero(~heads).tolist())
                made.append(MultiheadEdit(module=path, size=module.num_heads, keep=keep))
    return tuple(made)


def _heads(module: nn.MultiheadAttention, gone: Gone) -> np.ndarray | None:
    """Return which heads go, or None where tensors disagree or parts of heads go.  (H,) bool"""
    width = module.num_heads * module.head_dim
    patterns = []
    for names, copies in ((PACKED, 3), (SINGLE, 1)):
        for name, dim in names:
            tensor = getattr(module, name)
            if tensor is not None:
                patterns.append(gone.get((id(tensor), dim), np.zeros(copies * width, dtype=bool)))
    patterns.append(gone.get((id(module.out_proj.weight), 1), np.zeros(width, dtype=bool)))
    heads = np.concatenate(patterns).reshape(-1, module.num_heads, module.head_dim)
    first: np.ndarray = heads[0, :, 0]
    return first if bool((heads == first[None, :, None]).all()) else None
