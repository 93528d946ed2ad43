"""Pruning inside a Trainer: checkpoints, resuming, logs, the best model, distillation by one option."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import fxslim
from fxslim.errors import InputError
from fxslim.training.distill import Teaching, loss_from

from agreement import difference, outputs

CONFIG: dict[str, Any] = {"ffn": 0.8, "heads": 0.5, "start": 0.1, "end": 0.7, "every": 2}


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=20, num_hidden_layers=2, vocab_size=50)
    )


def data(rows: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (rows, 7), generator=generator)
    return [{"input_ids": row, "labels": (row.sum() % 2)} for row in ids]


def trainer_of(folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **asked: Any) -> Trainer:
    given: dict[str, Any] = {
        "max_steps": 20, "per_device_train_batch_size": 4, "save_steps": 8, "logging_steps": 4, "report_to": [],
        "disable_tqdm": True, "learning_rate": 1e-3, "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**given, **asked})
    own = build() if model is None else model
    return Trainer(model=own, args=arguments, train_dataset=data(), eval_dataset=data(8), callbacks=list(callbacks))  # type: ignore[arg-type]


def masks(callback: fxslim.PruningCallback) -> dict[str, list[bool]]:
    assert callback.pruner is not None and callback.pruner.units is not None
    return {own.site.name: own.gone.tolist() for own in callback.pruner.units.sites}


def test_a_trained_model_is_narrowed_without_loss(tmp_path: Path) -> None:
    callback = fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG))
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    model: Any = trainer.model
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    small: Any = fxslim.slim(model)
    assert {(part.site.kind, len(part.keep)) for part in small.fxslim.plan} == {("ffn", 4), ("attention", 2)}
    batch = {"input_ids": torch.stack([row["input_ids"] for row in data(4)])}
    assert difference(outputs(model.eval(), batch), outputs(small.eval(), batch)) < 1e-5
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["pruning/ffn_sparsity"] for entry in logged][-1] == 0.8
    assert logged[-1]["pruning/parameters_left"] == small.fxslim.report.parameters_after
    report = small.fxslim.report
    assert logged[-1]["pruning/macs_left"] == pytest.approx(report.macs_after / report.macs_before, abs=1e-5)
    assert {entry["pruning/parameters_final"] for entry in logged} == {report.parameters_after}
    assert {entry["pruning/macs_final"] for entry in logged} == {logged[-1]["pruning/macs_left"]}
    assert logged[0]["pruning/parameters_left"] > report.parameters_after
    assert logged[-1]["pruning/score_q10"] <= logged[-1]["pruning/score_q50"] <= logged[-1]["pruning/score_q90"]


class Slims(TrainerCallback):
    """Narrows the model and a copy of it on the way."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (6, 11):
            for model in (kwargs["model"], copy.deepcopy(kwargs["model"])):
                small: Any = fxslim.slim(model.eval())
                self.sizes.append(small.fxslim.report.parameters_after)
            kwargs["model"].train()


@pytest.mark.parametrize("distill", [False, True])
def test_a_resumed_training_ends_as_the_one_that_went_on(tmp_path: Path, distill: bool) -> None:
    """Same masks, same scores, same weights, bit for bit; also with copies narrowed in between."""
    config = fxslim.PruningConfig(**CONFIG, distill=distill)
    first, slims = fxslim.PruningCallback(config), Slims()
    whole = trainer_of(tmp_path, first, slims, gradient_accumulation_steps=2)
    whole.train()
    assert slims.sizes[0] == slims.sizes[1] > slims.sizes[2] == slims.sizes[3]
    second = fxslim.PruningCallback(config)
    resumed = trainer_of(tmp_path, second, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert masks(second) == masks(first)
    model, other_model = whole.model, resumed.model
    assert model is not None and other_model is not None
    for (name, mine), theirs in zip(model.state_dict().items(), other_model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert first.pruner is not None and first.pruner.units is not None
    assert second.pruner is not None and second.pruner.units is not None
    for own, other in zip(first.pruner.units.sites, second.pruner.units.sites, strict=True):
        assert torch.equal(own.score, other.score)
    assert first.pruner.timeline == second.pruner.timeline


def test_checkpoints_are_plain_and_hold_the_zeros(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG)))
    trainer.train()
    names = set(build().state_dict())
    for step in (8, 16, 20):
        folder = tmp_path / f"checkpoint-{step}"
        weights = load_file(folder / "model.safetensors")
        assert set(weights) <= names
        held = load_file(folder / "fxslim_masks.safetensors")
        gone = held["units.bert.encoder.layer.0:ffn.gone"]
        assert gone.any()
        assert weights["bert.encoder.layer.0.output.dense.weight"][:, gone].count_nonzero() == 0
        assert json.loads((folder / "fxslim_pruning.json").read_text())["step"] == step
    again = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-20")
    assert {len(part.keep) for part in fxslim.plan(again)} == {4, 2}


def test_masks_elsewhere_are_named_or_missed(tmp_path: Path) -> None:
    config = fxslim.PruningConfig(**CONFIG)
    trainer_of(tmp_path / "a", fxslim.PruningCallback(config)).train()
    old = str(tmp_path / "a" / "checkpoint-8")
    lost = trainer_of(tmp_path / "b", fxslim.PruningCallback(config))
    with pytest.raises(InputError, match="resume_from="):
        lost.train(resume_from_checkpoint=old)
    model: Any = lost.model
    assert not any(module._forward_pre_hooks for module in model.modules())
    found = fxslim.PruningCallback(config, resume_from=old)
    trainer_of(tmp_path / "b", found).train(resume_from_checkpoint=old)
    other = fxslim.PruningCallback(fxslim.PruningConfig(**{**CONFIG, "ffn": 0.5}), resume_from=old)
    with pytest.raises(InputError, match=r"another config: it had ffn=0\.8"):
        trainer_of(tmp_path / "b", other).train(resume_from_checkpoint=old)
    wrong = fxslim.PruningCallback(config, resume_from=tmp_path / "a" / "checkpoint-16")
    with pytest.raises(InputError, match="resumes at step 8, and the masks are those of step 16"):
        trainer_of(tmp_path / "b", wrong).train(resume_from_checkpoint=old)


def test_the_best_model_is_one_that_has_reached_the_target(tmp_path: Path) -> None:
    """With a metric that is best at the start, when nothing is masked."""
    model = build()
    trainer = trainer_of(
        tmp_path, fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG)), model=model, eval_strategy="steps",
        eval_steps=4, save_steps=4, load_best_model_at_end=True, metric_for_best_model="early", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"early": 100.0 - trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_global_step == 16  # the target is reached at 14
    assert {len(part.keep) for part in fxslim.plan(trainer.model)} == {4, 2}


class Stops(TrainerCallback):
    """Interrupts a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_training_can_be_begun_again(tmp_path: Path) -> None:
    callback, model = fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG)), build()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, callback, Stops(), model=model).train()
    trainer_of(tmp_path, callback, model=model).train()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {len(part.keep) for part in fxslim.plan(model)} == {4, 2}


def test_an_early_end_reaches_the_target_with_a_warning(tmp_path: Path) -> None:
    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    trainer = trainer_of(tmp_path, fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG)), Ends())
    with pytest.warns(UserWarning, match="training ended after 5 steps"):
        trainer.train()
    assert {len(part.keep) for part in fxslim.plan(trainer.model)} == {4, 2}


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize(
    "asked",
    [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}, {"activation_checkpointing": True}],
)
def test_what_trainers_do_to_models(tmp_path: Path, asked: dict[str, Any], distill: bool) -> None:
    config = fxslim.PruningConfig(**CONFIG, distill=distill)
    trainer = trainer_of(tmp_path, fxslim.PruningCallback(config), **asked)
    trainer.train()
    assert {len(part.keep) for part in fxslim.plan(trainer.model)} == {4, 2}


class Wrapped:
    """An optimizer with a scaler, as accelerate hands it to callbacks."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.state, self.param_groups = optimizer.state, optimizer.param_groups


@pytest.mark.parametrize("clips", [False, True])
def test_scaled_gradients_are_unscaled_once(tmp_path: Path, clips: bool) -> None:
    """Clipping unscales them before callbacks see them; without it, the callback does."""
    found = []
    for scale in (1.0, 1024.0):
        model = build().eval()
        callback = fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG, score="taylor"))
        trainer = trainer_of(tmp_path, callback, model=model, max_grad_norm=1.0 if clips else 0.0)
        trainer.state.max_steps = 20
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped = Wrapped(optimizer, torch.amp.GradScaler("cpu", init_scale=scale))
        given: Any = {"model": model, "optimizer": wrapped}
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, **given)
        batch = {name: torch.stack([row[name] for row in data(4)]) for name in ("input_ids", "labels")}
        wrapped.scaler.scale(model(**batch).loss).backward()
        if clips:
            wrapped.scaler.unscale_(optimizer)
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, **given)
        wrapped.scaler.step(optimizer)
        wrapped.scaler.update()
        callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, **given)
        assert callback.pruner is not None and callback.pruner.units is not None
        found.append(torch.cat([own.score for own in callback.pruner.units.sites]))
    assert found[0].count_nonzero() > 0
    assert torch.allclose(found[0], found[1], rtol=1e-4)


# Distillation --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_task_and_teacher() -> None:
    """The loss in training against one computed by hand from two plain models."""
    teacher = build()
    with torch.no_grad():
        teacher.classifier.weight.mul_(3)
    asked = fxslim.Distillation(temperature=3.0, task=0.5, logits=0.25, hidden=0.125)
    model = build()
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {name: torch.stack([row[name] for row in data(4)]) for name in ("input_ids", "labels")}
    teacher.eval()
    with torch.no_grad():
        mine, theirs = (one(**batch, output_hidden_states=True) for one in (model, teacher))
    p, q = (theirs.logits / 3).softmax(-1), (mine.logits / 3).softmax(-1)
    divergence = float((p * (p.log() - q.log())).sum(-1).mean() * 9)
    hidden = sum(float((a - b).square().mean()) for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True))
    expected = 0.5 * float(mine.loss) + 0.25 * divergence + 0.125 * hidden / 3
    config = fxslim.PruningConfig(ffn=0.5, start=5, end=6, distill=asked)
    pruner = fxslim.Pruner(model, config, teacher=teacher)
    model.train()
    assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
    model.eval()
    assert model(**batch).loss.item() == pytest.approx(mine.loss.item(), rel=1e-6)
    assert not any("teacher" in name for name in model.state_dict())
    pruner.release()
    assert model.train()(**batch).loss.item() == pytest.approx(mine.loss.item(), rel=1e-6)


def test_tokens_that_count_are_compared_and_no_others() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[1, 2, -100, -100], [3, -100, -100, -100]])
    asked = fxslim.Distillation(temperature=2.0)
    found = loss_from({"logits": mine}, {"logits": theirs}, {"labels": labels}, asked)
    p, q = (theirs / 2).softmax(-1), (mine / 2).softmax(-1)
    apart = 4 * (p * (p / q).log()).sum(-1)
    assert float(found) == pytest.approx(float(apart[labels != -100].mean()))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = loss_from({"logits": mine}, {"logits": theirs}, {"attention_mask": mask}, asked)
    assert float(found) == pytest.approx(float(apart[mask.bool()].mean()))


def test_regression_and_several_labels_are_compared_as_such() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(6, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    asked = fxslim.Distillation()
    found = loss_from({"logits": mine}, {"logits": theirs}, {}, asked)
    assert float(found) == pytest.approx(float((mine - theirs).square().mean()))
    many = {"logits": torch.randn(6, 3, generator=generator, dtype=torch.float64)}
    same = loss_from(many, many, {}, asked, kind="multi_label_classification")
    assert float(same) == pytest.approx(0.0, abs=1e-12)
    starts = {"start_logits": mine.reshape(2, 3), "end_logits": theirs.reshape(2, 3)}
    assert float(loss_from(starts, starts, {}, asked)) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(InputError, match="compares logits, and the outputs are loss, hidden"):
        loss_from({"loss": mine, "hidden": mine}, {}, {}, asked)


class Summing(BertForSequenceClassification):
    """Whose loss is the sum over its batch, divided by the number of items of all accumulated batches."""

    def forward(self, input_ids: Tensor, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        if labels is not None:
            summed = nn.functional.cross_entropy(output.logits, labels, reduction="sum")
            output["loss"] = summed / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return output


@pytest.mark.parametrize("sums", [True, False])
def test_accumulated_batches_weigh_as_the_model_weighs_them(sums: bool) -> None:
    """The teacher's part is scaled as the model's loss is; BERT takes the number of items, and returns the mean."""
    own = Summing if sums else BertForSequenceClassification
    model, teacher = (own(build().config) for _ in range(2))
    with torch.no_grad():
        teacher.classifier.bias += torch.tensor([1.0, -1.0])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {name: torch.stack([row[name] for row in data(4)]) for name in ("input_ids", "labels")}
    teaching = Teaching(model.train(), fxslim.Distillation(), teacher.eval())
    given = [{}, {"num_items_in_batch": torch.tensor(4)}, {"num_items_in_batch": torch.tensor(16)}]
    taught = [model(**batch, **items).loss.item() for items in given]
    teaching.release()
    task = [model(**batch, **items).loss.item() for items in given]
    learnt = [one - other for one, other in zip(taught, task, strict=True)]
    assert learnt[0] > 1e-3
    assert task[2] == pytest.approx(task[0] / (4 if sums else 1), rel=1e-5)
    assert learnt[1] == pytest.approx(learnt[0], rel=1e-4)
    assert learnt[2] == pytest.approx(learnt[0] / (4 if sums else 1), rel=1e-3)


def test_what_distillation_cannot_do_is_said(tmp_path: Path) -> None:
    config = fxslim.PruningConfig(**CONFIG, distill=True)
    with pytest.raises(InputError, match="label_smoothing_factor"):
        trainer_of(tmp_path, fxslim.PruningCallback(config), label_smoothing_factor=0.1).train()
    with pytest.raises(InputError, match="does nothing without distill="):
        fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG), teacher=build())
    model = build()
    with fxslim.Pruner(model, config, steps=10), pytest.raises(InputError, match="give it labels"):
        model.train()(input_ids=torch.ones(2, 3, dtype=torch.int64))


def test_a_teacher_is_another_model(tmp_path: Path) -> None:
    """The model itself would be its own teacher, and be frozen; nothing is left on a model that was refused."""
    config = fxslim.PruningConfig(**CONFIG, distill=True)
    for wrong, says in ((None, "shares weights"), ("dense", "not str"), (build, "not function")):
        model = build()
        teacher: Any = model if wrong is None else wrong
        with pytest.raises(InputError, match=says):
            fxslim.Pruner(model, config, steps=10, teacher=teacher)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_every_model_has_a_teacher_of_its_own(tmp_path: Path) -> None:
    """One callback for several trainings, as in a cross-validation."""
    callback = fxslim.PruningCallback(fxslim.PruningConfig(**CONFIG, distill=True))
    model, other = build(), build()
    with torch.no_grad():
        other.classifier.bias += 1
    trainer_of(tmp_path, callback, model=model)
    first = callback.teacher
    with torch.no_grad():
        model.classifier.bias += 2
    trainer_of(tmp_path, callback, model=model)
    assert callback.teacher is first  # of the model as it was, before it was trained
    trainer_of(tmp_path, callback, model=other)
    assert torch.equal(callback.teacher.classifier.bias, other.classifier.bias)  # type: ignore[arg-type, union-attr]
    given = fxslim.PruningCallback(callback.config, teacher=model)
    for own in (other, build()):
        trainer_of(tmp_path, given, model=own)
        assert given.teacher is model


def test_another_teacher_is_noticed(tmp_path: Path) -> None:
    config = fxslim.PruningConfig(**CONFIG, distill=True)
    fxslim.Pruner(build(), config, steps=10).save(tmp_path)
    other = build()
    with torch.no_grad():
        other.classifier.weight.mul_(2)
    with pytest.raises(InputError, match="give that dense model as teacher="):
        fxslim.Pruner(other, config, steps=10).load(tmp_path)
    fxslim.Pruner(other, config, steps=10, teacher=build()).load(tmp_path)


# Files ---------------------------------------------------------------------------------------------------------------


def test_broken_files_say_so(tmp_path: Path) -> None:
    pruner = fxslim.Pruner(build(), fxslim.PruningConfig(**CONFIG), steps=20)
    with pytest.raises(InputError, match=r"holds no fxslim_pruning\.json"):
        pruner.load(tmp_path)
    pruner.save(tmp_path)
    pruner.load(tmp_path)
    masks_file, rest = tmp_path / "fxslim_masks.safetensors", tmp_path / "fxslim_pruning.json"
    kept = masks_file.read_bytes(), rest.read_text()
    masks_file.write_bytes(kept[0][:20])
    with pytest.raises(InputError, match="cannot be read"):
        pruner.load(tmp_path)
    masks_file.write_bytes(kept[0])
    for broken in (kept[1][:-5], "{}", kept[1].replace('"step": 0', '"step": "x"')):
        rest.write_text(broken)
        with pytest.raises(InputError, match="cannot be read"):
            pruner.load(tmp_path)
    rest.write_text(kept[1].replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match="version 2"):
        pruner.load(tmp_path)
    rest.write_text(kept[1])
    torch.manual_seed(0)
    larger = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=24, num_hidden_layers=2, vocab_size=50)
    )
    with pytest.raises(InputError, match="masks of another model"):
        fxslim.Pruner(larger, fxslim.PruningConfig(**CONFIG), steps=20).load(tmp_path)
