"""What the pruning callback adds to the time of a training step, at one update of masks every ten steps.

``python -m benchmarks.overhead --data PATH`` trains two copies of a MiniLM classifier on the same batches of SST-2, one
of them with the callback, in turns of ten steps in one process, and writes ``benchmarks/results/overhead.{json,md}``.
Every turn of the pruned copy holds one update; masks grow from the first turn to the last. Products in bfloat16 are
measured where the CPU has instructions for them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.environment import write_result
from benchmarks.tuning import Phrases, has_bf16, rounds

EVERY = 10


class Side:
    """A model in training, with the callback or without.

    Args:
        model: the model; it is copied.
        config: how to prune; None for not at all.
        steps: steps of the whole training.
        bf16: multiply in bfloat16.
    """

    def __init__(self, model: nn.Module, config: Any, steps: int, *, bf16: bool) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments

        import fxslim

        self.model, self.bf16 = copy.deepcopy(model).train(), bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)
        self.callback = None if config is None else fxslim.PruningCallback(config)
        state = TrainerState(max_steps=steps)
        arguments = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True, bf16=bf16)
        self.given = (arguments, state, TrainerControl())
        self.own: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.callback is not None:
            self.callback.on_train_begin(*self.given, **self.own)

    def turn(self, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        """Train on these batches, a step each; return the seconds."""
        started = time.perf_counter()
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.model(**batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if self.callback is not None:
                self.callback.on_pre_optimizer_step(*self.given, **self.own)
            self.optimizer.step()
            if self.callback is not None:
                self.callback.on_optimizer_step(*self.given, **self.own)
            self.optimizer.zero_grad()
            if self.callback is not None:
                self.callback.on_step_end(*self.given, **self.own)
        return time.perf_counter() - started


def measure(model: nn.Module, task: Any, asked: dict[str, Any], turns: int, batch: int, *, bf16: bool) -> Any:
    """Train in turns; return seconds a step of both, and their paired ratio with its 95 % interval."""
    from tqdm import tqdm

    import fxslim
    from fxslim.timer import estimate_median

    warm = 2
    steps = (turns + warm) * EVERY
    config = fxslim.PruningConfig(start=0, end=steps, every=EVERY, schedule="linear", **asked)
    plain, pruned = (Side(model, one, steps, bf16=bf16) for one in (None, config))
    order = rounds(task.lengths, batch, 0)
    seconds: dict[str, list[float]] = {"plain": [], "callback": []}
    for turn in tqdm(range(turns + warm), unit="turn", mininterval=5):
        batches = [task.batch(next(order)) for _ in range(EVERY)]
        sides = [("plain", plain), ("callback", pruned)]
        for name, side in sides if turn % 2 else sides[::-1]:
            seconds[name].append(side.turn(batches) / EVERY)
    own = {name: values[warm:] for name, values in seconds.items()}
    ratio = estimate_median([b / a for a, b in zip(own["plain"], own["callback"], strict=True)])
    return {
        **{name: estimate_median(values).value for name, values in own.items()},
        "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "turns": turns, "batch": batch, "bf16": bf16,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    times = " | ".join(f"{row[name] * 1e3:.1f}" for name in ("plain", "callback"))
    kind = "bfloat16" if row["bf16"] else "float32"
    return f"| {row['score']} | {kind} | {times} | {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |"


def main() -> None:
    """Measure every score that is asked for."""
    from fxslim.training.scores import SCORES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scores", nargs="+", default=["fisher", "snip_momentum", "magnitude"], choices=[*SCORES])
    given = parser.parse_args()
    task = Phrases(given.data)
    model = task.model()
    rows = [
        {"score": score, **measure(model, task, {"ffn": 0.8, "heads": 0.6, "score": score}, given.turns, given.batch,
                                   bf16=bf16)}
        for score in given.scores for bf16 in (False, True) if has_bf16() or not bf16
    ]  # fmt: skip
    lines = [
        "# What the callback costs",
        "",
        f"MiniLM on SST-2, batches of {given.batch}, an update of masks every {EVERY} steps, ffn 0.8 and heads 0.6.",
        "In turns of ten steps, medians, the paired ratio with its 95 % interval. At most 1.05 is asked.",
        "",
        "| score | multiplied in | ms a step, without | with | ratio |",
        "| --- | --- | --- | --- | --- |",
        *map(_line, rows),
    ]
    write_result("overhead", payload={"rows": rows}, markdown="\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
