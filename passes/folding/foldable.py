"""Which units of a site give their consumers nothing but zeros, or constants that a bias can take up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from fxslim.passes.annotate import Labels, operation
from fxslim.passes.folding.constants import Constants
from fxslim.passes.folding.facts import CONSTANT, COPIES
from fxslim.passes.folding.products import PADDING, pads
from fxslim.passes.rules.movement import MOVES
from fxslim.passes.rules.walk import Use, parameter
from fxslim.passes.slicer import tensor_behind
from fxslim.program import Program
from fxslim.site import Fold, Site, Slice

ZERO, FOLDABLE, BLOCKED, VARIES = 0, 1, 2, 1 << 30
"""Verdicts in ascending order; BLOCKED and above stand for reasons, by number. The worst row decides of its unit."""

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")


@dataclass(frozen=True)
class Still:
    """What the constants of a program say of a site's units.

    Attributes:
        verdict: ZERO, FOLDABLE, a reason from BLOCKED on, or VARIES.  (units,)
        reasons: why constant units stay, by number.
        folds: what biases would take up, if all units went that may go.
    """

    verdict: np.ndarray
    reasons: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = ()

    @property
    def zero(self) -> np.ndarray:
        """Return which units give every consumer zeros.  (units,) bool"""
        found: np.ndarray = self.verdict == ZERO
        return found

    @property
    def gone(self) -> np.ndarray:
        """Return which units may go.  (units,) bool"""
        found: np.ndarray = self.verdict <= FOLDABLE
        return found

    def folding(self, site: Site, gone: np.ndarray) -> tuple[Fold, ...]:
        """Return what biases take up when some units go.  (units,) bool -> folds"""
        made = []
        for fold in self.folds:
            piece = next(p for p in site.slices if (p.tensor, p.dim, p.role) == (fold.tensor, fold.dim, "in"))
            removed = piece.removed(gone)
            pairs = [(row, value) for row, value in zip(fold.rows, fold.values, strict=True) if removed[row]]
            if pairs:
                rows, values = zip(*pairs, strict=True)
                made.append(fold.model_copy(update={"rows": rows, "values": values}))
        return tuple(made)

    def blocked(self, gone: np.ndarray) -> dict[str, int]:
        """Return how many constant units stay for which reason.  (units,) bool -> reason -> count"""
        counts = {reason: int(((self.verdict == BLOCKED + i) & ~gone).sum()) for i, reason in enumerate(self.reasons)}
        return {reason: count for reason, count in counts.items() if count}


def still(program: Program, labels: Labels, constants: Constants, sites: Sequence[Site]) -> dict[str, Still]:
    """Return what is still about sites: site name -> verdicts, only for sites of which something is known."""
    if not constants.facts:
        return {}
    judge = _Judge(program, labels, constants)
    found = {site.name: judge.site(site) for site in sites}
    return {name: own for name, own in found.items() if own is not None}


@dataclass
class _Rows:
    """Verdicts on the rows of a consumer, and what they hold."""

    verdict: np.ndarray
    value: np.ndarray
    biases: tuple[str, ...]


@dataclass
class _Judge:
    program: Program
    labels: Labels
    constants: Constants
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uses: dict[str | None, list[Use]] = {}
        for use in self.labels.contracted:
            self.uses.setdefault(_source(self.program, use.weight), []).append(use)
        self.users: dict[str, set[fx.Node]] = {}
        for node in self.program.graph.nodes:
            name = self.program.tensor_name(node)
            if name is not None:
                self.users.setdefault(name, set()).update(node.users)

    def site(self, site: Site) -> Still | None:
        """Judge a site's units, or return None where all of them vary."""
        if site.groups_stay:
            return None  # a value that is the same for every input differs between experts
        self.reasons = []
        judged = [(piece, self._rows(site, piece)) for piece in site.slices if piece.role == "in"]
        if all((rows.verdict == VARIES).all() for _, rows in judged):
            return None
        verdict = np.zeros(site.units, dtype=np.int64)
        folds: list[Fold] = []
        for piece, rows in judged:
            if piece.direct:
                rows.verdict[_zero(self.program.tensors[piece.tensor], piece.dim)] = ZERO
            owner = piece.owners()
            owned = owner >= 0
            worst = np.zeros(site.units if piece.groups is None else max(piece.groups) + 1, dtype=np.int64)
            np.maximum.at(worst, owner[owned], rows.verdict[owned])
            verdict = np.maximum(verdict, worst if piece.groups is None else worst[list(piece.groups)])
            folds.extend(_folds(piece, rows))
        return Still(verdict, tuple(self.reasons), tuple(folds))

    def _rows(self, site: Site, piece: Slice) -> _Rows:
        """Judge the rows of one consumer over all its calls."""
        components = self.labels.of(piece.tensor, piece.dim, piece.size)
        uses = [*self.uses.get(piece.tensor, ()), *self.uses.get(None, ())]
        uses = [use for use in uses if np.isin(self.labels.components.of[use.labels.numpy()], components).any()]
        rows = _Rows(np.full(piece.size, VARIES), np.zeros(piece.size), ())
        seen = [self._seen(use, piece, components) for use in uses]
        known = [found for found in seen if found is not None]
        if not known or len(known) < len(seen):
            return rows
        name = piece.tensor.removesuffix(".weight")
        name = name.removeprefix(f"{site.module}.") if site.module else name
        touched = np.any([here for _, _, here in known], axis=0)
        states = np.stack([np.where(here, state, -1) for state, _, here in known])
        values = np.stack([value for _, value, _ in known])
        first = np.argmax(states >= 0, axis=0)[None]
        rows.value = np.take_along_axis(values, first, 0)[0]
        constant = touched & ((states == CONSTANT) | (states < 0)).all(axis=0)
        same = constant & ((values == rows.value) | (states < 0)).all(axis=0)
        for number, reason in enumerate(self.constants.reasons):
            lost = (states == 2 + number).any(axis=0) & (states != 0).all(axis=0)
            if lost.any():
                rows.verdict[lost] = self._reason(reason)
        if (constant & ~same).any():
            rows.verdict[constant & ~same] = self._reason(f"{name} is called with different constants")
        rows.verdict[same & (rows.value == 0)] = ZERO
        folded = same & (rows.value != 0)
        if folded.any():
            rows.biases, reason = self._biases(piece, uses, name)
            rows.verdict[folded] = FOLDABLE if rows.biases else self._reason(reason)
        return rows

    def _seen(self, use: Use, piece: Slice, components: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return state and value of the rows that one product sums over, and which rows those are."""
        along = self.constants.along(use)
        if along is None:
            return None
        state, value, here = np.zeros(piece.size, int), np.zeros(piece.size), np.zeros(piece.size, dtype=bool)
        rows = use.labels.numpy() - self.labels.starts[piece.tensor, piece.dim]
        if ((rows < 0) | (rows >= piece.size)).any():  # of a computed weight: only zeros count
            own = self.labels.components.of[use.labels.numpy()]
            here = np.isin(components, own)
            state[here] = np.where(np.isin(components, own[(along[0] != CONSTANT) | (along[1] != 0)]), 0, 1)[here]
            return state, value, here
        state[rows], value[rows], here[rows] = along[0], along[1], True
        return state, value, here

    def _biases(self, piece: Slice, uses: Sequence[Use], name: str) -> tuple[tuple[str, ...], str]:
        """Return the biases of all calls of a consumer, or why nothing can be folded into them."""
        tensor = self.program.tensors[piece.tensor]
        if any(_source(self.program, use.weight) is None for use in uses):
            return (), f"the weight of {name} is computed"
        nodes = {use.node for use in uses}
        found: list[str] = []
        for node in nodes:
            if operation(node) in CONVOLUTIONS and pads(node):
                return (), PADDING
            bias = self.program.tensor_name(_bias(node))
            shape = [size for dim, size in enumerate(tensor.shape[:2]) if dim != piece.dim]
            if bias is None or bias in self.program.constants or list(self.program.tensors[bias].shape) != shape:
                return (), f"{name} has no bias"
            if not self.users[bias] <= nodes:
                return (), f"the bias of {name} is used elsewhere"
            found.append(bias)
        return tuple(sorted(set(found))), ""

    def _reason(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return BLOCKED + self.reasons.index(reason)


def _folds(piece: Slice, rows: _Rows) -> Iterable[Fold]:
    chosen = np.flatnonzero(rows.verdict == FOLDABLE)
    for bias in rows.biases if len(chosen) else ():
        yield Fold(tensor=piece.tensor, dim=piece.dim, bias=bias, rows=tuple(chosen.tolist()),
                   values=tuple(rows.value[chosen].tolist()))  # fmt: skip


def _bias(node: fx.Node) -> object:
    """Return what a product adds to every row of its result."""
    name = operation(node)
    if name == "aten.addmm":
        scaled = parameter(node, "beta", 3, 1) != 1 or parameter(node, "alpha", 4, 1) != 1
        return None if scaled else node.args[0]
    return parameter(node, "bias", 2) if name in ("aten.linear", *CONVOLUTIONS) else None


def _source(program: Program, node: fx.Node | None) -> str | None:
    """Return the tensor of the model that a value is, at most moved or cast."""
    return tensor_behind(program, node, (*MOVES, *COPIES))


def _zero(tensor: torch.Tensor, dim: int) -> np.ndarray:
    """Return which rows of a dimension are zero.  (size,) bool"""
    found: np.ndarray = ~(tensor.detach().movedim(dim, 0).flatten(1) != 0).any(dim=1).cpu().numpy()
    return found
