"""What values flow through: steps that a view reports, and walks back through them.

What an operation means is not known here. A :class:`View` reports linears, attentions and, for every other operation
that a value may flow through, a :class:`Step`. A walk back through steps ends in *sources*; it is deterministic and
remembered per node, so that it costs about as much as the nodes it looks at.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Protocol

from torch import fx


class Via(Flag):
    """What an operation does to the values that flow through it."""

    NOTHING = 0
    MOVE = auto()
    """Data movement, casts, dropout, and picking a piece."""
    JOIN = auto()
    """Several values side by side: cat, stack."""
    AFFINE = auto()
    """Elementwise and linear in what flows: scales, shifts, masks, sums."""
    PRODUCT = auto()
    """Elementwise product of two values that flow."""
    CURVE = auto()
    """Elementwise and not linear."""
    NORM = auto()
    """Norms and the reductions they are made of."""


POINTWISE = Via.MOVE | Via.AFFINE | Via.PRODUCT | Via.CURVE
BENDING = Via.PRODUCT | Via.CURVE


@dataclass(frozen=True, slots=True)
class Edge:
    """One operand of a step.

    Attributes:
        node: the operand.
        piece: which part of it is taken; None for all of it.
        curved: whether the operand passes a curve on its way into a product (the gate half of ``glu``).
    """

    node: fx.Node
    piece: Hashable = None
    curved: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """An operation that a value may flow through; ``edges`` leave side inputs (masks, tables, constants) out."""

    via: Via
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class LinearView:
    """Any node that multiplies an activation by a parameter matrix.

    Attributes:
        node: the node.
        input: the activation.
        weight: canonical name of the matrix (of the whole tensor, also where a slice of it is used).
        bias: canonical name of the bias, if there is one and it is a tensor of the model.
        in_dim: dimension of the stored weight that is contracted with the activation.
        out_dim: dimension of the stored weight that the output carries.
    """

    node: fx.Node
    input: fx.Node
    weight: str
    bias: str | None
    in_dim: int
    out_dim: int


@dataclass(frozen=True, slots=True)
class AttendView:
    """Any node that computes softmax(Q·Kᵀ)·V; ``form`` is ``"sdpa"`` or ``"explicit"``."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    form: str


class View(Protocol):
    """Canonical views of a graph: all that patterns know about operations."""

    def linear(self, node: fx.Node) -> LinearView | None:
        """Return the node as a linear, or None."""

    def attend(self, node: fx.Node) -> AttendView | None:
        """Return the node as an attention, or None."""

    def step(self, node: fx.Node) -> Step | None:
        """Return the node as something that values flow through, or None where every walk ends."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a walk ended: a node, and which piece of it flows (outermost choice last)."""

    node: fx.Node
    piece: tuple[Hashable, ...] = ()


@dataclass(frozen=True, slots=True)
class Region:
    """What lies between a value and its sources.

    Attributes:
        sources: where the walk ended, without repetition.
        crossed: everything that was passed on the way.
        bend: the operation nearest to the value that is not linear, if any.
    """

    sources: tuple[Source, ...]
    crossed: Via = Via.NOTHING
    bend: fx.Node | None = None


class Walk:
    """Walk back from values through the allowed steps, each node once.

    Values that are brought together elementwise must have the same sources; otherwise the walk ends there.

    Args:
        view: what operations mean.
        allowed: steps to walk through.
        pieces: whether pieces of one value (chunks, slices) are different sources.
    """

    def __init__(self, view: View, allowed: Via, pieces: bool) -> None:
        self._view = view
        self._allowed = allowed
        self._pieces = pieces
        self._regions: dict[fx.Node, Region] = {}

    def step(self, node: fx.Node) -> Step | None:
        """Return the step at a node if this walk may take it."""
        if self._view.linear(node) is not None:
            return None
        step = self._view.step(node)
        return step if step is not None and step.edges and step.via in self._allowed else None

    def region(self, node: fx.Node) -> Region:
        """Return what lies behind a node (a loop, not a recursion: residual streams are long)."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current not in self._regions:
                step = self.step(current)
                missing = [edge.node for edge in step.edges if edge.node not in self._regions] if step else []
                if missing:
                    pending.extend(missing)
                    continue
                self._regions[current] = self._merge(current, step) if step else Region((Source(current),))
            pending.pop()
        return self._regions[node]

    def through(self, edge: Edge, into: fx.Node) -> Region:
        """Return what lies behind one operand of ``into``."""
        region = self.region(edge.node)
        sources, crossed, bend = region.sources, region.crossed, region.bend
        if self._pieces and edge.piece is not None:
            sources = tuple(Source(source.node, (*source.piece, edge.piece)) for source in sources)
        if edge.curved:
            crossed, bend = crossed | Via.CURVE, bend or into
        return Region(sources, crossed, bend)

    def mixes(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the values that made the walk end at a node that it could otherwise have passed."""
        step = self.step(node)
        return tuple(dict.fromkeys(edge.node for edge in step.edges)) if step else ()

    def _merge(self, node: fx.Node, step: Step) -> Region:
        behind = [self.through(edge, node) for edge in step.edges]
        first = behind[0]
        if step.via is Via.JOIN:
            first = Region(tuple(dict.fromkeys(source for region in behind for source in region.sources)))
        elif any(set(region.sources) != set(first.sources) for region in behind[1:]):
            return Region((Source(node),))
        crossed, bend = step.via, node if step.via in BENDING else None
        for region in behind:
            crossed, bend = crossed | region.crossed, bend or region.bend
        return Region(first.sources, crossed, bend)
