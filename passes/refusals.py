"""Say why channels and experts stay that are in no family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fxslim.passes.family import Family, Refusal
from fxslim.passes.incidence import Incidence


def refusals(known: Incidence, families: Sequence[Family], refused: Mapping[int, str]) -> Iterator[Refusal]:
    """Say of every consumer outside the families, and of every producer that several units share, why it stays."""
    sliced = {(piece.tensor, piece.dim) for family in families for piece in family.slices}
    taken = {int(leaf) for family in families for leaf in family.leaves}
    for key in known.keys:
        if key not in known.incoming or key in sliced:
            continue
        rows = known.rows[key]
        distinct = np.unique(rows)
        reason = _why(known, distinct, refused, "channels") or "nothing produces its channels"
        yield Refusal(key[0], len(rows), reason, _produced_by_one(known, distinct))
    for key in known.keys:
        distinct = np.unique(known.rows[key])
        produced = key in known.outgoing and key not in known.incoming and key not in sliced
        if not produced or known.components.pinned[distinct].any():
            continue
        below = {int(leaf) for component in distinct.tolist() for leaf in known.reach[component].indices}
        if below & taken:
            yield Refusal(key[0], len(distinct), "units that go one by one share its channels")


def unrouted(known: Incidence, taken: set[int], refused: Mapping[int, str]) -> Iterator[Refusal]:
    """Say of every product whose results compete to be selected why all experts stay."""
    products = [(key, np.unique(known.rows[key])) for key in known.keys if key in known.outgoing]
    for selection in known.labels.competing:
        own = np.unique(known.components.of[selection.labels.numpy()])
        if selection.count and not set(own.tolist()) & taken:
            for key, rows in products:
                if np.isin(rows, own).all():
                    yield Refusal(key[0], len(known.rows[key]), _why(known, rows, refused, "experts"))


def _why(known: Incidence, distinct: np.ndarray, refused: Mapping[int, str], noun: str) -> str:
    """Say why coordinates stay, or nothing."""
    pinned = [component for component in distinct.tolist() if known.components.pinned[component]]
    if pinned:
        pin = known.components.pins.get(pinned[0])
        return pin.reason if pin is not None else "it meets a constant"
    if len(distinct) == 1:
        return f"all its {noun} go together{known.labels.tied_by(int(distinct[0]))}"
    return next((refused[c] for c in distinct.tolist() if refused.get(c)), "")


def _produced_by_one(known: Incidence, components: np.ndarray) -> bool:
    """Tell whether one linear produces all these channels and this is the only place where they are summed over."""
    owned = np.asarray(known.counts[components].sum(axis=0)).reshape(-1) > 0
    mine = [key for key, own in zip(known.keys, owned.tolist(), strict=True) if own]
    return sum(key in known.outgoing for key in mine) == 1 and sum(key in known.incoming for key in mine) == 1
