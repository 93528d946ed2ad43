"""torch.ao's structured pruner: rows of linears by their L1 norm, narrowed where `torch.fx` finds its patterns."""

from __future__ import annotations

import copy
import os.path
from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.peers.models import Subject

HELP = """it is told the up projections of the FFN and no others, since it has no pattern for heads; where it cannot
trace the whole model, it is given the smallest module around every FFN, one by one"""


def prune(subject: Subject, model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """Take half of the FFN channels out of a model; of the whole model or, where that fails, block by block."""
    up = list(subject.roles.linears(model, "up"))
    try:
        whole: nn.Module = _pruned(copy.deepcopy(model), up)
        return whole
    except Exception as error:  # noqa: BLE001 - whatever the rival raises; if the blocks fail too, it is shown
        first = error
    by_block: dict[str, list[str]] = {}
    for down in subject.roles.linears(model, "down"):
        block = max((_around(path, down) for path in up), key=len)
        by_block[block] = [path.removeprefix(f"{block}.") for path in up if path.startswith(f"{block}.")]
    for block, inner in by_block.items():
        try:
            traced = _pruned(model.get_submodule(block), inner)
        except Exception as error:
            raise RuntimeError(f"whole model: {_line(first)}; {block}: {_line(error)}") from error
        parent, _, child = block.rpartition(".")
        setattr(model.get_submodule(parent), child, traced)
    return model.eval()


def _around(*paths: str) -> str:
    """Return the path of the smallest module around all of these."""
    return os.path.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _pruned(module: nn.Module, linears: list[str]) -> Any:
    from torch.ao.pruning._experimental.pruner.saliency_pruner import SaliencyPruner

    pruner = SaliencyPruner({})
    pruner.prepare(module, [{"tensor_fqn": f"{path}.weight", "sparsity_level": 0.5} for path in linears])
    pruner.enable_mask_update = True
    pruner.step()
    return pruner.prune()
