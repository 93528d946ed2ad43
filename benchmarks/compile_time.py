"""How long narrowing takes and how much memory it needs.

``python -m benchmarks.compile_time`` runs every case in a process of its own, so that peaks do not mix, and writes
``benchmarks/results/compile_time.{json,md}``. Import and model construction do not count.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.environment import Environment, write_result
from benchmarks.processes import fresh, measured


def bert_base() -> dict[str, Any]:
    """Narrow BERT-base (random weights): half of the FFN, half of the heads, verified."""
    import torch._dynamo
    import torch.export  # noqa: F401
    from transformers import BertConfig, BertModel

    import fxslim
    import fxslim.api

    model = BertModel(BertConfig()).eval()
    return measured(lambda: fxslim.slim(model, ffn=0.5, heads=0.5))


def llama_7b_meta() -> dict[str, Any]:
    """Trace, label and plan a Llama-2-7B shape without weights."""
    import torch
    import torch._dynamo
    import torch.export
    from transformers import LlamaConfig, LlamaForCausalLM

    import fxslim
    import fxslim.api

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32000)).eval()
    return measured(lambda: fxslim.plan(model, ffn=0.5, heads=0.5))


CASES = {"bert_base": bert_base, "llama_7b_meta": llama_7b_meta}


def main() -> None:
    """Run every case several times and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=sorted(CASES), help="run one case in this process and print JSON")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(CASES[options.case]()))
        return
    results: dict[str, dict[str, Any]] = {}
    for name in CASES:
        runs = [fresh("benchmarks.compile_time", name) for _ in range(options.runs)]
        results[name] = {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]} | {"runs": runs}
    environment = Environment.collect()
    rows = [
        f"| {name} | {r['wall_seconds']:.2f} | {r['cpu_seconds']:.2f} | {r['peak_gib']:.2f} |"
        for name, r in results.items()
    ]
    lines = ["# Compile time", "", str(environment), "", f"Median of {options.runs} runs, each in a fresh process.", "",
             "| case | wall s | CPU s | peak GiB of the process |", "|---|---|---|---|", *rows]  # fmt: skip
    write_result("compile_time", payload={"environment": environment.to_json(), "results": results},
                 markdown="\n".join(lines) + "\n", figure=figure(results))  # fmt: skip
    print("\n".join(lines))


def figure(results: dict[str, dict[str, Any]]) -> Any:
    """Plot seconds and peaks, case by case."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(6, 2.6), layout="constrained")
    for axes, key, label in zip(
        made.subplots(1, 2), ("wall_seconds", "peak_gib"), ("seconds", "peak GiB"), strict=True
    ):
        axes.barh(list(results), [own[key] for own in results.values()])
        axes.set_xlabel(label)
    return made


if __name__ == "__main__":
    main()
