"""Take the lowest scores: an exact number of them, over one list or over many with limits for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return which scores are the ``count`` lowest, the first ones among equals.  (n,) -> (n,) bool"""
    taken = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count <= 0:
        return taken
    threshold = scores.kthvalue(min(count, len(scores))).values
    taken = scores < threshold
    equal = (scores == threshold).nonzero().squeeze(1)
    taken[equal[: count - int(taken.sum())]] = True
    return taken


def lowest_of_all(
    scores: Sequence[Tensor], sizes: Sequence[int], total: int, limits: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Return which scores of several lists are the lowest, within limits for every list.

    Args:
        scores: the scores of every list.
        sizes: what one of each list counts.
        total: what all that are taken count: reached exactly where sizes are the same, never exceeded.
        limits: how many of each list are taken at least and at most.

    Returns:
        Which are taken, (n,) bool for every list.
    """
    held = [_limited(own, *limit) for own, limit in zip(scores, limits, strict=True)]
    every = torch.cat(held)
    lengths = [len(own) for own in held]
    most = sum(limit[1] for limit in limits)
    if len(set(sizes)) == 1:
        taken = lowest(every, min(total // sizes[0], most))
    else:
        taken = torch.zeros(every.shape, dtype=torch.bool, device=every.device)
        weights = torch.repeat_interleave(torch.tensor(sizes), torch.tensor(lengths)).tolist()
        left = total
        for place in every.argsort(stable=True).tolist():
            if weights[place] <= left and every[place] < torch.inf:
                taken[place] = True
                left -= weights[place]
    return list(taken.split(lengths))


def _limited(scores: Tensor, least: int, most: int) -> Tensor:
    """Put the ``least`` lowest first, and what comes after the ``most`` lowest out of reach."""
    if least <= 0 and most >= len(scores):
        return scores
    held = scores.clone()
    order = scores.argsort(stable=True)
    held[order[: max(least, 0)]] = -torch.inf
    held[order[most:]] = torch.inf
    return held
