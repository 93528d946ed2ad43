"""One budget over all sites: which level each takes so that the damage is least and every limit holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_matrix

from fxslim.errors import RequestError
from fxslim.passes.fitting.latency import Latency
from fxslim.passes.fitting.processes import agreed
from fxslim.program import Program
from fxslim.report import Reached
from fxslim.site import SitePlan, leads, removed_rows
from fxslim.targets import Target

MOST_LEVELS = 48
ROUNDS = 8
TIME_SLACK = 0.01
"""Part of a limit on time by which a measured model may miss it."""
UNITS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "time": "times faster"}
GAP = 1e-4
"""Relative distance from the best allocation at which the search stops."""


@dataclass(frozen=True)
class Level:
    """One size that a site may take.

    Attributes:
        groups: whether whole groups go, or single units.
        steps: how many steps of that curve.
        damage: expected damage to the model's output.
        costs: what it costs of every resource.  (resources,)
    """

    groups: bool
    steps: int
    damage: float
    costs: np.ndarray


def allocate(levels: Sequence[Sequence[Level]], limits: Sequence[float]) -> list[int]:
    """Choose one level for every site: least damage within all limits, a multiple-choice knapsack.

    Args:
        levels: the levels of every site; costs are what the site adds.
        limits: what all sites together may cost of each resource.

    Returns:
        The chosen level of every site.

    Raises:
        RequestError: even the smallest levels cost more.
    """
    damage = np.array([level.damage for own in levels for level in own])
    costs = np.array([level.costs for own in levels for level in own], dtype=float).reshape(len(damage), len(limits))
    owner = np.repeat(np.arange(len(levels)), [len(own) for own in levels])
    sizes = np.abs(np.asarray(limits, dtype=float))
    scale = np.maximum(np.where(sizes > 0, sizes, np.abs(costs).max(axis=0, initial=0.0)), 1e-30)
    one = csr_matrix((np.ones(len(damage)), (owner, np.arange(len(damage)))))
    found = milp(
        damage / max(float(damage.max(initial=0.0)), 1e-300),
        integrality=np.ones(len(damage)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint((costs / scale).T, -np.inf, np.asarray(limits) / scale),
        ],
        options={"mip_rel_gap": GAP, "time_limit": 60},
    )
    if found.x is None:
        raise RequestError("the budget cannot be reached: not even the smallest sizes of all sites are small enough.")
    starts = np.concatenate([[0], np.cumsum([len(own) for own in levels])])
    return [int(np.argmax(found.x[a:b])) for a, b in pairwise(starts)]


def level_steps(count: int) -> list[int]:
    """Return numbers of steps, from none up to ``count``: at most 48, a power of two apart where there are more."""
    every = 1
    while count // every > MOST_LEVELS:
        every *= 2
    return list(range(0, count + 1, every))


@dataclass(frozen=True)
class Price:
    """Counts what a model costs after site plans.

    Attributes:
        program: the traced model.
        count_macs: MACs after site plans, at the traced sizes.
        outside: parameters and bytes of the model that the program does not hold.
        latency: what measures time; None where no target is about it.
    """

    program: Program
    count_macs: Callable[[tuple[SitePlan, ...]], int]
    outside: tuple[int, int] = (0, 0)
    latency: Latency | None = None

    def of(self, resource: str, parts: Sequence[SitePlan]) -> float:
        """Return what is left of a resource; of time, relative to the dense model's. The same in all processes."""
        if resource == "time":
            assert self.latency is not None
            return self.latency.share(parts)
        if resource == "macs":  # at the traced sizes: those of the first process
            return agreed(lambda: [float(self.count_macs(tuple(parts)))], 1)[0]
        sizes = _sizes(self.program, parts)
        if resource == "params":
            own = sum(n for name, n in sizes.items() if isinstance(self.program.tensors[name], torch.nn.Parameter))
            return float(own + self.outside[0])
        return float(sum(n * self.program.tensors[name].element_size() for name, n in sizes.items()) + self.outside[1])

    def reached(self, target: Target, dense: float, predicted: float, parts: Sequence[SitePlan]) -> Reached:
        """Return what became of a target.

        Args:
            target: the target.
            dense: what the dense model costs.
            predicted: what the sites' own costs add up to.
            parts: site plans.
        """
        limit, now = target.limit(dense), self.of(target.resource, parts)
        if target.resource != "time":
            return Reached(str(target), UNITS[target.resource], limit, predicted, now)
        assert self.latency is not None
        within = self.latency.estimate(parts).half_width
        return Reached(str(target), UNITS["time"], 1 / limit, 1 / max(predicted, 1e-9), 1 / now, within)


def _sizes(program: Program, parts: Sequence[SitePlan]) -> Mapping[str, int]:
    """Return the number of elements of every tensor that is the model's, after site plans."""
    shapes = {name: list(t.shape) for name, t in program.tensors.items() if name not in program.constants}
    lead = leads(parts)
    for (name, dim), gone in removed_rows(parts).items():
        if name in shapes:
            experts = gone.shape[0] if (name, dim) in lead else 1
            shapes[name][dim] -= int(gone.sum()) // experts
    return {name: int(np.prod(shape)) for name, shape in shapes.items()}


Found = Callable[[Sequence[float]], tuple[SitePlan, ...]]


def _slack(target: Target) -> float:
    """Return by which part of a limit a model may miss it: counts are exact, time is measured."""
    return TIME_SLACK if target.resource == "time" else 1e-9


def within(price: Price, wanted: Sequence[Target], choose: Found) -> tuple[SitePlan, ...]:
    """Return chosen site plans that hold every limit; what sites cost does not quite add up, least of all in time.

    A limit on time is met from both sides: a model that became faster than asked gave more away than it had to.

    Args:
        price: counts, and measures.
        wanted: the targets.
        choose: site plans for what all sites together may leave; what was chosen last is what is returned.

    Raises:
        RequestError: the budget cannot be reached.
    """
    dense = [price.of(one.resource, ()) for one in wanted]
    limits = [one.limit(whole) for one, whole in zip(wanted, dense, strict=True)]
    asked = list(limits)
    best: tuple[float, list[float]] | None = None
    for _ in range(ROUNDS):
        parts = choose(asked)
        left = [price.of(one.resource, parts) for one in wanted]
        over = [have / limit - 1 for have, limit in zip(left, limits, strict=True)]
        if all(more <= _slack(one) for more, one in zip(over, wanted, strict=True)):
            off = min(
                (abs(more) for more, one in zip(over, wanted, strict=True) if one.resource == "time"), default=0.0
            )
            if best is None or off < best[0]:
                best = (off, list(asked))
            if off <= TIME_SLACK or len(wanted) > 1:
                return parts
        asked = [_corrected(one, *numbers) for one, *numbers in zip(wanted, asked, left, limits, dense, strict=True)]
    if best is None:
        raise RequestError(f"no sizes were found that hold {', '.join(map(str, wanted))}.")
    return choose(best[1])


def _corrected(target: Target, asked: float, have: float, limit: float, dense: float) -> float:
    """Return what to ask for when asking for ``asked`` gave ``have``: savings of time are off by a factor."""
    if target.resource != "time":
        return asked - max(have - limit, 0.0) * 1.05
    saved = max(dense - have, 1e-3 * dense)
    return dense - (dense - asked) * (dense - limit) / saved


def saved(price: Price, dense: Sequence[float] | np.ndarray, part: SitePlan, resources: Sequence[str]) -> np.ndarray:
    """Return what a site plan by itself saves of each counted resource; of time, nothing: that has its own table."""
    return np.array([0.0 if name == "time" else whole - price.of(name, (part,))
                     for name, whole in zip(resources, dense, strict=True)])  # fmt: skip
