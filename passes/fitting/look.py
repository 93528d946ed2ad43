"""Look at the dense model once: the cost curve of every site, and what the output should lose at a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fxslim.passes.choose import measure
from fxslim.passes.fitting.consumers import Consumer
from fxslim.passes.fitting.curve import Curve, items
from fxslim.passes.fitting.exact import exact
from fxslim.passes.fitting.moments import Moments
from fxslim.passes.fitting.observe import Gradients, gradients, sums
from fxslim.passes.fitting.refit import Refit, refit
from fxslim.passes.fitting.seen import Read, Seen
from fxslim.passes.fitting.sequences import Rows
from fxslim.passes.fitting.subjects import Subjects, choices
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.methods import GRADIENTS, METHODS
from fxslim.program import Program

PARTS = (0.25, 0.5, 0.75)
"""Parts of a site that are taken out to see what that costs on sequences that nothing is fitted on."""
RIDGES = (0.003, 0.03, 0.3)
"""Ridges to choose from there."""


def sizes(curve: Curve) -> list[int]:
    """Return the numbers of steps after which the damage to the output is expected."""
    return sorted({round(part * len(curve.steps)) for part in PARTS} - {0})


def weigh(program: Program, subjects: Subjects, method: str, seed: int) -> None:
    """Make the curves of sites whose consumers can be seen, from weights alone."""
    for name, site in subjects.seen.items():
        seen = Seen(site, measure(site, program.tensors).scores, seed=seed)
        for groups in choices(site):
            subjects.curves[name, groups] = METHODS[method](seen, items(site, groups=groups))


@exact()
def look(
    program: Program,
    subjects: Subjects,
    method: str,
    rows: Rows,
    tick: Callable[[str], None],
    *,
    repair: bool,
    expects: bool,
    seed: int,
) -> None:
    """Run the dense model over the data once, and make the curve of every site as it comes by.

    Args:
        program: the traced model.
        subjects: the sites; their curves, and what they lead one to expect, are filled in.
        method: name of the method.
        rows: which rows count, and how much.
        tick: called with every site's name.
        repair: whether what is left is fitted.
        expects: whether the damage to the output is to be known: only a budget over several sites needs it.
        seed: for what is drawn.
    """
    inputs = [batch.inputs for batch in rows.batches]
    bent: dict[str, Gradients] = {}
    if method in GRADIENTS:
        wanted = {name: (site.units, subjects.reads[name]) for name, site in subjects.seen.items()}
        bent = dict(gradients(Tape(program, inputs, program.tensors), wanted, rows, seed=seed))
    tape = Tape(program, inputs, program.tensors)
    plain = replace(rows, weights={}) if method != "obs" else rows  # as the authors of the other methods have it
    for name, site in subjects.seen.items():
        parts: dict[int | None, list[Read]] = {None: [], 0: [], 1: []}
        for consumer in subjects.reads[name]:
            weight, root = consumer.matrix(program.tensors), subjects.roots.get(consumer.weight)
            seen_sums = sums(tape, consumer, plain, None, 0)
            centred = consumer.bias is not None
            bias = program.tensors[consumer.bias].detach().double() if consumer.bias is not None else None
            for part, reads in parts.items():
                own = _own_targets(seen_sums.moments(part, centred=centred), weight, bias)
                reads.append(Read(consumer, own, weight, root))
        slopes = bent.get(name, Gradients(np.zeros(site.units), np.zeros(site.units)))
        seen = Seen(site, measure(site, program.tensors).scores, tuple(parts[None]), slopes.first, slopes.second, seed)
        for groups in choices(site):
            subjects.curves[name, groups] = curve = METHODS[method](seen, items(site, groups=groups))
            for steps in sizes(curve) if expects else ():
                keep = curve.keep(site.units, steps)
                damage = sum(_damage(*two, keep, repair=repair) for two in zip(parts[0], parts[1], strict=True))
                subjects.expected.setdefault((name, groups), []).append((float(curve.damage[steps]), damage))
        tick(name)


def _own_targets(moments: Moments, weight: Tensor, bias: Tensor | None) -> Moments:
    """Return moments whose targets are what the dense consumer returns."""
    t = moments.x @ weight + (0.0 if bias is None else bias.reshape(-1))
    xt = moments.xx @ weight
    return replace(moments, t=t, xt=xt, tt=float((weight * xt).sum()))


def _damage(fitting: Read, judging: Read, keep: Sequence[int], *, repair: bool) -> float:
    """Return what the output loses, in the metric of the consumer, on the rows that judge."""
    left = left_of(fitting.consumer, keep).to(fitting.weight.device)
    weight, moments = fitting.weight, judging.moments
    matrix = weight[left]
    if repair:
        owner = torch.from_numpy(fitting.consumer.owner)
        matrix = refit(fitting.moments, moments, fitting.moments, weight, left, owner, ridges=RIDGES).matrix
    lost = torch.zeros_like(weight)
    lost[left] = matrix
    lost = fitting.measured(lost - weight)
    inner = moments.xx if repair else moments.xx + torch.outer(moments.x, moments.x)  # no bias makes up for the mean
    return max(float((lost * (inner @ lost)).sum()), 0.0)


def left_of(consumer: Consumer, keep: Sequence[int]) -> Tensor:
    """Return a consumer's inputs that stay: those of kept units, and those that no unit owns."""
    owner = consumer.owner
    return torch.from_numpy(np.flatnonzero((owner < 0) | np.isin(owner, np.asarray(keep, dtype=np.int64))))


def stored(consumer: Consumer, made: Refit, left: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lay a fitted matrix out as dense tensors with zeros where units went."""
    old = tensors[consumer.weight]
    matrix = torch.zeros(old.shape[consumer.dim], made.matrix.shape[1], dtype=made.matrix.dtype, device=old.device)
    matrix[left] = made.matrix
    found = {consumer.weight: consumer.stored(matrix, old)}
    if consumer.bias is not None:
        found[consumer.bias] = made.shift.to(tensors[consumer.bias]).reshape(tensors[consumer.bias].shape)
    return found
