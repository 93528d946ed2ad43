"""How much the model's output depends on what its consumers return: token by token, and direction by direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxslim.lazy import Lazy
from fxslim.passes.fitting.consumers import Call, Consumer
from fxslim.passes.fitting.observe import flat
from fxslim.passes.fitting.outputs import draw_of, loss, size
from fxslim.passes.fitting.processes import shared
from fxslim.passes.fitting.sequences import Rows
from fxslim.passes.fitting.tape import Tape
from fxslim.program import shape_of

FLOOR = 0.1
"""Least weight of a token, relative to the mean: what one output ignores may matter to another."""
MOST_NUMBERS = 1 << 28
"""Numbers of all metrics together up to which directions are told apart, and not only channels."""


@dataclass(frozen=True)
class Sensitivity:
    """Gauss-Newton curvature of the model's output, with respect to what consumers return.

    An error ``d`` of a consumer costs about ``(dᵀ g)²``, ``g`` being the gradient of a loss of the output. It is split
    into a weight for every token and a metric that all tokens share (as by Martens & Grosse 2015, section 3).

    Attributes:
        weights: call of a consumer -> the weight of every row of every batch, one on average.  (rows,) each
        roots: weight of a consumer -> ``L`` of the metric ``L Lᵀ``, or its diagonal: errors that are measured in it add
            up to what the output loses, as `fxslim.passes.fitting.outputs.size` counts it.  (out, out) or (out,)
    """

    weights: Mapping[fx.Node, Sequence[Tensor]] = field(default_factory=dict)
    roots: Mapping[str, Tensor] = field(default_factory=dict)


def sensitivity(tape: Tape, consumers: Sequence[Consumer], rows: Rows, *, seed: int) -> Sensitivity:
    """Differentiate a loss of the output by what every consumer returns, once for every batch.

    The weight of a token is the norm of its gradient, not its square: a few tokens would be all that counts.

    Args:
        tape: the dense model, at its start.
        consumers: the consumers.
        rows: which rows count.
        seed: for what is drawn.
    """
    if not consumers:
        return Sensitivity()
    called = {call.node: (one, call) for one in consumers for call in one.calls}
    full = sum(_outputs(one) ** 2 for one in consumers) <= MOST_NUMBERS
    norms: dict[fx.Node, list[Tensor]] = {node: [] for node in called}
    squares: dict[str, Tensor] = {}
    whole = torch.zeros(1, dtype=torch.float64)
    detached = not isinstance(tape.tensors, Lazy) and any(tensor.is_inference() for tensor in tape.tensors.values())
    for batch, given in enumerate(rows.batches):
        made = None if detached else _gradients(tape, called, rows, batch, draw_of(given.inputs, seed))
        if made is None:
            break
        found, of = made
        whole += of
        for node, gradient in found.items():
            consumer, call = called[node]
            own = flat(gradient, call.axis).float()
            counts, _ = rows.of(node, batch, len(own), own.device)
            own = own * counts[:, None]
            norms[node].append(own.square().sum(1).sqrt())
            square = (own.T @ own if full else own.square().sum(0)).double()
            squares[consumer.weight] = squares.get(consumer.weight, torch.zeros_like(square)) + square
    missing = torch.tensor(float(made is None))
    if shared(missing):  # in any of the processes: then in all of them
        return Sensitivity()
    scale = float(shared(whole).clamp_min(1e-300))
    roots = {name: _root(shared(square) / scale) for name, square in squares.items()}
    return Sensitivity(_weights(norms, called, rows), roots)


def _outputs(consumer: Consumer) -> int:
    return shape_of(consumer.calls[0].node)[consumer.calls[0].axis]


def _gradients(
    tape: Tape, called: Mapping[fx.Node, tuple[Consumer, Call]], rows: Rows, batch: int, generator: torch.Generator
) -> tuple[dict[fx.Node, Tensor], float] | None:
    """Return the gradient of one batch's loss by the value of every call, and the size of its output.

    None where the output has no gradient: it holds no finite floating-point numbers, is detached, or an operation has
    none.
    """
    added: dict[fx.Node, Tensor] = {}

    def after(node: fx.Node, value: Tensor) -> Tensor:
        if node not in called:
            return value
        added[node] = torch.zeros_like(value, requires_grad=True)
        return value + added[node]

    with torch.enable_grad():
        output = tape.finish(batch, after=after)
        mask = rows.mask(tape.nodes[-1], batch)
        total = loss(output, mask, rows.batches[batch].labels, generator)
        if not total.requires_grad or not total.isfinite():
            return None
        try:
            found = torch.autograd.grad(total, list(added.values()), allow_unused=True)
        except NotImplementedError:
            return None
    pairs = zip(added, found, strict=True)
    return {node: torch.zeros_like(added[node]) if g is None else g for node, g in pairs}, size(output, mask)


def _weights(
    found: Mapping[fx.Node, Sequence[Tensor]], called: Mapping[fx.Node, tuple[Consumer, Call]], rows: Rows
) -> dict[fx.Node, tuple[Tensor, ...]]:
    """Return weights that are one on average over the rows that count."""
    made = {}
    for node, norms in found.items():
        sizes = torch.zeros(2, dtype=torch.float64)
        for batch, own in enumerate(norms):
            counts, _ = rows.of(node, batch, len(own), own.device)
            sizes += torch.tensor([float(own.double().sum()), float(counts.sum())], dtype=torch.float64)
        sizes = shared(sizes)
        mean = float(sizes[0] / sizes[1].clamp_min(1.0))
        if mean > 0 and mean < float("inf"):
            made[node] = tuple((own / mean).clamp_min(FLOOR) for own in norms)
    return made


def _root(square: Tensor) -> Tensor:
    """Return the root of a metric; a little of the identity keeps it regular."""
    mean = float((square if square.ndim == 1 else square.diagonal()).mean()) or 1.0
    if square.ndim == 1:
        return (square + 1e-6 * mean).sqrt()
    values, vectors = torch.linalg.eigh(square / mean)
    root: Tensor = vectors * (values.clamp_min(0.0) + 1e-6).sqrt() * mean**0.5
    return root
