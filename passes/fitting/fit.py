"""Choose units on calibration data within a budget, and let what is left make up for what goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from fxslim.calibration import Calibration
from fxslim.errors import RequestError
from fxslim.passes.fitting.budget import Level, Price, allocate, level_steps, saved, within
from fxslim.passes.fitting.curve import Curve
from fxslim.passes.fitting.exact import exact
from fxslim.passes.fitting.latency import Shape
from fxslim.passes.fitting.look import look, weigh
from fxslim.passes.fitting.processes import agreed
from fxslim.passes.fitting.refit import ROWS_PER_INPUT, Repair
from fxslim.passes.fitting.repair import repair
from fxslim.passes.fitting.sensitivity import sensitivity
from fxslim.passes.fitting.sequences import Rows, rows_of
from fxslim.passes.fitting.subjects import Chosen, Subjects, choices, fit_of, parts_of, subjects_of
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.fitting.unseen import Masking, expect_unseen, weigh_unseen
from fxslim.passes.masking import Masks
from fxslim.passes.methods import WEIGHTS
from fxslim.plan import Note
from fxslim.program import Program
from fxslim.report import Fit, Reached
from fxslim.site import Site, SitePlan, units_by_group
from fxslim.targets import Target


@dataclass(frozen=True)
class Recipe:
    """How to choose and how to repair.

    Attributes:
        method: name of the method, one of `fxslim.passes.methods.METHODS`.
        repair: what is fitted of what is left; None for nothing.
        uniform: whether sites of one kind and size keep the same number.
        targets: budgets; empty where fractions are asked for.
        propagate: whether every consumer is fitted to what the narrowed model feeds it.
        swaps: whether the choice at a site is improved by swaps, where units are chosen by error.
        round_to: the kept number of inputs of each consumer is a multiple of this.
        seed: for what is drawn.
    """

    method: str = "obs"
    repair: Repair | None = "refit"
    uniform: bool = False
    propagate: bool = True
    swaps: bool = True
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
        reached: what became of the targets.
    """

    parts: tuple[SitePlan, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fits: tuple[Fit, ...] = ()
    notes: tuple[Note, ...] = ()
    reached: tuple[Reached, ...] = ()


def fit(
    program: Program,
    sites: Sequence[Site],
    recipe: Recipe,
    data: Calibration | None,
    price: Price,
    asked: Mapping[str, SitePlan],
    masking: Masking,
    *,
    fixed: bool = False,
    progress: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    changed: MutableMapping[str, Tensor] | None = None,
) -> Fitted:
    """Choose what stays, and repair it.

    Args:
        program: the traced model; not one of regions.
        sites: the sites that are asked for.
        recipe: how.
        data: calibration data; None for methods that look at weights alone.
        price: what a model costs.
        asked: how many units each site is asked to keep (which ones is decided here); unused with targets.
        masking: makes masks in the place of what goes.
        fixed: whether which ones is decided already.
        progress: whether to show a progress bar.
        weights: the numbers, where the program's tensors hold shapes alone.
        changed: where repaired tensors are put; by default, into memory.
    """
    subjects, notes = subjects_of(program, sites, unseen=bool(recipe.targets))
    program = program if weights is None else replace(program, tensors=weights)
    names = list(subjects.sites)
    rows = rows_of(program, data.batches) if data is not None else None
    repairs = recipe.repair is not None and rows is not None
    with _bar(len(names) * (1 - fixed + repairs), visible=progress) as tick:
        chosen: Chosen = {}
        reached: tuple[Reached, ...] = ()
        if rows is not None and (repairs or recipe.method == "obs" or recipe.targets):
            rows = weighted(program, subjects, rows, recipe.seed)
            if subjects.seen and not rows.weights:
                reason = "all tokens and directions count alike: the model's output has no gradient"
                notes = [*notes, Note(where="calibration", reason=reason)]
        notes = [*notes, *_copied(rows)]
        if not fixed:
            notes = [*notes, *_look(program, subjects, recipe, rows, masking, tick)]
            if recipe.targets:
                chosen, reached = _by_targets(subjects, recipe, price)
            else:
                chosen = _by_counts(subjects, asked)
        mine = dict(asked) if fixed else {part.site.name: part for part in parts_of(subjects, chosen)}
        others = tuple(part for name, part in asked.items() if name not in subjects.sites and not recipe.targets)
        if recipe.repair is None or rows is None:
            own = [mine[name] for name in names if name in mine]
            fits = tuple(fit_of(subjects, part, chosen) for part in own)
            return Fitted((*own, *others), fits=fits, notes=tuple(notes), reached=reached)
        again = chosen if recipe.method == "obs" else {}
        aside = [*(mine[name] for name in subjects.unseen if name in mine), *others]
        masks = masking([part for part in aside if not part.folds]) or Masks()
        parts, tensors, fits = repair(
            program, subjects, rows, mine, again, tick, masks=masks, how=recipe.repair,
            propagate=recipe.propagate, swaps=recipe.swaps, seed=recipe.seed, changed=changed,
        )  # fmt: skip
    return Fitted((*parts, *others), tensors, fits, (*notes, *_scarce(fits, recipe)), reached)


def _copied(rows: Rows | None) -> Iterator[Note]:
    """Say that sequences are there several times."""
    copies, total = rows.copies if rows is not None else (0, 0)
    if copies:
        reason = f"{copies} of {total} sequences are copies of others: they say nothing new"
        yield Note(where="calibration", reason=reason)


def _scarce(fits: Sequence[Fit], recipe: Recipe) -> Iterator[Note]:
    """Say that there were too few rows for matrices."""
    few = [fit.site for fit in fits if fit.how == "scaled" and recipe.repair == "refit"]
    if few:
        reason = (
            f"one factor for each unit was fitted at {', '.join(few)}, and no matrix: there are fewer than "
            f"{ROWS_PER_INPUT} tokens (copies of sequences apart) for each input that stays; give more data"
        )
        yield Note(where="calibration", reason=reason)


@exact()
def weighted(program: Program, subjects: Subjects, rows: Rows, seed: int) -> Rows:
    """Return rows that count by how much the output depends on them; the sites' metrics are filled in."""
    if not subjects.seen:
        return rows
    tape = Tape(program, [batch.inputs for batch in rows.batches], program.tensors)
    found = sensitivity(tape, [one for own in subjects.reads.values() for one in own], rows, seed=seed)
    subjects.roots = found.roots
    return replace(rows, weights=found.weights)


def _look(
    program: Program,
    subjects: Subjects,
    recipe: Recipe,
    rows: Rows | None,
    masking: Masking,
    tick: Callable[[str], None],
) -> list[Note]:
    """Make the curves of all sites; those that cannot be measured where they have to be are left out."""
    expects = bool(recipe.targets) and not recipe.uniform
    weigh_unseen(program, subjects)
    if rows is None or (recipe.method in WEIGHTS and (not recipe.targets or recipe.uniform)):
        weigh(program, subjects, recipe.method, recipe.seed)
        return []
    repairs = recipe.repair is not None
    look(program, subjects, recipe.method, rows, tick, repair=repairs, expects=expects, seed=recipe.seed)
    left = expect_unseen(program, subjects, rows, masking, tick) if expects else []
    for name in left:
        del subjects.sites[name], subjects.reads[name]
    return [
        Note(where=name, reason="left as it is: it has no place for masks that say what it is worth") for name in left
    ]


def _by_counts(subjects: Subjects, asked: Mapping[str, SitePlan]) -> Chosen:
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


def _by_targets(subjects: Subjects, recipe: Recipe, price: Price) -> tuple[Chosen, tuple[Reached, ...]]:
    """Return the steps that cost the model's output least within the budget, and what became of that."""
    resources = [one.resource for one in recipe.targets]
    dense = np.array([price.of(name, ()) for name in resources])
    faster = _time_saved(subjects, price, resources)
    levels: dict[str, list[Level]] = {}
    for name, site in subjects.sites.items():
        own = [Level(False, 0, 0.0, np.zeros(len(resources)))]
        for groups in choices(site):
            curve = subjects.curves[name, groups]
            sizes = _aligned(site, curve, groups, recipe.round_to)
            if not sizes:
                continue
            most = SitePlan(site=site, keep=curve.keep(site.units, sizes[-1]))
            slope = saved(price, dense, most, resources) / sizes[-1]
            own += [
                Level(groups, n, subjects.damage(name, groups, n), -slope * n - faster(name, groups, n)) for n in sizes
            ]
        levels[name] = own
    _reachable(recipe.targets, dense, levels)
    picks: dict[str, Level] = {}

    def choose(limits: Sequence[float]) -> tuple[SitePlan, ...]:
        nonlocal picks
        given = np.asarray(limits) - dense
        if recipe.uniform:
            picks = _uniform(subjects, levels, given)
        else:
            found = allocate(list(levels.values()), given)
            numbers = agreed(lambda: found, len(found))
            picks = {name: own[int(i)] for (name, own), i in zip(levels.items(), numbers, strict=True)}
        return parts_of(subjects, _steps(picks))

    parts = within(price, recipe.targets, choose)
    predicted = dense + np.sum([one.costs for one in picks.values()], axis=0)
    reached = [price.reached(*one, parts) for one in zip(recipe.targets, dense, predicted, strict=True)]
    return _steps(picks), tuple(reached)


def _reachable(targets: Sequence[Target], dense: np.ndarray, levels: Mapping[str, list[Level]]) -> None:
    """Refuse a target that not even the smallest sizes of all sites reach."""
    least = dense + np.sum([np.min([one.costs for one in own], axis=0) for own in levels.values()], axis=0)
    for target, whole, left in zip(targets, dense, least, strict=True):
        if left > target.limit(whole) * (1 + 1e-9):
            share = np.ceil(1000 * left / whole) / 1000
            raise RequestError(
                f"{target} cannot be reached: the smallest sizes of the {len(levels)} sites that were found and asked "
                f"for leave {share:.1%} of the dense model's {target.resource}. Ask for more than that, or for more "
                "kinds of sites; fxslim.inspect shows what was not found."
            )


def _time_saved(
    subjects: Subjects, price: Price, resources: Sequence[str]
) -> Callable[[str, bool, int], np.ndarray | float]:
    """Return how much time a site saves with so many steps, as costs: zero for every other resource."""
    if "time" not in resources or price.latency is None:
        return lambda name, groups, steps: 0.0
    found: dict[tuple[str, bool], list[str]] = {}
    for (name, groups), curve in subjects.curves.items():
        if curve.steps:
            found.setdefault((_look_of(subjects, name), groups), []).append(name)
    shapes = {
        key: Shape(key[0], key[1], len(subjects.curves[names[0], key[1]].steps), tuple(names))
        for key, names in found.items()
    }

    def narrowed(shape: Shape, steps: int) -> tuple[SitePlan, ...]:
        return parts_of(subjects, dict.fromkeys(shape.sites, ((shape.groups, steps),)))

    table = price.latency.table(list(shapes.values()), narrowed)
    at = np.array([float(name == "time") for name in resources])
    return lambda name, groups, steps: at * np.interp(steps, *table[_look_of(subjects, name), groups])


def _look_of(subjects: Subjects, name: str) -> str:
    """Return what a site's time depends on."""
    site = subjects.sites[name]
    widths = sorted((piece.size, piece.role, piece.experts) for piece in site.slices)
    return f"{site.kind} {site.units} {site.group_count} {widths}"


def _steps(picks: Mapping[str, Level]) -> dict[str, tuple[tuple[bool, int], ...]]:
    return {name: ((one.groups, one.steps),) for name, one in picks.items() if one.steps}


def _aligned(site: Site, curve: Curve, groups: bool, round_to: int) -> list[int]:
    """Return numbers of steps after which kernels like what is left, smallest first, zero left out."""
    if groups or site.kind == "experts":
        return list(range(1, len(curve.steps) + 1))
    consumer = next(piece for piece in site.slices if piece.role == "in")
    width = int((consumer.owners() == 0).sum()) or 1
    units = site.units // consumer.experts  # sizes are those of one expert
    multiple = round_to if round_to > 1 else 32 if units >= 1024 else 8 if units >= 128 else 1
    each = len(curve.steps[0]) if curve.steps else 1

    def fits(steps: int) -> bool:
        kept = (site.units - steps * each) // consumer.experts
        return kept * width % multiple == 0 and kept % site.multiple == 0

    found = [n for n in range(1, len(curve.steps) + 1) if fits(n)] or list(range(1, len(curve.steps) + 1))
    return [found[i - 1] for i in level_steps(len(found)) if i]


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
