"""What the recipes share: their options, a question answering task for a ``Trainer``, and what they report."""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.recipes import squad

TEMPERATURE = 2.0


class Steps(TrainerCallback):
    """Tells the old tool's callbacks of a ``Trainer``'s steps.

    Args:
        callbacks: those of `fxslim.inc.prepare_compression`.
    """

    def __init__(self, callbacks: Any) -> None:
        self.callbacks = callbacks

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.callbacks.on_train_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say which step comes."""
        self.callbacks.on_step_begin(state.global_step)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Read gradients."""
        self.callbacks.on_before_optimizer_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Mask more where it is due."""
        self.callbacks.on_after_optimizer_step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Take masks off."""
        self.callbacks.on_train_end()


class Learner(Trainer):
    """A ``Trainer`` that may learn the logits of a teacher instead of the answers.

    Attributes:
        teacher: the dense model; None for none.
        distill_loss_weight: by what the teacher's loss is multiplied.
    """

    teacher: nn.Module | None = None
    distill_loss_weight: float = 0.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the mean divergence of starts and ends from the teacher's; without one, the model's own loss."""
        outputs = model(**inputs)
        loss = outputs.loss
        if self.teacher is not None and self.distill_loss_weight and model.training:
            with torch.no_grad():
                theirs = self.teacher(**inputs)
            apart = [divergence(outputs[name], theirs[name]) for name in ("start_logits", "end_logits")]
            loss = self.distill_loss_weight * (apart[0] + apart[1]) / 2
        return (loss, outputs) if return_outputs else loss


def divergence(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return KL(theirs || mine) at `TEMPERATURE`, times its square, the mean over rows.  (B, S), (B, S) -> ()"""
    first, second = (functional.log_softmax(value.float() / TEMPERATURE, -1) for value in (mine, theirs))
    return functional.kl_div(first, second, log_target=True, reduction="batchmean") * TEMPERATURE**2


def options(prog: str, text: str | None, **defaults: float) -> argparse.ArgumentParser:
    """Return the options of a recipe.

    Args:
        prog: name of its module.
        text: what it does.
        **defaults: its own numbers, as options of these names.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.recipes.{prog}", description=text)
    parser.add_argument("--data", required=True, help="a folder or file, or a name on the hub")
    parser.add_argument("--model_name_or_path", help="to start from; the packaged all-MiniLM-L6-v2 otherwise")
    parser.add_argument("--num_train_epochs", type=float, default=10.0)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--dense", type=Path, help="keep the fine-tuned dense model here, and take it where it is")
    parser.add_argument("--json", type=Path, help="write the figures here")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser


def qa_options(prog: str, text: str | None, **defaults: float) -> argparse.ArgumentParser:
    """Return the options of a recipe for question answering; see `options`."""
    parser = options(prog, text, distill_loss_weight=4.5, **defaults)
    parser.set_defaults(num_train_epochs=5.0, per_device_train_batch_size=8)
    parser.add_argument("--max_seq_length", type=int, default=384)
    parser.add_argument("--doc_stride", type=int, default=128)
    parser.add_argument("--test", type=float, default=0.2, help="part of a file's paragraphs that is tested on")
    return parser


def source(given: argparse.Namespace) -> Any:
    """Return what to load a model from."""
    from benchmarks.tuning import packaged

    return given.model_name_or_path or packaged()


def arguments(given: argparse.Namespace, **more: Any) -> TrainingArguments:
    """Return the arguments of a ``Trainer``; nothing is saved or reported."""
    folder = tempfile.gettempdir()
    return TrainingArguments(
        output_dir=folder, num_train_epochs=given.num_train_epochs, learning_rate=given.learning_rate, seed=given.seed,
        per_device_train_batch_size=given.per_device_train_batch_size, bf16=given.bf16, warmup_steps=0.05,
        save_strategy="no", report_to=[], logging_steps=100, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False, remove_unused_columns=False, train_sampling_strategy="group_by_length", **more,
    )  # fmt: skip


def schedule(steps: int) -> dict[str, int]:
    """Return when the old tool prunes in a training of so many steps: from a twentieth to six tenths, 40 times."""
    first, last = steps // 20, max(steps * 6 // 10, 1)
    return {"start_step": first, "end_step": last, "pruning_frequency": max((last - first) // 40, 1)}


class Questions:
    """Question answering: data, a dense model, and a ``Trainer``.

    Args:
        given: options; see `qa_options`.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.tokenizer = AutoTokenizer.from_pretrained(source(given))
        path = Path(given.data)
        found = squad.split(squad.read(path), given.test, given.seed) if path.exists() else squad.from_hub(given.data)
        self.train, self.test = found
        self.windows = squad.features(self.tokenizer, self.train, given.max_seq_length, given.doc_stride)
        self.started = time.perf_counter()

    def dense(self) -> Any:
        """Return the dense model, fine-tuned: the one that is kept, or a new one."""
        place: Path | None = self.given.dense
        if place is not None and (place / "config.json").exists():
            return AutoModelForQuestionAnswering.from_pretrained(place, dtype=torch.float32).eval()
        set_seed(self.given.seed)  # of a fresh head
        model = AutoModelForQuestionAnswering.from_pretrained(source(self.given), dtype=torch.float32)
        self.trainer(model).train()
        if place is not None:
            model.save_pretrained(place)
        return model.eval()

    def trainer(self, model: nn.Module, teacher: nn.Module | None = None) -> Learner:
        """Return what trains a model; a teacher is copied."""
        made = Learner(model=model, args=arguments(self.given), train_dataset=self.windows,  # type: ignore[arg-type]
                       data_collator=partial(squad.collate, self.tokenizer))  # fmt: skip
        if teacher is not None and self.given.distill_loss_weight:
            made.teacher = copy.deepcopy(teacher).eval().requires_grad_(requires_grad=False)
            made.distill_loss_weight = self.given.distill_loss_weight
        return made

    def steps(self, trainer: Trainer) -> int:
        """Return how many optimizer steps a training has."""
        return round(len(trainer.get_train_dataloader()) * self.given.num_train_epochs)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Return exact match and F1 on the questions that are tested."""
        given = self.given
        made = squad.answers(model, self.tokenizer, self.test, given.max_seq_length, given.doc_stride)
        return squad.scored(made, self.test)

    def report(self, name: str, dense: nn.Module, small: Any) -> dict[str, Any]:
        """Print and return what became of a model."""
        found = {
            "recipe": name,
            "trained_on": len(self.train),
            "tested_on": len(self.test),
            "dense": self.scores(dense),
            "pruned": self.scores(small),
            **sizes(small),
            "seconds": time.perf_counter() - self.started,
        }
        return told(found, self.given.json)


def sizes(small: Any) -> dict[str, Any]:
    """Return what is left of a narrowed model."""
    found = small.fxslim.report
    return {
        "parameters": found.parameters_after / found.parameters_before,
        "macs": found.macs_after / found.macs_before,
        "kept": {part.site.name: [len(part.keep), part.site.units] for part in small.fxslim.plan},
    }


def told(figures: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """Print figures, write them to a file where one is given, and return them."""
    text = json.dumps(figures, indent=1)
    print(text)
    if path is not None:
        path.write_text(text, encoding="utf-8")
    return dict(figures)
