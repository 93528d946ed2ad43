"""What is left of a model's quality when it is pruned while it trains: budgets, scores, schedules, and what helps.

``python -m benchmarks.training --data PATH`` fine-tunes the packaged all-MiniLM-L6-v2 on SST-2 and STS-B, goes on with
pruning while training, narrows what came of it, scores the narrowed model and writes
``benchmarks/results/training.{json,md}``. ``PATH`` holds ``sst2/{train,dev,test}.tsv`` and
``stsb/{train,dev,test}.csv``. With ``--only-tables`` nothing is measured: tables are written from ``--rows``.

``headline`` uses all the data for ``--epochs``. On STS-B, a model is narrowed as soon as its masks have reached their
target, so that the rest of the training costs less; nothing is dropped from then on, labels count a tenth, and half of
what the teacher is asked about has no label: the training sentences with words changed, halves of two of them, and
sentences of the other data in the folder. The other groups compare at one budget, with few steps on a subset. Seconds
are those of training and narrowing; the first row pays for what the teacher is asked.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.environment import RESULTS, write_result
from benchmarks.kept import keep, kept, parsed
from benchmarks.training_rows import DENSE, FEW, GROUPS, Row, Setting, report
from benchmarks.tuning import Phrases, Remembered, Sentences, train

TASKS: Mapping[str, Any] = {"sst2": Phrases, "stsb": Sentences}
BATCH: Mapping[str, int] = {"sst2": 64, "stsb": 32}
EPOCHS: Mapping[str, float] = {"sst2": 3, "stsb": 11}
"""Rounds over all the data of a headline row."""
DENSE_EPOCHS: Mapping[str, float] = {"sst2": 3, "stsb": 4}
"""Rounds over all the data of the dense model before."""
SOON: Mapping[str, float] = {"stsb": 0.05}
"""Tasks whose headline rows reach their target at this part of the training, repaired, and go on narrowed."""
RATE: Mapping[str, float] = {"sst2": 1e-4, "stsb": 3e-4}
DENSE_RATE = 5e-5
"""The highest learning rate of a model that is pruned, and of one that is not."""
SMALL: Mapping[str, tuple[int, float]] = {"sst2": (2048, 4), "stsb": (2048, 8)}
"""Rows and rounds of the groups that compare."""
CALIBRATION = 512
"""Rows that repair fits on."""


class Bench:
    """One task, its dense model, and what measures rows of it.

    Args:
        task: the task, with all its data.
        small: the same with a subset.
        given: options of the command line.
    """

    def __init__(self, task: Any, small: Any, given: argparse.Namespace) -> None:
        self.task, self.small, self.given = task, small, given
        self.dense, self.dense_seconds = self._dense()
        self.teacher = Remembered(copy.deepcopy(self.dense))

    def _dense(self) -> tuple[nn.Module, float]:
        """Return the fine-tuned model: the one that is given or kept, or a new one; and the seconds it took."""
        key, given = self.task.key, self.given
        if key == "sst2" and given.sst2_model is not None:
            return self.task.load(given.sst2_model), 0.0
        place = None if given.models is None else given.models / key
        if place is not None and (place / "config.json").exists():
            return self.task.load(place), 0.0
        started = time.perf_counter()
        steps = self.steps(self.task, given.epochs or DENSE_EPOCHS[key])
        model = train(
            self.task.model(), self.task, steps, batch=BATCH[key], rate=DENSE_RATE, label=f"{self.task.name}, dense"
        )
        if place is not None:
            self.task.save(model, place)
        return model, time.perf_counter() - started

    def steps(self, task: Any, epochs: float) -> int:
        """Return how many optimizer steps that many rounds over a task's data are."""
        return max(round(epochs * len(task.labels) / BATCH[task.key]), 1)

    def row(self, group: str, setting: Setting, seed: int) -> Row:
        """Train, narrow, and score."""
        import fxslim

        headline = group == "headline"
        if headline and setting.config is not None and self.task.key in SOON:
            soon = {**setting.config, "end": SOON[self.task.key]}
            setting = dataclasses.replace(setting, config=soon, repair=True, updates=FEW // 2)
        task = self.task if headline else self.small
        key = task.key
        epochs = (self.given.epochs or EPOCHS[key]) if headline else SMALL[key][1]
        steps = 0 if setting.name == DENSE else self.steps(task, epochs)
        started, macs, parameters = time.perf_counter(), 1.0, 1.0
        model = copy.deepcopy(self.dense)
        if steps:
            pruning = None if setting.config is None else self._pruning(setting, task, steps, seed, more=headline)
            model = train(
                model, task, steps, batch=BATCH[key], rate=DENSE_RATE if pruning is None else RATE[key], seed=seed,
                pruning=pruning, narrow=headline and key in SOON,
                more=headline and pruning is not None and "teacher" in pruning,
                label=f"{task.name}, {group}, {setting.name}",
            )  # fmt: skip
        if setting.config is not None:
            small: Any = model if hasattr(model, "fxslim") else fxslim.slim(model, task.example())
            found = small.fxslim.report
            macs, parameters = found.macs_after / found.macs_before, found.parameters_after / found.parameters_before
            model = small
        seconds = time.perf_counter() - started + (self.dense_seconds if setting.name == DENSE else 0)
        return Row(task.name, group, setting.name, seed, steps, task.scores(model.eval()), macs, parameters, seconds)

    def _pruning(self, setting: Setting, task: Any, steps: int, seed: int, *, more: bool) -> dict[str, Any]:
        import fxslim

        asked = setting.asked(steps)
        distill = fxslim.Distillation(logits=task.logits) if asked.get("distill") else None
        config = fxslim.PruningConfig(**{**asked, "distill": distill})
        found: dict[str, Any] = {"config": config, "example_inputs": task.example()}
        if config.teaching is not None:
            found["teacher"] = self.teacher
        if setting.repair:
            rows = range(min(CALIBRATION // 2 if more else CALIBRATION, len(task.labels)))
            every = [task.batch(rows[start : start + 32]) for start in range(0, len(rows), 32)]
            draw = random.Random(seed)
            every = [task.more(batch, draw) for batch in every] if more else every
            found["calibration"] = [{name: own[name] for name in ("input_ids", "attention_mask")} for own in every]
        return found


def main() -> None:
    """Measure, and write tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with sst2/ and stsb/")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=[*TASKS])
    parser.add_argument("--groups", nargs="+", default=[*GROUPS], choices=[*GROUPS])
    parser.add_argument("--sst2-model", type=Path, help="a classifier fine-tuned on SST-2, instead of a new one")
    parser.add_argument("--models", type=Path, help="keep fine-tuned dense models here, and go on from those there")
    parser.add_argument("--epochs", type=float, help="rounds over the data of a headline row")
    parser.add_argument("--seeds", type=int, default=1)
    given = parsed(parser)
    rows = kept(given.rows, Row)
    if not given.only_tables:
        for key in given.tasks:
            measure(key, given, rows)
    write(rows)


def measure(key: str, given: argparse.Namespace, rows: list[Row]) -> None:
    """Add the rows of one task that are not there yet."""
    done = {(row.task, row.group, row.name, row.seed) for row in rows}
    kind = TASKS[key]
    plan = [(group, setting, seed) for group in given.groups for setting in GROUPS[group]
            for seed in range(1 if setting.name == DENSE else given.seeds)
            if (kind.name, group, setting.name, seed) not in done]  # fmt: skip
    if not plan:
        return
    bench = Bench(kind(given.data), kind(given.data, SMALL[key][0]), given)
    for number, (group, setting, seed) in enumerate(plan, 1):
        row = bench.row(group, setting, seed)
        print(f"{number} of {len(plan)}: {row}", flush=True)
        rows.append(row)
        keep(given.rows, rows)


def write(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write the tables of these rows."""
    text = report(rows, TASKS)
    payload = {"rows": [dataclasses.asdict(row) for row in rows]}
    write_result("training", payload=payload, markdown="\n".join(text), folder=folder)
    print("\n".join(text))


if __name__ == "__main__":
    main()
