"""The sites that are worked on: their consumers, their cost curves, and what taking parts of them out does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fxslim.passes.fitting.consumers import Consumer, consumers, producers
from fxslim.passes.fitting.curve import Curve
from fxslim.passes.views import Views
from fxslim.plan import Note
from fxslim.program import Program
from fxslim.report import Fit
from fxslim.site import Site, SitePlan, units_by_group

Chosen = Mapping[str, tuple[tuple[bool, int], ...]]
"""Site -> how many steps of which curves: of whole groups (True), then of single units (False)."""
DRAWN = 17
"""Most places of a curve that a report keeps."""


@dataclass
class Subjects:
    """The sites that are worked on, in the order of execution, and what is known of them.

    Attributes:
        sites: site name -> site.
        reads: site name -> its consumers; none where they cannot be seen.
        makes: site name -> its producers.
        curves: (site name, whole groups) -> curve.
        roots: weight of a consumer -> root of the metric in which its errors count, where that is known.
        expected: (site name, whole groups) -> (place on the curve, damage to the output) at a few sizes.
    """

    sites: dict[str, Site]
    reads: dict[str, tuple[Consumer, ...]]
    makes: dict[str, tuple[Consumer, ...]] = field(default_factory=dict)
    curves: dict[tuple[str, bool], Curve] = field(default_factory=dict)
    roots: Mapping[str, Tensor] = field(default_factory=dict)
    expected: dict[tuple[str, bool], list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def seen(self) -> dict[str, Site]:
        """Return the sites whose consumers can be seen."""
        return {name: site for name, site in self.sites.items() if self.reads[name]}

    @property
    def unseen(self) -> dict[str, Site]:
        """Return the others: nothing is fitted there."""
        return {name: site for name, site in self.sites.items() if not self.reads[name]}

    def damage(self, name: str, groups: bool, steps: int) -> float:
        """Return the expected damage to the output: a power law between a few sizes, through the curve's error."""
        error = float(self.curves[name, groups].damage[steps])
        if steps == 0:
            return 0.0
        measured = self.expected.get((name, groups), ())
        known = [(e, d) for e, d in measured if e > 0 and d > 0]
        if not known:
            return 0.0 if measured else error
        xs, ys = np.log([e for e, _ in known]), np.log([d for _, d in known])
        x = math.log(max(error, 1e-12))
        inside = float(np.interp(x, xs, ys))
        return math.exp(inside + min(x - xs[0], 0.0) + max(x - xs[-1], 0.0))


def subjects_of(program: Program, sites: Sequence[Site], *, unseen: bool = False) -> tuple[Subjects, list[Note]]:
    """Return the sites whose consumers can be seen, in the order of execution; all others behind them, if wanted."""
    views = Views(program)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found: list[tuple[int, Site, tuple[Consumer, ...]]] = []
    others: list[Site] = []
    notes: list[Note] = []
    for site in sites:
        own = "experts that are routed to" if site.kind == "experts" else consumers(program, views, site)
        if isinstance(own, str):
            notes.append(Note(where=site.name, reason=f"chosen by magnitude, without repair: {own}"))
            others += [site] if unseen else []
        else:
            found.append((min(order[call.node] for one in own for call in one.calls), site, own))
    found.sort(key=lambda item: item[0])
    names = Subjects(
        {site.name: site for site in (*(site for _, site, _ in found), *others)},
        {site.name: own for _, site, own in found} | {site.name: () for site in others},
        {site.name: producers(program, views, site) for _, site, _ in found},
    )
    return names, notes


def choices(site: Site) -> list[bool]:
    """Return what may go: single units, and whole groups where they may."""
    whole = site.groups is not None and not site.groups_stay and site.group_count > 1
    return [False, True] if whole else [False]


def parts_of(subjects: Subjects, chosen: Chosen) -> tuple[SitePlan, ...]:
    """Return what stays of every site of which anything goes."""
    return tuple(
        SitePlan(site=site, keep=keep_of(site, {g: subjects.curves[name, g] for g, _ in chosen[name]}, chosen[name]))
        for name, site in subjects.sites.items()
        if name in chosen and any(steps for _, steps in chosen[name])
    )


def keep_of(site: Site, curves: Mapping[bool, Curve], steps: Sequence[tuple[bool, int]]) -> tuple[int, ...]:
    """Return what is left after whole groups have gone, and then single units of the groups that are left."""
    if len(steps) == 1:
        groups, count = steps[0]
        return curves[groups].keep(site.units, count)
    first = set(curves[True].keep(site.units, steps[0][1]))
    gone: set[int] = set()
    for own in units_by_group(site):
        members = [unit for step in curves[False].steps for unit in step if unit in own.tolist() and unit in first]
        gone.update(members[: steps[1][1]])
    return tuple(sorted(first - gone))


def fit_of(subjects: Subjects, part: SitePlan, chosen: Chosen) -> Fit:
    """Return what is reported of a site before it is repaired."""
    name = part.site.name
    taken = chosen.get(name, ())
    known = any(subjects.expected.get((name, groups)) for groups, _ in taken)
    damage = sum(subjects.damage(name, groups, steps) for groups, steps in taken) if known else math.nan
    curve = _drawn(subjects, part.site, taken[0][0]) if known and len(taken) == 1 else ()
    return Fit(name, part.site.kind, part.site.units, len(part.keep), damage, curve=curve)


def _drawn(subjects: Subjects, site: Site, groups: bool) -> tuple[tuple[int, float], ...]:
    """Return (units that stay, expected damage to the output) at a few places of a curve, from all units down."""
    steps = subjects.curves[site.name, groups].steps
    gone = np.cumsum([0, *map(len, steps)])
    places = np.unique(np.linspace(0, len(steps), DRAWN).round().astype(int)).tolist()
    return tuple((site.units - int(gone[n]), subjects.damage(site.name, groups, n)) for n in places)
