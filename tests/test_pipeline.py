"""Pipelines: order is checked when they are built, observers see every pass, facts are kept by their type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from fxslim.errors import FxslimError, OrderError
from fxslim.pipeline import Facts, Pass, Pipeline


@dataclass(frozen=True)
class Flour:
    grams: int


@dataclass(frozen=True)
class Dough:
    grams: int


@dataclass(frozen=True)
class Bread:
    grams: int


@dataclass(frozen=True)
class Knead:
    water: int = 2

    requires: ClassVar[tuple[type, ...]] = (Flour,)
    ensures: ClassVar[tuple[type, ...]] = (Dough,)

    def run(self, facts: Facts) -> Facts:
        return facts.adding(Dough(facts.get(Flour).grams + self.water))


@dataclass(frozen=True)
class Bake:
    requires: ClassVar[tuple[type, ...]] = (Flour, Dough)
    ensures: ClassVar[tuple[type, ...]] = (Bread,)

    def run(self, facts: Facts) -> Facts:
        if facts.get(Dough).grams > 100:
            raise ValueError("too large")
        return facts.adding(Bread(facts.get(Dough).grams - 1))


def test_passes_run_in_order() -> None:
    facts = Pipeline((Knead(water=5), Bake()), given=(Flour,)).run(Flour(10))
    assert facts.get(Bread) == Bread(14)
    assert facts.get(Dough) == Dough(15)
    assert facts.find(int) is None


def test_a_pass_before_what_it_needs_is_refused_when_the_pipeline_is_built() -> None:
    with pytest.raises(OrderError, match=r"^Bake needs Dough, which no pass before it provides\.$"):
        Pipeline((Bake(), Knead()), given=(Flour,))
    with pytest.raises(OrderError, match=r"^Bake needs Flour, Dough, which"):
        Pipeline((Bake(),), given=())
    assert issubclass(OrderError, FxslimError)


def test_observers_see_every_pass_with_the_facts_before_and_after() -> None:
    seen: list[tuple[str, Any, Any]] = []
    clock: list[float] = []

    def note(before: Facts, step: Pass, after: Facts, seconds: float) -> None:
        seen.append((type(step).__name__, before.find(Bread), after.find(Bread)))

    def time(before: Facts, step: Pass, after: Facts, seconds: float) -> None:
        clock.append(seconds)

    Pipeline((Knead(), Bake()), given=(Flour,)).run(Flour(1), observers=(note, time))
    assert seen == [("Knead", None, None), ("Bake", None, Bread(2))]
    assert len(clock) == 2
    assert min(clock) >= 0


def test_a_pass_that_fails_ends_the_run() -> None:
    seen: list[str] = []
    pipeline = Pipeline((Knead(), Bake()), given=(Flour,))
    with pytest.raises(ValueError, match=r"^too large$"):
        pipeline.run(Flour(100), observers=(lambda before, step, after, seconds: seen.append(type(step).__name__),))
    assert seen == ["Knead"]


def test_facts_are_added_without_changing_what_was() -> None:
    first = Facts().adding(Flour(1))
    second = first.adding(Flour(2), Dough(3))
    assert first.get(Flour) == Flour(1)
    assert (second.get(Flour), second.get(Dough)) == (Flour(2), Dough(3))
    with pytest.raises(KeyError):
        first.get(Dough)
