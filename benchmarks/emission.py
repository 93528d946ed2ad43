"""Whether a compiled graph is as fast as the narrowed module, and an optimized one faster than MACs would have it.

``python -m benchmarks.emission`` times a BERT-base with half of the FFN and half of the heads, at every batch and
length: dense, the narrowed module, its graph, the graph after `fxslim.optimize`, and that with inductor where there is
a C++ compiler; interleaved in one process. It writes ``benchmarks/results/emission.{json,md}``.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

from benchmarks.environment import write_result

COMPILERS = ("g++", "clang++", "c++", "cl")


def forms(layers: int, *, inductor: bool) -> dict[str, Any]:
    """Return the dense model and everything that is made of it, by name."""
    from transformers import BertConfig, BertModel

    import fxslim

    dense = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    found = fxslim.inspect(dense)
    plan = fxslim.plan(found, ffn=0.5, heads=0.5)
    graph = fxslim.compile(found, plan=plan)
    made = {
        "dense": dense,
        "module": fxslim.slim(found, plan=plan),
        "graph": graph,
        "optimized": fxslim.optimize(graph),
    }
    return made | ({"inductor": fxslim.optimize(graph, inductor=True)} if inductor else {})


def measure(models: Mapping[str, Any], batch: int, length: int, seconds: float, tight: float) -> dict[str, Any]:
    """Time every form at one size, against the dense model, and the graphs against the narrowed module."""
    import torch

    from fxslim import count, timer

    ids = torch.arange(batch * length).reshape(batch, length) % 1000 + 1000
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        ideal = count.macs_of(models["dense"], **inputs) / count.macs_of(models["module"], **inputs)
        calls = {name: partial(model, **inputs) for name, model in models.items()}
        timing = timer.compare(calls, baseline="dense", max_seconds=seconds, target_ci=tight)
    graphs = {name: _against(timing, name, "module") for name in models if name not in ("dense", "module")}
    return {"batch": batch, "length": length, "ideal": ideal, "timing": timing.to_json(), "against_module": graphs}


def _against(timing: Any, name: str, other: str) -> dict[str, float | None]:
    """Return how many times faster one form is than another, paired within rounds."""
    from fxslim import timer

    pairs = zip(timing[other].seconds, timing[name].seconds, strict=True)
    found = timer.estimate_median([first / second for first, second in pairs])
    return {"value": found.value, "low": found.low, "high": found.high if math.isfinite(found.high) else None}


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a row for every size and form."""
    yield "| batch | length | form | ms | speed-up over dense | ideal by MACs | over the narrowed module |"
    yield "|---|---|---|---|---|---|---|"
    for own in results:
        for sample in own["timing"]["samples"]:
            ratio, name = sample["ratio"], sample["name"]
            dense = {"value": 1 / ratio["value"], "low": 1 / ratio["high"] if ratio["high"] else 0.0,
                     "high": 1 / ratio["low"] if ratio["low"] else None}  # fmt: skip
            yield (
                f"| {own['batch']} | {own['length']} | {name} | {sample['time']['value'] * 1e3:.1f} "
                f"| {_shown(dense)} | {own['ideal']:.3f} | {_shown(own['against_module'].get(name))} |"
            )


def _shown(ratio: Mapping[str, float | None] | None) -> str:
    """Write a ratio with its interval, which is open where there were too few rounds."""
    if ratio is None:
        return ""
    high = "" if ratio["high"] is None else f"{ratio['high']:.3f}"
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {high}]"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emission", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each size")
    parser.add_argument("--no-inductor", action="store_true", help="leave inductor out")
    given = parser.parse_args()
    compiler = next(filter(shutil.which, COMPILERS), None)
    models = forms(given.layers, inductor=compiler is not None and not given.no_inductor)
    sizes = product(given.batches, given.lengths)
    results = [measure(models, batch, length, given.seconds, 0.01) for batch, length in sizes]
    note = (
        ""
        if "inductor" in models
        else "Inductor was left out" + (": there is no C++ compiler." if not compiler else ".")
    )
    lines = [f"# Forms of a BERT-base ({given.layers} layers) with half of the FFN and half of the heads", "",
             "Interleaved in one process, medians, 95 % intervals of the paired ratio.", note, "",
             *table(results)]  # fmt: skip
    write_result("emission", payload={"layers": given.layers, "results": results}, markdown="\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
