"""Plain, deterministic text: the printer that golden tests compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxslim.labels import Components
from fxslim.program import Program, shape_of
from fxslim.site import Block, Site, Slice, blocks_of


def site_lines(sites: Iterable[Site]) -> list[str]:
    """Print sites: one line each, and one for every slice."""
    lines = []
    for site in sites:
        groups = "" if site.groups is None else f" in {site.group_count} groups"
        head = " task head" if site.task_head else ""
        lines.append(f"{site.name} [{site.units} units{groups}]{head}")
        for piece in site.slices:
            blocks, each = _blocks(piece, site.units)
            rows = " ".join(f"{b.count}x{b.width}@{b.start}" + (f"+{b.step}" if b.count > 1 else "") for b in blocks)
            owner = "" if piece.groups is None else " by group"
            hook = f" <- {piece.hook}" if piece.hook is not None else ""
            lines.append(f"  {piece.role:<3} {piece.tensor}.{piece.dim} ({piece.size}): {rows}{each}{owner}{hook}")
    return lines


def _blocks(piece: Slice, units: int) -> tuple[tuple[Block, ...], str]:
    """Return blocks to print: those of the first expert where the others are like it."""
    if piece.lead is None:
        return piece.blocks, ""
    owner = piece.per_expert(piece.owners())
    numbers = np.arange(piece.experts)[:, None] * (units // piece.experts)
    alike = bool((np.where(owner >= 0, owner - numbers, -1) == owner[0]).all())
    note = f" of each of {piece.experts} in dimension {piece.lead}"
    return (blocks_of(owner[0]), note) if alike else (piece.blocks, note.replace("of each", "over all"))


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


def label_lines(program: Program, starts: Mapping[tuple[str, int], int], components: Components) -> list[str]:
    """Print what every tensor dimension carries: components, numbered as they appear, and which of them are parents.

    ``3*8`` is eight rows of component 3, ``3-10`` a row for each of them, ``stays`` a row of a pinned one.
    """
    numbers: dict[int, int] = {}
    lines = []
    for (tensor, dim), start in starts.items():
        own = components.of[start : start + program.tensors[tensor].shape[dim]].tolist()
        names = [None if components.pinned[c] else numbers.setdefault(c, len(numbers) + 1) for c in own]
        lines.append(f"{tensor}.{dim} ({len(own)}): {' '.join(_runs(names))}")
    below: dict[int, list[int]] = {}
    for parent, child in components.edges.tolist():
        if parent in numbers and child in numbers:
            below.setdefault(numbers[parent], []).append(numbers[child])
    return [*lines, *(f"{parent} > {' '.join(_runs(sorted(below[parent])))}" for parent in sorted(below))]


def _runs(numbers: Sequence[int | None]) -> list[str]:
    """Compress numbers into runs of equal and of ascending ones."""
    runs: list[list[Any]] = []  # first, last, count
    for number in numbers:
        first, last, count = runs[-1] if runs else (None, None, 0)
        equal = count and last == number and (first == last or number is None)
        ascending = number is not None and last is not None and number == last + 1 and count == last - first + 1
        if equal or ascending:
            runs[-1] = [first, number, count + 1]
        else:
            runs.append([number, number, 1])
    return [_run(*run) for run in runs]


def _run(first: int | None, last: int | None, count: int) -> str:
    name = "stays" if first is None else str(first)
    return name if count == 1 else f"{name}*{count}" if first == last else f"{name}-{last}"


def _argument(program: Program, argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return program.tensor_name(argument) or argument.name
    if isinstance(argument, tuple | list):
        return "[" + ", ".join(_argument(program, item) for item in argument) + "]"
    if isinstance(argument, torch.SymInt):
        return str(argument)
    return repr(argument)
