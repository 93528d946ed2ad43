"""Go through the model once more, narrowed so far beside dense, and fit every consumer as it comes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fxslim.calibration import Calibration
from fxslim.passes.fitting.consumers import Consumer
from fxslim.passes.fitting.curve import items
from fxslim.passes.fitting.look import left_of, stored
from fxslim.passes.fitting.observe import Rows, sums
from fxslim.passes.fitting.refit import Repair, refit
from fxslim.passes.fitting.seen import Read, Seen
from fxslim.passes.fitting.subjects import Chosen, Subjects, fit_of, keep_of
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.methods.obs import obs
from fxslim.plan import SitePlan
from fxslim.program import Program
from fxslim.report import Fit


def repair(
    program: Program,
    subjects: Subjects,
    data: Calibration,
    rows: Rows,
    before: Mapping[str, SitePlan],
    chosen: Chosen,
    tick: Callable[[str], None],
    *,
    how: Repair,
    seed: int,
) -> tuple[tuple[SitePlan, ...], dict[str, Tensor], tuple[Fit, ...]]:
    """Fit what is left of every consumer to what brings its residual stream back to the dense model's.

    Its producers are fitted first, to what they make in the dense model of what they read there.

    Args:
        program: the traced model.
        subjects: the sites, in the order of execution.
        data: calibration data.
        rows: which rows count.
        before: what stays of every site.
        chosen: sites whose units are chosen again, by what the narrowed model reads: how many steps.
        tick: called with every site's name.
        how: what may be fitted.
        seed: for what is drawn.

    Returns:
        What stays, new tensors by canonical name, and what was done.
    """
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
        if how == "refit":
            for producer in subjects.makes[name]:
                ahead = min(mine.place(call.node) for call in producer.calls) >= mine.at  # what was run is done
                if producer.weight not in changed and ahead:
                    changed |= _made(producer, mine, dense, rows)
                    tensors.update(changed)
        reads, every = [], []
        for consumer in subjects.reads[name]:
            weight = consumer.matrix(program.tensors)
            own = sums(mine, consumer, rows, dense, weight.shape[1])
            reads.append(Read(consumer, own.moments(centred=consumer.bias is not None), weight))
            every.append(own)
        part = before[name]
        if name in chosen:
            seen = Seen(site, np.zeros(site.units), tuple(reads), seed=seed)
            curves = {groups: obs(seen, items(site, groups=groups, most=steps)) for groups, steps in chosen[name]}
            part = SitePlan(site=site, keep=keep_of(site, curves, chosen[name]))
        report = fit_of(subjects, part, chosen)
        for read, own in zip(reads, every, strict=True):
            consumer, centred = read.consumer, read.consumer.bias is not None
            left = left_of(consumer, part.keep).to(read.weight.device)
            halves = own.moments(0, centred=centred), own.moments(1, centred=centred)
            made = refit(*halves, read.moments, read.weight, left, torch.from_numpy(consumer.owner), how=how)
            changed |= stored(consumer, made, left, tensors)
            tensors.update(changed)
            report = replace(report, error=made.error, plain=made.plain, how=made.how, ridge=made.ridge)
        parts.append(part)
        fits.append(report)
    return tuple(parts), changed, tuple(fits)


def _made(producer: Consumer, mine: Tape, dense: Tape, rows: Rows) -> dict[str, Tensor]:
    """Return a producer's tensors, fitted: its inputs are not quite those of the dense model any more."""
    weight = producer.matrix(mine.tensors)
    own = sums(mine, producer, rows, dense, weight.shape[1])
    centred = producer.bias is not None
    every = torch.arange(len(weight), device=weight.device)
    halves = own.moments(0, centred=centred), own.moments(1, centred=centred)
    made = refit(*halves, own.moments(centred=centred), weight, every, torch.arange(len(weight)))
    return stored(producer, made, every, mine.tensors) if made.how == "refit" else {}
