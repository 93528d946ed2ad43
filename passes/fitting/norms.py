"""Fit the factors of norms: what they scale is not quite what the dense model has there any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxslim.passes.fitting.observe import flat
from fxslim.passes.fitting.processes import shared
from fxslim.passes.fitting.sequences import Rows
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.steps import name_of
from fxslim.program import Program, shape_of


@dataclass(frozen=True)
class Norm:
    """A factor for every channel, and perhaps a bias, of which nothing else in the graph makes use.

    Attributes:
        node: what is scaled.
        weight: canonical name of the factors.  (channels,)
        bias: canonical name of the bias, or None.  (channels,)
    """

    node: fx.Node
    weight: str
    bias: str | None

    def plain(self, tape: Tape, batch: int) -> Tensor:
        """Return what is scaled, before it is.  (rows, channels)"""
        if name_of(self.node) == "mul":
            (read,) = (n for n in self.node.all_input_nodes if tape.program.tensor_name(n) is None)
            return flat(tape.values[batch][read], -1)
        x, shape, _, _, *eps = self.node.args
        normed = functional.layer_norm(tape.values[batch][x], list(shape), None, None, *eps[:1])  # type: ignore[index,arg-type]
        return flat(normed, -1)


def norms(program: Program) -> tuple[Norm, ...]:
    """Return the layer norms and the products with one factor for each channel, in the order of execution."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or name_of(node) not in ("layer_norm", "mul"):
            continue
        shape = shape_of(node)
        read = [n for n in node.all_input_nodes if program.tensor_name(n) is not None]
        names = [str(program.tensor_name(n)) for n in read]
        if len(shape) < 2 or any(len(n.users) > 1 for n in read):
            continue
        if any(not isinstance(t, nn.Parameter) or t.shape != shape[-1:] for t in map(program.tensors.get, names)):
            continue
        if name_of(node) == "layer_norm" and len(node.args) >= 4 and len(set(names)) == 2:
            found.append(Norm(node, *names))
        elif name_of(node) == "mul" and len(names) == 1 and len(node.all_input_nodes) == 2:
            (other,) = (n for n in node.all_input_nodes if program.tensor_name(n) is None)
            if shape_of(other) == shape:
                found.append(Norm(node, names[0], None))
    return tuple(found)


def refit_norm(norm: Norm, mine: Tape, dense: Tape, rows: Rows) -> dict[str, Tensor]:
    """Return factors and bias with which the narrowed model comes closest to the dense one, channel by channel.

    Least squares of one factor (and one bias) for each channel: ``w = cov(z, y) / var(z)``. Nothing is returned where
    that does not help on the sequences that judge.
    """
    mine.advance(norm.node)
    dense.advance(norm.node)
    sums: list[Tensor] = []
    for batch in range(len(mine.values)):
        z, y = norm.plain(mine, batch), flat(dense.peek(norm.node, batch), -1)
        counts, judged = rows.of(norm.node, batch, len(z), z.device)
        z, y = z[counts].double(), y[counts].double()
        own = torch.stack([torch.ones_like(z), z, y, z * z, z * y, y * y])
        sums.append(torch.stack([own[:, ~judged].sum(1), own[:, judged].sum(1)]))
    total = shared(torch.stack(sums).sum(0))  # (2, 6, channels)
    weight = mine.tensors[norm.weight]
    bias = mine.tensors[norm.bias] if norm.bias is not None else None
    old = weight.detach().double(), torch.zeros_like(weight).double() if bias is None else bias.detach().double()
    found = _line(total[0], old[0], centred=bias is not None)
    if not bool(_error(total[1], *found).sum() < _error(total[1], *old).sum()):
        return {}
    slope, shift = _line(total.sum(0), old[0], centred=bias is not None)
    return {norm.weight: slope.to(weight)} | ({str(norm.bias): shift.to(bias)} if bias is not None else {})


def _line(total: Tensor, old: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return slope and shift of the best line for each channel; the old slope where nothing varies.

    (6, channels), (channels,) -> (channels,), (channels,)
    """
    n, z, y, zz, zy, _ = total / total[0].clamp_min(1.0)
    ridge = 1e-6 * zz.mean().clamp_min(1e-12)
    if not centred:
        return (zy + ridge * old) / (zz + ridge), torch.zeros_like(z)
    slope = (zy - z * y + ridge * old) / ((zz - z * z).clamp_min(0.0) + ridge)
    return slope, (y - slope * z) * n.clamp(0, 1)


def _error(total: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """Return the sum of squares that a line leaves, for each channel."""
    n, z, y, zz, zy, yy = total
    found: Tensor = yy - 2 * slope * zy - 2 * shift * y + slope**2 * zz + 2 * slope * shift * z + n * shift**2
    return found


def between(found: Mapping[int, Norm], start: int, end: int) -> list[Norm]:
    """Return the norms whose place is from ``start`` up to ``end``, in their order."""
    return [found[place] for place in sorted(found) if start <= place < end]
