"""Swap sizes between sites for as long as the model's output gains by it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from fxslim.passes.fitting.budget import Level
from fxslim.passes.fitting.look import Halves
from fxslim.passes.fitting.probe import Probe
from fxslim.passes.fitting.subjects import Subjects

TRIES = 48
"""Swaps that are tried; about one in five is taken."""
SEARCH_WORK = 6.0
"""How often all tokens may be run through the whole model for that."""


def search(
    probe: Probe,
    subjects: Subjects,
    halves: Halves,
    levels: Mapping[str, Sequence[Level]],
    start: Mapping[str, Level],
    limits: np.ndarray,
    *,
    repair: bool,
    seed: int,
    tick: Callable[[str], None],
) -> dict[str, Level]:
    """Give one site a size more and take one or more off another, and keep what brings the output closer (EvoPress).

    Every site is fitted by itself for this, to what the dense model returns.

    Args:
        probe: measures damage.
        subjects: the sites.
        halves: their moments.
        levels: sizes that each may take.
        start: where to begin.
        limits: what all sites together may cost of each resource.
        repair: whether what is left is fitted.
        seed: for the draw.
        tick: called after every try.
    """
    draw = random.Random(seed)
    made: dict[tuple[str, bool, int], dict[str, Tensor]] = {}

    def tensors(name: str, level: Level) -> dict[str, Tensor]:
        key = (name, level.groups, level.steps)
        if key not in made:
            keep = subjects.curves[name, level.groups].keep(subjects.sites[name].units, level.steps)
            made[key] = {}
            for half in halves[name] if level.steps else ():
                made[key] |= half.tensors(keep, probe.start.tensors, repair=repair)
        return made[key]

    def damage(picked: Mapping[str, Level]) -> float:
        changed = dict(probe.start.tensors)
        for name, level in picked.items():
            changed |= tensors(name, level)
        return probe.damage(changed)

    ladders = {name: _ladder(own, start[name]) for name, own in levels.items()}
    best, fitness = dict(start), damage(start)
    names = [name for name, ladder in ladders.items() if len(ladder) > 1]
    for _ in range(TRIES if len(names) > 1 else 0):
        tick("swapping sizes")
        more, less = draw.sample(names, 2)
        trial = _swapped(best, ladders, more, less, draw.choice((1, 1, 2)), limits)
        if trial is None:
            continue
        now = damage(trial)
        if now < fitness:
            best, fitness = trial, now
        kept = {(name, level.groups, level.steps) for name, level in best.items()}
        made = {key: own for key, own in made.items() if key in kept}
    return best


def _ladder(levels: Sequence[Level], start: Level) -> list[Level]:
    """Return the levels of one kind, from the smallest to the largest."""
    own = [level for level in levels if level.steps == 0 or level.groups == start.groups]
    return sorted(own, key=lambda level: -level.steps)


def _swapped(
    best: Mapping[str, Level],
    ladders: Mapping[str, list[Level]],
    more: str,
    less: str,
    steps: int,
    limits: np.ndarray,
) -> dict[str, Level] | None:
    """Return sizes with one site larger and another so much smaller that the limits hold; None where that cannot be."""
    trial = dict(best)
    up = ladders[more].index(best[more]) + steps
    if up >= len(ladders[more]):
        return None
    trial[more] = ladders[more][up]
    down = ladders[less].index(best[less])
    while down > 0:
        down -= 1
        trial[less] = ladders[less][down]
        if bool((sum(level.costs for level in trial.values()) <= limits + 1e-6 * np.abs(limits)).all()):
            return trial
    return None
