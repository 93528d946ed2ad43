"""Look at consumers while the calibration data flows: sums of what they read, gradients of their masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from fxslim.errors import InputError
from fxslim.passes.fitting.consumers import Call, Consumer
from fxslim.passes.fitting.moments import Sums
from fxslim.passes.fitting.outputs import draw_of, loss
from fxslim.passes.fitting.processes import shared
from fxslim.passes.fitting.sequences import Rows
from fxslim.passes.fitting.tape import Tape


def flat(value: Tensor, axis: int) -> Tensor:
    """Return rows of channels.  (..., channels, ...) -> (rows, channels)"""
    moved = value.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def sums(
    tape: Tape, consumer: Consumer, rows: Rows, dense: Tape | None, outputs: int, others: Sequence[Consumer] = ()
) -> Sums:
    """Add up what a consumer reads over all its calls; both tapes stand at its first call afterwards.

    With a dense tape, the targets are what brings the residual stream back to the dense model's:
    ``x W + [(h_dense + x_dense W) - (h + x W)]`` (KPrune, Park et al. 2024, section 4.2); where no residual stream can
    be seen, what the dense model computes there. Without one there are no targets. Others that read the same, call by
    call, have their targets beside it.
    """
    first = consumer.calls[0].node
    tape.advance(first)
    if dense is not None:
        dense.advance(first)
    ahead = tape.fork() if len(consumer.calls) > 1 else tape
    beside = dense.fork() if dense is not None and len(consumer.calls) > 1 else dense
    total = Sums(len(consumer.owner), outputs, tape.tensors[consumer.weight].device)
    in_order = [sorted(one.calls, key=lambda call: tape.place(call.node)) for one in (consumer, *others)]
    for calls in zip(*in_order, strict=True):
        call = calls[0]
        ahead.advance(call.node)
        if beside is not None:
            beside.advance(call.node)
        for batch in range(len(ahead.values)):
            x, t = _pair(ahead, beside, calls, batch)
            counts, judged = rows.of(call.node, batch, len(x), x.device)
            weights = rows.weights[call.node][batch][counts] if call.node in rows.weights else None
            total.add(x[counts], t[counts], judged, weights, rows.copied(batch, len(x), x.device)[counts])
    total.share()
    if not all(bool(own.isfinite().all()) for own in (total.xx, total.xt)):
        raise InputError(f"what {consumer.weight} reads is NaN or infinite on some calibration batch; take it out.")
    return total


def _pair(tape: Tape, dense: Tape | None, calls: Sequence[Call], batch: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of calls that read the same."""
    call = calls[0]
    x = flat(tape.values[batch][call.input], call.axis)
    if dense is None:
        return x, x[:, :0]
    wanted = torch.cat([flat(dense.peek(one.node, batch), one.axis) for one in calls], dim=1)
    if all(tape.holds(node) and dense.holds(node) for node in call.residual):
        for node in call.residual:
            mine, theirs = (flat(own.values[batch][node], call.axis) for own in (tape, dense))
            if mine.shape == wanted.shape:
                wanted = wanted + (theirs - mine)
    return x, wanted


@dataclass(frozen=True)
class Gradients:
    """Gradients of a site's masks over samples: mean absolute value and mean square.  (units,) each"""

    first: np.ndarray
    second: np.ndarray


def gradients(
    tape: Tape, reads: Mapping[str, tuple[int, Sequence[Consumer]]], rows: Rows, *, seed: int
) -> Iterator[tuple[str, Gradients]]:
    """Differentiate the loss of every sample by the mask of every unit.

    Args:
        tape: the dense model, at its start.
        reads: site -> number of units, consumers.
        rows: which rows count.
        seed: for what is drawn.
    """
    read: dict[fx.Node, fx.Node] = {}
    place: dict[fx.Node, tuple[str, Consumer, Call]] = {}
    for name, (_, own) in reads.items():
        for consumer in own:
            for call in consumer.calls:
                read[call.node], place[call.node] = call.input, (name, consumer, call)
    first = {name: torch.zeros(units, dtype=torch.float64) for name, (units, _) in reads.items()}
    second = {name: torch.zeros(units, dtype=torch.float64) for name, (units, _) in reads.items()}
    count = torch.zeros(1, dtype=torch.float64)
    for batch, given in enumerate(rows.batches):
        samples = max(given.rows, 1)
        masks = {name: torch.ones(samples, units, requires_grad=True) for name, (units, _) in reads.items()}

        def masked(node: fx.Node, value: Tensor, masks: Mapping[str, Tensor] = masks) -> Tensor:
            name, consumer, call = place[node]
            return _masked(value, masks[name], consumer, call.axis)

        with torch.enable_grad():
            output = tape.finish(batch, masked, read)
            own_loss = _of_gradient(
                loss(output, rows.mask(list(tape.nodes)[-1], batch), given.labels, draw_of(given.inputs, seed))
            )
            found = torch.autograd.grad(own_loss, list(masks.values()), allow_unused=True)
        for name, gradient in zip(masks, found, strict=True):
            if gradient is not None:
                first[name] += gradient.double().abs().sum(0)
                second[name] += gradient.double().square().sum(0)
        count += samples
    for tensor in (count, *first.values(), *second.values()):
        shared(tensor)
    for name in reads:
        yield name, Gradients((first[name] / count).numpy(), (second[name] / count).numpy())


def _of_gradient(own: Tensor) -> Tensor:
    if not own.requires_grad or not own.isfinite():
        raise InputError(
            "methods that score by gradients need finite outputs that have one; take method='obs' or 'wanda'."
        )
    return own


def _masked(value: Tensor, mask: Tensor, consumer: Consumer, axis: int) -> Tensor:
    """Multiply what a consumer reads by its units' masks, each sample by its own."""
    owner = torch.from_numpy(consumer.owner)
    whole = torch.where(owner >= 0, mask[:, owner.clamp_min(0)], 1.0).to(value)  # (samples, in)
    moved = value.movedim(axis, -1)
    if moved.shape[0] % len(mask):
        return (moved * whole.mean(0)).movedim(-1, axis)
    grouped = moved.reshape(len(mask), -1, moved.shape[-1]) * whole[:, None]
    return grouped.reshape(moved.shape).movedim(-1, axis)
