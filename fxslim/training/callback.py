"""Pruning inside ``transformers.Trainer``: a callback, and nothing else to change."""

from __future__ import annotations

import logging
import weakref
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fxslim.errors import InputError
from fxslim.training.checkpoint import holds_masks
from fxslim.training.config import PruningConfig
from fxslim.training.distill import Teaching
from fxslim.training.pruner import Pruner, unwrapped

LOG = logging.getLogger("fxslim")


def forget_best(state: TrainerState) -> None:
    """Seek the best model from here on: those before were larger."""
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None


class PruningCallback(TrainerCallback):
    """Prunes the model of a ``Trainer`` while it trains; afterwards ``fxslim.slim(trainer.model)`` makes it smaller.

    Masks are saved beside every checkpoint; ``trainer.train(resume_from_checkpoint=…)`` goes on from them. What is
    masked, quantiles of scores and the size now and at the end are logged under ``pruning/…``: in ``log_history``, on
    the screen, and by callbacks that come after this one (integrations of ``report_to`` come before; add theirs again
    behind it). With ``load_best_model_at_end`` the best one is sought among those that have reached the target.

    Args:
        config: what goes.
        example_inputs: see `fxslim.inspect`; not needed for models of transformers.
        teacher: the dense model for distillation; None for a copy of the model that the ``Trainer`` is made with.
        calibration: batches on which weights are fitted whenever units are masked; see `fxslim.Pruner`.
        resume_from: folder with the masks to go on from, where it is neither in the output folder nor among the
            training arguments.
    """

    def __init__(
        self,
        config: PruningConfig,
        *,
        example_inputs: Any = None,
        teacher: nn.Module | None = None,
        calibration: Any = None,
        resume_from: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(config, PruningConfig):
            raise InputError(f"PruningCallback takes a fxslim.PruningConfig, not {type(config).__name__}.")
        if teacher is not None and config.distill is None:
            raise InputError("teacher= does nothing without distill= in the config.")
        self.config, self.example_inputs, self.teacher, self.resume_from = config, example_inputs, teacher, resume_from
        self.calibration = calibration
        self.pruner: Pruner | None = None
        self._settled = False
        self._copied: weakref.ref[nn.Module] | None = None
        """The model that the teacher is a copy of, where none was given: a Trainer of another model has another."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the dense model, before a checkpoint is loaded into it."""
        model = unwrapped(kwargs["model"])
        other = self._copied is not None and self._copied() is not model
        if self.config.distill is not None and (self.teacher is None or other):
            self.teacher, self._copied = Teaching.copy_of(model), weakref.ref(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find what can go, and put masks on it."""
        if self.pruner is not None and not self.pruner.finished:  # a training that was interrupted
            self.pruner.release()
        if self.config.distill is not None and args.label_smoothing_factor:
            raise InputError(
                "distillation adds to the model's own loss, and label_smoothing_factor replaces that: set it to 0."
            )
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise InputError("masks need whole weights, and deepspeed or fsdp may shard them: train with DDP.")
        self.pruner = Pruner(
            kwargs["model"],
            self.config,
            example_inputs=self.example_inputs,
            optimizer=kwargs.get("optimizer"),
            steps=state.max_steps,
            teacher=self.teacher,
            calibration=self.calibration,
        )
        if self.pruner.teaching is not None and (
            args.bf16 or args.fp16
        ):  # a Trainer's autocast ends with the model's call
            self.pruner.teaching.dtype = torch.bfloat16 if args.bf16 else torch.float16
        for note in self.pruner.notes:
            LOG.warning("%s: %s", note.where, note.reason)
        if state.global_step:
            try:
                self._resume(self.pruner, args, state)
            except BaseException:
                self.pruner.release()
                raise
        self._settled = self.pruner.settled

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read gradients."""
        optimizer: Any = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and not args.max_grad_norm:  # clipping would have done it
            scaler.unscale_(optimizer.optimizer)
        self._running().before_step(scale=1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask more where it is due."""
        self._running().after_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the best model so far when the target is reached: it was a larger one."""
        if self._running().settled and not self._settled:
            forget_best(state)
            self._settled = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the masks beside the checkpoint."""
        if args.should_save and self.pruner is not None:
            place = Path(str(args.output_dir))
            name = f"checkpoint-{state.global_step}"
            trials = sorted(place.glob(f"*/{name}"), key=lambda folder: folder.stat().st_mtime)  # of a search
            self.pruner.save(trials[-1] if trials and not (place / name).exists() else place / name)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what is masked to what is logged."""
        logs = kwargs.get("logs")
        if self.pruner is None or self.pruner.finished or not isinstance(logs, dict) or "loss" not in logs:
            return
        figures = {f"pruning/{name}": float(f"{value:.6g}") for name, value in self.pruner.figures().to_dict().items()}
        logs |= figures
        if state.log_history:
            state.log_history[-1] |= figures

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the masks off; zeros are left."""
        self._running().finish()

    def _running(self) -> Pruner:
        if self.pruner is None:
            raise InputError("the callback has seen no training begin; give it to a Trainer.")
        return self.pruner

    def _resume(self, pruner: Pruner, args: TrainingArguments, state: TrainerState) -> None:
        pruner.load(self._folder(args, state))
        if pruner.step != state.global_step:
            raise InputError(
                f"training resumes at step {state.global_step}, and the masks are those of step {pruner.step}."
            )

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Return the folder with the masks to go on from."""
        given = getattr(args, "resume_from_checkpoint", None)
        places = [self.resume_from, given if isinstance(given, str) else None,
                  Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"]  # fmt: skip
        for place in places:
            if place is not None and holds_masks(place):
                return Path(place)
        raise InputError(
            f"training resumes at step {state.global_step}, and no masks are found in {args.output_dir}: say where "
            "they are with PruningCallback(config, resume_from=…)."
        )
