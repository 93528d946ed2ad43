"""Each part of post-training pruning against an independent computation in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxslim.errors import RequestError
from fxslim.passes.fitting import latency
from fxslim.passes.fitting.budget import Level, allocate
from fxslim.passes.fitting.consumers import Consumer
from fxslim.passes.fitting.curve import Items, by_scores
from fxslim.passes.fitting.moments import Moments, Sums
from fxslim.passes.fitting.refit import refit, scale, scaled, solve
from fxslim.passes.fitting.seen import Read, Seen
from fxslim.passes.fitting.swaps import swapped
from fxslim.passes.methods import METHODS
from fxslim.passes.methods.obs import obs
from fxslim.timer import Estimate

UNITS, OUT, ROWS = 8, 5, 400


def data(width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return correlated inputs, a weight and a target.  (rows, in), (in, out), (rows, out)"""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(ROWS, UNITS * width) @ draw(UNITS * width, UNITS * width) + draw(UNITS * width)
    weight = draw(UNITS * width, OUT)
    return x, weight, x @ weight + 0.3 * draw(ROWS, OUT) + draw(OUT)


def seen_of(x: Tensor, weight: Tensor, t: Tensor, width: int, *, centred: bool = True, **more: Any) -> Seen:
    owner = np.repeat(np.arange(UNITS), width)
    read = Read(Consumer("w", "b" if centred else None, 1, owner, ()), moments(x, t, centred=centred), weight)
    site: Any = SimpleNamespace(name="site", units=UNITS, groups=None, least=1)
    return Seen(site, np.arange(UNITS, dtype=float), (read,), **more)


def moments(x: Tensor, t: Tensor, *, centred: bool = True) -> Moments:
    total = Sums(x.shape[1], t.shape[1], x.device)
    total.add(x, t, torch.zeros(len(x), dtype=torch.bool))
    return total.moments(centred=centred)


def least_squares(x: Tensor, t: Tensor, keep: list[int], *, centred: bool) -> float:
    """Return the smallest mean squared error of the kept inputs, by lstsq."""
    kept = x[:, keep]
    if centred:
        kept, t = kept - kept.mean(0), t - t.mean(0)
    found = torch.linalg.lstsq(kept, t).solution
    return float((kept @ found - t).square().sum() / len(x))


def free(width: int) -> Items:
    del width
    return Items(tuple((unit,) for unit in range(UNITS)), (np.arange(UNITS),))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [1, 3])
def test_obs_takes_out_what_least_squares_miss_least(width: int, centred: bool) -> None:
    x, weight, t = data(width)
    curve = obs(seen_of(x, weight, t, width, centred=centred), free(width), damping=1e-12, step=1)
    left = list(range(UNITS))

    def columns(units: list[int]) -> list[int]:
        return [unit * width + i for unit in units for i in range(width)]

    whole = least_squares(x, t, columns(left), centred=centred)
    target = t - t.mean(0) if centred else t
    energy = float(target.square().sum() / len(x)) - whole  # what the whole matrix explains
    for step, (gone,) in enumerate(curve.steps, start=1):
        errors = {u: least_squares(x, t, columns([v for v in left if v != u]), centred=centred) for u in left}
        assert gone == min(errors, key=lambda unit: errors[unit])
        left.remove(gone)
        assert curve.damage[step] == pytest.approx((errors[gone] - whole) / energy, rel=1e-6)


def test_obs_takes_equally_many_of_every_group() -> None:
    x, weight, t = data(2)
    halves = Items(tuple((unit,) for unit in range(UNITS)), (np.arange(4), np.arange(4, 8)))
    curve = obs(seen_of(x, weight, t, 2), halves)
    assert [[unit // 4 for unit in step] for step in curve.steps] == [[0, 1]] * 3


def test_a_whole_group_is_one_step() -> None:
    x, weight, t = data(1)
    pairs = Items(tuple((2 * i, 2 * i + 1) for i in range(4)), (np.arange(4),))
    curve = obs(seen_of(x, weight, t, 1), pairs, damping=1e-12)
    errors = {i: least_squares(x, t, [u for u in range(UNITS) if u // 2 != i], centred=True) for i in range(4)}
    assert curve.steps[0] == (2 * min(errors, key=lambda i: errors[i]), 2 * min(errors, key=lambda i: errors[i]) + 1)


def test_steps_of_many_channels_end_where_single_ones_do() -> None:
    """Rounding does not add up: whatever the step, the damage is that of the same units taken out at once."""
    x, weight, t = data(1)
    for step in (1, 3):
        curve = obs(seen_of(x, weight, t, 1), free(1), damping=1e-12, step=step)
        whole = least_squares(x, t, list(range(UNITS)), centred=True)
        energy = float((t - t.mean(0)).square().sum() / len(x)) - whole
        for steps in (step, 2 * step):
            keep = list(curve.keep(UNITS, steps))
            assert curve.damage[steps] * energy == pytest.approx(
                least_squares(x, t, keep, centred=True) - whole, rel=1e-6
            )


@pytest.mark.parametrize("centred", [True, False])
def test_a_refit_without_ridge_is_least_squares(centred: bool) -> None:
    x, weight, t = data(1)
    keep = torch.tensor([0, 2, 3, 7])
    seen = moments(x, t, centred=centred)
    matrix = solve(seen, weight, keep, 0.0)
    kept, target = (x[:, keep] - x[:, keep].mean(0), t - t.mean(0)) if centred else (x[:, keep], t)
    assert torch.allclose(matrix, torch.linalg.lstsq(kept, target).solution, rtol=1e-7)
    assert seen.error(matrix, keep) == pytest.approx(
        float((kept @ matrix - target).square().sum() / target.square().sum()), rel=1e-9
    )


def test_a_ridge_pulls_towards_the_weights_as_they_were() -> None:
    x, weight, t = data(1)
    keep, seen = torch.tensor([0, 2, 3, 7]), moments(x, t)
    r = 0.1 * scale(seen)
    kept, target = x[:, keep] - x[:, keep].mean(0), t - t.mean(0)
    root = (r * len(x)) ** 0.5
    rows = torch.cat([kept, root * torch.eye(4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([target, root * weight[keep]])).solution
    assert torch.allclose(solve(seen, weight, keep, 0.1), expected, rtol=1e-8)
    assert torch.allclose(solve(seen, weight, keep, 1e9), weight[keep], rtol=1e-6)


def test_factors_of_units_are_least_squares() -> None:
    x, weight, t = data(3)
    keep = torch.arange(UNITS * 3)[6:]
    owner = torch.arange(UNITS).repeat_interleave(3)
    kept, target = x[:, keep] - x[:, keep].mean(0), t - t.mean(0)
    parts = torch.stack([(kept[:, i : i + 3] @ weight[keep][i : i + 3]).reshape(-1) for i in range(0, len(keep), 3)], 1)
    factors = torch.linalg.lstsq(parts, target.reshape(-1, 1)).solution[:, 0]
    found = scaled(moments(x, t), weight, keep, owner, ridge=0.0)
    assert torch.allclose(found, weight[keep] * factors.repeat_interleave(3)[:, None], rtol=1e-7)


def test_few_rows_fit_factors_and_nothing_that_does_not_help() -> None:
    x, weight, _ = data(1)
    keep, owner = torch.arange(UNITS), torch.arange(UNITS)
    few, exact = moments(x[:20], x[:20] @ weight), moments(x, x @ weight)
    assert refit(few, exact, exact, weight, keep, owner).how == "sliced"  # nothing is better than what is right
    doubled = moments(x[:20], 2 * x[:20] @ weight)
    made = refit(doubled, moments(x, 2 * x @ weight), moments(x, 2 * x @ weight), weight, keep, owner)
    assert made.how == "scaled"
    assert torch.allclose(made.matrix, 2 * weight, rtol=0.02)


def test_the_bias_takes_up_the_mean() -> None:
    x, weight, t = data(1)
    keep = torch.tensor([1, 4])
    made = refit(moments(x, t), moments(x, t), moments(x, t), weight, keep, torch.arange(UNITS))
    assert torch.allclose((x[:, keep] @ made.matrix + made.shift).mean(0), t.mean(0), rtol=1e-9)


def test_sums_of_two_parts_add_up() -> None:
    x, _, t = data(2)
    judged = torch.arange(len(x)) % 3 == 0
    total = Sums(x.shape[1], t.shape[1], x.device)
    for rows in (slice(0, 150), slice(150, None)):
        total.add(x[rows], t[rows], judged[rows])
    for part, own in ((0, ~judged), (1, judged), (None, torch.ones_like(judged))):
        found, expected = total.moments(part, centred=True), torch.cov(x[own].T, correction=0)
        assert found.count == int(own.sum())
        assert torch.allclose(found.xx, expected, rtol=1e-9)
        assert torch.allclose(found.xt, (x[own] - x[own].mean(0)).T @ (t[own] - t[own].mean(0)) / own.sum(), rtol=1e-9)


SCORES = {
    "magnitude": lambda x, w: np.arange(UNITS) ** 2.0,
    "wanda": lambda x, w: (x.square().mean(0) * w.square().sum(1)).reshape(UNITS, -1).sum(1).numpy(),
    "flap": lambda x, w: (x.var(0, correction=0) * w.square().sum(1)).reshape(UNITS, -1).sum(1).numpy(),
    "taylor": lambda x, w: np.arange(UNITS)[::-1] * 1.0,
    "fisher": lambda x, w: (np.arange(UNITS) - 3.5) ** 2,
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("method", SCORES)
def test_scores_are_what_their_papers_say(method: str, centred: bool) -> None:
    x, weight, t = data(3)
    seen = seen_of(
        x, weight, t, 3, centred=centred, slope=np.arange(UNITS)[::-1] * 1.0, bend=(np.arange(UNITS) - 3.5) ** 2
    )
    expected = by_scores(free(3), SCORES[method](x, weight))
    found = METHODS[method](seen, free(3))
    assert found.steps == expected.steps
    assert found.damage == pytest.approx(expected.damage)


def test_random_is_the_same_for_the_same_seed() -> None:
    x, weight, t = data(1)
    first, again, other = (METHODS["random"](seen_of(x, weight, t, 1, seed=s), free(1)).steps for s in (1, 1, 2))
    assert first == again
    assert first != other


def levels(generator: np.random.Generator, resources: int) -> list[list[Level]]:
    made = []
    for _ in range(5):
        costs = np.sort(generator.random((4, resources)) * 10, axis=0)
        damage = np.sort(generator.random(4))[::-1]
        made.append([Level(False, 4 - i, float(damage[i]), costs[i]) for i in range(4)])
    return made


@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_is_the_best_there_is(seed: int, resources: int) -> None:
    generator = np.random.default_rng(seed)
    every = levels(generator, resources)
    limits = np.full(resources, 24.0)
    picks = allocate(every, limits)
    damage = sum(own[i].damage for own, i in zip(every, picks, strict=True))
    best = min(
        sum(level.damage for level in choice)
        for choice in itertools.product(*every)
        if (sum(level.costs for level in choice) <= limits + 1e-9).all()
    )
    assert (sum(own[i].costs for own, i in zip(every, picks, strict=True)) <= limits + 1e-6).all()
    assert damage == pytest.approx(best, rel=1e-3)


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot be reached"):
        allocate(levels(np.random.default_rng(0), 1), [-1.0])


# Metrics, weights and swaps -------------------------------------------------------------------------------------------


def test_weighted_rows_count_as_if_they_were_there_several_times() -> None:
    x, _, t = data(1)
    times = torch.randint(0, 4, (ROWS,), generator=torch.Generator().manual_seed(1))
    weighted, repeated = Sums(UNITS, OUT, x.device), Sums(UNITS, OUT, x.device)
    judged = torch.arange(ROWS) % 5 == 4
    weighted.add(x, t, judged, times.double())
    repeated.add(x.repeat_interleave(times, 0), t.repeat_interleave(times, 0), judged.repeat_interleave(times))
    for part in (None, 0, 1):
        one, two = weighted.moments(part, centred=True), repeated.moments(part, centred=True)
        for name in ("x", "t", "xx", "xt"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-12, atol=1e-12)
        assert one.tt == pytest.approx(two.tt, rel=1e-12)


@pytest.mark.parametrize("width", [1, 3])
def test_a_metric_of_what_is_returned_is_a_change_of_coordinates(width: int) -> None:
    """OBS in the metric L Lᵀ is plain OBS on targets and weights that were multiplied by L."""
    x, weight, t = data(width)
    root = torch.randn(OUT, OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = seen_of(x, weight, t, width)
    (read,) = seen.reads
    measured = replace(seen, reads=(replace(read, root=root),))
    moved = seen_of(x, weight @ root, t @ root, width)
    mine, theirs = obs(measured, free(width), step=1), obs(moved, free(width), step=1)
    assert mine.steps == theirs.steps
    np.testing.assert_allclose(mine.damage, theirs.damage, rtol=1e-9)
    assert mine.steps != obs(seen, free(width), step=1).steps or not np.allclose(mine.damage, theirs.damage[::-1])
    diagonal = replace(read, root=root.diagonal())
    assert torch.equal(diagonal.measured(weight), weight * root.diagonal())


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("width", [1, 3])
def test_swaps_never_lose(width: int, classes: int) -> None:
    """Against the error of every choice, by brute force."""
    x, weight, t = data(width, seed=3)
    seen = seen_of(x, weight, t, width)
    own = tuple(np.array_split(np.arange(UNITS), classes))
    items = Items(tuple((unit,) for unit in range(UNITS)), own)
    damping = 1e-12

    def error(keep: tuple[int, ...]) -> float:
        return least_squares(x, t, [unit * width + i for unit in keep for i in range(width)], centred=True)

    worst = max(itertools.combinations(range(UNITS), 4), key=error)
    start = worst if classes == 1 else (0, 1, 4, 5)
    found = swapped(seen, items, start, damping=damping)
    assert len(found) == 4
    assert [sum(unit in group for unit in found) for group in own] == [sum(u in group for u in start) for group in own]
    assert error(found) <= error(start) * (1 + 1e-9)
    if classes == 1:
        assert error(found) < error(start)  # it started from the worst there is
        assert swapped(seen, items, found, damping=damping) == found


@pytest.mark.parametrize("centred", [True, False])
def test_inputs_that_are_always_zero_go_first(centred: bool) -> None:
    x, weight, _ = data(1)
    x[:, [2, 5]], weight[[2, 5]] = 0.0, 1e6 * weight[[2, 5]]
    curve = obs(seen_of(x, weight, x @ weight, 1, centred=centred), free(1), step=1)
    assert {unit for step in curve.steps[:2] for unit in step} == {2, 5}
    np.testing.assert_allclose(curve.damage[:3], 0.0, atol=1e-12)
    assert curve.damage[3] > 1e-6


def test_a_budget_that_is_just_met_takes_nothing() -> None:
    levels = [[Level(False, n, float(n), np.array([-10.0 * n])) for n in range(4)] for _ in range(3)]
    assert allocate(levels, [0.0]) == [0, 0, 0]


def test_copies_do_not_count_as_rows() -> None:
    x, _, t = data(1)
    judged, copied = torch.arange(ROWS) % 5 == 4, torch.arange(ROWS) >= 100
    total = Sums(x.shape[1], t.shape[1], x.device)
    total.add(x, t, judged, copied=copied)
    assert [total.moments(part, centred=True).count for part in (0, 1)] == [80, 20]
    torch.testing.assert_close(total.moments(centred=True).xx, moments(x, t).xx)


CACHED = {"ffn 0 1": 0.9, "ffn 0 2": 0.8}


@pytest.mark.parametrize(
    "text", ["{}", '{"ffn 0 1": 0.9}', '{"ffn 0 1": 0.9, "ffn 0 2": NaN}', "[1]", "{", "[" * 100000]
)
def test_a_table_of_times_that_is_not_whole_is_measured_again(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    assert latency._read(path, CACHED) is None
    latency._write(path, CACHED)
    assert latency._read(path, CACHED) == CACHED


def test_tables_of_times_are_of_these_sites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What one of two sites saves is half of what both do; one site alone is measured by itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = torch.nn.Linear(2, 2)
    timed: list[int] = []

    def ratios(self: latency.Latency, models: Any, *_: Any, **__: Any) -> dict[str, Estimate]:
        timed.append(len(models))
        return {name: Estimate(0.6, 0.6, 0.6) for name in models}

    monkeypatch.setattr(latency.Latency, "_ratios", ratios)
    made = latency.Latency(model, lambda parts: model, lambda parts: model, {"input": torch.ones(1, 2)}, "key")
    saved = []
    for sites in (("a", "b"), ("a",), ("a",)):
        shape = latency.Shape("ffn", False, 4, sites)
        ((_, own),) = made.table([shape], lambda shape, steps: ()).values()
        saved.append(own[-1])
    assert saved == pytest.approx([0.2, 0.4, 0.4])
    assert timed == [4, 4]
