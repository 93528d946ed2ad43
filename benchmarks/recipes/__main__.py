"""Run every recipe on XQuAD and SST-2, and write ``benchmarks/results/recipes.{json,md}``.

``python -m benchmarks.recipes --data PATH``, where ``PATH`` holds ``xquad/xquad.en.json`` and ``sst2/{train,dev}.tsv``.
Recipes that ``--rows`` has already are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.recipes import classify_magnitude, qa_auto, qa_ffn, qa_heads
from benchmarks.tuning import has_bf16

RECIPES = {"qa_ffn": qa_ffn, "qa_heads": qa_heads, "qa_auto": qa_auto, "classify_magnitude": classify_magnitude}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lay the figures of recipes out, a line each."""
    lines = ["| recipe | trained on, tested on | dense | pruned | parameters | MACs | s |", "| --- |" + " --- |" * 6]
    for row in rows:
        scores = [", ".join(f"{name} {v:.2f}" for name, v in row[key].items()) for key in ("dense", "pruned")]
        left = [f"{row[key]:.1%}" if key in row else "as before" for key in ("parameters", "macs")]
        data = f"{row['trained_on']}, {row['tested_on']}"
        lines.append("| " + " | ".join([row["recipe"], data, *scores, *left, f"{row['seconds']:.0f}"]) + " |")
    return lines


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--data", required=True, help="folder with xquad/ and sst2/")
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    parser.add_argument("--sst2-model", type=Path, help="a classifier fine-tuned on SST-2, instead of a new one")
    parser.add_argument("--epochs", type=float, default=5.0, help="of question answering")
    parser.add_argument("--samples", type=int, default=16384, help="training rows of SST-2")
    parser.add_argument("--rows", type=Path, help="keep figures here as they come, and go on from those that are there")
    given = parser.parse_args()
    rows = json.loads(given.rows.read_text(encoding="utf-8")) if given.rows and given.rows.exists() else []
    done = {row["recipe"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.recipes:
            own = ["--data", given.data, *(["--bf16"] if has_bf16() else [])]
            if name == "classify_magnitude":
                own += ["--dense", str(given.sst2_model or Path(folder) / "sst2"), "--num_train_epochs", "2"]
                own += ["--per_device_train_batch_size", "32", "--max_train_samples", str(given.samples)]
            else:
                own += ["--dense", str(Path(folder) / "qa"), "--num_train_epochs", str(given.epochs)]
            if name not in done:
                rows.append(RECIPES[name].main(own))
            if given.rows is not None:
                given.rows.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = [
        "# The recipes of the old tool, end to end",
        "",
        "all-MiniLM-L6-v2 with a fresh head. XQuAD-en is small: answers are few to learn from, and F1 is far from that",
        "of models trained on all of SQuAD. What is pruned is trained as long again as the dense model was, which of",
        "questions is its teacher; the first recipe's seconds are of both. Masks of single weights leave sizes as they",
        "are.",
        "",
        *table(rows),
    ]
    write_result("recipes", payload={"rows": rows}, markdown="\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
