"""What a trained model is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxslim.asked import nearest
from fxslim.errors import RequestError


@dataclass(frozen=True)
class Metric:
    """One of the numbers that ``Trainer.evaluate`` returns, and how much of it may be lost.

    Attributes:
        name: its name, such as ``eval_accuracy``.
        greater_is_better: whether more is better.
        is_relative: whether ``criterion`` is a part of the dense model's value; otherwise it is an absolute difference.
        criterion: how much may be lost.
        weight_ratio: has no effect: of several metrics, each has to hold by itself.
    """

    name: str
    greater_is_better: bool = True
    is_relative: bool = True
    criterion: float = 0.01
    weight_ratio: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RequestError(f"Metric(name={self.name!r}): give the name of a result, such as 'eval_accuracy'.")
        for name in ("greater_is_better", "is_relative"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"Metric({name}={getattr(self, name)!r}): give True or False.")
        for name in ("criterion", "weight_ratio"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            if not number and not (name == "weight_ratio" and value is None):
                raise RequestError(f"Metric({name}={value!r}): give a number of at least 0.")

    def read(self, results: Mapping[str, float]) -> float:
        """Return its value among results; raise RequestError, naming the nearest one, where it is not there."""
        if self.name not in results:
            near = nearest(self.name, tuple(results)) or f" There are {', '.join(results)}."
            raise RequestError(
                f"evaluate() returns no {self.name!r}.{near} compute_metrics= of the trainer makes them."
            )
        return float(results[self.name])

    def holds(self, before: float, after: float) -> bool:
        """Tell whether no more than the criterion is lost."""
        lost = before - after if self.greater_is_better else after - before
        allowed = self.criterion * abs(before) if self.is_relative else self.criterion
        return lost <= allowed or math.isclose(lost, allowed, rel_tol=1e-9, abs_tol=1e-12)
