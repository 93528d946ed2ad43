"""A ``Trainer`` that prunes while it trains."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fxslim.errors import InputError, RequestError
from fxslim.inc.config import WeightPruningConfig
from fxslim.inc.metrics import Metric
from fxslim.inc.pruning import PruningCallbacks
from fxslim.training.callback import forget_best

LOG = logging.getLogger("fxslim")


class NLPTrainer(Trainer):
    """A ``transformers.Trainer`` with `prune`; everything else is as it is there.

    Attributes:
        metrics: what the pruned model is judged by, one or several; None for nothing.
        pruning: the callbacks of the last pruning.
    """

    metrics: Metric | list[Metric] | None = None
    pruning: PruningCallbacks | None = None

    def prune(self, pruning_config: WeightPruningConfig | None = None) -> Any:
        """Train, and prune on the way.

        Where there are ``metrics``, the model is evaluated before and after, and what is lost is logged.

        Args:
            pruning_config: what goes.

        Returns:
            The trainer's model, as large as before, with zeros: `fxslim.inc.model_slim` makes it smaller.

        Raises:
            RequestError: something that was asked for means nothing, or a metric is not among the results.
        """
        if not isinstance(pruning_config, WeightPruningConfig):
            raise RequestError(f"prune(pruning_config=…) takes a WeightPruningConfig, not {pruning_config!r}.")
        metrics = self._judges()
        results = self.evaluate() if metrics else {}
        before = {metric.name: metric.read(results) for metric in metrics}
        model: Any = self.model
        if all(wish.on_data for wish in pruning_config.wishes()):
            self.pruning = PruningCallbacks(pruning_config, model, dataloader=self.get_train_dataloader())
            self.pruning.on_train_end()
        else:
            callback = _Steps(self, pruning_config)
            self.add_callback(callback)
            try:
                self.train()
            finally:
                self.remove_callback(callback)
                callback.end()
        results = self.evaluate() if metrics else {}
        for metric in metrics:
            after = metric.read(results)
            kept = "within" if metric.holds(before[metric.name], after) else "beyond"
            LOG.warning("%s: %.4g dense, %.4g pruned, %s the criterion", metric.name, before[metric.name], after, kept)
        return model

    def _judges(self) -> list[Metric]:
        given = self.metrics
        several = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
        if not all(isinstance(one, Metric) for one in several):
            raise RequestError(f"metrics={given!r}: give metrics.Metric(name='eval_accuracy'), or a list of them.")
        if several and self.eval_dataset is None:
            raise RequestError("metrics need an eval_dataset= of the trainer.")
        return several


class _Steps(TrainerCallback):
    """Tells pruners of a Trainer's steps."""

    def __init__(self, trainer: NLPTrainer, config: WeightPruningConfig) -> None:
        self.trainer, self.config = trainer, config
        self.callbacks: PruningCallbacks | None = None
        self._settled = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put masks on."""
        if state.global_step:
            raise InputError(
                "NLPTrainer.prune starts from the beginning; to resume, take transformers.Trainer with "
                "fxslim.PruningCallback, which saves masks beside checkpoints."
            )
        on_data = any(wish.on_data for wish in self.config.wishes())
        loader = self.trainer.get_train_dataloader() if on_data else None
        self.callbacks = PruningCallbacks(
            self.config, kwargs["model"], optimizer=kwargs.get("optimizer"), dataloader=loader
        )
        self.trainer.pruning = self.callbacks
        self.callbacks.on_train_begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read gradients."""
        assert self.callbacks is not None
        optimizer: Any = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and not args.max_grad_norm:  # clipping would have done it
            scaler.unscale_(optimizer.optimizer)
        self.callbacks.on_before_optimizer_step(1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask more where it is due."""
        assert self.callbacks is not None
        self.callbacks.on_after_optimizer_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the best model so far when the target is reached: it was a larger one."""
        assert self.callbacks is not None
        if self.callbacks.settled and not self._settled:
            forget_best(state)
            self._settled = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the masks off; zeros are left."""
        assert self.callbacks is not None
        self.callbacks.on_train_end()

    def end(self) -> None:
        """Take masks off a training that was interrupted."""
        if self.callbacks is not None:
            self.callbacks.release()
