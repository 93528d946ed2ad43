"""What the rows of the quality benchmark say: tables, orders that theory predicts, and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

DENSE = "dense"
"""The method of the row that holds the score of a task's model as it came."""


@dataclass(frozen=True)
class Row:
    """One measurement: a task, a method, a budget, a seed of the calibration data."""

    task: str
    method: str
    budget: float
    seed: int
    score: float
    divergence: float
    macs: float
    seconds: float


@dataclass(frozen=True)
class Task:
    """What the scores of a task are, and how they are shown.

    Attributes:
        key: Name on the command line and in file names.
        name: Name in rows and tables.
        unit: What its score is.
        divergence: What its distance from the dense model is.
        data: What calibrates.
        budgets: The parts of its MACs that are measured.
        lower: Whether a lower score is better.

    """

    key: str
    name: str
    unit: str
    divergence: str
    data: str
    budgets: tuple[float, ...]
    lower: bool = False

    @property
    def label(self) -> str:
        """Return what the score is, and which way is better."""
        return f"{self.unit}, {'lower' if self.lower else 'higher'} is better"


BUDGETS = (0.75, 0.60, 0.50, 0.40, 0.33)
TASKS = (
    Task("stsb", "STS-B", "Spearman x 100", "1 - cosine to the dense embeddings", "1024 sentences", BUDGETS),
    Task("sst2", "SST-2", "accuracy %", "KL(dense, pruned)", "1024 phrases", BUDGETS),
    Task("wikitext", "WikiText-2", "perplexity per byte", "KL(dense, pruned) per byte", "128 sequences of 128 bytes",
         (0.8, 0.65, 0.5), lower=True),
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """Two methods, of which the second should be better (or, unless it is ``strict``, at least as good)."""

    name: str
    worse: str
    better: str
    strict: bool = True


ORDERS = (
    Order("a", "random", "wanda"),
    Order("a", "magnitude", "wanda"),
    Order("a", "wanda", "flap (bias)"),
    Order("a", "flap (bias)", "obs, uniform"),
    Order("b", "fisher, mask tuning", "obs"),
    Order("c", "wanda", "wanda, refit"),
    Order("c", "obs, uniform, no repair", "obs, uniform"),
    Order("d", "obs, dense inputs", "obs"),
    Order("e", "obs, uniform", "obs"),
    Order("e", "obs, uniform, no heads", "obs, no heads"),
    Order("f", "obs, no swaps", "obs", strict=False),
)
WIDER = {"b": 0.4, "e": 0.6}
"""Order -> the budget below which (b), or at and below which (e), the gain should be larger than above.

Heads of grouped queries go equally many of each group: of the few that there are, half at once. Without heads, the gain
of (e) is that of sizes alone.
"""
MEANING = {
    "a": "random, magnitude < wanda < FLAP < OBS with refit",
    "b": "mask tuning < least squares, more so past 60 % removed",
    "c": "the same mask: none < refit",
    "d": "dense inputs < propagated inputs",
    "e": "uniform < allocated, most at 40 % removed and more",
    "f": "greedy <= local search",
}


@dataclass(frozen=True)
class Compared:
    """An order at a budget: means over the seeds that both methods were measured with, and whether it holds.

    ``gain`` is by how much the second is better; all are None where no seed is shared.
    """

    order: Order
    budget: float
    seeds: int
    worse: float | None
    better: float | None
    gain: float | None
    holds: bool | None


@dataclass(frozen=True)
class Widening:
    """Whether the mean gain of an order is larger where more is removed; None where one side was not measured."""

    order: Order
    low: float | None
    high: float | None
    holds: bool | None


Value = Callable[[Row], float]


def score(row: Row) -> float:
    """Return a row's score."""
    return row.score


def divergence(row: Row) -> float:
    """Return a row's distance from the dense model."""
    return row.divergence


def curves(rows: Iterable[Row], of: Value = score) -> dict[str, dict[float, tuple[float, float | None]]]:
    """Return for every method and budget the mean over seeds, and their deviation if there are several."""
    values: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.method != DENSE:
            values.setdefault(row.method, {}).setdefault(row.budget, []).append(of(row))
    return {
        method: {b: (fmean(own), pstdev(own) if len(own) > 1 else None) for b, own in budgets.items()}
        for method, budgets in values.items()
    }


def table(head: str, methods: Iterable[str], rows: Sequence[Row], of: Value, digits: int) -> list[str]:
    """Lay the rows of one task out: methods by budgets, the mean over seeds and their standard deviation."""
    made = curves(rows, of)
    budgets = sorted({budget for own in made.values() for budget in own}, reverse=True)
    lines = _lines(head, [f"{budget:.0%} of MACs" for budget in budgets])
    for method in methods:
        if method in made:
            cells = [_cell(made[method].get(budget), digits) for budget in budgets]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _cell(found: tuple[float, float | None] | None, digits: int) -> str:
    if found is None:
        return ""
    mean, spread = found
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _lines(first: str, rest: Sequence[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(rest) + " |", "| --- |" + " --- |" * len(rest)]


def orders(rows: Sequence[Row], of: Value, lower: bool) -> tuple[list[Compared], list[Widening]]:
    """Say of every order, at every budget of one task's rows, whether it holds."""
    values = {(row.method, row.budget, row.seed): of(row) for row in rows if row.method != DENSE}
    budgets = sorted({budget for _, budget, _ in values}, reverse=True)
    found = [_compared(order, budget, values, lower) for order in ORDERS for budget in budgets]
    wider = []
    for order in ORDERS:
        if order.name not in WIDER:
            continue
        edge, beyond = WIDER[order.name], order.name == "b"
        gains = {c.budget: c.gain for c in found if c.order == order and c.gain is not None}
        far = [gain for budget, gain in gains.items() if (budget < edge if beyond else budget <= edge)]
        near = [gain for budget, gain in gains.items() if (budget >= edge if beyond else budget > edge)]
        low, high = fmean(near) if near else None, fmean(far) if far else None
        wider.append(Widening(order, low, high, None if low is None or high is None else high > low))
    return found, wider


def _compared(order: Order, budget: float, values: Mapping[tuple[str, float, int], float], lower: bool) -> Compared:
    first = {seed: v for (method, b, seed), v in values.items() if (method, b) == (order.worse, budget)}
    second = {seed: v for (method, b, seed), v in values.items() if (method, b) == (order.better, budget)}
    seeds = first.keys() & second.keys()
    if not seeds:
        return Compared(order, budget, 0, None, None, None, None)
    worse, better = fmean(first[seed] for seed in seeds), fmean(second[seed] for seed in seeds)
    gain = worse - better if lower else better - worse
    return Compared(order, budget, len(seeds), worse, better, gain, gain > 0 if order.strict else gain >= 0)


def orders_table(head: str, rows: Sequence[Row], of: Value, lower: bool, digits: int) -> list[str]:
    """Lay the orders of one task out: pairs by budgets, both means and whether the second one is better."""
    found, wider = orders(rows, of, lower)
    budgets = sorted({c.budget for c in found}, reverse=True)
    lines = _lines(head, [f"{budget:.0%} of MACs" for budget in budgets])
    for order in ORDERS:
        cells = [_verdict(c, digits) for c in found if c.order == order]
        sign = "<" if order.strict else "<="
        lines.append(f"| ({order.name}) {order.worse} {sign} {order.better} | " + " | ".join(cells) + " |")
    lines.append("")
    for w in wider:
        name, edge = w.order.name, f"{1 - WIDER[w.order.name]:.0%}"
        where = f"more than {edge} removed" if name == "b" else f"{edge} removed and more"
        pair = f"({name}) {w.order.worse} < {w.order.better}"
        if w.low is None or w.high is None:
            lines.append(f"{pair}: gain with {where} against less not measured.")
        else:
            verdict = "larger, holds" if w.holds else "not larger, does not hold"
            lines.append(f"{pair}: mean gain with {where} {w.high:.{digits}f}, "
                         f"with less {w.low:.{digits}f}: {verdict}.")  # fmt: skip
        lines.append("")
    return lines[:-1]


def _verdict(found: Compared, digits: int) -> str:
    if found.worse is None or found.better is None:
        return "not measured"
    return f"{found.worse:.{digits}f}, {found.better:.{digits}f}: {'holds' if found.holds else 'does not hold'}"


def report(rows: Sequence[Row], methods: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return all tables as text, and the rows and orders as plain data."""
    text = ["# Quality after post-training pruning, without training", ""]
    text += ["How long it takes is measured by itself: [speedup](speedup.md).", ""]
    data: dict[str, Any] = {}
    measured = [task for task in TASKS if any(row.task == task.name for row in rows)]
    for task in measured:
        own = [row for row in rows if row.task == task.name]
        draws = len({row.seed for row in own})
        over = f"mean and deviation over at most {draws} draw{'s' if draws > 1 else ''}"
        text += [f"{task.name}: calibrated on {task.data}, without labels; {over}.", ""]
        dense = next((f" (dense {row.score:.2f})" for row in own if row.method == DENSE), "")
        text += [*table(f"{task.name}, {task.label}{dense}", methods, own, score, 2), ""]
        text += [*table(f"{task.name}, {task.divergence}, lower is better", methods, own, divergence, 4), ""]
    text += [
        "## Orders",
        "",
        "What theory and the literature predict: in each pair the second method is better (<), or at",
    ]
    text += ["least as good (<=), whichever way the score runs. Means over the seeds that both rows have.", ""]
    text += [f"* ({name}) {meaning}" for name, meaning in MEANING.items()] + [""]
    for task in measured:
        own = [row for row in rows if row.task == task.name]
        for of, head, lower, digits in (
            (score, task.label, task.lower, 2),
            (divergence, f"{task.divergence}, lower is better", True, 4),
        ):
            text += [*orders_table(f"{task.name}, {head}", own, of, lower, digits), ""]
            found, wider = orders(own, of, lower)
            data[f"{task.name}, {of.__name__}"] = {
                "compared": [asdict(c) for c in found],
                "wider": [asdict(w) for w in wider],
            }
    return text, {"rows": [asdict(row) for row in rows], "orders": data}


def plot(rows: Sequence[Row], methods: Sequence[str], folder: Path) -> list[Path]:
    """Draw the score of every task against its budget, a line per method; needs matplotlib.

    Returns the files, one ``quality-TASK.png`` for each task that has rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    written = []
    for task in TASKS:
        own = [row for row in rows if row.task == task.name]
        made = curves(own)
        if not made:
            continue
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()
        for method in methods:
            points = sorted(made.get(method, {}).items())
            if points:
                axes.errorbar([b * 100 for b, _ in points], [mean for _, (mean, _) in points],
                              yerr=[float("nan") if spread is None else spread for _, (_, spread) in points],
                              marker="o", markersize=4, capsize=3, linewidth=1.2, label=method)  # fmt: skip
        for row in own:
            if row.method == DENSE:
                axes.axhline(row.score, color="black", linestyle=":", linewidth=1, label=DENSE)
        if task.lower:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set_xticks(sorted({budget * 100 for line in made.values() for budget in line}))
        axes.invert_xaxis()
        axes.set(title=task.name, xlabel="% of MACs kept", ylabel=task.label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"quality-{task.key}.png")
        figure.savefig(written[-1], dpi=120, metadata={"Software": None})
    return written
