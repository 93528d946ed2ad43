"""Intel Neural Compressor's pruner and `model_slim`, as its last releases had them; see `inc_environment`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.models import Subject

HELP = """a loader of one batch; no cache in the config; three steps of snip_momentum with learning rate 0, so that
weights stay; 51 % of heads asked, since it rounds half of them down; FFN alone where its search for heads raises"""


def prune(subject: Subject, model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """Mask half of the FFN channels and half of the heads, then take them out; the FFN alone where heads fail."""
    config: Any = model.config
    config.use_cache = False
    try:
        return _slimmed(copy.deepcopy(model), inputs, {"ffn2_sparsity": 0.5, "mha_sparsity": 0.51})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return _slimmed(model, inputs, {"ffn2_sparsity": 0.5})


def _slimmed(model: nn.Module, inputs: Mapping[str, Any], asked: dict[str, float]) -> nn.Module:
    from neural_compressor.compression.pruner import model_slim, parse_auto_slim_config
    from neural_compressor.training import WeightPruningConfig, prepare_compression

    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    loader: list[Any] = [tensors] if "input_ids" in tensors else [list(tensors.values())]
    settings = {"pruning_type": "snip_momentum", "pruning_scope": "local", "start_step": 1, "end_step": 1}
    pruners = parse_auto_slim_config(model, loader, **asked)
    callbacks = prepare_compression(model, WeightPruningConfig(pruners, **settings)).callbacks
    callbacks.on_train_begin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(3):
        callbacks.on_step_begin(step)
        model(**inputs)[0].square().mean().backward()
        callbacks.on_before_optimizer_step()
        optimizer.step()
        callbacks.on_after_optimizer_step()
        optimizer.zero_grad()
    callbacks.on_train_end()
    slim: nn.Module = model_slim(model, loader, round_multiplier=32)
    return slim.eval()
