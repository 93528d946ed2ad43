"""The model card of a narrowed model: what was removed, from what, and the report's own figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from fxslim.hf.classes import reading
from fxslim.passes.prepare import weights_digest
from fxslim.plan import Plan
from fxslim.report import Record, Report

CARD = "README.md"
BEGIN, END = "<!-- fxslim:begin -->", "<!-- fxslim:end -->"
CHANGED = "Its weights have changed since it was narrowed (training, a cast). What follows was measured before that."
TAGS = ("fxslim", "pruned")


def card(small: PreTrainedModel, record: Record, *, source: str | PathLike[str] | None = None) -> str:
    """Return a model card.

    Args:
        small: the narrowed model.
        record: its plan, and its report where it was narrowed in this process.
        source: folder or hub name of the dense model, whose own card is kept below the section of fxslim. What it says
            about results (``model-index``) is left out: the dense model had them.
    """
    earlier = _earlier(source)
    data: dict[str, Any] = {} if earlier is None else earlier.data.to_dict()  # type: ignore[no-untyped-call]
    data.pop("model-index", None)
    data["library_name"] = data.get("library_name", "transformers")
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or ()), *TAGS]))
    name = None if source is None or Path(source).is_dir() else fspath(source)
    if name is not None:
        data["base_model"] = name
    text = "" if earlier is None else re.sub(f"{BEGIN}.*?{END}", "", earlier.text, flags=re.DOTALL).strip()
    kind = type(small).__name__
    changed = record.report is not None and record.weights != weights_digest(small)
    lines = [BEGIN, "# Narrowed by fxslim", "", *_section(kind, name or data.get("base_model"), record, changed)]
    if text:
        lines += ["", "What follows is the card of the model that this one was made from; it is about that model."]
    header = ModelCardData(**data).to_yaml()
    return "\n".join(["---", header, "---", "", *lines, END, *(["", text] if text else []), ""])


def _earlier(source: str | PathLike[str] | None) -> ModelCard | None:
    """Return the card that stands in the dense model's folder or repository, if there is one."""
    if source is None:
        return None
    with reading(source):
        path = cached_file(fspath(source), CARD, _raise_exceptions_for_missing_entries=False)
    return None if path is None else ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)


def _section(kind: str, base: Any, record: Record, changed: bool) -> list[str]:
    plan, report = record.plan, record.report
    origin = f"`{base}`" if isinstance(base, str) else "a dense model of the same class"
    tools = f"fxslim {plan.fxslim} (torch {plan.torch}, transformers {plan.transformers})"
    lines = [
        f"A `{kind}` with fewer channels and heads, made from {origin} by {tools}. Its weights are dense.",
        "",
        *_table(("removed from", "kind", "kept", "of", "places"), _removed(plan)),
    ]
    if plan.weights_changed:
        lines += ["", "What is left was repaired on calibration data; the dense weights cannot stand in for it."]
    if report is None and plan.tried:
        how = "It was narrowed tensor by tensor, without being loaded; a layer of each kind was compared with a masked"
        lines += ["", f"{how} one. How good it is was not measured."]
    elif report is None:
        lines += ["", "It was loaded and saved again: what was measured when it was narrowed is not known here."]
    else:
        lines += ["", CHANGED, ""] if changed else [""]
        lines += _measured(report)
    lines += ["", "Load it with fxslim:", "", "```python", "import fxslim", "",
              'model = fxslim.from_pretrained("…")  # this folder or repository', "```"]  # fmt: skip
    if report is not None and report.plain is not None:
        lines += ["", f"{report.plain}."]
    return lines


def _removed(plan: Plan) -> list[tuple[object, ...]]:
    """Return what was removed, look-alike places in one row."""
    rows = Counter(
        (re.sub(r"(?<=\.)\d+(?=[.:])", "#", part.site.name), part.site.kind, len(part.keep), part.site.units)
        for part in plan
    )
    return [(f"`{name}`", kind, kept, units, places) for (name, kind, kept, units), places in rows.items()]


def _measured(report: Report) -> list[str]:
    totals = [
        ("parameters", report.parameters_before, report.parameters_after),
        ("MACs of the example", report.macs_before, report.macs_after),
    ]
    lines = _table(("", "before", "after", "left"),
                   [(name, f"{a:,}", f"{b:,}", f"{b / a:.1%}" if a else "") for name, a, b in totals])  # fmt: skip
    if report.reached:
        rows = [(one.target, one.unit, one.text(one.asked), one.text(one.measured)) for one in report.reached]
        lines += ["", *_table(("target", "", "asked", "measured"), rows)]
    checked = report.verification
    if checked.differences:
        where = f"Against the dense model with masks, on {len(checked.differences)} paths,"
        size = f"{checked.max_abs:.2e} ({checked.relative:.1e} of their scale)"
        lines += ["", f"{where} outputs differ by at most {size}."]
    if report.tokens:
        lines += [f"Chosen on {report.tokens:,} tokens of calibration data."]
    lines += ["How good it is at a task was not measured by fxslim."]
    if report.not_done:
        lines += ["", "Asked for and not done:", "", *(f"* {n.where}: {n.reason}" for n in report.not_done)]
    return lines


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
