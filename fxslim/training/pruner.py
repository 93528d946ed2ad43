"""Masks that grow while a model trains, for any loop: before the optimizer's step, after it, and at the end."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import fxslim.api
from fxslim.errors import InputError
from fxslim.plan import Note
from fxslim.report import Inspection
from fxslim.training.checkpoint import State, read, write
from fxslim.training.config import PruningConfig
from fxslim.training.distill import Teaching
from fxslim.training.figures import Estimate, Figures, quantiles
from fxslim.training.mend import Mending
from fxslim.training.optimizer import keeps_zeros
from fxslim.training.schedule import Timeline, masked_fraction, timeline
from fxslim.training.units import MaskedUnits
from fxslim.training.weights import MaskedWeights

AT_ONCE = Timeline(0, 1, 1)
"""For masks that do not grow."""


class Pruner:
    """Masks of a model, their scores and their schedule.

    ::

        pruner = fxslim.Pruner(model, config, optimizer=optimizer, steps=1000)
        for batch in loader:
            loss(model, batch).backward()
            pruner.before_step()  # gradients are there: accumulated, averaged, unscaled
            optimizer.step()
            pruner.after_step()
            optimizer.zero_grad()
        pruner.finish()
        small = fxslim.slim(model)

    Masks only grow: a unit or weight that is masked stays so. From the moment it is, the weights that read it are zero,
    so that the model, any copy of it and any checkpoint compute what the masked model computes, and the masks keep
    gradients away. In several processes the masks are those of the first.

    Args:
        model: the model; wrappers of data parallelism and ``torch.compile`` are looked through.
        config: what goes.
        example_inputs: see `fxslim.inspect`; not needed for models of transformers, nor where weights alone are masked.
        optimizer: the optimizer, whose memory of what is masked is cleared, where it is one number for each weight; it
            may be set later.
        steps: how many optimizer steps the training has; needed where ``start`` or ``end`` is a fraction.
        teacher: the dense model for distillation; None for a copy of the model as it is now.
        calibration: an iterable of batches (see `fxslim.plan`): whenever units are masked, weights and biases around
            them are fitted to what the model computed before. It takes seconds, so updates should be few (``every``).
        found: what `fxslim.inspect` said of this model, which is not traced again: nothing but masks may have
            changed it since.

    Raises:
        InputError: something does not fit, or is missing. Nothing is left on the model.
        RequestError: nothing that the config asks for is found.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        *,
        example_inputs: Any = None,
        optimizer: Any = None,
        steps: int | None = None,
        teacher: nn.Module | None = None,
        calibration: Any = None,
        found: Inspection | None = None,
    ) -> None:
        if not isinstance(config, PruningConfig):
            raise InputError(f"config takes a fxslim.PruningConfig, not {type(config).__name__}.")
        if teacher is not None and config.distill is None:
            raise InputError("teacher= does nothing without distill= in the config.")
        if calibration is not None and not config.units:
            raise InputError("calibration= does nothing where weights alone are masked.")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise InputError(f"steps={steps!r}: give the number of optimizer steps, at least 1.")
        self.config, self.optimizer, self.step = config, optimizer, 0
        self.model = unwrapped(model)
        self.timeline: Timeline = timeline(config.start, config.end, config.every, steps) if config.grows else AT_ONCE
        self.finished = False
        self.units: MaskedUnits | None = None
        self.weights: MaskedWeights | None = None
        self.estimate: Estimate | None = None
        self.mending: Mending | None = None
        self.teaching: Teaching | None = None
        try:
            self._put_on(example_inputs, teacher, calibration, found)
        except BaseException:
            self.release()
            raise
        _forget_compiled(model)
        self._follow()

    def _put_on(
        self, example_inputs: Any, teacher: nn.Module | None, calibration: Any, found: Inspection | None
    ) -> None:
        """Find what the config is about, and put masks and teacher on the model."""
        config = self.config
        if config.weights is not None:
            self.weights = MaskedWeights(self.model, config)
        if config.units:
            if found is None:
                found = fxslim.api.inspect(self.model, example_inputs)
            elif found.analysis is None or found.analysis.model is not self.model:
                raise InputError("found= is about another model.")
            self.estimate = Estimate(found)
            self.mending = None if calibration is None else Mending(self.model, found, calibration)
            self.units = MaskedUnits(self.model, found, config)
        if config.teaching is not None:
            self.teaching = Teaching(self.model, config.teaching, teacher)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Return what was asked for and is not done, with its reason."""
        sources = [*self._parts(), *([] if self.mending is None else [self.mending])]
        return tuple(note for part in sources for note in part.notes)

    @property
    def settled(self) -> bool:
        """Tell whether the target is reached: masks do not grow any more."""
        due = self.weights is not None and self.weights.due > 0
        return self.finished or not self.config.grows or (self.step >= self.timeline.end and not due)

    def before_step(self, *, scale: float = 1.0) -> None:
        """Read the step's gradients, and clear those of what is masked.

        Gradients are those that the optimizer will use: unscaled, where losses are scaled.

        Args:
            scale: what losses are scaled by. It matters where weights are frozen and their masks take gradients
                themselves, which nothing unscales.
        """
        self._check_open("before_step")
        for part in self._parts():
            if self.settled:
                part.rest()
            else:
                part.observe(scale)
            part.spare()

    def after_step(self) -> None:
        """Count the step, keep zeros zero, and mask more where it is due.

        Raises:
            InputError: masks are due, and no gradient has been seen to choose them by.
        """
        self._check_open("after_step")
        growing = not self.settled
        self.step += 1
        if growing and self.weights is not None:
            self.weights.regularize(self.optimizer)
        if self.timeline.due(self.step):
            self._update(self.timeline.time(self.step))
        elif self.weights is not None and self.weights.due:
            self.weights.portion()
            self._follow()
        else:
            self._put_back()

    def reach(self) -> None:
        """Mask now what is missing to the target."""
        self._check_open("reach")
        self._update(1.0)
        while self.weights is not None and self.weights.due:
            self.weights.portion()
        self._follow()

    def finish(self) -> None:
        """Take the masks off a model that has reached its target; zeros are left, for `fxslim.slim` to take out.

        Where training ended before the schedule did, what is missing is masked now, with a warning: nothing has
        recovered from it.
        """
        if self.finished:
            return
        try:
            if not self.settled:
                warnings.warn(
                    f"training ended after {self.step} steps, before masks reached their target at "
                    f"{self.timeline.end}: the rest is masked now, and nothing has recovered from it.",
                    stacklevel=2,
                )
                self.reach()
            self._follow()
        finally:
            self.release()

    def release(self) -> None:
        """Take masks and teacher off the model where it stands; what is masked stays zero until it is trained."""
        for part in self._parts():
            part.fold()  # an interrupt may have come between a mask and its zeros
            part.release()
        if self.teaching is not None:
            self.teaching.release()
        self.finished = True

    def sparsity(self) -> dict[str, float]:
        """Return the masked fraction of units, by kind, and of weights."""
        return {name: value for part in self._parts() for name, value in part.sparsity().items()}

    def figures(self) -> Figures:
        """Return what pruning has come to."""
        left = quantiles([part.scores() for part in self._parts()])
        if self.estimate is None or self.units is None:
            now = end = sum(p.numel() for p in self.model.parameters()), 1.0
        else:
            now = end = self.estimate.of(self.units.parts())
            with suppress(InputError):  # of weights that are not finite: the next update says so
                end = now if self.settled else self.estimate.of(self.units.parts(final=True))
        return Figures(self.step, self.sparsity(), left, *now, *end)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write masks, scores and schedule into a folder, beside a checkpoint of the model."""
        tensors: dict[str, Tensor] = {}
        for part in self._parts():
            tensors |= part.state()
        teacher = None if self.teaching is None else self.teaching.fingerprint
        write(folder, State(self.step, self.timeline, self.config, teacher, tensors))

    def load(self, folder: str | PathLike[str]) -> None:
        """Go on from what `save` wrote; the model's and optimizer's own states are loaded by whoever saved them.

        Raises:
            InputError: there is nothing, or it is about another model, another config or another teacher.
        """
        state = read(folder)
        if state.config != self.config:
            mine, theirs = self.config.to_dict(), state.config.to_dict()
            other = ", ".join(f"{name}={theirs[name]!r}" for name in mine if mine[name] != theirs[name])
            raise InputError(f"{folder} was written by another config: it had {other}.")
        expected = {name: value for part in self._parts() for name, value in part.state().items()}
        wrong = sorted(
            {name for name in expected.keys() | state.tensors.keys()
             if name not in expected or name not in state.tensors or expected[name].shape != state.tensors[name].shape}
        )  # fmt: skip
        if wrong:
            raise InputError(f"{folder} holds the masks of another model: {', '.join(wrong[:3])} differ.")
        if self.teaching is not None and self.teaching.fingerprint != state.teacher:
            raise InputError(
                "the teacher is not the one that distillation began with: give that dense model as teacher=."
            )
        self.step, self.timeline = state.step, state.timeline
        for part in self._parts():
            part.load(state.tensors)
        self._follow()

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            self.release()

    def _parts(self) -> list[Any]:
        return [part for part in (self.units, self.weights) if part is not None]

    def _update(self, time: float) -> None:
        if not all(part.heard for part in self._parts()):
            raise InputError(
                f"score={self.config.score!r} reads gradients, and none has been seen: call before_step() after "
                "loss.backward(), before the optimizer's step, and before gradients are cleared."
            )
        change: Callable[[float], float] = lambda last: masked_fraction(self.config.schedule, time, last)  # noqa: E731
        before = () if self.units is None else self.units.parts()
        for part in self._parts():
            part.update(change)
        if self.mending is not None and self.units is not None:
            more = [part for part in self.units.parts() if part not in before]
            if more:
                self.units.take(self.mending.tensors(self.model, more))
        self._follow()

    def _put_back(self) -> None:
        """Put zeros back that an optimizer may have moved: an unknown one, or one whose memory nothing can clear."""
        if self.weights is not None:
            self.weights.fold()
        if self.units is not None and not (self.units.hooked and keeps_zeros(self.optimizer)):
            self.units.fold()

    def _follow(self) -> None:
        """Put zeros behind the masks, in weights and in what the optimizer remembers."""
        for part in self._parts():
            part.fold()
            part.forget(self.optimizer)

    def _check_open(self, what: str) -> None:
        if self.finished:
            raise InputError(f"{what}() after finish() or release(): make a new Pruner to go on pruning.")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers of data parallelism and of ``torch.compile``.

    Raises:
        InputError: its weights are sharded over processes.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            break
        model = inner
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor or "FlatParameter" in type(parameter).__name__:
            raise InputError(
                f"{name} is sharded over processes ({type(parameter.data).__name__}): masks need it whole."
            )
    return model


def _forget_compiled(model: nn.Module) -> None:
    """Let what was compiled before see the masks: compiled code does not look for hooks that come later."""
    dynamo = sys.modules.get("torch._dynamo")
    compiled = any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if dynamo is not None and compiled:
        torch._dynamo.reset()
