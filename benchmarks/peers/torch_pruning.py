"""Torch-Pruning, with the help that its own examples give it, from the roles of a model's linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.peers.models import Roles, Subject

HELP = """the number of heads of every projection; that a fused gate and up projection has two halves; embeddings,
projections back to the residual stream, poolers and language-model heads ignored; no cache; afterwards the attributes
of every attention that say how many heads it has and how wide they are, from its weights"""
COUNTS = ("num_attention_heads", "num_heads", "n_heads")
WIDTHS = ("all_head_size", "inner_dim", "embed_dim", "split_size")


def prune(subject: Subject, model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """Take half of the FFN channels and half of the heads out of a model, in place."""
    given = dict(inputs)
    return pruned(model, given, subject.roles, subject.heads, subject.groups, channels=0.5, taken=0.5)


def pruned(
    model: nn.Module, inputs: dict[str, Any], roles: Roles, heads: int, groups: int, *, channels: float, taken: float
) -> nn.Module:
    """Take a part of the FFN channels, and of the heads, out of a model by magnitude, in place."""
    import torch_pruning as tp

    queries, keys = roles.linears(model, "queries"), roles.linears(model, "keys")
    up = roles.linears(model, "up")
    free = {id(linear) for found in (queries, keys, up) for linear in found.values()}
    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)
    stays = [module for module in model.modules() if isinstance(module, kinds) and id(module) not in free]
    widths = [linear.weight.shape[-1] // heads for linear in _attended(model, roles)]
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=channels,
        head_pruning_ratio=taken,
        ignored_layers=stays,
        num_heads={**dict.fromkeys(queries.values(), heads), **dict.fromkeys(keys.values(), groups)},
        out_channel_groups={linear: 2 for name, linear in up.items() if name.endswith("gate_up_proj")},
        in_channel_groups={},
        prune_num_heads=True,
        prune_head_dims=False,
        output_transform=lambda output: output[0].sum(),
    )
    pruner.step()
    _patch(model, roles, widths)
    return model.eval()


def _attended(model: nn.Module, roles: Roles) -> list[Any]:
    return [linear for linear in roles.linears(model, "attended").values() if isinstance(linear, nn.Linear)]


def _patch(model: nn.Module, roles: Roles, widths: list[int]) -> None:
    """Say in every attention how many heads it has now."""
    keys = roles.linears(model, "keys")
    for path, linear, width in zip(roles.linears(model, "queries"), _attended(model, roles), widths, strict=False):
        inside = path.rpartition(".")[0]
        attention: Any = model.get_submodule(inside)
        heads = linear.in_features // width
        own = [projection for name, projection in keys.items() if name.startswith(f"{inside}.")]
        groups = own[0].out_features // width if own else (attention.qkv_proj.out_features // width - heads) // 2
        found = {**dict.fromkeys(COUNTS, heads), **dict.fromkeys(WIDTHS, heads * width), "num_key_value_heads": groups,
                 "num_key_value_groups": heads // max(groups, 1)}  # fmt: skip
        for name, value in found.items():
            if hasattr(attention, name):
                setattr(attention, name, value)
