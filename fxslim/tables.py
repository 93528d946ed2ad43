"""Tables for people: as text on a terminal, and as HTML in notebooks and reports."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH = 140


@dataclass(frozen=True)
class Table:
    """Rows under columns; columns whose name ends in ``#`` hold numbers and are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Drawn

        made = Drawn(title=self.title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            right = column.endswith("#")
            made.add_column(column.removesuffix("#"), justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            made.add_row(*map(_cell, row))
        out = io.StringIO()
        Console(file=out, width=WIDTH, no_color=True, highlight=False, emoji=False, markup=False).print(made)
        return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())

    def markdown(self) -> str:
        """Return a Markdown table."""
        heads = [column.removesuffix("#") for column in self.columns]
        rule = ["---:" if column.endswith("#") else "---" for column in self.columns]
        rows = [[_cell(cell).replace("|", r"\|") for cell in row] for row in (heads, rule, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines] if self.title else lines)

    def html(self) -> str:
        """Return an HTML table; every cell is text."""
        classes = [' class="number" style="text-align: right"' if c.endswith("#") else "" for c in self.columns]
        head = "".join(
            f"<th{look}>{escape(name.removesuffix('#'))}</th>" for name, look in zip(self.columns, classes, strict=True)
        )
        rows = (
            [f"<td{k}>{escape(_cell(cell))}</td>" for cell, k in zip(row, classes, strict=True)] for row in self.rows
        )
        body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


class Shown:
    """Something that is read as tables and lines: printed as text, shown as HTML in a notebook."""

    def parts(self) -> Sequence[Table | str]:
        """Return what is shown, in order."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts()))

    def _repr_html_(self) -> str:
        shown = (part.html() if isinstance(part, Table) else f"<p>{escape(part)}</p>" for part in self.parts())
        return "\n".join(shown)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
