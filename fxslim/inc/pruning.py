"""The old tool's callbacks, on native pruners; by hand, or at the optimizer's steps."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from fxslim.asked import nearest
from fxslim.errors import InputError, RequestError
from fxslim.inc.auto_slim import model_slim
from fxslim.inc.config import WeightPruningConfig, Wish
from fxslim.inc.data import check_loader, check_model
from fxslim.inc.oneshot import pruned
from fxslim.inc.standing import STANDING
from fxslim.inc.translate import Finder, native, updates
from fxslim.plan import Note
from fxslim.training.pruner import Pruner, unwrapped

LOG = logging.getLogger("fxslim")


class PruningCallbacks:
    """Masks of a model while it trains: one native `fxslim.Pruner` for each pruner of a config.

    Call ``on_before_optimizer_step`` when gradients are there, and ``on_after_optimizer_step`` after the step; where an
    optimizer is attached, it does so, and what is called all the same counts once. ``on_train_end`` takes masks and
    hooks off; zeros are left.

    Pruners on data (``sparse_gpt``, ``wanda``, ``retrain_free``) prune at once, when the dataloader is there.

    Args:
        conf: what goes.
        model: the model. When anything fails here, it is as it was.
        optimizer: the optimizer, whose memory of what is masked is cleared; a group lasso needs its learning rates.
        dataloader: batches, to trace models with that are not of transformers, and for pruners on data.
        loss_func: for ``retrain_free``: (outputs, target) -> loss; None for the loss that the model returns.

    Attributes:
        pruners: the native pruners.
        notes: what was asked for and is not done, with its reason.
    """

    def __init__(
        self,
        conf: WeightPruningConfig,
        model: nn.Module,
        *,
        optimizer: Any = None,
        dataloader: Any = None,
        loss_func: Any = None,
    ) -> None:
        check_model(model, "PruningCallbacks(conf, model)", "second")
        if not isinstance(conf, WeightPruningConfig):
            raise RequestError(f"conf takes a fxslim.inc.WeightPruningConfig, not {type(conf).__name__}.")
        check_loader(dataloader, "optimizer= and loss_func=")
        self.conf, self.model, self.loss_func = conf, unwrapped(model), loss_func
        self.pruners: list[Pruner] = []
        self.finished = self._before = self._begun = False
        self._handles: list[Any] = []
        self._notes: list[Note] = []
        wishes = conf.wishes()
        for wish in wishes:
            wish.check_end()
        self._waiting = [wish for wish in wishes if wish.on_data]
        if any(wish.lasso for wish in wishes) and optimizer is None:
            raise RequestError("group_lasso needs the learning rate: give optimizer=, to prepare_pruning.")
        finder = Finder(self.model, dataloader)
        try:
            for wish in wishes:
                if not wish.on_data:
                    self._add(wish, finder, optimizer)
            if dataloader is not None:
                self._prune_on(dataloader)
        except BaseException:
            self.release()
            raise
        for note in self.notes:
            LOG.warning("%s: %s", note.where, note.reason)
        STANDING.add(self)

    def _add(self, wish: Wish, finder: Finder, optimizer: Any) -> None:
        config, notes = native(wish, finder)
        self._notes += notes
        if config is not None:
            found = finder.found if config.units else None
            pruner = Pruner(self.model, config, optimizer=optimizer, found=found)
            pruner.timeline = updates(wish)
            self.pruners.append(pruner)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Return what was asked for and is not done, and what else to know."""
        return tuple(dict.fromkeys((*self._notes, *(note for own in self.pruners for note in own.notes))))

    @property
    def settled(self) -> bool:
        """Tell whether the target is reached: masks do not grow any more."""
        return all(pruner.settled for pruner in self.pruners)

    @property
    def sparsity(self) -> dict[str, float]:
        """Return the masked fraction of what each pruner is about: ``ffn``, ``heads``, ``weights``, ``weights 2``, …"""
        found: dict[str, float] = {}
        for pruner in self.pruners:
            for name, value in pruner.sparsity().items():
                again = sum(other.split()[0] == name for other in found)
                found[f"{name} {again + 1}" if again else name] = value
        return found

    # The events of a training loop ------------------------------------------------------------------------------------

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Start: pruners that go before the first step, and those that were waiting for data."""
        check_loader(dataloader, "nothing else")
        if dataloader is not None and self._waiting:
            self._prune_on(dataloader)
        self._begin()

    def on_epoch_begin(self, epoch: int = 0) -> None:
        """Do nothing: steps count."""

    def on_step_begin(self, local_step: int = 0) -> None:
        """Start, where ``on_train_begin`` was not called."""
        self._begin()

    def on_after_compute_loss(self, input: Any, student_output: Any, student_loss: Any, *rest: Any) -> Any:
        """Return the loss as it is."""
        return student_loss

    def on_before_optimizer_step(self, scale: float = 1.0) -> None:
        """Read gradients, once for every step; see `fxslim.Pruner.before_step`."""
        if self.finished or self._before:
            return
        self._begin()
        self._before = True
        for pruner in self.pruners:
            pruner.before_step(scale=scale)

    def on_after_optimizer_step(self) -> None:
        """Keep zeros, and mask more where it is due, once for every step."""
        if self.finished or not self._before:
            return
        self._before = False
        for pruner in self.pruners:
            pruner.after_step()

    def on_step_end(self) -> None:
        """End a step whose ``on_after_optimizer_step`` was not called."""
        self.on_after_optimizer_step()

    def on_epoch_end(self) -> None:
        """Do nothing: steps count."""

    def on_before_eval(self) -> None:
        """Do nothing: the zeros are in the weights."""

    def on_after_eval(self) -> None:
        """Do nothing: the zeros are in the weights."""

    def on_train_end(self) -> None:
        """Take masks and hooks off; what is missing to the target is masked now, with a warning."""
        if self.finished:
            return
        if self._waiting:
            warnings.warn(f"{self._waiting[0].kind} has seen no data: nothing was pruned by it.", stacklevel=2)
        self.on_after_optimizer_step()
        for pruner in self.pruners:
            pruner.finish()
        LOG.info("pruned: %s", ", ".join(f"{name} {value:.1%}" for name, value in self.sparsity.items()))
        self.release()

    def release(self) -> None:
        """Take masks and hooks off where the model stands: nothing else was done to model, optimizer or torch."""
        for pruner in self.pruners:
            if not pruner.finished:
                pruner.release()
        while self._handles:
            self._handles.pop().remove()
        self.finished = True

    def model_slim(
        self, model: nn.Module | None = None, dataloader: Any = None, round_multiplier: int = 32
    ) -> nn.Module:
        """Take out what is zero: see `fxslim.inc.model_slim`; without a model, the one that was pruned."""
        self.on_train_end()
        return model_slim(self.model if model is None else model, dataloader, round_multiplier)

    def _begin(self) -> None:
        if self._begun or self.finished:
            return
        self._begun = True
        for pruner in self.pruners:
            if pruner.timeline.end == 0:
                pruner.reach()

    def _prune_on(self, dataloader: Any) -> None:
        """Prune on data: on a copy, whose weights the model takes when everything has succeeded."""
        if self._waiting:
            self._notes += pruned(self.model, self._waiting, dataloader, self.loss_func)
            self._waiting = []

    def attach(self, optimizer: Any) -> None:
        """See the steps of an optimizer, by hooks that torch offers for it, so that nothing needs to be called."""
        inner = _seen(optimizer)
        self._handles.append(inner.register_step_pre_hook(lambda *_: self.on_before_optimizer_step()))
        self._handles.append(inner.register_step_post_hook(lambda *_: self.on_after_optimizer_step()))


class CompressionManager:
    """What `prepare_compression` returns.

    Attributes:
        callbacks: the events of a training loop.
        model: the model that was given.
    """

    def __init__(self, model: nn.Module, callbacks: PruningCallbacks) -> None:
        self.model, self.callbacks = model, callbacks

    def save(self, root: str | Path) -> None:
        """Write the model into a folder: a model of transformers as its class does it, others as safetensors.

        A narrowed model of transformers is written by `fxslim.save_pretrained`.
        """
        place = Path(root)
        inner: Any = unwrapped(self.model)
        if not hasattr(inner, "save_pretrained"):
            place.mkdir(parents=True, exist_ok=True)
            save_model(inner, str(place / "model.safetensors"))
        elif hasattr(inner, "fxslim"):
            from fxslim.hf import save_pretrained

            save_pretrained(inner, place)
        else:
            inner.save_pretrained(place)


def prepare_compression(
    model: nn.Module, confs: WeightPruningConfig | Sequence[WeightPruningConfig] | None = None, **kwargs: Any
) -> CompressionManager:
    """Put masks on a model; its training loop calls the callbacks.

    Args:
        model: the model.
        confs: what goes; or a list that holds it alone.
        **kwargs: ``optimizer``, ``dataloader``, ``loss_func``: see `PruningCallbacks`; ``conf`` for ``confs``.

    Raises:
        RequestError: an argument means nothing, or nothing that is asked for is found.
    """
    check_model(model, "prepare_compression(model, conf)")
    confs = kwargs.pop("conf", None) if confs is None else confs
    known = ("optimizer", "dataloader", "loss_func")
    for name in kwargs:
        if name not in known:
            raise RequestError(f"prepare_compression has no {name}=.{nearest(name, known, '=')}")
    several: list[Any] = list(confs) if isinstance(confs, list | tuple) else [confs]
    if len(several) != 1:
        raise RequestError(
            "prepare_compression takes one WeightPruningConfig, with a dict for each pruner; quantization and "
            "distillation are not among what fxslim.inc does (natively, fxslim.PruningConfig has distill=True)."
        )
    return CompressionManager(model, PruningCallbacks(several[0], model, **kwargs))


def _seen(optimizer: Any) -> Any:
    """Return the optimizer whose steps can be seen, inside what wraps it."""
    inner = optimizer
    while not hasattr(inner, "register_step_pre_hook") or isinstance(
        getattr(inner, "optimizer", None), torch.optim.Optimizer
    ):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise InputError(f"optimizer= takes a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    return inner


def prepare_pruning(
    model: nn.Module,
    config: WeightPruningConfig,
    optimizer: Any = None,
    dataloader: Any = None,
    loss_func: Any = None,
    framework: str = "pytorch",
    device: Any = None,
) -> PruningCallbacks:
    """Put masks on a model; with an optimizer, its steps are seen, and nothing else needs to be called.

    Args:
        model: the model.
        config: what goes.
        optimizer: the optimizer, whose steps are seen: see `PruningCallbacks.attach`.
        dataloader: batches, to trace models with that are not of transformers, and for pruners on data.
        loss_func: for ``retrain_free``: (outputs, target) -> loss; None for the loss that the model returns.
        framework: ``pytorch``.
        device: None; the model is worked on where it is.

    Raises:
        RequestError: an argument means nothing, or nothing that is asked for is found.
    """
    check_model(model, "prepare_pruning(model, config)")
    if framework != "pytorch":
        raise RequestError(f"framework={framework!r}: there is 'pytorch' alone.")
    if device is not None:
        raise RequestError("device=: the model is worked on where it is; move it with model.to(device) instead.")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise RequestError(f"optimizer={type(optimizer).__name__}: that is none; say dataloader= by name.")
    if optimizer is not None:
        _seen(optimizer)
    made = PruningCallbacks(config, model, optimizer=optimizer, dataloader=dataloader, loss_func=loss_func)
    if optimizer is not None:
        try:
            made.attach(optimizer)
            made.on_step_begin()
        except BaseException:
            made.release()
            raise
    return made
