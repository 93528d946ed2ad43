"""Sites whose consumers cannot be seen: units go by magnitude, and masked runs say what the output loses by that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxslim.passes.choose import measure
from fxslim.passes.fitting.curve import items
from fxslim.passes.fitting.exact import exact
from fxslim.passes.fitting.look import sizes
from fxslim.passes.fitting.outputs import divergence
from fxslim.passes.fitting.processes import shared
from fxslim.passes.fitting.seen import Seen
from fxslim.passes.fitting.sequences import Rows
from fxslim.passes.fitting.subjects import Subjects, choices
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.masking import Masks
from fxslim.passes.methods.magnitude import magnitude
from fxslim.program import Program
from fxslim.site import SitePlan

Masking = Callable[[Sequence[SitePlan]], Masks | None]
"""Returns the masks of site plans; None where there is no place for one."""


def weigh_unseen(program: Program, subjects: Subjects) -> None:
    """Make the curves of unseen sites from weights alone."""
    for name, site in subjects.unseen.items():
        seen = Seen(site, measure(site, program.tensors).scores)
        for groups in choices(site):
            subjects.curves[name, groups] = magnitude(seen, items(site, groups=groups))


@exact()
def expect_unseen(
    program: Program, subjects: Subjects, rows: Rows, masking: Masking, tick: Callable[[str], None]
) -> list[str]:
    """Measure what the output loses when parts of an unseen site alone are masked, on the sequences that judge.

    The dense model is run up to each site, and from there to its end for every size.

    Args:
        program: the traced model.
        subjects: the sites; what they lead one to expect is filled in.
        rows: which rows count.
        masking: makes masks.
        tick: called with every site's name.

    Returns:
        The sites that have no place for masks.
    """
    judges = [rows.judges(batch) for batch in range(len(rows.batches))]
    places = [batch for batch, own in enumerate(judges) if own is None or bool(own.any())]
    inputs = [rows.batches[batch].inputs for batch in places]
    tape = Tape(program, inputs, program.tensors)
    without: list[str] = []
    for name, site in subjects.unseen.items():
        tick(name)
        keys = [(groups, steps) for groups in choices(site) for steps in sizes(subjects.curves[name, groups])]
        plans = [SitePlan(site=site, keep=subjects.curves[name, g].keep(site.units, n)) for g, n in keys]
        masks = [made for plan in plans if (made := masking((plan,))) is not None]
        if len(masks) < len(plans):
            without.append(name)
            continue
        if not masks:
            continue
        first = min(map(tape.meets, masks), key=tape.place)
        if tape.place(first) < tape.at:
            tape = Tape(program, inputs, program.tensors)
        tape.advance(first)
        found = torch.zeros(len(masks), 2, dtype=torch.float64)
        for number, batch in enumerate(places):
            dense, mask = tape.outputs(number), rows.mask(tape.nodes[-1], batch)
            for row, made in zip(found, masks, strict=True):
                apart = divergence(dense, tape.fork(made).outputs(number), mask, judges[batch])
                row += torch.tensor(apart, dtype=torch.float64)
        for (groups, steps), (total, weight) in zip(keys, shared(found).tolist(), strict=True):
            error = float(subjects.curves[name, groups].damage[steps])
            subjects.expected.setdefault((name, groups), []).append((error, total / max(weight, 1e-300)))
    return without
