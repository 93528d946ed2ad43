"""Choose units on calibration data within a budget, and let what is left make up for what goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fxslim.calibration import Calibration
from fxslim.passes.choose import measure
from fxslim.passes.fitting.budget import Level, Price, allocate, level_steps, slopes, within
from fxslim.passes.fitting.consumers import Consumer, consumers
from fxslim.passes.fitting.curve import Curve, items
from fxslim.passes.fitting.moments import Moments
from fxslim.passes.fitting.observe import Gradients, Rows, gradients, rows_of, sums
from fxslim.passes.fitting.outputs import divergence
from fxslim.passes.fitting.refit import Refit, refit
from fxslim.passes.fitting.seen import Read, Seen
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.methods import GRADIENTS, METHODS, WEIGHTS
from fxslim.passes.views import Views
from fxslim.plan import Note, Site, SitePlan, units_by_group
from fxslim.program import Program
from fxslim.report import Fit
from fxslim.targets import Target

PROBES = (0.25, 0.5, 0.75)
"""Parts of a site that are taken out, of this site alone, to see what that does to the model's output."""
PROBE_WORK = 4.0
"""How often all tokens may be run through the whole model for these probes."""


@dataclass(frozen=True)
class Recipe:
    """How to choose and how to repair.

    Attributes:
        method: name of the method, one of `fxslim.passes.methods.METHODS`.
        repair: whether what is left is fitted.
        uniform: whether sites of one kind and size keep the same number.
        targets: budgets; empty where fractions are asked for.
        round_to: the kept number of inputs of each consumer is a multiple of this.
        seed: for what is drawn.
    """

    method: str = "obs"
    repair: bool = True
    uniform: bool = False
    targets: tuple[Target, ...] = ()
    round_to: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """Chosen sites and repaired tensors.

    Attributes:
        parts: what stays of every site.
        tensors: canonical tensor name -> repaired tensor; empty without repair.
        fits: what was done, site by site.
        notes: what was not.
    """

    parts: tuple[SitePlan, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fits: tuple[Fit, ...] = ()
    notes: tuple[Note, ...] = ()


@dataclass
class Subjects:
    """The sites that are worked on, in the order of execution, and what is known of them.

    Attributes:
        sites: site name -> site.
        reads: site name -> its consumers.
        curves: (site name, whole groups) -> curve.
        probes: (site name, whole groups) -> (error of the sum, damage to the output) where it was probed.
    """

    sites: dict[str, Site]
    reads: dict[str, tuple[Consumer, ...]]
    curves: dict[tuple[str, bool], Curve] = field(default_factory=dict)
    probes: dict[tuple[str, bool], list[tuple[float, float]]] = field(default_factory=dict)

    def damage(self, name: str, groups: bool, steps: int) -> float:
        """Return the expected damage to the output: a power law between what was probed, through the curve's error."""
        error = float(self.curves[name, groups].damage[steps])
        if steps == 0:
            return 0.0
        known = [(e, d) for e, d in self.probes.get((name, groups), ()) if e > 0 and d > 0]
        if not known:
            return error
        xs, ys = np.log([e for e, _ in known]), np.log([d for _, d in known])
        x = math.log(max(error, 1e-12))
        inside = float(np.interp(x, xs, ys))
        return math.exp(inside + min(x - xs[0], 0.0) + max(x - xs[-1], 0.0))


def fit(
    program: Program,
    sites: Sequence[Site],
    recipe: Recipe,
    data: Calibration | None,
    price: Price,
    asked: Mapping[str, SitePlan],
    *,
    fixed: bool = False,
    progress: bool = False,
) -> Fitted:
    """Choose what stays, and repair it.

    Args:
        program: the traced model; not one of regions.
        sites: the sites that are asked for.
        recipe: how.
        data: calibration data; None for methods that look at weights alone.
        price: what a model costs.
        asked: how many units each site is asked to keep (which ones is decided here); unused with targets.
        fixed: whether which ones is decided already.
        progress: whether to show a progress bar.
    """
    views = Views(program)
    subjects, notes = _subjects(program, views, sites)
    names = list(subjects.sites)
    repairs = recipe.repair and data is not None
    with _bar(len(names) * (1 + repairs), visible=progress) as tick:
        if fixed:
            pass
        elif data is not None:
            _look(program, subjects, recipe, data, tick)
        else:
            _weigh(program, subjects, recipe)
        chosen = _by_targets(subjects, recipe, price) if recipe.targets else _by_counts(subjects, asked)
        before = dict(asked) if fixed else {part.site.name: part for part in _parts(subjects, chosen)}
        others = tuple(part for name, part in asked.items() if name not in subjects.sites and not recipe.targets)
        if not repairs or data is None:
            own = [before[name] for name in names if name in before]
            fits = tuple(_fit_of(subjects, part, chosen) for part in own)
            return Fitted((*own, *others), fits=fits, notes=tuple(notes))
        repaired, tensors, fits = _repair(program, subjects, recipe, data, before, {} if fixed else chosen, tick)
    return Fitted((*repaired, *others), tensors, fits, tuple(notes))


Chosen = Mapping[str, tuple[tuple[bool, int], ...]]
"""Site -> how many steps of which curves: whole groups, then single units."""


def _subjects(program: Program, views: Views, sites: Sequence[Site]) -> tuple[Subjects, list[Note]]:
    """Return the sites whose consumers can be seen, in the order of execution."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found: list[tuple[int, Site, tuple[Consumer, ...]]] = []
    notes: list[Note] = []
    for site in sites:
        own = "experts that are routed to" if site.kind == "experts" else consumers(program, views, site)
        if isinstance(own, str):
            notes.append(Note(where=site.name, reason=f"chosen by magnitude, without repair: {own}"))
        else:
            found.append((min(order[call.node] for one in own for call in one.calls), site, own))
    found.sort(key=lambda item: item[0])
    names = Subjects({site.name: site for _, site, _ in found}, {site.name: own for _, site, own in found})
    return names, notes


def _choices(site: Site) -> list[bool]:
    """Return what may go: single units, and whole groups where they may."""
    whole = site.groups is not None and not site.groups_stay and site.group_count > 1
    return [False, True] if whole else [False]


def _weigh(program: Program, subjects: Subjects, recipe: Recipe) -> None:
    """Make curves from weights alone."""
    for name, site in subjects.sites.items():
        seen = Seen(site, measure(site, program.tensors).scores, seed=recipe.seed)
        for groups in _choices(site):
            subjects.curves[name, groups] = METHODS[recipe.method](seen, items(site, groups=groups))


def _look(program: Program, subjects: Subjects, recipe: Recipe, data: Calibration, tick: Callable[[str], None]) -> None:
    """Run the dense model over the data once, and make the curve of every site as it comes by."""
    rows = rows_of(program, data.batches)
    slopes_: dict[str, Gradients] = {}
    inputs = [batch.inputs for batch in data.batches]
    if recipe.method in GRADIENTS:
        wanted = {name: (site.units, subjects.reads[name]) for name, site in subjects.sites.items()}
        slopes_ = dict(gradients(Tape(program, inputs, program.tensors), wanted, rows, seed=recipe.seed))
    if recipe.method in WEIGHTS and not recipe.targets:
        _weigh(program, subjects, recipe)
        return
    tape = Tape(program, inputs, program.tensors)
    probe = _Probe(tape, rows, data, len(subjects.sites)) if recipe.targets and not recipe.uniform else None
    for name, site in subjects.sites.items():
        reads, halves = [], []
        for consumer in subjects.reads[name]:
            weight = consumer.matrix(program.tensors)
            seen_sums = sums(tape, consumer, rows, None, 0)
            centred = consumer.bias is not None
            bias = program.tensors[consumer.bias].detach().double() if consumer.bias is not None else None
            own = [_own_targets(seen_sums.moments(part, centred=centred), weight, bias) for part in (None, 0, 1)]
            reads.append(Read(consumer, own[0], weight))
            halves.append((own[1], own[2]))
        bent = slopes_.get(name, Gradients(np.zeros(site.units), np.zeros(site.units)))
        seen = Seen(site, measure(site, program.tensors).scores, tuple(reads), bent.first, bent.second, recipe.seed)
        for groups in _choices(site):
            curve = METHODS[recipe.method](seen, items(site, groups=groups))
            subjects.curves[name, groups] = curve
            if probe is not None:
                subjects.probes[name, groups] = probe.run(tape, seen, curve, halves if recipe.repair else None)
        tick(name)


def _own_targets(moments: Moments, weight: Tensor, bias: Tensor | None) -> Moments:
    """Return moments whose targets are what the dense consumer returns."""
    t = moments.x @ weight + (0.0 if bias is None else bias.reshape(-1))
    xt = moments.xx @ weight
    return replace(moments, t=t, xt=xt, tt=float((weight * xt).sum()))


class _Probe:
    """Take parts of one site out, of this site alone, and see what that does to the model's output."""

    def __init__(self, tape: Tape, rows: Rows, data: Calibration, sites: int) -> None:
        part = data.part(int(data.tokens * min(1.0, PROBE_WORK / max(sites * len(PROBES) / 2, 1))))
        self.batches = [i for i, batch in enumerate(data.batches) if any(batch is one for one in part)]
        self.rows = rows
        whole = tape.on(self.batches)
        self.dense = [whole.outputs(i) for i in range(len(self.batches))]

    def run(
        self, tape: Tape, seen: Seen, curve: Curve, halves: Sequence[tuple[Moments, Moments]] | None
    ) -> list[tuple[float, float]]:
        """Return (error of the sum, damage to the output) after parts of the curve, on sequences that judge.

        Args:
            tape: the dense model, at the site.
            seen: the site.
            curve: its curve.
            halves: for each consumer, moments to fit with and to judge by; None where nothing is repaired.
        """
        found = []
        for part in PROBES:
            steps = round(part * len(curve.steps))
            if not steps > 0:
                continue
            keep = curve.keep(seen.site.units, steps)
            changed = dict(tape.tensors)
            for number, read in enumerate(seen.reads):
                changed |= _without(read, keep, changed, halves[number] if halves else None)
            apart = tape.on(self.batches)
            apart.tensors = changed
            total = weight = 0.0
            for i, batch in enumerate(self.batches):
                mask = self.rows.mask(apart.nodes[-1], batch)
                own, of = divergence(self.dense[i], apart.outputs(i), mask, self.rows.judges(batch))
                total, weight = total + own, weight + of
            sizes = torch.tensor([total, weight], dtype=torch.float64)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sizes)
            found.append((float(curve.damage[steps]), float(sizes[0] / sizes[1].clamp_min(1e-300))))
        return found


def _without(
    read: Read, keep: Sequence[int], tensors: Mapping[str, Tensor], halves: tuple[Moments, Moments] | None
) -> dict[str, Tensor]:
    """Return a consumer's tensors when some units are left, fitted to what it returned or not."""
    consumer = read.consumer
    left = _left(consumer, keep).to(read.weight.device)
    if halves is None:
        matrix = torch.zeros_like(read.weight)
        matrix[left] = read.weight[left]
        return {consumer.weight: consumer.stored(matrix, tensors[consumer.weight])}
    fitting, judging = halves
    made = refit(fitting, judging, fitting, read.weight, left, torch.from_numpy(consumer.owner))
    return stored(consumer, made, left, tensors)


def stored(consumer: Consumer, made: Refit, left: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lay a fitted matrix out as dense tensors with zeros where units went."""
    old = tensors[consumer.weight]
    matrix = torch.zeros(old.shape[consumer.dim], made.matrix.shape[1], dtype=made.matrix.dtype, device=old.device)
    matrix[left] = made.matrix
    found = {consumer.weight: consumer.stored(matrix, old)}
    if consumer.bias is not None:
        found[consumer.bias] = made.shift.to(tensors[consumer.bias]).reshape(tensors[consumer.bias].shape)
    return found


def _left(consumer: Consumer, keep: Sequence[int]) -> Tensor:
    """Return a consumer's inputs that stay: those of kept units, and those that no unit owns."""
    owner = consumer.owner
    return torch.from_numpy(np.flatnonzero((owner < 0) | np.isin(owner, np.asarray(keep, dtype=np.int64))))


def _by_counts(subjects: Subjects, asked: Mapping[str, SitePlan]) -> dict[str, tuple[tuple[bool, int], ...]]:
    """Return the steps that take out as many units as were asked for."""
    chosen: dict[str, tuple[tuple[bool, int], ...]] = {}
    for name, site in subjects.sites.items():
        part = asked.get(name)
        if part is None:
            continue
        gone = part.gone
        if site.groups is None:
            chosen[name] = ((False, int(gone.sum())),)
            continue
        each = [int(gone[own].sum()) for own in units_by_group(site)]
        whole = [count == len(own) for count, own in zip(each, units_by_group(site), strict=True)]
        rest = [count for count, all_ in zip(each, whole, strict=True) if not all_]
        chosen[name] = tuple((kind, n) for kind, n in ((True, sum(whole)), (False, max(rest, default=0))) if n)
    return chosen


def _by_targets(subjects: Subjects, recipe: Recipe, price: Price) -> dict[str, tuple[tuple[bool, int], ...]]:
    """Return the steps that cost the model least within the budget."""
    wanted = [one for one in recipe.targets if one.resource != "time"]
    resources = [one.resource for one in wanted]
    dense = np.array([price.of(name, ()) for name in resources])
    levels: dict[str, list[Level]] = {}
    for name, site in subjects.sites.items():
        own = [Level(False, 0, 0.0, np.zeros(len(resources)))]
        for groups in _choices(site):
            curve = subjects.curves[name, groups]
            sizes = _aligned(subjects, site, curve, groups, recipe.round_to)
            if not sizes:
                continue
            slope = slopes(price, site, curve.keep(site.units, sizes[-1]), sizes[-1], resources)
            own += [Level(groups, n, subjects.damage(name, groups, n), -slope * n) for n in sizes]
        levels[name] = own
    picked: dict[str, tuple[tuple[bool, int], ...]] = {}

    def choose(limits: Sequence[float]) -> tuple[SitePlan, ...]:
        given = np.asarray(limits) - dense
        if recipe.uniform:
            picks = _uniform(subjects, levels, given)
        else:
            numbers = allocate(list(levels.values()), given)
            picks = {name: own[i] for (name, own), i in zip(levels.items(), numbers, strict=True)}
        picked.clear()
        picked.update({name: ((one.groups, one.steps),) for name, one in picks.items() if one.steps})
        return _parts(subjects, picked)

    within(price, wanted, choose)
    return picked


def _aligned(subjects: Subjects, site: Site, curve: Curve, groups: bool, round_to: int) -> list[int]:
    """Return numbers of steps after which kernels like what is left, smallest first, zero left out."""
    if groups:
        return list(range(1, len(curve.steps) + 1))
    consumer = subjects.reads[site.name][0]
    width = int((consumer.owner == 0).sum()) or 1
    multiple = round_to if round_to > 1 else 32 if site.units >= 1024 else 8 if site.units >= 128 else 1
    each = len(curve.steps[0]) if curve.steps else 1

    def fits(steps: int) -> bool:
        kept = site.units - steps * each
        return kept * width % multiple == 0 and kept % site.multiple == 0

    found = [n for n in range(1, len(curve.steps) + 1) if fits(n)] or list(range(1, len(curve.steps) + 1))
    return [found[i - 1] for i in level_steps(len(found), 1) if i]


def _uniform(subjects: Subjects, levels: Mapping[str, list[Level]], limits: np.ndarray) -> dict[str, Level]:
    """Return levels at which every site keeps the same part, the largest such part within the limits."""

    def at(part: float) -> dict[str, Level]:
        found = {}
        for name, own in levels.items():
            single = [one for one in own if not one.groups]
            most = len(subjects.curves[name, False].steps) + 1
            found[name] = min(single, key=lambda one: abs(one.steps - part * most))
        return found

    parts = sorted({one.steps / (len(subjects.curves[name, False].steps) + 1)
                    for name, own in levels.items() for one in own if not one.groups})  # fmt: skip
    for part in parts:
        picks = at(part)
        if bool((sum(one.costs for one in picks.values()) <= limits + 1e-6).all()):
            return picks
    return at(1.0)


def _parts(subjects: Subjects, chosen: Chosen) -> tuple[SitePlan, ...]:
    return tuple(
        SitePlan(site=site, keep=_keep(site, {g: subjects.curves[name, g] for g, _ in chosen[name]}, chosen[name]))
        for name, site in subjects.sites.items()
        if name in chosen and any(steps for _, steps in chosen[name])
    )


def _keep(site: Site, curves: Mapping[bool, Curve], steps: Sequence[tuple[bool, int]]) -> tuple[int, ...]:
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


def _fit_of(subjects: Subjects, part: SitePlan, chosen: Chosen) -> Fit:
    name = part.site.name
    taken = chosen.get(name, ())
    damage = sum(subjects.damage(name, groups, steps) for groups, steps in taken)
    known = any(subjects.probes.get((name, groups)) for groups, _ in taken)
    return Fit(name, part.site.kind, part.site.units, len(part.keep), damage if known else math.nan)


def _repair(
    program: Program,
    subjects: Subjects,
    recipe: Recipe,
    data: Calibration,
    before: Mapping[str, SitePlan],
    chosen: Chosen,
    tick: Callable[[str], None],
) -> tuple[tuple[SitePlan, ...], dict[str, Tensor], tuple[Fit, ...]]:
    """Go through the model once more: narrowed so far beside dense, every consumer fitted as it comes by."""
    rows = rows_of(program, data.batches)
    inputs = [batch.inputs for batch in data.batches]
    tensors: dict[str, Tensor] = dict(program.tensors)
    dense, mine = Tape(program, inputs, program.tensors), Tape(program, inputs, tensors)
    parts: list[SitePlan] = []
    fits: list[Fit] = []
    changed: dict[str, Tensor] = {}
    for name, site in subjects.sites.items():
        tick(name)
        if name not in before:
            continue
        reads, every = [], []
        for consumer in subjects.reads[name]:
            weight = consumer.matrix(program.tensors)
            own = sums(mine, consumer, rows, dense, weight.shape[1])
            centred = consumer.bias is not None
            reads.append(Read(consumer, own.moments(centred=centred), weight))
            every.append(own)
        keep = before[name].keep
        if recipe.method == "obs" and name in chosen:
            seen = Seen(site, np.zeros(site.units), tuple(reads), seed=recipe.seed)
            curves = {g: METHODS["obs"](seen, items(site, groups=g)) for g, _ in chosen[name]}
            keep = _keep(site, curves, chosen[name])
        part = SitePlan(site=site, keep=keep)
        report = _fit_of(subjects, part, chosen)
        for read, own in zip(reads, every, strict=True):
            consumer, centred = read.consumer, read.consumer.bias is not None
            left = _left(consumer, keep).to(read.weight.device)
            made = refit(
                own.moments(0, centred=centred),
                own.moments(1, centred=centred),
                read.moments,
                read.weight,
                left,
                torch.from_numpy(consumer.owner),
            )
            new = stored(consumer, made, left, tensors)
            changed |= new
            tensors.update(new)
            report = replace(report, error=made.error, plain=made.plain, how=made.how, ridge=made.ridge)
        parts.append(part)
        fits.append(report)
    return tuple(parts), changed, tuple(fits)


@contextmanager
def _bar(total: int, *, visible: bool) -> Iterator[Callable[[str], None]]:
    if not visible:
        yield lambda name: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="fxslim calibration", leave=False) as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        yield tick
