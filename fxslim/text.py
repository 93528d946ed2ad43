"""Plain, deterministic text: tables for people, and the printer that golden tests compare."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxslim.plan import Site
from fxslim.program import Program, shape_of

WIDTH = 140


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> str:
    """Return a table; columns whose name ends in ``#`` hold numbers and are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column.removesuffix("#"), justify="right" if column.endswith("#") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_cell(cell) for cell in row))
    out = io.StringIO()
    Console(file=out, width=WIDTH, no_color=True, highlight=False, emoji=False, markup=False).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def site_lines(sites: Iterable[Site]) -> list[str]:
    """Print sites: one line each, and one for every slice."""
    lines = []
    for site in sites:
        groups = "" if site.groups is None else f" in {site.group_count} groups"
        head = " task head" if site.task_head else ""
        lines.append(f"{site.name} [{site.units} units{groups}]{head}")
        for piece in site.slices:
            rows = " ".join(
                f"{b.count}x{b.width}@{b.start}" + (f"+{b.step}" if b.count > 1 else "") for b in piece.blocks
            )
            owner = "" if piece.groups is None else " by group"
            hook = f" <- {piece.hook}" if piece.hook is not None else ""
            lines.append(f"  {piece.role:<3} {piece.tensor}.{piece.dim} ({piece.size}): {rows}{owner}{hook}")
    return lines


def program_lines(program: Program) -> list[str]:
    """Print a program's operations with example shapes, constants and the tensors they read."""
    lines = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        shape = "x".join(map(str, shape_of(node))) or "-"
        arguments = ", ".join(_argument(program, argument) for argument in node.args)
        lines.append(f"{node.name}: {shape} = {node.target}({arguments})")
    return lines


def _argument(program: Program, argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return program.tensor_name(argument) or argument.name
    if isinstance(argument, tuple | list):
        return "[" + ", ".join(_argument(program, item) for item in argument) + "]"
    if isinstance(argument, torch.SymInt):
        return str(argument)
    return repr(argument)
