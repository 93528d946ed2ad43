"""Rows that are kept in a file as they are measured, so that a benchmark can be cut off and goes on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of a benchmark with rows; ``--data`` is among those that were added before."""
    parser.add_argument("--rows", type=Path, help="keep rows here as they come, and go on from those that are there")
    parser.add_argument("--only-tables", action="store_true", help="measure nothing: write what --rows holds")
    given = parser.parse_args()
    if given.only_tables and (given.rows is None or not given.rows.exists()):
        parser.error("--only-tables needs --rows with a file that is there")
    if not given.only_tables and given.data is None:
        parser.error("--data is needed to measure")
    return given


def kept(path: Path | None, kind: type[Row]) -> list[Row]:
    """Return the rows of a file; none where there is none."""
    if path is None or not path.exists():
        return []
    return [kind(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def keep(path: Path | None, rows: Sequence[Any]) -> None:
    """Write all rows, where there is a file for them."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
