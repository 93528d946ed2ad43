"""Write what came of the zoo as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.zoo.check import Form, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- zoo:begin -->", "<!-- zoo:end -->"
HEAD = (
    "model",
    "class",
    "sites",
    "oracle",
    "outputs",
    "`slim`",
    "`compile`",
    "generates",
    "survives",
    "s",
    "what is missing",
)

SHOWN = 3
"""How many outputs of a case the table names."""


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the counts that the README quotes."""
    prunable = sum(row.prunable for row in rows)
    forms = ("slim", "compile")
    return {
        "cases": len(rows),
        "families": len({row.name for row in rows}),
        "narrowed": {form: sum(row.passes(form) for row in rows) for form in forms},
        "narrowed or in place": {form: sum(row.passes(form, in_place=True) for row in rows) for form in forms},
        "wrong": sum(made.outcome == "wrong" for row in rows for made in (row.slim, row.compile)),
        "nothing": sum("nothing" in (row.slim.outcome, row.compile.outcome) for row in rows),
        "without sites": sum(not row.sites and not row.error for row in rows),
        "outputs": {form: sum(len(getattr(row, form).outputs) for row in rows) for form in forms},
        "mute": {form: sum(len(getattr(row, form).mute) for row in rows) for form in forms},
        "prunable": prunable,
        "in sites": sum(row.found for row in rows),
        "smaller": {form: sum(getattr(row, form).narrowed for row in rows) for form in forms},
        "seconds": round(sum(row.seconds for row in rows)),
        "slowest": round(max((row.seconds for row in rows), default=0.0), 1),
    }


def summary(rows: Sequence[Row]) -> str:
    """Return the totals in words."""
    t = totals(rows)
    cases, prunable = t["cases"], max(t["prunable"], 1)
    lines = [f"{cases} cases of {t['families']} families.", "", "| | `slim` | `compile` |", "| --- | --- | --- |"]
    for name in ("narrowed", "narrowed or in place"):
        lines.append(
            f"| pass, {name} | " + " | ".join(_share(t[name][form], cases) for form in ("slim", "compile")) + " |"
        )
    smaller = " | ".join(_share(t["smaller"][form], prunable) for form in ("slim", "compile"))
    found = f"oracle: {t['prunable']}, in sites: {_share(t['in sites'], prunable)}"
    lines.append(f"| prunable linears ({found}) that got smaller | {smaller} |")
    told = " | ".join(f"{t['outputs'][form]} of {t['outputs'][form] + t['mute'][form]}" for form in ("slim", "compile"))
    lines.append(f"| outputs that were compared and whose numbers are not all the same | {told} |")
    empty = f"Nothing could be compared in {t['nothing']} cases, and no site was found in {t['without sites']}."
    lines += ["", f"Wrong answers: {t['wrong']}. {empty}"]
    lines += ["", f"Seconds on one core: {t['seconds']} in all, {t['slowest']:g} for the slowest."]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})"


def figure(counted: Mapping[str, Any]) -> Figure:
    """Plot what `totals` has counted: parts of cases that pass, and of prunable linears that got smaller."""
    from matplotlib.figure import Figure

    shares = {
        **{f"pass, {name}": (counted[name], counted["cases"]) for name in ("narrowed", "narrowed or in place")},
        "prunable linears that got smaller": (counted["smaller"], counted["prunable"]),
    }
    made = Figure(figsize=(7, 2.4), layout="constrained")
    axes = made.subplots()
    for place, form in enumerate(("slim", "compile")):
        parts = [100 * own[form] / max(whole, 1) for own, whole in shares.values()]
        axes.barh([row + 0.4 * place for row in range(len(shares))], parts, height=0.38, label=form)
    axes.set_yticks([row + 0.2 for row in range(len(shares))], list(shares))
    axes.set_xlabel(f"% ({counted['cases']} cases, {counted['prunable']} linears)")
    axes.legend(loc="lower left")
    return made


def markdown(rows: Sequence[Row]) -> str:
    """Return totals and one line a case."""
    lines = ["# The zoo", "", summary(rows), "", f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    sites = ", ".join(f"{count} {kind}" for kind, count in sorted(row.sites.items()))
    oracle = f"{row.found}/{row.prunable}" if row.prunable else ""
    missing = row.failure().replace("|", "/")
    keys = [_key(key) for key in row.slim.outputs or row.compile.outputs]
    outputs = ", ".join([*keys[:SHOWN], *([f"{len(keys) - SHOWN} more"] if len(keys) > SHOWN else [])])
    forms = (outputs, _form(row.slim), _form(row.compile))
    generates = row.generates.partition(":")[0]
    return (row.name, row.model, sites, oracle, *forms, generates, row.survives[:3], f"{row.seconds:.1f}", missing)


def _key(key: str) -> str:
    """Write an output's place with dots."""
    return key.strip("[]'.").replace("'][", ".").replace("][", ".").replace("'", "")


def _form(form: Form) -> str:
    return f"{form.outcome} {form.worst:.0e}" if form.worst else form.outcome
