"""What users are told: what can be narrowed and what cannot, what was done, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

import networkx as nx

from fxslim.analysis import Analysis
from fxslim.plan import Note, Plan
from fxslim.site import Site
from fxslim.tables import Shown, Table


@dataclass(frozen=True)
class Difference:
    """What was measured along one path.

    Attributes:
        path: how the model was run.
        max_abs: largest absolute difference of any output.
        scale: largest absolute value of the reference.
        tolerance: largest absolute difference that was allowed.
    """

    path: str
    max_abs: float
    scale: float
    tolerance: float

    @property
    def relative(self) -> float:
        """Return the difference relative to the output's scale."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self) | {"relative": self.relative}


@dataclass(frozen=True)
class Verification(Shown):
    """Differences between masked and narrowed, one per path; all within tolerance."""

    differences: tuple[Difference, ...] = ()

    @property
    def max_abs(self) -> float:
        """Return the largest absolute difference."""
        return max((difference.max_abs for difference in self.differences), default=0.0)

    @property
    def relative(self) -> float:
        """Return the largest difference relative to an output's scale."""
        return max((difference.relative for difference in self.differences), default=0.0)

    def parts(self) -> tuple[Table]:
        """Return the differences."""
        rows = [(d.path, f"{d.max_abs:.2e}", f"{d.relative:.2e}", f"{d.tolerance:.2e}") for d in self.differences]
        return (Table(("path", "largest difference#", "relative#", "allowed#"), rows, title="masked = narrowed"),)


@dataclass(frozen=True)
class Inspection(Shown):
    """What can be narrowed in a model, and what cannot.

    Attributes:
        sites: every site, in the order of execution.
        pinned: consumers whose channels stay, with the reason.
        notes: what the user should know about the trace.
        feeds: directed graph over site names: which site's output reaches which site's input without passing another.
        explain: answers "why was this not found?" for a module path or a weight.
        analysis: the model and what the passes found; an Inspection stands for the model in `plan`, `slim`, `compile`.
    """

    sites: tuple[Site, ...]
    pinned: tuple[Note, ...]
    notes: tuple[Note, ...] = ()
    feeds: nx.DiGraph = field(default_factory=nx.DiGraph, compare=False)
    explain: Callable[[str], str] = field(default=str, compare=False, repr=False)
    analysis: Analysis | None = field(default=None, compare=False, repr=False)

    def why(self, name: str) -> str:
        """Say what was found at a module or weight, what was not, and why."""
        lines = [f"{note.where}: {note.reason}" for note in self.pinned if _below(note.where, name)]
        return "\n".join([*lines, self.explain(name)])

    def __getitem__(self, name: str) -> Site:
        """Return a site by name."""
        return next(site for site in self.sites if site.name == name)

    def parts(self) -> list[Table | str]:
        """Return the sites, why the rest stays, and notes."""
        rows = [
            (site.name, site.kind, site.units, "" if site.groups is None else site.group_count,
             "task head" if site.task_head else "")
            for site in self.sites
        ]  # fmt: skip
        parts: list[Table | str] = []
        parts.append(Table(("site", "kind", "units#", "groups#", ""), rows, title=f"{len(self.sites)} sites"))
        if self.pinned:
            by_reason: dict[str, list[str]] = {}
            for note in self.pinned:
                by_reason.setdefault(note.reason, []).append(note.where)
            pinned = [(reason, len(where), where[0]) for reason, where in by_reason.items()]
            parts.append(Table(("stays, because", "linears#", "first"), pinned))
        parts.extend(f"note: {note.where}: {note.reason}" for note in self.notes)
        return parts


def _below(where: str, name: str) -> bool:
    return not name or where == name or where.startswith(f"{name}.")


@dataclass(frozen=True)
class Fit:
    """What was done at one site.

    Attributes:
        site: its name.
        kind: its kind.
        units: how many units it has.
        kept: how many stay.
        damage: what was expected of this to the output: KL divergence, or relative squared error; NaN where nothing
            was measured.
        error: error of what it returns, on rows that were not fitted, relative to the target; NaN without repair.
        plain: the same without repair.
        how: how it was repaired.
        ridge: with which ridge.
        curve: (units that stay, expected damage) at a few places of the cost curve that was chosen from.
    """

    site: str
    kind: str
    units: int
    kept: int
    damage: float = nan
    error: float = nan
    plain: float = nan
    how: str = ""
    ridge: float = nan
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reached:
    """What became of a target.

    Attributes:
        target: the target, such as ``speedup(2)``.
        unit: what the numbers count: ``MACs``, ``parameters``, ``bytes`` or ``times faster``.
        asked: the limit; how many times faster, of time.
        predicted: what the sites' own costs add up to.
        measured: what the narrowed model has: counted, or timed end to end.
        within: half-width of the 95 % interval of what was timed, relative; 0 where things are counted.
    """

    target: str
    unit: str
    asked: float
    predicted: float
    measured: float
    within: float = 0.0

    def text(self, number: float) -> str:
        """Write one of the numbers."""
        return f"{number:.3f}" if self.unit == "times faster" else f"{number:,.0f}"


@dataclass(frozen=True)
class Plain:
    """Whether ``from_pretrained`` of transformers loads a narrowed model that was saved, and why.

    Attributes:
        loads: whether it does, which was tried; otherwise it fails with transformers' own error about sizes.
        reason: what the config says, or why it cannot say it.
    """

    loads: bool
    reason: str

    def __str__(self) -> str:
        answer = "yes" if self.loads else "no; use fxslim.from_pretrained"
        return f"plain from_pretrained loads what is saved: {answer} ({self.reason})"


@dataclass(frozen=True)
class Report(Shown):
    """What was done to a model.

    Attributes:
        parameters_before: distinct parameters of the dense model.
        parameters_after: of the narrowed one.
        macs_before: multiply-accumulates of one forward on the traced example, dense.
        macs_after: narrowed.
        plan: what was taken out.
        verification: masked against narrowed, on fresh inputs.
        not_done: what was asked for and not done, with its reason.
        notes: what the user should know about the result.
        seconds: pass -> wall time.
        fits: how what is left was fitted on calibration data, site by site.
        tokens: how many tokens of calibration data that were.
        reached: what became of the targets.
        plain: whether transformers loads the saved model by itself; None where it is none of transformers'.
    """

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    plan: Plan
    verification: Verification
    not_done: tuple[Note, ...] = ()
    notes: tuple[Note, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    fits: tuple[Fit, ...] = ()
    tokens: int = 0
    reached: tuple[Reached, ...] = ()
    plain: Plain | None = None

    @property
    def sites(self) -> tuple[dict[str, Any], ...]:
        """Return name, kind, units and kept units of every narrowed site."""
        return tuple(
            {"name": p.site.name, "kind": p.site.kind, "units": p.site.units, "kept": len(p.keep)} for p in self.plan
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "sites": list(self.sites),
            "verification": [difference.to_dict() for difference in self.verification.differences],
            "not_done": [note.model_dump() for note in self.not_done],
            "notes": [note.model_dump() for note in self.notes],
            "seconds": self.seconds,
            "fits": [
                {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(fit).items()}
                for fit in self.fits
            ],
            "tokens": self.tokens,
            "reached": [asdict(one) for one in self.reached],
            "plain": None if self.plain is None else asdict(self.plain),
        }

    def tables(self) -> list[Table]:
        """Return totals, what became of targets, sites, and differences."""
        totals = [
            (name, before, after, f"{after / before:.1%}" if before else "")
            for name, before, after in (
                ("parameters", self.parameters_before, self.parameters_after),
                ("MACs", self.macs_before, self.macs_after),
            )
        ]
        rows = [(s["name"], s["kind"], s["kept"], s["units"]) for s in self.sites]
        tables = [Table(("", "before#", "after#", "left#"), totals)]
        if self.reached:
            tables.append(_reached(self.reached))
        if self.fits:
            tables.append(_fits(self.fits, self.tokens))
        elif rows:
            tables.append(Table(("site", "kind", "kept#", "of#"), rows))
        return [*tables, *self.verification.parts()]

    def parts(self) -> list[Table | str]:
        """Return the tables and what there is to say."""
        said = [f"not done: {note.where}: {note.reason}" for note in self.not_done]
        plain = [] if self.plain is None else [str(self.plain)]
        return [*self.tables(), *plain, *said, *(f"note: {note.where}: {note.reason}" for note in self.notes)]

    def save(self, path: str | Path) -> None:
        """Write one HTML page: summary, sites, plots, the site graph, what was measured, the environment.

        Raises:
            InputError: the file is not called ``.html``, or what draws is not installed (``fxslim[draw]``).
        """
        import fxslim  # what draws stands above this module, and is reached through the public face

        fxslim.save_report(self, path)


def _reached(reached: tuple[Reached, ...]) -> Table:
    rows = []
    for one in reached:
        numbers = (one.asked, one.predicted, one.measured)
        texts = [one.text(number) for number in numbers]
        rows.append((one.target, one.unit, *texts, f"{one.within:.1%}" if one.within else ""))
    return Table(("target", "", "asked#", "predicted#", "measured#", "±#"), rows)


def _fits(fits: tuple[Fit, ...], tokens: int) -> Table:
    def number(value: float) -> str:
        return f"{value:.2g}" if isfinite(value) else ""

    rows = [(f.site, f.kind, f.kept, f.units, number(f.damage), number(f.plain), number(f.error), f.how) for f in fits]
    columns = ("site", "kind", "kept#", "of#", "damage#", "sliced#", "repaired#", "")
    return Table(columns, rows, title=f"chosen on {tokens} tokens; errors are of rows that were not fitted")


@dataclass(frozen=True)
class Record:
    """What travels with a narrowed model as ``.fxslim``: the plan and the report.

    Attributes:
        plan: what was taken out.
        report: what was measured, where that was in this process.
        weights: the weights of which that is said (`fxslim.passes.prepare.weights_digest`).
    """

    plan: Plan
    report: Report | None = None
    weights: str = ""
