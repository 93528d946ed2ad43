"""The same BERT, pruned by others to the same number of MACs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from benchmarks.peers.models import BERT_ROLES
from benchmarks.peers.torch_pruning import pruned
from fxslim.count import macs_of

TORCH_PRUNING = "Torch-Pruning, magnitude"


def missing() -> str | None:
    """Return why there is nothing to compare with, or None."""
    return None if find_spec("torch_pruning") else f"{TORCH_PRUNING}: not installed, left out (pip install '.[peers]')"


def torch_pruning(model: nn.Module, inputs: Mapping[str, Tensor], budget: float) -> tuple[nn.Module, float]:
    """Prune FFN channels and heads of a BERT encoder, the same fraction in every layer, to a part of its MACs.

    The fraction of both is bisected; then heads stay, and as many channels come back as the budget allows. What the
    residual stream holds stays. Returns the model and its part of the MACs, found on one sequence of the inputs,
    because it does not depend on how many there are.
    """
    inputs = {name: value[:1] for name, value in inputs.items()}
    whole = macs_of(model, **inputs)

    def measured(channels: float, heads: float) -> tuple[nn.Module, float]:
        small = _pruned(model, inputs, channels, heads)
        return small, macs_of(small, **inputs) / whole

    both = _smallest(lambda ratio: measured(ratio, ratio)[1] <= budget)
    channels = _smallest(lambda ratio: measured(ratio, both)[1] <= budget)
    return measured(channels, both)


def _smallest(fits: Callable[[float], bool], steps: int = 9) -> float:
    """Return the smallest ratio that fits, to one part in ``2 ** steps``."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        ratio = (low + high) / 2
        low, high = (low, ratio) if fits(ratio) else (ratio, high)
    if high == 1.0:
        raise ValueError("no ratio leaves that few MACs")
    return high


def _pruned(model: nn.Module, inputs: dict[str, Tensor], channels: float, heads: float) -> nn.Module:
    small: Any = copy.deepcopy(model)
    number = small.config.num_attention_heads
    return pruned(small, inputs, BERT_ROLES, number, number, channels=channels, taken=heads)
