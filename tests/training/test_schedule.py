"""Schedules: values against formulas written out again, ends that are exact, and the steps at which masks grow."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxslim.errors import InputError
from fxslim.training.schedule import SCHEDULES, Timeline, masked_fraction, timeline

FRACTIONS = st.floats(0.01, 0.99)


def by_hand(name: str, t: float, s0: float, s1: float) -> float:
    """Return Zhu and Gupta's equation 1 for cubic, the old tool's formulas for the others."""
    if name == "one_shot":
        return s1
    if name == "cubic":
        return s1 + (s0 - s1) * (1 - 3 * t + 3 * t**2 - t**3)
    if name == "exp":
        return 1 - math.exp((1 - t) * math.log(1 - s0) + t * math.log(1 - s1))
    share = {"linear": t, "cube": t * t * t, "cos": 1 - math.cos(math.pi * t / 2)}[name]
    return s0 * (1 - share) + s1 * share


@pytest.mark.parametrize("name", SCHEDULES)
@given(t=st.floats(0, 1), last=FRACTIONS)
def test_values(name: str, t: float, last: float) -> None:
    assert masked_fraction(name, t, last) == pytest.approx(by_hand(name, t, 0.0, last), abs=1e-12)
    assert masked_fraction(name, t, last, 0.005) == pytest.approx(by_hand(name, t, 0.005, last), abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@given(last=FRACTIONS)
def test_the_end_is_exact_and_curves_never_fall(name: str, last: float) -> None:
    assert masked_fraction(name, 1.0, last) == last
    values = [masked_fraction(name, t / 50, last) for t in range(51)]
    assert all(a <= b + 1e-15 for a, b in pairwise(values))


def test_cubic_is_fast_first_and_cube_slow() -> None:
    assert masked_fraction("cubic", 0.5, 0.8) > masked_fraction("linear", 0.5, 0.8) > masked_fraction("cube", 0.5, 0.8)


def test_steps() -> None:
    line = timeline(0.1, 0.7, 25, 100)
    assert line == Timeline(10, 70, 25)
    assert [step for step in range(101) if line.due(step)] == [10, 35, 60, 70]
    assert [line.time(step) for step in (0, 10, 40, 70, 99)] == [0, 0, 0.5, 1, 1]
    assert timeline(3, 3, 5, None) == Timeline(3, 3, 5)
    assert [timeline(3, 3, 5, None).time(step) for step in (0, 2, 3, 4)] == [0, 0, 1, 1]
    assert [step for step in range(9) if timeline(0, 0, 1, 5).due(step)] == [1]
    assert timeline(0.0, 1.0, 1, 7) == Timeline(0, 7, 1)


@pytest.mark.parametrize(
    ("start", "end", "steps", "says"),
    [
        (0.1, 0.7, None, "steps="),
        (1, 0.7, None, "fractions of training"),
        (5, 20, 10, "after the last"),
        (9, 5, 10, "before start"),
    ],
)
def test_steps_that_cannot_be(start: float, end: float, steps: int | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        timeline(start, end, 1, steps)
