"""Check the timer's statistics on a simulated machine; nothing here depends on real time."""

from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fxslim.errors import InputError
from fxslim.timer import Estimate, Timing, compare, estimate_median


class Machine:
    """Simulate a machine: callables take the time they are told to, times noise, times a slow-down that drifts."""

    def __init__(
        self,
        *,
        noise: Callable[[], float] = lambda: 1.0,
        drift: Callable[[float], float] = lambda _now: 1.0,
    ) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self._noise, self._drift = noise, drift

    def clock(self) -> float:
        """Return the simulated time in seconds."""
        return self.now

    def task(self, name: str, seconds: float) -> Callable[[], None]:
        """Return a callable that takes about ``seconds``."""

        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self._noise() * self._drift(self.now)

        return run

    def tasks(self, **seconds: float) -> dict[str, Callable[[], None]]:
        """Return one callable per name."""
        return {name: self.task(name, time) for name, time in seconds.items()}


def skewed(seed: int) -> Callable[[], float]:
    """Return noise as machines have it: skewed, one measurement in twenty far too slow."""
    source = random.Random(seed)
    return lambda: source.lognormvariate(0.0, 0.1) * (source.uniform(2, 10) if source.random() < 0.05 else 1.0)


def timed(machine: Machine, **options: object) -> Timing:
    """Time two tasks, the second taking 0.7 of the first."""
    settings = {"clock": machine.clock, "device": "cpu", "max_seconds": 1e9, **options}
    return compare(machine.tasks(dense=0.010, slim=0.007), **settings)  # type: ignore[arg-type]


def test_noiseless_times_and_ratios_are_exact() -> None:
    timing = timed(Machine(), min_rounds=10)
    assert timing.converged
    assert timing.rounds == 10
    assert timing.baseline == "dense"
    assert timing["dense"].time.value == pytest.approx(0.010)
    assert timing["dense"].ratio == Estimate(1.0, 1.0, 1.0)
    assert timing["slim"].ratio.value == pytest.approx(0.7)
    assert timing["slim"].speedup.value == pytest.approx(1 / 0.7)
    assert timing.elapsed == pytest.approx(10 * 0.017)


def test_named_baseline() -> None:
    timing = timed(Machine(), baseline="slim")
    assert timing["slim"].ratio.value == 1
    assert timing["dense"].ratio.value == pytest.approx(1 / 0.7)


def test_fast_callables_run_in_blocks() -> None:
    machine = Machine()
    timing = compare(machine.tasks(fast=1e-6, slow=1e-2), clock=machine.clock, device="cpu", min_rounds=6)
    assert timing["fast"].calls == 1024
    assert timing["slow"].calls == 1
    assert timing["fast"].time.value == pytest.approx(1e-6)
    assert timing["slow"].ratio.value == pytest.approx(1e4)


def test_a_clock_that_stands_still_does_not_hang() -> None:
    timing = compare({"nothing": lambda: None}, clock=lambda: 0.0, device="cpu", min_rounds=6, warmup=0)
    assert timing["nothing"].calls == 2**20
    assert timing["nothing"].time.value > 0


@pytest.mark.parametrize("count", [1, 5, 6, 7, 20, 101, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_interval_ranks_are_the_tightest_allowed(count: int, confidence: float) -> None:
    estimate = estimate_median(range(1, count + 1), confidence=confidence)
    excess = 1 - confidence
    rank = 0 if math.isinf(estimate.high) else round(estimate.low)
    assert rank == 0 or 2 * stats.binom.cdf(rank - 1, count, 0.5) <= excess + 1e-12
    assert 2 * stats.binom.cdf(rank, count, 0.5) > excess
    assert rank == 0 or estimate.high == count + 1 - rank


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=60))
def test_interval_encloses_the_median_and_ignores_order(values: list[float]) -> None:
    estimate = estimate_median(values)
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate == estimate_median(values[::-1])


def test_interval_covers_the_true_median_as_often_as_it_claims() -> None:
    source, count, trials = random.Random(7), 35, 4000
    for confidence in (0.8, 0.95):
        rank = round(estimate_median(range(1, count + 1), confidence=confidence).low)
        claimed = 1 - 2 * stats.binom.cdf(rank - 1, count, 0.5)
        hits = 0
        for _ in range(trials):
            estimate = estimate_median([source.expovariate(1.0) for _ in range(count)], confidence=confidence)
            hits += estimate.low <= math.log(2) <= estimate.high
        assert claimed >= confidence
        assert hits / trials == pytest.approx(claimed, abs=0.02)


def test_ratio_intervals_cover_the_true_ratio_about_as_often_as_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes longer than everything else here
    trials, hits = 500, 0
    for seed in range(trials):
        timing = timed(Machine(noise=skewed(seed)), seed=seed, target_ci=0.03)
        assert timing.converged
        assert timing["slim"].ratio.half_width <= 0.03
        hits += timing["slim"].ratio.low <= 0.7 <= timing["slim"].ratio.high
    assert 0.92 <= hits / trials <= 0.98


def test_drift_cancels_in_ratios() -> None:
    machine = Machine(drift=lambda now: 1 + now)  # slows down by one each second
    timing = timed(machine, min_rounds=60)
    assert timing["dense"].time.value > 0.015
    assert timing["slim"].ratio.value == pytest.approx(0.7, rel=1e-2)


def test_drift_within_a_round_hits_all_alike() -> None:
    machine = Machine()
    machine._drift = lambda _now: 1.01 ** len(machine.calls)  # every call takes 1 % longer than the one before
    timing = timed(machine, min_rounds=40)
    pairs = zip(timing["slim"].seconds, timing["dense"].seconds, strict=True)
    assert {round(slim / dense, 3) for slim, dense in pairs} == {0.707, 0.693}
    assert timing["slim"].ratio.value == pytest.approx(0.7, rel=1e-4)


def orders(seed: int) -> list[tuple[str, ...]]:
    """Return the order of three tasks in each of 60 rounds."""
    machine = Machine()
    compare(machine.tasks(a=0.01, b=0.02, c=0.03), clock=machine.clock, device="cpu", min_rounds=60, seed=seed)
    measured = machine.calls[-180:]
    return [tuple(measured[start : start + 3]) for start in range(0, 180, 3)]


def test_order_changes_from_round_to_round() -> None:
    rounds = orders(0)
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert len(set(rounds)) == 6
    assert {name: sum(order[0] == name for order in rounds) >= 10 for name in "abc"} == dict.fromkeys("abc", True)
    assert rounds == orders(0) != orders(1)


def test_warm_up_takes_turns_and_is_not_measured() -> None:
    machine = Machine()
    timing = timed(machine, warmup=4, min_rounds=8)
    assert machine.calls[:8] == ["dense", "slim"] * 4
    assert len(timing["dense"].seconds) == timing.rounds == 8
    assert timing.elapsed < machine.now


def test_stops_when_ratios_are_known_well_enough() -> None:
    wide, narrow = (timed(Machine(noise=skewed(1)), target_ci=target) for target in (0.1, 0.02))
    assert wide.converged
    assert narrow.converged
    assert wide.rounds < narrow.rounds
    assert narrow["slim"].ratio.half_width <= 0.02


def test_stops_when_time_is_up() -> None:
    timing = timed(Machine(noise=skewed(1)), target_ci=1e-6, max_seconds=2.0)
    assert not timing.converged
    assert 2.0 <= timing.elapsed < 2.5
    assert "NOT converged" in str(timing)


def test_time_wins_over_rounds_and_leaves_intervals_open() -> None:
    timing = timed(Machine(), min_rounds=20, max_seconds=0.05)
    assert not timing.converged
    assert timing.rounds == 3
    assert timing["slim"].ratio == Estimate(pytest.approx(0.7), 0.0, math.inf)  # type: ignore[arg-type]
    assert timing["slim"].speedup.high == math.inf
    assert timing.to_json()["samples"][1]["ratio"]["high"] is None


def test_a_single_callable_converges_on_its_own_time() -> None:
    machine = Machine(noise=skewed(3))
    timing = compare(machine.tasks(only=0.01), clock=machine.clock, device="cpu", max_seconds=1e9)
    assert timing.converged
    assert timing["only"].time.half_width <= 0.02


def test_plain_data_survives_json() -> None:
    timing = timed(Machine(noise=skewed(2)))
    plain = timing.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["samples"][1]["ratio"]["value"] == timing["slim"].ratio.value
    assert "seconds" not in plain["samples"][0]
    raw = timing.to_json(raw=True)["samples"][0]["seconds"]
    assert raw == list(timing["dense"].seconds)
    assert {"rounds", "elapsed", "threads", "torch_version", "converged", "device"} <= plain.keys()


def test_table_names_everything() -> None:
    lines = str(timed(Machine())).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["dense", "slim"]
    assert "10 ms" in lines[1]
    assert "0.7000" in lines[2]
    assert "1.43x" in lines[2]
    assert "20 rounds in 0.3 s: converged" in lines[3]


def test_progress_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert timed(Machine(noise=skewed(4)), progress=True) == timed(Machine(noise=skewed(4)))
    capsys.readouterr()


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_off_while_timing_and_put_back(enabled: bool) -> None:
    before, seen = gc.isenabled(), set[bool]()
    machine = Machine()
    work = machine.task("a", 0.01)

    def look() -> None:
        seen.add(gc.isenabled())
        work()

    try:
        (gc.enable if enabled else gc.disable)()
        compare({"a": look}, clock=machine.clock, device="cpu")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == {False}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interruptions_and_errors_pass_through(error: type[BaseException]) -> None:
    machine = Machine()
    work = machine.task("a", 0.01)

    def fail_late() -> None:
        work()
        if len(machine.calls) > 10:
            raise error

    with pytest.raises(error):
        compare({"a": fail_late}, clock=machine.clock, device="cpu")
    assert gc.isenabled()


@pytest.mark.parametrize(
    "options", [{"baseline": "missing"}, {"min_rounds": 0}, {"warmup": -1}, {"confidence": 1.0}], ids=str
)
def test_senseless_requests_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"baseline 'missing'|needs min_rounds"):
        timed(Machine(), **options)


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(InputError, match="none"):
        compare({})


def test_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        timed(Machine())["missing"]


def test_wall_clock_by_default() -> None:
    timing = compare({"a": lambda: sum(range(1000)), "b": lambda: sum(range(2000))}, max_seconds=0.05, warmup=1)
    assert timing.rounds >= 1
    assert all(second > 0 for sample in timing.samples for second in sample.seconds)
