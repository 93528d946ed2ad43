"""Cost curves: in which order units go, and what the sum loses with every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxslim.site import Site, units_by_group


@dataclass(frozen=True)
class Curve:
    """An order of removal.

    Attributes:
        steps: units that go with each step: one, or one of every group.
        damage: error after so many steps, relative to what the consumer returns.  (steps + 1,), from 0
    """

    steps: tuple[tuple[int, ...], ...]
    damage: np.ndarray

    def keep(self, units: int, steps: int) -> tuple[int, ...]:
        """Return what is left of ``units`` after so many steps."""
        gone = {unit for step in self.steps[:steps] for unit in step}
        return tuple(unit for unit in range(units) if unit not in gone)


@dataclass(frozen=True)
class Items:
    """What goes together, and among what it is chosen.

    Attributes:
        units: the units of every item.
        classes: items by class; one step takes one item (or equally many) of every class.
        least: how many items of every class stay.
        most: how many steps are wanted; None for all.
    """

    units: tuple[tuple[int, ...], ...]
    classes: tuple[np.ndarray, ...]
    least: int = 1
    most: int | None = None

    @property
    def steps(self) -> int:
        """Return how many steps there are."""
        every = max(min(len(own) for own in self.classes) - self.least, 0)
        return every if self.most is None else min(every, self.most)


def items(site: Site, *, groups: bool = False, most: int | None = None) -> Items:
    """Return what can go at a site: single units, equally many of every group, or whole groups.

    Args:
        site: the site.
        groups: whole groups (keys and values with all their query heads) in the place of single units.
        most: how many steps are wanted; None for all.
    """
    every = units_by_group(site)
    if groups and site.groups is not None:
        return Items(tuple(tuple(own.tolist()) for own in every), (np.arange(len(every)),), 1, most)
    single = tuple((unit,) for unit in range(site.units))
    if site.groups is None:
        return Items(single, (np.arange(site.units),), max(site.least, 1), most)
    return Items(single, tuple(every), max(site.least, 1), most)


def by_scores(found: Items, scores: np.ndarray) -> Curve:
    """Return the curve of scores that add up: the lowest go first.  scores: (units,)"""
    totals = np.array([scores[list(units)].sum() for units in found.units])
    orders = [own[np.argsort(totals[own], kind="stable")] for own in found.classes]
    steps = tuple(tuple(sorted(unit for order in orders for unit in found.units[order[i]])) for i in range(found.steps))
    lost = [sum(totals[order[i]] for order in orders) for i in range(len(steps))]
    whole = float(np.abs(totals).sum()) or 1.0
    return Curve(steps, np.concatenate([[0.0], np.cumsum(lost)]) / whole)
