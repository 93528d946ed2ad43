"""Loosen what meets data that has to stay: the data is gathered there, and the rest may lose channels.

What a norm ties, or what is returned, stays whole: a residual stream, what gates of several layers are made of. Where
it meets other data element by element, that data would have to stay as well. But the result needs no more of it than
its own consumers read, so that the data can be gathered at that operation, if

* no component of the data can go: all are pinned, or they are one (a value never loses all its coordinates), and
* something of the result can, and of another operand, which some product with a parameter makes.

Data that is gathered is pinned: it must not lose what the result keeps. Nothing is gathered for the sake of experts:
where a module cannot do that, there is nothing that could stay in an expert's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fxslim.labels import Components, Meeting, Relations, solve


def loosen(
    relations: Relations,
    tied: Sequence[tuple[int, str]] = (),
    *,
    made: Sequence[torch.Tensor] = (),
    whole: Sequence[torch.Tensor] = (),
) -> Components:
    """Decide which operands are gathered where they meet others, and solve the relations.

    Ensures: what could go without it still can.

    Args:
        relations: the relations; what is gathered, and its pins, are added to them.
        tied: (a label, the operation) where coordinates were tied along an axis, to say why data stays.
        made: labels of what products with parameters make.
        whole: labels of coordinates for the sake of which nothing is gathered: experts that compete.
    """
    components = solve(relations)
    loose = [i for i, meeting in enumerate(relations.meetings) if _stays(components, meeting.result)]
    gathered = {(i, j) for i in loose for j in relations.meetings[i].whole}
    while gathered:
        relations.gathered = frozenset(gathered)
        found = solve(relations)
        barred, makes = _marked(found, whole), _below(found, _marked(found, made))
        kept = {(i, j) for i, j in gathered if _may(found, relations.meetings[i], j, barred, makes)}
        if kept == gathered:
            break
        gathered = kept
    relations.gathered = frozenset(gathered)
    if not gathered:
        return components
    names = {int(components.of[label]): name for label, name in reversed(tied)}
    for i, j in sorted(gathered):
        meeting = relations.meetings[i]
        for own in meeting.operands[j : j + 1]:
            by = names.get(int(components.of[int(own.reshape(-1)[0])]))
            reason = "all its channels go together" + (f" (tied by {by})" if by else "")
            relations.pin(own, relations.pin_label(reason, meeting.node))
    return solve(relations)


def _may(found: Components, meeting: Meeting, j: int, barred: np.ndarray, makes: np.ndarray) -> bool:
    """Tell whether an operand is still to be gathered: it has to stay, the result does not, and something makes it."""
    if _stays(found, meeting.result) or barred[_components(found, meeting.result)].any():
        return False
    if j < len(meeting.operands) and not _stays(found, meeting.operands[j]):
        return False
    every = (*meeting.operands, *meeting.others)
    return any(not _stays(found, own) and makes[_components(found, own)].any() for own in every)


def _marked(components: Components, every: Sequence[torch.Tensor]) -> np.ndarray:
    """Return which components some labels belong to.  (components,) bool"""
    marked = np.zeros(len(components.pinned), dtype=bool)
    for labels in every:
        marked[_components(components, labels)] = True
    return marked


def _below(components: Components, marked: np.ndarray) -> np.ndarray:
    """Return the marked components and everything below them.  (components,) bool"""
    while len(components.edges):
        more = marked.copy()
        more[components.edges[marked[components.edges[:, 0]], 1]] = True
        if bool((more == marked).all()):
            break
        marked = more
    return marked


def _stays(components: Components, labels: torch.Tensor) -> bool:
    """Tell whether nothing of a value can go: all of it is pinned, or it is a single component."""
    own = _components(components, labels)
    return len(own) == 1 or bool(components.pinned[own].all())


def _components(components: Components, labels: torch.Tensor) -> np.ndarray:
    own: np.ndarray = np.unique(components.of[labels.reshape(-1).numpy()])
    return own
