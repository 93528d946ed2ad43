"""What is found: families of coordinates that go together, and what stays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxslim.site import Slice


@dataclass(frozen=True)
class Family:
    """Leaf components that play the same part: the smallest pieces of one site.

    Attributes:
        leaves: components, ordered by where they lie in the consumer.  (L,)
        members: the leaves and every component above that stands for a part of them alone.
        unit_of: leaf -> unit.  (L,)
        groups: unit -> group, or None where any units may go.
        slices: what follows the units.
        scored: whether the units are the heads of a score product (query times key).
        heads_refused: why the heads do not go where the units are smaller than they; "" elsewhere.
        multiple: the number of units that are left (of one expert) has to be a multiple of this.
        experts: in how many experts the leaves are counted; units are those of the first, of the second, ….
        routers: the weights whose products say which units are selected, where units are whole experts.
        across: whether the units are channels that all units of another family of the same leaves share.
        least: how many units (of every group) have to stay.
        stays: whether something of every group has to stay: what a group stands for is read elsewhere.
    """

    leaves: np.ndarray
    members: np.ndarray
    unit_of: np.ndarray
    groups: tuple[int, ...] | None
    slices: tuple[Slice, ...]
    scored: bool
    heads_refused: str = ""
    multiple: int = 1
    experts: int = 1
    routers: tuple[str, ...] = ()
    across: bool = False
    least: int = 1
    stays: bool = False

    @property
    def units(self) -> int:
        """Return the number of units."""
        return self.channels * self.experts

    @property
    def channels(self) -> int:
        """Return the number of units that the labels tell apart: those of one expert."""
        return int(self.unit_of.max()) + 1


@dataclass(frozen=True)
class Refusal:
    """A consumer whose channels stay, and why; ``inner`` where a single linear produces them (no residual stream)."""

    tensor: str
    channels: int
    reason: str
    inner: bool = False


@dataclass(frozen=True)
class Found:
    """Families that can be narrowed, consumers that cannot, and routers whose experts stay."""

    families: tuple[Family, ...]
    refusals: tuple[Refusal, ...]
    routers: tuple[Refusal, ...] = ()
