"""Time callables against one another: interleaved, warmed, medians with confidence intervals.

Two timings taken one after the other differ by more than the models do: clocks throttle, caches warm, neighbours wake
up. So every round times each callable once, in an order that is shuffled and then reversed; whatever drifts hits all of
them alike, and the ratio *within* a round is free of it. Reported are medians and distribution-free intervals: run
times are skewed, and means of them follow their outliers.
"""

from __future__ import annotations

import gc
import math
import random
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch.utils import benchmark

from fxslim.errors import InputError

__all__ = ["Estimate", "Sample", "Timing", "compare", "estimate_median"]

_BLOCK_SECONDS = 1e-3
"""Shortest time to measure at once; faster callables run several times per measurement."""
_MAX_CALLS = 1 << 20
_CHECK_GROWTH = 1.25
"""Intervals are looked at whenever the rounds have grown by this factor. Stopping at the first narrow interval favours
those that are narrow by chance; looking rarely keeps that small (simulated: intervals claiming 95 % cover 94 %)."""


@dataclass(frozen=True)
class Estimate:
    """Hold the median of positive values and its confidence interval; too few values leave it open: 0 to infinity."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Return half the width of the interval, relative to the value."""
        return (self.high - self.low) / (2 * self.value)

    def inverse(self) -> Estimate:
        """Return the estimate of the reciprocal."""
        return Estimate(1 / self.value, 1 / self.high, 1 / self.low if self.low > 0 else math.inf)

    def to_json(self) -> dict[str, float | None]:
        """Return plain data; infinite bounds become None."""
        return {name: bound if math.isfinite(bound) else None for name, bound in asdict(self).items()}


@dataclass(frozen=True)
class Sample:
    """Hold the timings of one callable.

    Attributes:
        name: The callable's name.
        calls: Calls per measurement.
        seconds: Seconds per call, one entry per round.
        time: Median seconds per call.
        ratio: Median over the rounds of this callable's time divided by the baseline's (below 1: faster).

    """

    name: str
    calls: int
    seconds: tuple[float, ...]
    time: Estimate
    ratio: Estimate

    @property
    def speedup(self) -> Estimate:
        """Return how many times faster than the baseline this callable is."""
        return self.ratio.inverse()


@dataclass(frozen=True)
class Timing:
    """Hold what `compare` measured, and under which conditions.

    Attributes:
        samples: One per callable, in the order they were given.
        baseline: Name of the sample that ratios refer to.
        rounds: Rounds measured; every callable was measured once in each.
        elapsed: Seconds spent on these rounds, warm-up not included.
        converged: Whether every ratio's interval became as narrow as asked; if not, time was up.
        target_ci: Half-width asked for, relative to the ratio.
        confidence: Coverage of the intervals.
        device: Device whose clock was used.
        threads: ``torch.get_num_threads()`` while timing.
        torch_version: Version of torch.

    """

    samples: tuple[Sample, ...]
    baseline: str
    rounds: int
    elapsed: float
    converged: bool
    target_ci: float
    confidence: float
    device: str
    threads: int
    torch_version: str

    def __getitem__(self, name: str) -> Sample:
        """Return the sample of that name, or raise ``KeyError``."""
        for sample in self.samples:
            if sample.name == name:
                return sample
        raise KeyError(name)

    def __str__(self) -> str:
        """Lay out the medians, the ratios and the conditions as a table."""
        interval = f"{self.confidence:.0%} interval"
        rows = [("", "median", interval, f"/ {self.baseline}", interval, "speed-up")]
        for sample in self.samples:
            unit, scale = benchmark.select_unit(sample.time.value)
            times = [f"{seconds / scale:.4g}" for seconds in asdict(sample.time).values()]
            row = (sample.name, f"{times[0]} {unit}", f"{times[1]} .. {times[2]} {unit}")
            ratio = sample.ratio
            rows.append((*row, f"{ratio.value:.4f}", f"{ratio.low:.4f} .. {ratio.high:.4f}", f"{1 / ratio.value:.2f}x"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        verdict = "converged" if self.converged else "NOT converged, time was up"
        lines.append(
            f"{self.rounds} rounds in {self.elapsed:.1f} s: {verdict} (target {self.target_ci:.1%} of the ratio)"
        )
        lines.append(f"{self.device}, {self.threads} threads, torch {self.torch_version}")
        return "\n".join(lines)

    def to_json(self, *, raw: bool = False) -> dict[str, Any]:
        """Return plain data, with the time of every single round only if ``raw``; infinite bounds become None."""
        plain = asdict(self)
        for sample, own in zip(plain["samples"], self.samples, strict=True):
            sample |= {"time": own.time.to_json(), "ratio": own.ratio.to_json()}
            seconds = sample.pop("seconds")
            if raw:
                sample["seconds"] = list(seconds)
        return {**plain, "samples": list(plain["samples"])}


def estimate_median(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Return the median of independent positive values, with an interval that assumes nothing on their distribution.

    The k-th smallest and the k-th largest of n values enclose the median with probability 1 - 2 P(X < k), X binomial
    (n, 1/2). Source: David and Nagaraja, Order Statistics (3rd ed.), section 7.1. At 95 %, it
    takes six values; with fewer, the interval is open.
    """
    ordered = sorted(values)
    rank = _rank(len(ordered), confidence)
    if rank == 0:
        return Estimate(median(ordered), 0.0, math.inf)
    return Estimate(median(ordered), ordered[rank - 1], ordered[-rank])


@lru_cache(maxsize=1024)
def _rank(count: int, confidence: float) -> int:
    """Return the largest k with 2 P(X < k) <= 1 - confidence, X binomial (count, 1/2); 0 if there is none."""
    allowed = int((1 - confidence) / 2 * 2**53) * 2**count // 2**53
    rank, below, term = 0, 0, 1
    while below + term <= allowed:
        below += term
        term = term * (count - rank) // (rank + 1)
        rank += 1
    return rank


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    warmup: int = 3,
    min_rounds: int = 20,
    max_seconds: float = 30.0,
    target_ci: float = 0.02,
    confidence: float = 0.95,
    device: torch.device | str | None = None,
    seed: int = 0,
    clock: Callable[[], float] | None = None,
    progress: bool = False,
) -> Timing:
    """Time callables in turns until every ratio to the baseline is known to within ``target_ci``, or time is up.

    The callables are called as they are: wrap them in ``torch.inference_mode`` if that is what you mean to time.

    Args:
        functions: What to time, by name.
        baseline: The name that ratios refer to; the first by default.
        warmup: Calls of each callable before anything is measured.
        min_rounds: Rounds to measure before intervals are looked at.
        max_seconds: Time for the measured rounds. It wins over ``min_rounds``; the round under way is completed.
        target_ci: Half-width of the interval of a ratio, relative to the ratio; of the time if there is one callable.
        confidence: Coverage of the intervals.
        device: ``cuda``: time with CUDA events. Otherwise with the wall clock, which waits for the accelerator first,
            unless the device is ``cpu``.
        seed: Seed of the order within rounds.
        clock: Returns seconds; replaces the wall clock.
        progress: Show a progress bar (needs rich).

    Raises `InputError` if the names or numbers make no sense. What a callable raises passes through.

    """
    names = tuple(functions)
    reference = next(iter(names), "") if baseline is None else baseline
    if reference not in functions:
        raise InputError(f"baseline {reference!r} is not among the callables to time: {', '.join(names) or 'none'}")
    if min_rounds < 1 or warmup < 0 or not 0 < confidence < 1:
        raise InputError("compare() needs min_rounds >= 1, warmup >= 0 and a confidence between 0 and 1")
    where = _device(device)
    now = clock or (timeit.default_timer if where.type == "cpu" else benchmark.timer)
    run = {name: _stopwatch(function, now, where) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    due = min_rounds
    with _garbage_kept(), _bar(progress, max_seconds) as show:
        calls = _warm_up(run, warmup)
        start = now()
        for rounds, order in enumerate(_orders(names, seed), start=1):
            for name in order:
                seconds[name].append(run[name](calls[name]) / calls[name])
            elapsed = now() - start
            show(elapsed, rounds)
            if rounds >= due or elapsed >= max_seconds:
                samples = tuple(_sample(name, calls[name], seconds, reference, confidence) for name in names)
                converged = rounds >= min_rounds and _widest(samples, reference) <= target_ci
                if converged or elapsed >= max_seconds:
                    break
                due = 2 * math.ceil(rounds * _CHECK_GROWTH / 2)  # whole pairs of an order and its reverse
    threads, version = torch.get_num_threads(), torch.__version__
    return Timing(samples, reference, rounds, elapsed, converged, target_ci, confidence, str(where), threads, version)


def _sample(name: str, calls: int, seconds: Mapping[str, Sequence[float]], baseline: str, confidence: float) -> Sample:
    """Summarise one callable's rounds, alone and paired with the baseline's."""
    ratios = [time / base for time, base in zip(seconds[name], seconds[baseline], strict=True)]
    ratio = Estimate(1.0, 1.0, 1.0) if name == baseline else estimate_median(ratios, confidence=confidence)
    time = estimate_median(seconds[name], confidence=confidence)
    return Sample(name, calls, tuple(seconds[name]), time, ratio)


def _widest(samples: Sequence[Sample], baseline: str) -> float:
    """Return the largest relative half-width among the ratios, or that of the only time."""
    if len(samples) == 1:
        return samples[0].time.half_width
    return max(sample.ratio.half_width for sample in samples if sample.name != baseline)


def _orders(names: Sequence[str], seed: int) -> Iterator[tuple[str, ...]]:
    """Yield orders without end: each shuffle, then its reverse, so that every pair runs both ways equally often."""
    shuffle = random.Random(seed)
    while True:
        order = tuple(shuffle.sample(names, len(names)))
        yield order
        yield order[::-1]


def _warm_up(run: Mapping[str, Callable[[int], float]], warmup: int) -> dict[str, int]:
    """Warm every callable up in turns, and return how many calls of each to measure at once."""
    for _ in range(warmup):
        for measure in run.values():
            measure(1)
    calls = dict.fromkeys(run, 1)
    for name, measure in run.items():
        while calls[name] < _MAX_CALLS and measure(calls[name]) < _BLOCK_SECONDS:
            calls[name] *= 2
    return calls


# --- Clocks ---------------------------------------------------------------------------------------------------------


def _device(device: torch.device | str | None) -> torch.device:
    """Return the device asked for; by default the accelerator, if there is one."""
    if device is not None:
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _stopwatch(
    function: Callable[[], object], clock: Callable[[], float], device: torch.device
) -> Callable[[int], float]:
    """Return what runs ``function`` a number of times and returns the seconds that this took, never zero."""
    if device.type == "cuda":
        return lambda calls: max(_cuda_seconds(function, calls, device), 1e-9)
    timer = timeit.Timer(function, timer=clock)
    return lambda calls: max(timer.timeit(calls), 1e-9)


def _cuda_seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Time calls with a pair of events on the device's current stream."""
    with torch.cuda.device(device):
        event: Callable[..., Any] = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect garbage once, then not again until the block ends."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _bar(visible: bool, seconds: float) -> Iterator[Callable[[float, int], None]]:
    """Yield what shows the time spent and the rounds done; drawn between rounds, by no thread of its own."""
    if not visible:
        yield lambda _elapsed, _rounds: None
        return
    from rich.progress import Progress

    drawn = -math.inf
    with Progress(auto_refresh=False, transient=True) as progress:
        task = progress.add_task("timing", total=seconds)

        def show(elapsed: float, rounds: int) -> None:
            nonlocal drawn
            if elapsed - drawn >= 0.25:
                drawn = elapsed
                progress.update(task, completed=elapsed, description=f"timing: round {rounds}", refresh=True)

        yield show
