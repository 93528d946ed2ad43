"""Whether the harness's intervals hold: one model against itself, again and again.

``python -m benchmarks.repeatability`` benchmarks two copies of one model twenty times. Their ratio is 1 by
construction: an interval that claims 95 % should contain it nineteen times out of twenty, and be no wider than was
asked. It writes
``benchmarks/results/repeatability.{json,md,png}``.
"""

from __future__ import annotations

import argparse
import copy

import torch

import fxslim
from benchmarks.environment import write_result
from fxslim.tables import Table

RUNS = 20
WIDTH = 0.02
"""Half-width asked for, relative to the ratio."""


def main() -> None:
    """Compare, count, write."""
    from matplotlib.figure import Figure
    from transformers import BertConfig, BertModel

    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeatability", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seconds", type=float, default=60.0, help="longest time for one run")
    given = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=6)
    model = BertModel(config).eval()
    models = {"one": model, "other": copy.deepcopy(model)}
    rows = []
    for run in range(given.runs):
        found = fxslim.benchmark(models, batches=[1], lengths=[64], target_ci=WIDTH, max_seconds=given.seconds)
        timing = found.points[0].timing
        ratio = timing["other"].ratio
        rows.append({"run": run + 1, "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
                     "half_width": ratio.half_width, "converged": timing.converged, "rounds": timing.rounds,
                     "seconds": round(timing.elapsed, 1), "holds": ratio.low <= 1 <= ratio.high})  # fmt: skip
        print(rows[-1], flush=True)
    holds, narrow = sum(row["holds"] for row in rows), sum(row["half_width"] <= WIDTH for row in rows)
    both = sum(row["holds"] and row["half_width"] <= WIDTH for row in rows)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    spread = [[row["ratio"] - row["low"] for row in rows], [row["high"] - row["ratio"] for row in rows]]
    axes.errorbar([row["run"] for row in rows], [row["ratio"] for row in rows], yerr=spread, fmt="o", capsize=2)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("run")
    axes.set_ylabel("time of one copy / other")
    table = Table(("run#", "ratio#", "95 % interval#", "±#", "contains 1", "rounds#", "s#"),
                  [(row["run"], f"{row['ratio']:.4f}", f"{row['low']:.4f} .. {row['high']:.4f}",
                    f"{row['half_width']:.2%}", "yes" if row["holds"] else "no", row["rounds"], row["seconds"])
                   for row in rows])  # fmt: skip
    text = [
        "# One model against itself",
        f"all-MiniLM-L6-v2's shape, batch 1, length 64: two copies, {len(rows)} runs of at most {given.seconds:g} s.",
        f"The interval contains 1 in {holds} runs, is at most ±{WIDTH:.0%} in {narrow}, and both in {both}.",
        table.markdown(),
    ]
    payload = {"rows": rows, "holds": holds, "narrow": narrow, "both": both}
    write_result("repeatability", payload=payload, markdown="\n\n".join(text), figure=figure)
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
