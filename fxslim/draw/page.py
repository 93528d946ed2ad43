"""The page that a report is saved as: what was done, in one HTML file that needs nothing else."""

from __future__ import annotations

import io
import platform
from collections.abc import Iterator
from html import escape
from importlib import metadata
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fxslim.draw import dot, plots
from fxslim.draw.read import picture_of
from fxslim.errors import InputError
from fxslim.folder import write_files
from fxslim.report import Report
from fxslim.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("fxslim", "torch", "transformers", "numpy", "scipy")


def save_report(report: Report, path: str | Path) -> None:
    """Write a report as one HTML page: totals, sites, plots, the site graph, what was measured, and the environment.

    Raises:
        InputError: the file is not called ``.html``, or what draws is not installed (``fxslim[draw]``).
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise InputError(f"a report is saved as .html, not as {path.name!r}; report.to_dict() is plain data.")
    write_files({path: page(report)})


def page(report: Report) -> str:
    """Return the page."""
    title = f"{escape(report.plan.fingerprint.model_class)}: what fxslim did"
    style = files("fxslim.draw").joinpath("app", "report.css").read_text(encoding="utf-8")
    body = "\n".join(f"<section>\n{section}\n</section>" for section in _sections(report))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    """Yield the parts of the page, those that have something to say."""
    tables = report.tables()
    yield "<h2>Summary</h2>\n" + tables[0].html()
    if report.not_done or report.notes:
        yield "<h2>Notes</h2>\n" + _notes(report)
    drawn = list(_plots(report))
    if drawn:
        yield "<h2>Plots</h2>\n" + "\n".join(f"<figure>{_svg(figure)}</figure>" for figure in drawn)
    yield "\n".join(["<h2>Sites and measurements</h2>", *(table.html() for table in tables[1:])])
    if report.plan.sites:
        drawing = dot.svg(picture_of(report))
        yield f'<h2>Site graph</h2>\n<figure class="graph">{drawing[drawing.index("<svg") :]}</figure>'
    if report.seconds:
        seconds = [(name, f"{spent:.2f}") for name, spent in report.seconds.items()]
        yield "<h2>Seconds</h2>\n" + Table(("pass", "seconds#"), tuple(seconds)).html()
    yield "<h2>Environment</h2>\n" + _environment()


def _plots(report: Report) -> Iterator[Figure]:
    if report.plan.sites:
        yield plots.kept(report)
    if any(isfinite(fit.damage) for fit in report.fits):
        yield plots.damage(report)
    if any(isfinite(fit.error) for fit in report.fits):
        yield plots.repair(report)


def _notes(report: Report) -> str:
    said = [("not done", note) for note in report.not_done] + [("note", note) for note in report.notes]
    items = (f"<li><b>{kind}</b> {escape(note.where)}: {escape(note.reason)}</li>" for kind, note in said)
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def _svg(figure: Figure) -> str:
    """Return a figure as an element of the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


def _environment() -> str:
    """Describe the process that wrote the page."""
    rows = [("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("threads", str(torch.get_num_threads())))
    return Table(("where this page was written", ""), tuple(rows)).html()
