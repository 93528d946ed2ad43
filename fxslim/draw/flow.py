"""Which group of coordinates every value of a graph carries: units of sites, streams that sites share, what stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fxslim.draw.picture import STAYS, Group
from fxslim.labels import CONSTANT, Value
from fxslim.passes.annotate import Labels
from fxslim.passes.rules.walk import Use
from fxslim.passes.sites import Sites


class Flow:
    """Groups of the components of a program's labels.

    Attributes:
        groups: sites, then streams, then what stays, if anything does.
    """

    def __init__(self, labels: Labels, sites: Sites) -> None:
        self.labels = labels
        self._codes = np.zeros(len(labels.components.pinned), dtype=np.int64)
        self._groups: list[tuple[str, ...]] = [(STAYS,)]  # code -> groups
        for site in sites.sites:
            self._add(sites.families[site.name].members, site.name)
        own = (Group(site.name, "site", site.units) for site in sites.sites)
        self.groups = (*own, *self._streams(), Group(STAYS, "stays", 0, "it meets what is not narrowed"))

    def of(self, value: Any) -> tuple[str, ...]:
        """Return the groups that a value carries: of a Value, a tuple of them, or nothing."""
        found: dict[str, None] = {}
        for one in value if isinstance(value, tuple) else (value,):
            for labels in one.labels if isinstance(one, Value) else ():
                for code in np.unique(self._codes[self.labels.components.of[labels.numpy()]]).tolist():
                    found.update(dict.fromkeys(self._groups[code]))
        return tuple(found)

    def _add(self, components: np.ndarray, name: str) -> None:
        """Let components belong to one more group."""
        for code in np.unique(self._codes[components]).tolist():
            more = (name,) if code == 0 else (*self._groups[code], name)
            self._groups.append(more)
            self._codes[components[self._codes[components] == code]] = len(self._groups) - 1

    def _streams(self) -> Iterator[Group]:
        """Find what several products read or add to, and no site owns: residual streams."""
        read: dict[int, list[torch.Tensor]] = {}
        written: dict[int, list[torch.Tensor]] = {}
        for uses, table in ((self.labels.contracted, read), (self.labels.produced, written)):
            for use in uses:
                first = self._unowned(use)
                if first is not None:
                    table.setdefault(first, []).append(use.labels)
        number = 0
        for first, several in read.items():
            if first not in written or len(several) + len(written[first]) < 3 or self._codes[first]:
                continue
            number += 1
            name = f"stream {number}"
            own = np.unique(self.labels.components.of[np.concatenate([one.reshape(-1).numpy() for one in several])])
            self._add(own[self._codes[own] == 0], name)
            pin = self.labels.components.pins.get(first)
            reason = pin.reason if pin is not None else "several layers share it"
            yield Group(name, "stream", several[0].numel(), f"{reason}{self.labels.tied_by(first)}")

    def _unowned(self, use: Use) -> int | None:
        """Return the first component of what a product sums over or makes, where no site owns it."""
        own = self.labels.components.of[use.labels.reshape(-1).numpy()]
        first = int(own.min())
        constant = int(self.labels.components.of[CONSTANT])
        return None if first == constant or self._codes[own].any() else first
