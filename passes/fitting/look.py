"""Look at the dense model once: the cost curve of every site, and what its output loses at a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fxslim.calibration import Calibration
from fxslim.passes.choose import measure
from fxslim.passes.fitting.consumers import Consumer
from fxslim.passes.fitting.curve import items
from fxslim.passes.fitting.moments import Moments
from fxslim.passes.fitting.observe import Gradients, Rows, gradients, sums
from fxslim.passes.fitting.probe import Probe
from fxslim.passes.fitting.refit import Refit, refit, sliced
from fxslim.passes.fitting.seen import Read, Seen
from fxslim.passes.fitting.subjects import Subjects, choices
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.methods import GRADIENTS, METHODS
from fxslim.program import Program

PARTS = (0.25, 0.5, 0.75)
"""Parts of a site that are taken out, of this site alone, to see what that does to the model's output."""
PROBE_WORK = 4.0
"""How often all tokens may be run through the whole model for that."""
RIDGES = (0.003, 0.03, 0.3)
"""Ridges to choose from where many sizes are tried."""


@dataclass(frozen=True)
class Half:
    """What one consumer reads, in sequences to fit with and in sequences to judge by."""

    consumer: Consumer
    weight: Tensor
    fitting: Moments
    judging: Moments

    def tensors(self, keep: Sequence[int], tensors: Mapping[str, Tensor], *, repair: bool) -> dict[str, Tensor]:
        """Return the consumer's tensors when some units are left."""
        left = left_of(self.consumer, keep).to(self.weight.device)
        if not repair:
            return stored(self.consumer, sliced(self.judging, self.weight, left), left, tensors, bias=False)
        owner = torch.from_numpy(self.consumer.owner)
        made = refit(self.fitting, self.judging, self.fitting, self.weight, left, owner, ridges=RIDGES)
        return stored(self.consumer, made, left, tensors)


Halves = dict[str, tuple[Half, ...]]


def weigh(program: Program, subjects: Subjects, method: str, seed: int) -> None:
    """Make curves from weights alone."""
    for name, site in subjects.sites.items():
        seen = Seen(site, measure(site, program.tensors).scores, seed=seed)
        for groups in choices(site):
            subjects.curves[name, groups] = METHODS[method](seen, items(site, groups=groups))


def look(
    program: Program,
    subjects: Subjects,
    method: str,
    data: Calibration,
    rows: Rows,
    probe: Probe | None,
    tick: Callable[[str], None],
    *,
    repair: bool,
    most: int,
    seed: int,
) -> Halves:
    """Run the dense model over the data once, and make the curve of every site as it comes by.

    Args:
        program: the traced model.
        subjects: the sites; their curves and probes are filled in.
        method: name of the method.
        data: calibration data.
        rows: which rows count.
        probe: what measures damage; None where no budget needs it.
        tick: called with every site's name.
        repair: whether what is left is fitted.
        most: how many numbers of moments may be kept.
        seed: for what is drawn.

    Returns:
        The moments of all sites, for further fits; empty where they are too many.
    """
    bent: dict[str, Gradients] = {}
    inputs = [batch.inputs for batch in data.batches]
    if method in GRADIENTS:
        wanted = {name: (site.units, subjects.reads[name]) for name, site in subjects.sites.items()}
        bent = dict(gradients(Tape(program, inputs, program.tensors), wanted, rows, seed=seed))
    tape = Tape(program, inputs, program.tensors)
    every: Halves = {}
    size = sum(2 * len(one.owner) ** 2 for own in subjects.reads.values() for one in own)
    for name, site in subjects.sites.items():
        reads, halves = [], []
        for consumer in subjects.reads[name]:
            weight = consumer.matrix(program.tensors)
            seen_sums = sums(tape, consumer, rows, None, 0)
            centred = consumer.bias is not None
            bias = program.tensors[consumer.bias].detach().double() if consumer.bias is not None else None
            own = [_own_targets(seen_sums.moments(part, centred=centred), weight, bias) for part in (None, 0, 1)]
            reads.append(Read(consumer, own[0], weight))
            halves.append(Half(consumer, weight, own[1], own[2]))
        slopes = bent.get(name, Gradients(np.zeros(site.units), np.zeros(site.units)))
        seen = Seen(site, measure(site, program.tensors).scores, tuple(reads), slopes.first, slopes.second, seed)
        for groups in choices(site):
            subjects.curves[name, groups] = METHODS[method](seen, items(site, groups=groups))
            if probe is not None:
                probe.tape.advance(min((c.node for h in halves for c in h.consumer.calls), key=probe.tape.place))
                subjects.probes[name, groups] = _probed(probe, subjects, name, groups, halves, repair=repair)
        if size <= most:
            every[name] = tuple(halves)
        tick(name)
    return every


def _own_targets(moments: Moments, weight: Tensor, bias: Tensor | None) -> Moments:
    """Return moments whose targets are what the dense consumer returns."""
    t = moments.x @ weight + (0.0 if bias is None else bias.reshape(-1))
    xt = moments.xx @ weight
    return replace(moments, t=t, xt=xt, tt=float((weight * xt).sum()))


def _probed(
    probe: Probe, subjects: Subjects, name: str, groups: bool, halves: Sequence[Half], *, repair: bool
) -> list[tuple[float, float]]:
    """Return (error of the sum, damage to the output) after parts of a curve."""
    curve, site = subjects.curves[name, groups], subjects.sites[name]
    found = []
    for part in PARTS:
        steps = round(part * len(curve.steps))
        if steps:
            changed = dict(probe.tape.tensors)
            for half in halves:
                changed |= half.tensors(curve.keep(site.units, steps), changed, repair=repair)
            found.append((float(curve.damage[steps]), probe.damage(changed, probe.tape)))
    return found


def left_of(consumer: Consumer, keep: Sequence[int]) -> Tensor:
    """Return a consumer's inputs that stay: those of kept units, and those that no unit owns."""
    owner = consumer.owner
    return torch.from_numpy(np.flatnonzero((owner < 0) | np.isin(owner, np.asarray(keep, dtype=np.int64))))


def stored(
    consumer: Consumer, made: Refit, left: Tensor, tensors: Mapping[str, Tensor], *, bias: bool = True
) -> dict[str, Tensor]:
    """Lay a fitted matrix out as dense tensors with zeros where units went."""
    old = tensors[consumer.weight]
    matrix = torch.zeros(old.shape[consumer.dim], made.matrix.shape[1], dtype=made.matrix.dtype, device=old.device)
    matrix[left] = made.matrix
    found = {consumer.weight: consumer.stored(matrix, old)}
    if consumer.bias is not None and bias:
        found[consumer.bias] = made.shift.to(tensors[consumer.bias]).reshape(tensors[consumer.bias].shape)
    return found
