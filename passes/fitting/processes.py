"""What the processes of ``torch.distributed`` do together, where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed


def together() -> bool:
    """Tell whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized()


def shared(total: Tensor) -> Tensor:
    """Add up in place over all processes."""
    if together():
        there = total.to(_device(total.device))
        distributed.all_reduce(there)
        if there is not total:
            total.copy_(there)
    return total


def agreed(found: Callable[[], Sequence[float]], count: int) -> list[float]:
    """Return the numbers that the first process finds, in every process: what each measures by itself differs.

    Args:
        found: finds them; called in the first process alone.
        count: how many they are.
    """
    if not together():
        return list(found())
    first = distributed.get_rank() == 0
    sent = torch.tensor(list(found()) if first else [0.0] * count, dtype=torch.float64)
    sent = sent.to(_device(sent.device))
    distributed.broadcast(sent, 0)
    return [float(one) for one in sent.tolist()]


def _device(own: torch.device) -> torch.device:
    """Return where a tensor has to be to be sent."""
    away = distributed.get_backend() == "nccl" and own.type == "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if away else own
