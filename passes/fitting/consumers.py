"""Where a site is summed over: its consumers' calls in the graph, what they read, and what their results join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxslim.flow import LinearView
from fxslim.passes.annotate import operation
from fxslim.passes.steps import COPIES, RESHAPES, TRANSPOSES, name_of
from fxslim.passes.views import CONVOLUTIONS, Views
from fxslim.program import Program, shape_of
from fxslim.site import Site, Slice

CARRIES = ("view", "reshape", "_unsafe_view", "dropout", "clone", "contiguous", "to", "_to_copy", "alias", "detach")
"""Operations that hand a sum of channels on as it is, to where it is added."""


@dataclass(frozen=True)
class Call:
    """One call of a consumer.

    Attributes:
        node: the product.
        input: what it reads.
        axis: the axis of what it reads that is summed over; the same axis of its result holds its outputs.
        residual: what the result is added to, already there when the product is made: the residual stream, and what
            parallel branches have made before. Empty where that cannot be seen.
    """

    node: fx.Node
    input: fx.Node
    axis: int
    residual: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Consumer:
    """A matrix that sums over a site's units.

    Attributes:
        weight: canonical name of the matrix.
        bias: canonical name of its bias, or None.
        dim: the dimension of the stored weight that is summed over.
        owner: unit of every input, -1 where it stays.  (in,)
        calls: every call of it, in the order of execution.
    """

    weight: str
    bias: str | None
    dim: int
    owner: np.ndarray
    calls: tuple[Call, ...]

    def matrix(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight with the inputs first.  (in, out), float64"""
        weight = tensors[self.weight].detach().movedim(self.dim, 0)
        return weight.reshape(weight.shape[0], -1).double()

    def stored(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Lay a matrix out as the weight is stored.  (in, out) -> like"""
        moved = like.detach().movedim(self.dim, 0)
        return matrix.to(like).reshape(moved.shape).movedim(0, self.dim).contiguous()

    def columns(self, units: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the inputs that units own, those that nobody owns left out.  Ascending."""
        return np.flatnonzero(np.isin(self.owner, np.asarray(units, dtype=np.int64)) & (self.owner >= 0))


def consumers(program: Program, views: Views, site: Site) -> tuple[Consumer, ...] | str:
    """Return a site's consumers, or why their inputs cannot be seen as rows of numbers."""
    found: list[Consumer] = []
    for piece in site.slices:
        if piece.role != "in":
            continue
        if piece.lead is not None or not piece.direct:
            return "its consumer holds a matrix for each expert, or is computed from other weights"
        calls = [view for view in views.linears.values() if view.weight == piece.tensor and view.in_dim == piece.dim]
        if not calls:
            return f"{piece.tensor} is not used as one matrix"
        reason = _misfit(program, piece, calls) or _read_elsewhere(program, calls, piece.tensor, calls[0].bias)
        if reason:
            return reason
        before = next((one for one in found if one.weight == piece.tensor and one.dim == piece.dim), None)
        owner = piece.owners()
        if before is not None:
            found[found.index(before)] = _joined(before, owner)
            continue
        read = tuple(Call(view.node, view.input, _axis(view.node), residual(view.node)) for view in calls)
        found.append(Consumer(piece.tensor, calls[0].bias, piece.dim, owner, read))
    return tuple(found) if found else "nothing sums over it"


def producers(program: Program, views: Views, site: Site) -> tuple[Consumer, ...]:
    """Return the matrices that make a site's units of something, as consumers of all of it; parts of matrices not."""
    found: dict[str, Consumer] = {}
    for piece in site.slices:
        if piece.role != "out" or piece.lead is not None or piece.tensor in found:
            continue
        calls = [view for view in views.linears.values() if view.weight == piece.tensor and view.out_dim == piece.dim]
        if not calls or any(view.bias != calls[0].bias for view in calls):
            continue
        shape, dim = program.tensors[piece.tensor].shape, calls[0].in_dim
        widths = {shape_of(view.input)[_axis(view.node)] for view in calls}
        whole = widths == {shape[dim]} and all(view.in_dim == dim for view in calls)
        if whole and len(shape) == 2 and not _read_elsewhere(program, calls, piece.tensor, calls[0].bias):
            read = tuple(Call(view.node, view.input, _axis(view.node), ()) for view in calls)
            found[piece.tensor] = Consumer(piece.tensor, calls[0].bias, dim, np.full(shape[dim], -1), read)
    return tuple(found.values())


def _misfit(program: Program, piece: Slice, calls: Sequence[LinearView]) -> str:
    shape = program.tensors[piece.tensor].shape
    for view in calls:
        value = view.input.meta.get("val")
        if not isinstance(value, torch.Tensor) or int(value.shape[_axis(view.node)]) != shape[piece.dim]:
            return f"only a part of {piece.tensor} is used at once"
        if view.bias != calls[0].bias:
            return f"{piece.tensor} is used with several biases"
    return ""


def _read_elsewhere(program: Program, calls: Sequence[LinearView], *names: str | None) -> str:
    """Say whether anything but these calls reads a tensor: tied ones cannot be fitted for one of their uses."""
    products = {view.node for view in calls}
    for name in names:
        placeholders = program.graph.find_nodes(op="placeholder")
        pending = [n for n in placeholders if name is not None and program.tensor_name(n) == name]
        while pending:
            for user in pending.pop().users:
                if user in products:
                    continue
                if name_of(user) not in COPIES | TRANSPOSES | RESHAPES:
                    return f"{name} is read by {user.target} as well"
                pending.append(user)
    return ""


def _joined(one: Consumer, owner: np.ndarray) -> Consumer:
    return Consumer(one.weight, one.bias, one.dim, np.where(one.owner >= 0, one.owner, owner), one.calls)


def _axis(node: fx.Node) -> int:
    return 1 if name_of(node) in CONVOLUTIONS else -1


def residual(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return everything that a result is added to and that was there before: the residual stream and earlier branches.

    Sums with what is computed later (parallel branches) are passed through; anything else that is done to the result
    on the way, such as a norm, or a second reader, ends the walk.
    """
    current = node
    found: list[fx.Node] = []
    while True:
        users = [user for user in current.users if user.op == "call_function" and operation(user) != "aten.sym_size"]
        if len(users) != 1:
            return tuple(found)
        (user,) = users
        if name_of(user) in CARRIES and user.args[0] is current:
            current = user
            continue
        if name_of(user) not in ("add", "add_") or len(user.args) != 2 or user.kwargs:
            return tuple(found)
        other = user.args[1] if user.args[0] is current else user.args[0]
        if not isinstance(other, fx.Node) or other is current:
            return tuple(found)
        if other < node and other.op == "call_function":
            if not _same(other, user):
                return tuple(found)
            found.append(other)
        current = user


def _same(one: fx.Node, other: fx.Node) -> bool:
    first, second = one.meta.get("val"), other.meta.get("val")
    return isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and first.shape == second.shape
