"""Go through the model once more, narrowed so far beside dense, and fit every consumer as it comes by."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fxslim.passes.fitting.consumers import Consumer
from fxslim.passes.fitting.curve import items
from fxslim.passes.fitting.exact import exact
from fxslim.passes.fitting.look import left_of, stored
from fxslim.passes.fitting.norms import between, norms, refit_norm
from fxslim.passes.fitting.observe import sums
from fxslim.passes.fitting.refit import Repair, refit
from fxslim.passes.fitting.seen import Read, Seen
from fxslim.passes.fitting.sequences import Rows
from fxslim.passes.fitting.subjects import Chosen, Subjects, fit_of, keep_of
from fxslim.passes.fitting.swaps import swapped
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.masking import Masks
from fxslim.passes.methods.obs import obs
from fxslim.program import Program
from fxslim.report import Fit
from fxslim.site import SitePlan

NOTHING = Masks()


@exact()
def repair(
    program: Program,
    subjects: Subjects,
    rows: Rows,
    before: Mapping[str, SitePlan],
    chosen: Chosen,
    tick: Callable[[str], None],
    *,
    masks: Masks = NOTHING,
    how: Repair,
    propagate: bool = True,
    swaps: bool = True,
    seed: int,
    changed: MutableMapping[str, Tensor] | None = None,
) -> tuple[tuple[SitePlan, ...], Mapping[str, Tensor], tuple[Fit, ...]]:
    """Fit what is left of every consumer to what brings its residual stream back to the dense model's.

    Its producers are fitted first, to what they make in the dense model of what they read there.

    Args:
        program: the traced model.
        subjects: the sites, in the order of execution.
        rows: the calibration data, and which rows of it count.
        before: what stays of every site.
        chosen: sites whose units are chosen again, by what the narrowed model reads: how many steps.
        tick: called with every site's name.
        masks: masks of everything that goes where nothing is fitted.
        how: what may be fitted.
        propagate: whether what is read, and what is to be made up for, is the narrowed model's; the dense model's
            otherwise.
        swaps: whether the choice at a site is improved by swaps.
        seed: for what is drawn.
        changed: where new tensors are put; nothing is there yet. By default, into memory.

    Returns:
        What stays, new tensors by canonical name, and what was done.
    """
    inputs = [batch.inputs for batch in rows.batches]
    changed = {} if changed is None else changed
    tensors = ChainMap(changed, program.tensors)  # type: ignore[arg-type]  # only the first is written to
    dense = Tape(program, inputs, program.tensors)
    mine = Tape(program, inputs, tensors, masks) if propagate else Tape(program, inputs, program.tensors)
    parts: list[SitePlan] = []
    fits: list[Fit] = []
    follows = how == "refit" and propagate
    scaled = {mine.place(norm.node): norm for norm in norms(program)} if follows else {}

    def scale(until: int) -> None:
        """Fit the norms up to there."""
        for norm in between(scaled, mine.at, until) if changed else ():
            changed.update(refit_norm(norm, mine, dense, rows))

    for name, site in subjects.seen.items():
        tick(name)
        if name not in before:
            continue
        if follows:
            for group in _groups(subjects.makes[name], mine, changed):
                scale(min(mine.place(call.node) for call in group[0].calls))
                changed.update(_made(group, mine, dense, rows))
            scale(min(mine.place(call.node) for one in subjects.reads[name] for call in one.calls))
        reads, every = [], []
        for consumer in subjects.reads[name]:
            weight = consumer.matrix(program.tensors)
            own = sums(mine, consumer, rows, dense, weight.shape[1])
            moments = own.moments(centred=consumer.bias is not None)
            reads.append(Read(consumer, moments, weight, subjects.roots.get(consumer.weight)))
            every.append(own)
        part = before[name]
        if name in chosen:
            seen = Seen(site, np.zeros(site.units), tuple(reads), seed=seed)
            curves = {groups: obs(seen, items(site, groups=groups, most=steps)) for groups, steps in chosen[name]}
            keep = keep_of(site, curves, chosen[name])
            if swaps and len(chosen[name]) == 1:
                keep = swapped(seen, items(site, groups=chosen[name][0][0]), keep)
            part = SitePlan(site=site, keep=keep)
        report = fit_of(subjects, part, chosen)
        for read, own in zip(reads, every, strict=True):
            consumer, centred = read.consumer, read.consumer.bias is not None
            left = left_of(consumer, part.keep).to(read.weight.device)
            halves = own.moments(0, centred=centred), own.moments(1, centred=centred)
            made = refit(*halves, read.moments, read.weight, left, torch.from_numpy(consumer.owner), how=how)
            changed.update(stored(consumer, made, left, tensors))
            report = replace(report, error=made.error, plain=made.plain, how=made.how, ridge=made.ridge)
        parts.append(part)
        fits.append(report)
    scale(len(mine.nodes))
    for name in subjects.unseen:
        tick(name)
        if name in before:
            parts.append(before[name])
            fits.append(replace(fit_of(subjects, before[name], chosen), how="sliced"))
    return tuple(parts), changed, tuple(fits)


def _groups(makes: Sequence[Consumer], mine: Tape, done: Mapping[str, Tensor]) -> list[list[Consumer]]:
    """Return the producers that can still be fitted: those that read the same, together."""
    found: dict[object, list[Consumer]] = {}
    for one in makes:
        ahead = min(mine.place(call.node) for call in one.calls) >= mine.at  # what was run is done
        if one.weight not in done and ahead:
            inputs = tuple(call.input for call in sorted(one.calls, key=lambda call: mine.place(call.node)))
            found.setdefault((inputs, one.bias is None), []).append(one)
    return list(found.values())


def _made(group: Sequence[Consumer], mine: Tape, dense: Tape, rows: Rows) -> dict[str, Tensor]:
    """Return producers' tensors, fitted: their inputs are not quite those of the dense model any more."""
    weights = [one.matrix(mine.tensors) for one in group]
    weight = torch.cat(weights, dim=1)
    own = sums(mine, group[0], rows, dense, weight.shape[1], group[1:])
    centred = group[0].bias is not None
    every = torch.arange(len(weight), device=weight.device)
    halves = own.moments(0, centred=centred), own.moments(1, centred=centred)
    made = refit(*halves, own.moments(centred=centred), weight, every, torch.arange(len(weight)))
    if made.how != "refit":
        return {}
    sizes = [one.shape[1] for one in weights]
    found: dict[str, Tensor] = {}
    for one, matrix, shift in zip(group, made.matrix.split(sizes, 1), made.shift.split(sizes), strict=True):
        found |= stored(one, replace(made, matrix=matrix, shift=shift), every, mine.tensors)
    return found
