"""What stands for a cut in the dense graph: zeros in what a product reads, minus infinity where something competes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxslim.errors import NarrowError
from fxslim.passes.annotate import Labels, operation
from fxslim.passes.cut import Cut
from fxslim.passes.rows import cleared
from fxslim.passes.rules.walk import Use
from fxslim.program import Program
from fxslim.site import SitePlan


@dataclass(frozen=True)
class Mask:
    """Coordinates of what an operation reads that stand for what goes.

    Attributes:
        node: the operation.
        source: what it reads.
        gone: which coordinates; its axes are aligned with the source's at the last one.
        value: what stands there: zero, or minus infinity where the coordinates compete to be selected.
        use: the parameter that meets them, where they are summed over.
    """

    node: fx.Node
    source: fx.Node
    gone: torch.Tensor
    value: float
    use: Use | None = None


@dataclass(frozen=True)
class Masks:
    """All masks of a cut.

    Attributes:
        inputs: operation -> masks of what it reads.
        tensors: canonical name -> consumers with zero columns, for what differs between experts.
    """

    inputs: Mapping[fx.Node, tuple[Mask, ...]] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def is_apart(part: SitePlan) -> bool:
    """Tell whether rows of a site differ between experts: no coordinate of an activation stands for them."""
    return any(piece.lead is not None for piece in part.site.slices)


def masks(program: Program, labels: Labels, cut: Cut, parts: Sequence[SitePlan] = ()) -> Masks:
    """Return the masks of a cut.

    Args:
        program: the program.
        labels: its labels.
        cut: what the masks take.
        parts: what that is at the sites.

    Raises:
        NarrowError: there is no place for a mask.
    """
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for part in parts:
            tensors |= cleared(program.tensors, tensors, part) if is_apart(part) else {}
    inputs: dict[fx.Node, tuple[Mask, ...]] = {}
    for mask in (*_summed(labels, cut), *_selected(labels, cut)):
        inputs[mask.node] = (*inputs.get(mask.node, ()), mask)
    return Masks(inputs, tensors)


def _summed(labels: Labels, cut: Cut) -> Iterator[Mask]:
    for use in labels.contracted:
        gone = torch.from_numpy(cut.removed[labels.components.of[use.labels.numpy()]])
        if not bool(gone.any()):
            continue
        if use.activation is None or use.axis is None:
            raise NarrowError(f"no place for a mask at {use.node.name} ({operation(use.node)})")
        rank = use.activation.meta["val"].ndim
        yield Mask(use.node, use.activation, gone.reshape(-1, *[1] * (rank - 1 - use.axis % rank)), 0.0, use)


def _selected(labels: Labels, cut: Cut) -> Iterator[Mask]:
    for one in labels.selections:
        gone = torch.from_numpy(cut.removed[labels.components.of[one.labels.numpy()]])
        if bool(gone.any()):
            yield Mask(one.node, one.source, gone, float("-inf"))
