"""How time and memory of calibration grow with layers and with tokens.

``python -m benchmarks.calibration`` prunes encoders of MiniLM's width (random weights, random tokens) to half of their
MACs with the defaults, each in a process of its own, and writes ``benchmarks/results/calibration.{json,md}``. Building
the model does not count as time.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.environment import write_result
from benchmarks.processes import fresh, measured

LENGTH, BATCH = 32, 64
CASES = ((3, 16384), (6, 8192), (6, 16384), (6, 32768), (12, 16384))
"""Layers and tokens."""


def case(layers: int, tokens: int) -> dict[str, Any]:
    """Prune one encoder."""
    import torch
    from transformers import BertConfig, BertModel

    import fxslim

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=layers, vocab_size=4096
    )
    model = BertModel(config).eval()
    batches = [
        {"input_ids": torch.randint(5, 4096, (BATCH, LENGTH)), "attention_mask": torch.ones(BATCH, LENGTH).long()}
        for _ in range(tokens // (BATCH * LENGTH))
    ]
    found = measured(lambda: fxslim.slim(model, calibration=batches, target=fxslim.macs(0.5)))
    return {"layers": layers, "tokens": tokens, **found}


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--case", metavar="LAYERS,TOKENS", help="run one case in this process and print JSON")
    given = parser.parse_args()
    if given.case:
        layers, tokens = map(int, given.case.split(","))
        print(json.dumps(case(layers, tokens)))
        return
    rows = [fresh("benchmarks.calibration", f"{layers},{tokens}") for layers, tokens in CASES]
    lines = [
        "# Calibration: time and memory",
        "",
        "BERT of width 384 with 12 heads and 1536 channels; default method and repair, half of the MACs.",
        "",
        "| layers | tokens | wall s | CPU s | peak GiB of the process |",
        "| --- | --- | --- | --- | --- |",
        *(_line(row) for row in rows),
    ]
    write_result("calibration", payload={"rows": rows}, markdown="\n".join(lines))
    print("\n".join(lines))


def _line(row: dict[str, Any]) -> str:
    sizes, seconds = f"{row['layers']} | {row['tokens']}", f"{row['wall_seconds']:.1f} | {row['cpu_seconds']:.1f}"
    return f"| {sizes} | {seconds} | {row['peak_gib']:.2f} |"


if __name__ == "__main__":
    main()
