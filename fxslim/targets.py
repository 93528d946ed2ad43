"""Budgets: what a narrowed model may cost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fxslim.errors import RequestError

__all__ = ["Target", "macs", "memory", "params", "speedup"]

Resource = Literal["macs", "params", "bytes", "time"]
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Target:
    """A budget.

    Attributes:
        resource: what is limited.
        share: the part of the dense model's that may be left; None where an amount is given.
        amount: how many bytes may be left.
        inputs: inputs at whose sizes time is measured; None for those of the trace.
    """

    resource: Resource
    share: float | None = None
    amount: int | None = None
    inputs: Any = None

    def limit(self, dense: float) -> float:
        """Return what may be left of ``dense``."""
        return float(self.amount or 0) if self.share is None else self.share * dense

    def __str__(self) -> str:
        if self.share is None:
            return f"memory({self.amount} bytes)"
        return f"speedup({1 / self.share:g})" if self.resource == "time" else f"{self.resource}({self.share:g})"


def macs(keep: float) -> Target:
    """Keep this part of the model's multiply-accumulates, counted at the sizes of the example inputs."""
    return Target("macs", _share("macs", keep))


def params(keep: float) -> Target:
    """Keep this part of the model's parameters."""
    return Target("params", _share("params", keep))


def memory(size: int | str) -> Target:
    """Let the weights (parameters and buffers) take no more than this: bytes, or text such as ``"400MB"``."""
    amount: float = -1
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", size.upper())
        amount = float(found[1]) * UNITS[found[2]] if found else -1
    elif isinstance(size, int) and not isinstance(size, bool):
        amount = size
    if amount < 1:
        raise RequestError(f"memory({size!r}): give a number of bytes, or a text such as '400MB' or '1.5GiB'.")
    return Target("bytes", amount=int(amount))


def speedup(times: float, inputs: Any = None) -> Target:
    """Become this many times faster, measured on this machine.

    Args:
        times: dense time divided by narrowed time.
        inputs: inputs at whose sizes it is measured; the example inputs where none are given.
    """
    if isinstance(times, bool) or not isinstance(times, int | float) or not 1 < times < 1000:
        raise RequestError(f"speedup({times!r}): give how many times faster, a number above 1.")
    return Target("time", 1 / times, inputs=inputs)


def targets(given: Any) -> tuple[Target, ...]:
    """Return what was given as ``target=``: one, or several that must all hold.

    Raises:
        RequestError: it is none.
    """
    if given is None:
        return ()
    several = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    for one in several:
        if not isinstance(one, Target):
            raise RequestError(
                f"target={one!r}: give fxslim.macs(0.5), fxslim.params(0.6), fxslim.memory('400MB'), "
                "fxslim.speedup(2.0), or a list of them."
            )
    return several


def _share(name: str, keep: float) -> float:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < 1:
        raise RequestError(f"{name}({keep!r}): give the part to keep, a number between 0 and 1.")
    return float(keep)
