"""Read a folder back and compare it with the model that was written, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fxslim.errors import InputError, VerifyError
from fxslim.hf.load import from_pretrained
from fxslim.inputs import bind
from fxslim.sharing import evaluating


def check_saved(small: PreTrainedModel, folder: Path) -> None:
    """Load a folder and compare every tensor, and what the model computes, with the model in memory.

    Raises:
        InputError: from_pretrained loads a parameter in a dtype that does not hold it, or not the mixture that it was.
        VerifyError: they differ.
    """
    implementation = small.config._attn_implementation
    trusted = {"trust_remote_code": True} if small.is_remote_code() else {}  # the code is running already
    loaded: nn.Module = from_pretrained(folder, dtype=small.dtype, attn_implementation=implementation, **trusted)
    loaded.to(small.device)
    expected = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for name in sorted(expected.keys() ^ found.keys()):
        raise VerifyError(name, float("inf"), 0.0, "saved folder: tensor missing, or tied otherwise")
    dtypes = sorted({str(p.dtype) for p in small.parameters() if p.is_floating_point()})
    for name, own in small.named_parameters():
        read = found[name].dtype  # wider than all of the model's where the class keeps it so
        if read != own.dtype and (len(dtypes) > 1 or torch.promote_types(read, own.dtype) != read):
            raise InputError(
                f"the model mixes {', '.join(dtypes)}, which from_pretrained does not restore: {name} would be loaded "
                f"in {read}. Cast it to one dtype first, for example with small.to(torch.float32)."
            )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or not torch.equal(found[name].to(tensor.dtype), tensor):
            raise VerifyError(name, float("inf"), 0.0, "saved folder: tensor read back")
        found[name].data = tensor.data  # the same memory: no third copy while the model runs
    _check_outputs(small, loaded)


def _check_outputs(small: nn.Module, loaded: nn.Module) -> None:
    """Run both models, which share their tensors now, on inputs made from the config."""
    try:
        candidates = bind(small, None)
    except InputError:  # no inputs can be made for it; its tensors are compared, and that has to do
        return
    with torch.no_grad(), evaluating(small), evaluating(loaded):
        try:
            expected = _tensors(small(**candidates[0]))
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
            return  # it takes other inputs than its config tells
        found = _tensors(loaded(**candidates[0]))
    for one, other in zip(expected, found, strict=True):
        if not torch.equal(one, other):
            difference = (one - other).abs().max().item()
            raise VerifyError("output", difference, 0.0, "saved folder, loaded back")


def _tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
