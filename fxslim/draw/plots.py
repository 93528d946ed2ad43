"""Plots, as figures of matplotlib: what is kept, how scores are spread, what it was expected to cost, what it brings.

Every function returns a ``matplotlib.figure.Figure``: show it in a notebook, or save it with ``savefig``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from fxslim.draw.dot import COLOURS
from fxslim.errors import InputError
from fxslim.passes.choose import measure
from fxslim.plan import Plan
from fxslim.program import Program
from fxslim.report import Inspection, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float]


def kept(plan: Plan | Report) -> Figure:
    """Plot the part that is kept of every narrowed site, by kind, in the order of execution."""
    plan = plan.plan if isinstance(plan, Report) else plan
    figure, axes = _figure("What is kept, by layer and kind", "narrowed site, in the order of execution", "kept")
    for kind in dict.fromkeys(part.site.kind for part in plan):
        ratios = [(i, len(part.keep) / part.site.units) for i, part in enumerate(plan) if part.site.kind == kind]
        axes.plot(*zip(*ratios, strict=True), "o-", color=COLOURS[kind], label=kind, linewidth=1, markersize=4)
    _shares(axes, "y")
    axes.locator_params(axis="x", integer=True)
    return _legend(figure, axes)


def scores(found: Inspection) -> Figure:
    """Plot how the magnitudes of units are spread at every site: median, and from the 5th to the 95th percentile.

    Scores are relative to the site's largest, so that sites can stand in one plot.

    Raises:
        InputError: the Inspection does not hold its model, or its weights are on ``meta``.
    """
    import numpy as np

    if found.analysis is None:
        raise InputError("this Inspection was not made by fxslim.inspect; it holds no weights to score.")
    tensors = found.analysis.facts.get(Program).tensors
    figure, axes = _figure("Magnitude of units", "site, in the order of execution", "of the largest")
    for kind in dict.fromkeys(site.kind for site in found.sites):
        rows = []
        for i, site in enumerate(found.sites):
            if site.kind != kind:
                continue
            seen = measure(site, tensors)
            if not seen.real:
                raise InputError("weights on meta have no magnitudes; load the model first.")
            rows.append((i, *np.percentile(seen.scores / max(seen.scores.max(), 1e-30), (5, 50, 95))))
        places, low, median, high = map(np.array, zip(*rows, strict=True))
        spread = np.stack([median - low, high - median])
        axes.errorbar(places, median, yerr=spread, fmt="o", color=COLOURS[kind], label=kind, capsize=2, markersize=4)
    axes.set_ylim(0, 1.05)
    axes.locator_params(axis="x", integer=True)
    return _legend(figure, axes)


def damage(report: Report) -> Figure:
    """Plot what taking units out was expected to cost the output: the cost curve of every site, and the level chosen.

    Raises:
        InputError: nothing was measured: no budget was shared out on calibration data.
    """
    fits = [fit for fit in report.fits if isfinite(fit.damage)]
    if not fits:
        raise InputError("this report holds no damage: it is measured where calibration= comes with a target=.")
    figure, axes = _figure("Expected damage, and the level chosen", "kept", "damage to the output")
    for fit in fits:
        if fit.curve:
            line = [(kept / fit.units, cost) for kept, cost in fit.curve]
            axes.plot(*zip(*line, strict=True), "-", color=COLOURS.get(fit.kind), linewidth=0.8, alpha=0.6)
    for kind in dict.fromkeys(fit.kind for fit in fits):
        points = [(fit.kept / fit.units, fit.damage) for fit in fits if fit.kind == kind]
        axes.plot(*zip(*points, strict=True), "o", color=COLOURS.get(kind), label=kind, markersize=5)
    axes.set_ylim(0, 4 * max(fit.damage for fit in fits) or None)
    _shares(axes, "x")
    return _legend(figure, axes)


def repair(report: Report) -> Figure:
    """Plot the error of what every site returns, without and with repair, on rows that nothing was fitted on.

    Raises:
        InputError: nothing was repaired.
    """
    fits = [(i, fit) for i, fit in enumerate(report.fits) if isfinite(fit.error)]
    if not fits:
        raise InputError("this report holds no repair: what is left is fitted where calibration= is given.")
    figure, axes = _figure("Error of what a site returns", "site, in the order of execution", "relative to the target")
    axes.plot([i for i, _ in fits], [fit.plain for _, fit in fits], "o", color="#a9b3c1", label="sliced", markersize=5)
    axes.plot(
        [i for i, _ in fits], [fit.error for _, fit in fits], "o", color="#0f7f6a", label="repaired", markersize=5
    )
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    return _legend(figure, axes)


def against_budget(
    series: Mapping[str, Sequence[Point]], *, what: str, budget: str = "part of MACs", dense: float | None = None
) -> Figure:
    """Plot measured values, such as accuracy or latency, against the budget, one line for each method.

    Args:
        series: name -> (budget, value) points.
        what: what the values are.
        budget: what the budget counts.
        dense: the dense model's value, as a line.
    """
    figure, axes = _figure(f"{what} against the budget", budget, what)
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, linewidth=1.2, markersize=4)
    if dense is not None:
        axes.axhline(dense, color="#5a6778", linewidth=1, linestyle="--", label="dense")
    return _legend(figure, axes)


def _figure(title: str, x: str, y: str) -> tuple[Figure, Any]:
    """Return an empty figure of our look."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'fxslim[draw]'.") from error
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _shares(axes: Any, which: str) -> None:
    """Let an axis run over parts of a whole."""
    from matplotlib.ticker import PercentFormatter

    getattr(axes, f"set_{which}lim")(0, 1.05)
    getattr(axes, f"{which}axis").set_major_formatter(PercentFormatter(1.0))


def _legend(figure: Figure, axes: Any) -> Figure:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    return figure
