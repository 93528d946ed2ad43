"""Whether ``target=fxslim.speedup(2.0)`` gives that, and how long calibration takes.

``python -m benchmarks.speedup`` prunes the packaged MiniLM and a BERT of base size to half of their time, times the
dense and the narrowed model once more, interleaved, until the ratio is known to 1 %, and writes
``benchmarks/results/speedup.{json,md}``. MiniLM is calibrated on the sentences of ``--data PATH`` (see
`benchmarks.quality`), BERT on random tokens: its weights are random as well, and only its time is looked at.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import Environment, write_result
from benchmarks.quality import Similarity

ROWS, LENGTH = 8, 128


def _bert() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """Return a BERT of base size and 1024 rows of 16 random tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    ids = [torch.randint(1000, 30000, (64, 16)) for _ in range(16)]
    return BertModel(BertConfig()).eval(), [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in ids]


def measure(name: str, model: Any, batches: list[dict[str, torch.Tensor]], asked: float, seconds: float) -> Any:
    """Prune to a budget of MACs and to one of time; return what was asked, predicted and measured."""
    import fxslim
    from fxslim import timer

    started = time.perf_counter()
    fxslim.slim(model, calibration=batches, target=fxslim.macs(0.5))
    plain = time.perf_counter() - started
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 1000 + 1000
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    started = time.perf_counter()
    target = fxslim.speedup(asked, inputs=inputs)
    small: Any = fxslim.slim(model, calibration=batches, target=target)
    spent = time.perf_counter() - started
    (reached,) = small.fxslim.report.reached
    with torch.inference_mode():
        models = {"dense": partial(model, **inputs), "narrowed": partial(small.eval(), **inputs)}
        timing = timer.compare(models, max_seconds=seconds, target_ci=0.01)
    again = timing["narrowed"].speedup
    return {"model": name, "asked": asked, "predicted": reached.predicted, "measured": reached.measured,
            "within": reached.within, "again": again.value, "low": again.low, "high": again.high,
            "macs": small.fxslim.report.macs_after / small.fxslim.report.macs_before,
            "seconds_macs": plain, "seconds_time": spent}  # fmt: skip


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speedup", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with stsb/; MiniLM is left out without it")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=180.0, help="time for the last measurement of each model")
    parser.add_argument("--models", nargs="+", default=["minilm", "bert"], choices=["minilm", "bert"])
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # tables of latencies are measured anew
        if given.data is not None and "minilm" in given.models:
            task = Similarity(given.data)
            rows.append(measure("MiniLM", task.model, task.calibration(0), given.speedup, given.seconds))
        if "bert" in given.models:
            rows.append(measure("BERT-base", *_bert(), given.speedup, given.seconds))
    environment = Environment.collect()
    lines = ["# A speed-up on request", "", str(environment), "",
             f"Batch {ROWS}, length {LENGTH}; interleaved, medians, 95 % intervals.", "",
             "Calibrated on 1024 sentences (MiniLM), on 1024 rows of 16 random tokens (BERT-base).", "",
             "| model | asked | predicted | measured | measured again | MACs left | s, MACs budget | s, time budget |",
             "|---|---|---|---|---|---|---|---|",
             *(f"| {r['model']} | {r['asked']:.2f} | {r['predicted']:.3f} | {r['measured']:.3f} ± {r['within']:.1%} "
               f"| {r['again']:.3f} [{r['low']:.3f}, {r['high']:.3f}] | {r['macs']:.1%} | {r['seconds_macs']:.0f} "
               f"| {r['seconds_time']:.0f} |" for r in rows)]  # fmt: skip
    write_result("speedup", payload={"environment": environment.to_json(), "rows": rows},
                 markdown="\n".join(lines) + "\n")  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
