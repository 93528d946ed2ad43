"""How much is masked when: a curve from nothing to the target, and the steps at which it is followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fxslim.errors import InputError

Curve = Callable[[float, float, float], float]
"""Takes the time t in [0, 1], the fraction at the start and the one at the end; returns the fraction at t."""


def _exp(t: float, first: float, last: float) -> float:
    return 1 - (1 - first) * math.pow((1 - last) / (1 - first), t)


SCHEDULES: Mapping[str, Curve] = MappingProxyType(
    {
        "one_shot": lambda t, first, last: last,
        "linear": lambda t, first, last: first + (last - first) * t,
        "cubic": lambda t, first, last: last + (first - last) * (1 - t) ** 3,
        "cube": lambda t, first, last: first + (last - first) * t**3,
        "cos": lambda t, first, last: first + (last - first) * (1 - math.cos(math.pi * t / 2)),
        "exp": _exp,
    }
)
"""``cubic`` is fast first (Zhu and Gupta 2017, equation 1), ``cube``, ``cos`` and ``exp`` are those of Intel Neural
Compressor: slow first, but for ``exp``, which removes the same part of what is left in equal times."""


def masked_fraction(schedule: str, t: float, last: float, first: float = 0.0) -> float:
    """Return the fraction that is masked at a time; at 1 exactly the last one, whatever rounding says.

    Args:
        schedule: one of `SCHEDULES`.
        t: the time, from 0 to 1.
        last: the fraction at the end.
        first: the fraction at the start.
    """
    return last if t >= 1 else SCHEDULES[schedule](max(t, 0.0), first, last)


@dataclass(frozen=True)
class Timeline:
    """The steps at which masks grow.

    Attributes:
        start: number of optimizer steps after which the curve starts.
        end: number of steps after which it is at its end.
        every: steps between two updates.
    """

    start: int
    end: int
    every: int

    def time(self, step: int) -> float:
        """Return where on the curve a step is, from 0 to 1."""
        if step >= self.end:
            return 1.0
        return 0.0 if step <= self.start else (step - self.start) / (self.end - self.start)

    def due(self, step: int) -> bool:
        """Tell whether masks are updated after this many steps."""
        first = max(self.start, 1)
        last = max(self.end, 1)
        return first <= step <= last and (step in (first, last) or (step - self.start) % self.every == 0)


def timeline(start: float | int, end: float | int, every: int, steps: int | None) -> Timeline:
    """Return the steps of a schedule.

    Args:
        start: as a whole number of steps, or as a fraction (a float) of all of them.
        end: the same.
        every: steps between two updates.
        steps: how many steps there are in all, where known.

    Raises:
        InputError: a fraction of an unknown number, or an end before the start or after the last step.
    """
    if steps is None and (isinstance(start, float) or isinstance(end, float)):
        raise InputError(
            f"start={start} and end={end} are fractions of training: say how many optimizer steps it has with steps=, "
            "or give start and end as whole numbers of steps."
        )
    first, last = (round(x * (steps or 0)) if isinstance(x, float) else x for x in (start, end))
    if steps is not None and last > steps:
        raise InputError(f"end={end} comes after the last of {steps} steps: masks would not reach their target.")
    if last < first:
        raise InputError(f"end={end} comes before start={start}.")
    return Timeline(first, max(last, 1), every)
