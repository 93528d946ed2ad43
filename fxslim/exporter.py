"""The second try at a trace: transformers' own exporter, which swaps what the bare export cannot take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.errors import TraceError


def applies(model: nn.Module) -> bool:
    """Tell whether transformers can be asked to export a model: one of its own, so that it is imported already."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def export_patched(
    model: nn.Module, example: Mapping[str, Any], shapes: Callable[[dict[str, Any]], Any] | None
) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Export a transformers model through its ``DynamoExporter``.

    Args:
        model: a (shared) copy in eval mode, without caches.
        example: keyword inputs.
        shapes: returns the dynamic shapes of keyword inputs; None to fix every size.

    Returns:
        The exported program and its inputs: those of the example, some as plain numbers instead of tensors.

    Raises:
        TraceError: the exporter would take other inputs than the example's.
    """
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.exporters.utils import prepare_for_export

    pretrained: Any = model
    _, prepared, flags = prepare_for_export(pretrained, dict(example))
    if flags or set(prepared) != set(example):
        different = sorted(set(prepared) ^ set(example))
        raise TraceError(f"transformers' exporter would trace other inputs: {', '.join(different)}.")
    prepared = {name: prepared[name] for name in example}
    with _own_nodes():
        config = DynamoConfig(dynamic=shapes is not None, dynamic_shapes=None if shapes is None else shapes(prepared))
        exported, _ = DynamoExporter().export_program(pretrained, dict(prepared), config)
    return exported, prepared


@contextmanager
def _own_nodes() -> Iterator[None]:
    """Take back the caches that an export registers as pytree nodes: elsewhere a cache is no result to compare."""
    from transformers.exporters.exporter_dynamo import is_cache_class

    before, pending = set(pytree.SUPPORTED_NODES), len(pytree._cxx_pytree_pending_imports)
    try:
        yield
    finally:
        if not pytree._cxx_pytree_imported:  # that one would refuse them the second time
            waiting = pytree._cxx_pytree_pending_imports
            waiting[pending:] = [item for item in waiting[pending:] if not is_cache_class(item[0][0])]
            for kind in filter(is_cache_class, set(pytree.SUPPORTED_NODES) - before):
                pytree._deregister_pytree_node(kind)
