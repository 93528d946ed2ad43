"""Pipelines: a tuple of passes over a set of facts, checked when it is built and observed while it runs.

A fact is any immutable object; facts are kept by their type. A pass says which types it needs and which it adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from fxslim.errors import OrderError

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """Everything that is known at one point of a pipeline, by type."""

    known: Mapping[type, Any] = field(default_factory=dict)

    def get(self, kind: type[T]) -> T:
        """Return the fact of a type."""
        found: T = self.known[kind]
        return found

    def find(self, kind: type[T]) -> T | None:
        """Return the fact of a type, or None."""
        return self.known.get(kind)

    def adding(self, *facts: Any) -> Facts:
        """Return these facts and more; a new fact replaces the one of the same type."""
        return Facts({**self.known, **{type(fact): fact for fact in facts}})


class Pass(Protocol):
    """One step: a frozen dataclass whose fields are its options."""

    requires: ClassVar[tuple[type, ...]]
    ensures: ClassVar[tuple[type, ...]]

    def run(self, facts: Facts) -> Facts:
        """Return the facts and what this pass adds to them."""


Observer = Callable[[Facts, Pass, Facts, float], None]
"""Called after every pass with the facts before, the pass, the facts after, and its seconds."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Attributes:
        passes: the passes.
        given: types of the facts that it starts from.

    Raises:
        OrderError: a pass needs a fact that nothing before it provides.
    """

    passes: tuple[Pass, ...]
    given: tuple[type, ...]

    def __post_init__(self) -> None:
        known = set(self.given)
        for step in self.passes:
            missing = [kind.__name__ for kind in step.requires if kind not in known]
            if missing:
                raise OrderError(f"{type(step).__name__} needs {', '.join(missing)}, which no pass before it provides.")
            known.update(step.ensures)

    def run(self, *facts: Any, observers: tuple[Observer, ...] = ()) -> Facts:
        """Run every pass; return all facts."""
        state = Facts().adding(*facts)
        for step in self.passes:
            before, start = state, time.perf_counter()
            state = step.run(before)
            seconds = time.perf_counter() - start
            for observer in observers:
                observer(before, step, state, seconds)
        return state
