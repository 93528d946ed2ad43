"""``NLPTrainer.prune``: a Trainer that prunes, and judges what it has done."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, TrainerCallback, TrainingArguments

from fxslim.errors import RequestError
from fxslim.inc import NLPTrainer, WeightPruningConfig, metrics, model_slim, parse_auto_slim_config


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=32, num_hidden_layers=1, vocab_size=50)
    )


def data(rows: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, 50, (rows, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.sum() % 2} for row in ids]


def accuracy(seen: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())}


def trainer_of(folder: Path, *callbacks: TrainerCallback, **asked: Any) -> NLPTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-3, **asked,
    )  # fmt: skip
    return NLPTrainer(model=build(), args=arguments, train_dataset=data(32), eval_dataset=data(8),
                      compute_metrics=accuracy, callbacks=list(callbacks))  # type: ignore[arg-type]  # fmt: skip


def test_a_trainer_prunes_and_judges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2)
    model: Any = trainer.model
    pruners = parse_auto_slim_config(model, ffn2_sparsity=0.5, mha_sparsity=0.5)
    trainer.metrics = metrics.Metric(name="eval_accuracy")
    with caplog.at_level(logging.WARNING, logger="fxslim"):
        done = trainer.prune(pruning_config=WeightPruningConfig(pruners, start_step=1, end_step=6))
    assert done is model and trainer.state.global_step == 8
    assert "eval_accuracy: " in caplog.text and "dense" in caplog.text
    assert trainer.pruning is not None and trainer.pruning.finished
    assert trainer.pruning.sparsity == {"ffn": 0.5, "heads": 0.5}
    assert not any(module._forward_pre_hooks for module in model.modules())
    batch = torch.stack([row["input_ids"] for row in data(4)])
    with torch.no_grad():
        before = model.eval()(batch).logits
        small: Any = model_slim(model, round_multiplier=1)
        assert torch.allclose(small(batch).logits, before, rtol=0, atol=1e-5)
    layer = small.bert.encoder.layer[0]
    assert layer.intermediate.dense.weight.shape == (16, 16)
    assert layer.attention.self.query.weight.shape == (8, 16)


def test_the_best_model_is_one_that_has_reached_the_target(tmp_path: Path) -> None:
    """With a metric that is best at the start: an early model under the last masks has recovered from nothing."""
    model = build()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, save_steps=2, eval_steps=2, eval_strategy="steps", report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, load_best_model_at_end=True,
        metric_for_best_model="early", greater_is_better=True,
    )  # fmt: skip
    trainer = NLPTrainer(model=model, args=arguments, train_dataset=data(32), eval_dataset=data(8))  # type: ignore[arg-type]
    trainer.compute_metrics = lambda _: {"early": 100.0 - trainer.state.global_step}
    trainer.prune(WeightPruningConfig([{"op_names": ["query"], "pattern": "1x1"}], target_sparsity=0.5, end_step=5))
    assert trainer.state.best_global_step == 6
    assert (model.bert.encoder.layer[0].attention.self.query.weight == 0).float().mean() == 0.5


class Stops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_training_leaves_no_masks(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Stops())
    model: Any = trainer.model
    with pytest.raises(KeyboardInterrupt):
        trainer.prune(pruning_config=WeightPruningConfig([{"pattern": "mha"}], target_sparsity=0.5, end_step=6))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(type(callback).__name__ == "_Steps" for callback in trainer.callback_handler.callbacks)


def test_pruners_on_data_do_not_train(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    model: Any = trainer.model
    dense = build()
    trainer.prune(WeightPruningConfig([{"pattern": "2:4", "op_names": ["query"], "pruning_type": "wanda"}]))
    assert trainer.state.global_step == 0
    query = model.bert.encoder.layer[0].attention.self.query.weight
    assert ((query.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert torch.equal(query[query != 0], dense.bert.encoder.layer[0].attention.self.query.weight[query != 0])


def test_what_means_nothing_is_refused_before_training(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    conf = WeightPruningConfig([{"pattern": "mha"}], target_sparsity=0.5, end_step=6)
    with pytest.raises(RequestError, match=r"takes a WeightPruningConfig"):
        trainer.prune()
    trainer.metrics = "eval_accuracy"  # type: ignore[assignment]
    with pytest.raises(RequestError, match=r"metrics.Metric\(name='eval_accuracy'\)"):
        trainer.prune(pruning_config=conf)
    trainer.metrics = [metrics.Metric(name="eval_acuracy")]
    with pytest.raises(RequestError, match=r"no 'eval_acuracy'. Did you mean eval_accuracy"):
        trainer.prune(pruning_config=conf)
    assert trainer.state.global_step == 0
    with pytest.raises(RequestError, match=r"name of a result"):
        metrics.Metric(name="")


@pytest.mark.parametrize(
    ("asked", "before", "after", "holds"),
    [
        ({}, 0.9, 0.892, True),
        ({}, 0.9, 0.89, False),
        ({"is_relative": False}, 0.9, 0.89, True),
        ({"greater_is_better": False}, 2.0, 2.02, True),
        ({"greater_is_better": False}, 2.0, 2.03, False),
        ({"criterion": 0.0}, 0.9, 0.95, True),
    ],
)
def test_a_metric_says_how_much_may_be_lost(asked: dict[str, Any], before: float, after: float, holds: bool) -> None:
    assert metrics.Metric(name="eval_x", **asked).holds(before, after) is holds
