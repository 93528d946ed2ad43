"""Peers side by side: who can do which model, who is exact, how long it takes and how much memory.

``python -m benchmarks.peers`` writes ``benchmarks/results/peers.{json,md,png}``. It needs the extras ``peers`` and
``bench``. Rows of Intel Neural Compressor come from an environment of its own, which
``python -m benchmarks.peers.inc_environment FOLDER`` makes; then ``--inc FOLDER`` runs its cells there. ``--rows FILE``
keeps rows as they come and goes on from those that are there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.peers.cell import TOOLS
from benchmarks.peers.models import BERT_BASE, SUBJECTS, matrices
from benchmarks.peers.report import base_text, figure, models_text
from benchmarks.processes import tried

CELL = "benchmarks.peers.cell"
BASE = ("fxslim", "Torch-Pruning", "INC")
"""torch.ao has no pattern for heads and cannot come to the same widths."""


@dataclass
class Kept:
    """Rows in a file, by tool and model."""

    path: Path | None
    inc: Path | None
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))

    def cell(self, tool: str, model: str) -> dict[str, Any] | None:
        """Return a row that is there, or run its cell; None where the tool's environment is not given."""
        key = f"{tool},{model}"
        if key not in self.rows:
            if tool == "INC" and self.inc is None:
                return None
            found, error = tried(
                CELL, key, python=sys.executable if tool != "INC" else str(self.inc / "bin" / "python")
            )  # type: ignore[operator]
            self.keep(key, {"tool": tool, "model": model, **found, "error": error})
            print(f"{key}: {error or 'done'}", flush=True)
        own: dict[str, Any] = self.rows[key]
        return own

    def keep(self, key: str, value: Any) -> None:
        """Add something, on disk too if there is a file."""
        self.rows[key] = value
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")


def ran(cells: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Return the cells that could be run."""
    return [row for row in cells if row is not None]


def latency(seconds: float) -> dict[str, Any]:
    """Time a BERT-base that fxslim has pruned and one that Torch-Pruning has, once every width is the same.

    Raises:
        ValueError: a width is not.
    """
    import fxslim

    inputs = {"input_ids": BERT_BASE.inputs(1, 128)["input_ids"]}
    models = {tool: TOOLS[tool](BERT_BASE, BERT_BASE.build(), inputs) for tool in ("Torch-Pruning", "fxslim")}
    first, second = ({name: w.shape for name, w in matrices(model).items()} for model in models.values())
    if first != second:
        raise ValueError(f"other widths: {[name for name in first if first[name] != second.get(name)]}")
    found = fxslim.benchmark(models, inputs, check=False, max_seconds=seconds, target_ci=0.01)
    return {"latency": found.to_dict(), "latency_table": found.to_markdown()}


def main() -> None:
    """Run every cell, then BERT-base, and write what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--only", choices=("models", "base"), help="one part of two")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the latency of BERT-base")
    parser.add_argument("--inc", type=Path, help="the environment of Intel Neural Compressor")
    parser.add_argument("--rows", type=Path, help="keep rows here as they come, and go on from those that are there")
    given = parser.parse_args()
    if find_spec("torch_pruning") is None:
        parser.error("Torch-Pruning is not installed: pip install '.[peers]'")
    kept = Kept(given.rows, given.inc)
    text, payload, plot = ["# Peers side by side"], {}, None
    if given.only != "base":
        rows = ran(kept.cell(tool, model) for model in SUBJECTS for tool in TOOLS)
        text += models_text(rows)
        payload["models"], plot = rows, figure(rows)
    if given.only != "models":
        times = ran(kept.cell(tool, BERT_BASE.name) for tool in BASE)
        if "latency" not in kept.rows:
            kept.keep("latency", latency(given.seconds))
        base = {"time": times, **kept.rows["latency"]}
        text += base_text(base)
        payload["base"] = base
    name = "peers" if given.only is None else f"peers-{given.only}"
    write_result(name, payload=payload, markdown="\n\n".join(text), figure=plot)
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
