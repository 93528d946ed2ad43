"""Text classification on SST-2 with magnitude pruning through ``NLPTrainer.prune``.

``python -m benchmarks.recipes.classify_magnitude --data PATH --target_sparsity 0.9`` fine-tunes a model (or takes the
one of ``--dense``) and prunes it while it trains on. Single weights (``--pattern 1x1``) leave the model as large as it
is; with ``channelx1`` what is zero is taken out.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from benchmarks.recipes.common import arguments, options, schedule, sizes, source, told
from benchmarks.recipes.squad import hub
from fxslim.inc import NLPTrainer, WeightPruningConfig, metrics, model_slim


def phrases(data: str) -> list[list[tuple[int, str]]]:
    """Return (label, phrase) to train on and to test on: of a folder with ``sst2/{train,dev}.tsv``, or of the hub."""
    if not Path(data).exists():
        sets = hub(data, "sst2")
        return [[(row["label"], row["sentence"]) for row in sets[part]] for part in ("train", "validation")]
    found = []
    for name in ("train", "dev"):
        lines = (Path(data) / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        found.append([(int(label), text) for label, _, text in (line.partition("\t") for line in lines)])
    return found


def accuracy(found: Any) -> dict[str, float]:
    """Return the part of the rows that are right."""
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; return figures before and after."""
    parser = options("classify_magnitude", __doc__, target_sparsity=0.9)
    parser.add_argument("--pattern", default="1x1")
    parser.add_argument("--max_train_samples", type=int, help="train on so many rows, drawn once")
    given = parser.parse_args(argv)
    train, test = phrases(given.data)
    if given.max_train_samples is not None:
        train = random.Random(given.seed).sample(train, min(given.max_train_samples, len(train)))
    tokenizer = AutoTokenizer.from_pretrained(source(given))
    rows: list[Any] = [
        [{**tokenizer(text, truncation=True, max_length=128), "labels": label} for label, text in part]
        for part in (train, test)
    ]

    def trainer_of(model: Any) -> NLPTrainer:
        return NLPTrainer(
            model=model, args=arguments(given, per_device_eval_batch_size=64), train_dataset=rows[0],
            eval_dataset=rows[1], data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
        )  # fmt: skip

    started = time.perf_counter()
    set_seed(given.seed)  # of a fresh head
    fresh = AutoModelForSequenceClassification.from_pretrained(source(given), dtype=torch.float32)
    dense = copy.deepcopy(fresh)
    if given.dense is not None and (given.dense / "config.json").exists():
        dense = AutoModelForSequenceClassification.from_pretrained(given.dense, dtype=torch.float32)
    else:
        trainer_of(dense).train()
        if given.dense is not None:
            dense.save_pretrained(given.dense)
    before = trainer_of(dense).evaluate()["eval_accuracy"]

    model = copy.deepcopy(dense)
    trainer = trainer_of(model)
    trainer.metrics = metrics.Metric(name="eval_accuracy", is_relative=False, criterion=0.02)
    steps = round(len(trainer.get_train_dataloader()) * given.num_train_epochs)
    pruning_conf = WeightPruningConfig(
        [{"pruning_type": "magnitude", "pattern": given.pattern}],
        target_sparsity=given.target_sparsity,
        excluded_op_names=["classifier", "pooler"],
        **schedule(steps),
    )
    model = trainer.prune(pruning_config=pruning_conf)
    assert trainer.pruning is not None
    found = {"recipe": "classify_magnitude", "trained_on": len(train), "tested_on": len(test),
             "masked": trainer.pruning.sparsity}  # fmt: skip
    if given.pattern == "channelx1":
        model = model_slim(model)
        found |= sizes(model) if hasattr(model, "fxslim") else {}
    after = trainer_of(model).evaluate()["eval_accuracy"]
    return told(
        {**found, "dense": {"accuracy": 100 * before}, "pruned": {"accuracy": 100 * after},
         "seconds": time.perf_counter() - started},
        given.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
