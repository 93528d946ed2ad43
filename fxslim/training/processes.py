"""Several processes that train one model."""

from __future__ import annotations

import torch
from torch import Tensor


def averaged(values: Tensor) -> Tensor:
    """Return the mean over all processes, as data parallelism takes it of gradients."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return values
    distributed.all_reduce(values)
    return values / distributed.get_world_size()


def agreed(values: Tensor, device: torch.device) -> Tensor:
    """Return what the first process says, in all of them: sums of gradients may round differently elsewhere."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return values
    sent = values.to(device, torch.uint8) if values.dtype == torch.bool else values.to(device)
    distributed.broadcast(sent, 0)
    return sent.to(values.device, values.dtype)
