"""The same BERT, pruned by others to the same number of MACs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from fxslim.count import macs_of

TORCH_PRUNING = "Torch-Pruning, magnitude"


def missing() -> str | None:
    """Return why there is nothing to compare with, or None."""
    return None if find_spec("torch_pruning") else f"{TORCH_PRUNING}: not installed, left out (pip install '.[peers]')"


def torch_pruning(model: nn.Module, inputs: Mapping[str, Tensor], budget: float) -> tuple[nn.Module, float]:
    """Prune FFN channels and heads of a BERT encoder, the same fraction in every layer, to a part of its MACs.

    The fraction of channels is bisected, that of heads follows it in whole heads; what the residual stream holds stays.
    Returns the model and its part of the MACs: the largest that was found within the budget. All of this is done on
    one sequence of the inputs, because the part does not depend on how many there are.
    """
    inputs = {name: value[:1] for name, value in inputs.items()}
    whole = macs_of(model, **inputs)
    low, high = 0.0, 1.0
    best: tuple[nn.Module, float] | None = None
    while high - low > 1 / 512:
        ratio = (low + high) / 2
        small = _pruned(model, inputs, ratio)
        macs = macs_of(small, **inputs) / whole
        if macs > budget:
            low = ratio
            continue
        high = ratio
        if best is None or macs > best[1]:
            best = small, macs
    if best is None:
        raise ValueError(f"no ratio leaves {budget:.0%} of the MACs")
    return best


def _pruned(model: nn.Module, inputs: dict[str, Tensor], ratio: float) -> nn.Module:
    import torch_pruning as tp

    small: Any = copy.deepcopy(model)
    layers = small.encoder.layer
    heads = {
        linear: layer.attention.self.num_attention_heads
        for layer in layers
        for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
    }
    stays = [small.embeddings, *(layer.attention.output.dense for layer in layers)]
    stays += [layer.output.dense for layer in layers] + ([small.pooler] if small.pooler is not None else [])
    pruner = tp.pruner.BasePruner(
        small,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        ignored_layers=stays,
        num_heads=heads,
        out_channel_groups={},
        in_channel_groups={},
        prune_num_heads=True,
        prune_head_dims=False,
        output_transform=lambda output: output.last_hidden_state.sum(),
    )
    pruner.step()
    for layer in layers:
        attention = layer.attention.self
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features
    return small.eval()
