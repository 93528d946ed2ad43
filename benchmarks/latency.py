"""How much faster a narrowed BERT-base is, against the ideal (MACs dense / MACs narrowed).

``python -m benchmarks.latency`` times the dense model, the narrowed module and the compiled graph side by side in one
process and writes ``benchmarks/results/latency.{json,md}``.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from benchmarks.environment import Environment, write_result

LENGTH = 128


def main() -> None:
    """Time batch 1 and 8."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each batch size")
    options = parser.parse_args()
    import torch
    from transformers import BertConfig, BertModel

    import fxslim
    from fxslim import count, timer

    dense = BertModel(BertConfig()).eval()
    small: Any = fxslim.slim(dense, ffn=0.5, heads=0.5)
    graph = fxslim.compile(dense, plan=small.fxslim.plan.model_copy(update={"edits": (), "zeroed": ()}))
    rows, results = [], []
    for batch in options.batches:
        ids = torch.arange(batch * LENGTH).reshape(batch, LENGTH) % 1000 + 1000
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            ideal = count.macs_of(dense, **inputs) / count.macs_of(small, **inputs)
            timing = timer.compare(
                {name: partial(m, **inputs) for name, m in (("dense", dense), ("module", small), ("graph", graph))},
                max_seconds=options.seconds,
                target_ci=0.01,
            )
        for name in ("module", "graph"):
            speedup = timing[name].speedup
            rows.append(
                f"| {batch} | {name} | {timing['dense'].time.value * 1e3:.1f} | {timing[name].time.value * 1e3:.1f} "
                f"| {speedup.value:.3f} [{speedup.low:.3f}, {speedup.high:.3f}] | {ideal:.3f} "
                f"| {speedup.value / ideal:.3f} |"
            )
        results.append({"batch": batch, "length": LENGTH, "ideal": ideal, "timing": timing.to_json()})
    environment = Environment.collect()
    lines = ["# Latency of BERT-base with half of the FFN and half of the heads", "", str(environment), "",
             f"Sequence {LENGTH}, interleaved, medians, 95 % intervals of the paired ratio.", "",
             "| batch | form | dense ms | narrowed ms | speed-up | ideal | of ideal |", "|---|---|---|---|---|---|---|",
             *rows]  # fmt: skip
    write_result("latency", payload={"environment": environment.to_json(), "results": results},
                 markdown="\n".join(lines) + "\n")  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
