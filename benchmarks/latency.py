"""How much faster narrowed models are, against the ideal (MACs dense / MACs narrowed), and how fast they write.

``python -m benchmarks.latency`` times a BERT-base with half of the FFN and half of the heads (dense, narrowed module,
compiled graph, optimized graph, and that prepacked, which helps a dense model, too) over a grid of batches and lengths,
then a small Llama with grouped queries that generates; everything side by side in one process. It writes
``benchmarks/results/latency.{json,md,png}``; with ``--device cuda``, where models are larger and in bfloat16,
``latency-cuda.*``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

import fxslim
from benchmarks.environment import write_result
from fxslim import timer
from fxslim.harness import Benchmark, Point
from fxslim.tables import Table

BATCHES, LENGTHS = (1, 8), (16, 128, 512)
FEW, MANY = 256, 512
"""Rows up to which prepacked graphs are timed, and above which a point gets more time, in proportion."""
ON_CPU: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8000}
ON_GPU: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
"""Shapes of the Llama; eight heads on the CPU, thirty-two on a GPU, four queries to each key."""
COLUMNS = ("variant", "batch#", "length#", "form", "ms#", "times faster#", "95 % interval#", "ideal#", "of ideal#",
           "over the module#", "95 % interval#")  # fmt: skip


def main() -> None:
    """Time every point of the grid, then generation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for a point of few rows")
    parser.add_argument("--variants", nargs="+", help="see fxslim.benchmark; all that pay on the device by default")
    parser.add_argument("--tokens", type=int, default=32, help="how many are generated; 0 for none")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    on_gpu = torch.device(given.device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    variants = given.variants or (["eager", "cuda-graph", "inductor"] if on_gpu else ["eager"])
    timing = {"max_seconds": given.seconds, "target_ci": 0.01}
    models, inputs = bert(given.device, dtype)
    grid = list(product(given.batches, given.lengths))
    found = over(grid, models, inputs, {**timing, "variants": variants})
    written = None
    if given.tokens:
        models, inputs = llama(given.device, dtype)
        written = fxslim.benchmark(models, inputs, generate=given.tokens, **timing)
    report("latency-cuda" if on_gpu else "latency", found, written)


def over(
    grid: list[tuple[int, int]], models: dict[str, nn.Module], inputs: dict[str, Any], asked: dict[str, Any]
) -> Benchmark:
    """Time every point by itself: what is prepacked at few rows only, and points of many rows for longer."""
    found = []
    for batch, length in grid:
        rows = batch * length
        own = {name: model for name, model in models.items() if rows <= FEW or "prepacked" not in name}
        timing = {**asked, "max_seconds": asked["max_seconds"] * max(rows / MANY, 1)}
        found.append(fxslim.benchmark(own, inputs, batches=[batch], lengths=[length], **timing))
    points = tuple(point for one in found for point in one.points)
    notes = tuple(dict.fromkeys(note for one in found for note in one.notes))
    most = max(found, key=lambda one: len(one.sizes))
    return dataclasses.replace(most, points=points, notes=notes)


def bert(device: str, dtype: torch.dtype) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Return a BERT-base in all its forms, and one row of one token to repeat."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    dense = BertModel(BertConfig()).eval().to(device, dtype)
    small: Any = fxslim.slim(dense, ffn=0.5, heads=0.5)
    graph = fxslim.compile(dense, plan=small.fxslim.plan.model_copy(update={"edits": (), "zeroed": ()}))
    ids = torch.arange(1000, 1016, device=device)[None]
    models = {"dense": dense, "module": small, "graph": graph, "optimized": fxslim.optimize(graph)}
    if device == "cpu":
        models["prepacked"] = fxslim.optimize(graph, prepack=True)
        models["dense, prepacked"] = fxslim.optimize(fxslim.compile(dense), prepack=True)
    return models, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llama(device: str, dtype: torch.dtype) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Return a Llama, dense and with half of the FFN and of the heads, and a prompt of 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape, heads = (ON_CPU, 8) if device == "cpu" else (ON_GPU, 32)
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=heads // 4, eos_token_id=None)
    dense = LlamaForCausalLM(config).eval().to(device, dtype)
    ids = torch.arange(100, 228, device=device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"dense": dense, "slim": fxslim.slim(dense, ffn=0.5, heads=0.5)}, inputs


def compared(point: Point, dense: str) -> Iterator[tuple[Any, ...]]:
    """Yield a row for each form: against the dense model, the ideal, and, within rounds, the narrowed module."""
    for sample in point.timing.samples:
        start = (point.variant, point.batch, point.length, sample.name, f"{sample.time.value * 1e3:.2f}")
        if sample.name == dense:
            yield (*start, *[""] * 6)
            continue
        ideal, speed = point.macs[dense] / point.macs[sample.name], sample.speedup
        pairs = zip(point.timing["module"].seconds, sample.seconds, strict=True)
        over = timer.estimate_median([module / own for module, own in pairs])
        yield (*start, f"{speed.value:.3f}", interval(speed), f"{ideal:.3f}", f"{speed.value / ideal:.3f}",
               *(("", "") if sample.name == "module" else (f"{over.value:.3f}", interval(over))))  # fmt: skip


def interval(found: timer.Estimate) -> str:
    """Lay an interval out."""
    return f"{found.low:.3f} .. {found.high:.3f}"


def report(name: str, found: Benchmark, written: Benchmark | None) -> None:
    """Write and print the tables."""
    rows = [row for point in found.points for row in compared(point, found.baseline)]
    table = Table(COLUMNS, rows)
    parts = ["# Latency", "BERT-base with half of the FFN and half of the heads; interleaved, medians.",
             table.markdown(), *(f"* {line}" for line in found.parts() if isinstance(line, str))]  # fmt: skip
    if written is not None:
        parts += ["## Writing", "A Llama with grouped queries, half of the FFN and of the heads, greedy, with a cache.",
                  written.to_markdown()]  # fmt: skip
    payload = {"forward": found.to_dict(), "generation": None if written is None else written.to_dict()}
    write_result(name, payload=payload, markdown="\n\n".join(parts), figure=found.plot())
    print("\n".join([str(table), *([] if written is None else [str(written)])]))


if __name__ == "__main__":
    main()
