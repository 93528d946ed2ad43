"""Masks of weights: single ones, blocks, N of every M. They leave zeros; nothing becomes smaller by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.asked import globs
from fxslim.errors import InputError, RequestError
from fxslim.passes.choose import matches, part_of
from fxslim.plan import Note
from fxslim.training.config import PruningConfig, WeightMasks
from fxslim.training.lasso import shrink
from fxslim.training.lowest import lowest, lowest_of_all
from fxslim.training.optimizer import forget, learning_rates
from fxslim.training.patterns import Layer, Pattern, layers, pattern_of
from fxslim.training.processes import agreed
from fxslim.training.scores import SCORES


@dataclass
class MaskedLayer:
    """A layer and which of its weights are masked.

    Attributes:
        layer: the layer.
        chosen: which blocks go.  (blocks out, blocks in) bool
        wanted: which weights go with them.  (out, in) bool
        gone: which of those are masked by now.  (out, in) bool
        score: the scores of blocks, or of single weights where a part of a block goes.
    """

    layer: Layer
    chosen: Tensor
    wanted: Tensor
    gone: Tensor
    score: Tensor


class MaskedWeights:
    """The masks of all layers that a config is about.

    Args:
        model: the model.
        config: what goes.

    Raises:
        RequestError: no layer is left, or limits cannot be met.
        InputError: a weight is frozen where a score needs its gradient.
    """

    def __init__(self, model: nn.Module, config: PruningConfig) -> None:
        assert config.masks is not None
        self.config, self.asked, self.score = config, config.masks, SCORES[config.score]
        self.pattern: Pattern = pattern_of(self.asked.pattern)
        self.heard = self.asked.lock or not self.score.gradients
        """Whether there is something to choose by: gradients have been seen, or none are needed."""
        found, refused = chosen_layers(model, self.asked, globs(config.include), globs(config.skip))
        self.notes = tuple(Note(where=path, reason=f"weights are not masked: {reason}") for path, reason in refused)
        if not found:
            reasons = "; ".join(f"{note.where}: {note.reason}" for note in self.notes)
            raise RequestError(f"there is no layer whose weights could be masked. {reasons}".rstrip())
        self.layers = [self._masked(layer) for layer in found]
        self.due = 0
        """How many portions of what was chosen last have still to go."""
        if self.asked.lock:
            for own in self.layers:
                own.wanted = own.gone = own.layer.matrix(own.layer.weight.detach() == 0).clone()
        else:
            assert self.asked.fraction is not None
            config.check_limits("fraction", self.asked.fraction, "layer")

    def _masked(self, layer: Layer) -> MaskedLayer:
        weight = layer.weight
        if self.score.gradients and not self.asked.lock and not weight.requires_grad:
            raise InputError(
                f"score={self.config.score!r} reads the gradient of {layer.path}.weight, which is frozen; train it, "
                "leave it out with skip=, or take score='magnitude'."
            )
        matrix = layer.matrix(weight.detach())
        gone = torch.zeros_like(matrix, dtype=torch.bool)
        chosen = self.pattern.summed(gone) > 0
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        score = torch.zeros(matrix.shape if self.pattern.drop else chosen.shape, dtype=dtype, device=weight.device)
        return MaskedLayer(layer, chosen, gone, gone.clone(), score)

    # What a step says -------------------------------------------------------------------------------------------------

    def observe(self, scale: float) -> None:
        """Take note of the gradients of a step, before the optimizer uses them; they are those of weights alone."""
        if not self.score.gradients or self.asked.lock:
            return
        self.heard = self.heard or any(own.layer.weight.grad is not None for own in self.layers)
        steps = [self._step(own) for own in self.layers]
        if not bool(torch.stack([step.sum().to(steps[0]) for step in steps]).isfinite().all()):
            return  # the optimizer leaves such a step out, too, where losses are scaled
        for own, step in zip(self.layers, steps, strict=True):
            own.score = self.score.after(own.score, step, self.config.decay)

    def _step(self, own: MaskedLayer) -> Tensor:
        """Return what a step says of a layer's blocks."""
        weight = own.layer.weight
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        values = own.layer.matrix(self.score.elements(weight, gradient))
        if self.pattern.drop:
            return self.score.step(values).to(own.score)
        if self.asked.reduce == "max":
            return self.pattern.largest(values).to(own.score)
        step = self.score.step(self.pattern.summed(values))
        size = values.numel() / own.chosen.numel()
        mean = self.score.per_cost if self.score.of == "mask" else self.asked.reduce == "mean"
        return (step / size if mean else step).to(own.score)

    def rest(self) -> None:
        """Have no masks that take gradients."""

    def spare(self) -> None:
        """Clear the gradients of masked weights."""
        for own in self.layers:
            gradient = own.layer.weight.grad
            if gradient is not None:
                gradient.masked_fill_(own.layer.stored(own.gone), 0)

    # What goes --------------------------------------------------------------------------------------------------------

    def update(self, change: Callable[[float], float]) -> None:
        """Mask what has to go by now.

        Args:
            change: the fraction that goes at the end -> the one that goes now.
        """
        if self.asked.lock:
            return
        assert self.asked.fraction is not None
        whole = self.pattern.fraction or 1.0
        last = self.asked.fraction / whole  # of the blocks
        fraction = last if change(self.asked.fraction) == self.asked.fraction else change(self.asked.fraction) / whole
        if not self.score.gradients:
            for own in self.layers:
                own.score = self._step(own)
        ranked = [self._ranked(own) for own in self.layers]
        if self.config.scope == "global":
            sizes = [own.gone.numel() // own.chosen.numel() for own in self.layers]
            limits = [
                (part_of(fraction / last, least) if last else 0, most) for least, most in map(self._limits, self.layers)
            ]
            total = part_of(fraction, sum(own.gone.numel() for own in self.layers))
            taken = lowest_of_all(ranked, sizes, total, limits)
        else:
            taken = [lowest(own, part_of(fraction, len(own))) for own in ranked]
        for own, one in zip(self.layers, taken, strict=True):
            new = agreed(one, one.device).reshape(own.chosen.shape) & ~own.chosen
            part = self.pattern.spread(new, own.score)
            own.wanted |= part if self.pattern.drop is None else agreed(part, part.device)
            own.chosen |= new
        self.due = self.asked.portions
        self.portion()

    def _ranked(self, own: MaskedLayer) -> Tensor:
        """Return the scores of a layer's blocks, those that are chosen already first.  (blocks,)"""
        scores = self.pattern.summed(own.score) if self.pattern.drop else own.score
        return scores.masked_fill(own.chosen, -torch.inf).reshape(-1)

    def portion(self) -> None:
        """Mask the next portion of what is chosen."""
        if not self.due:
            return
        for own in self.layers:
            left = own.wanted & ~own.gone
            count = int(left.sum())
            if self.due > 1 and count:
                values = own.layer.matrix(own.layer.weight.detach()).abs().double().masked_fill(~left, torch.inf)
                left = lowest(values.reshape(-1), -(-count // self.due)).reshape(left.shape)
            own.gone |= left
        self.due -= 1

    def _limits(self, own: MaskedLayer) -> tuple[int, int]:
        """Return how many blocks of a layer go at least and at most."""
        low, high = (limit / (self.pattern.fraction or 1.0) for limit in self.config.limits)
        count = own.chosen.numel()
        return min(math.ceil(low * count - 1e-9), count), min(part_of(high, count), count)

    # What follows -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> None:
        """Put zeros in the places of all masked weights."""
        for own in self.layers:
            own.layer.weight.data.masked_fill_(own.layer.stored(own.gone), 0)

    @torch.no_grad()
    def regularize(self, optimizer: Any) -> None:
        """Shrink the norms of blocks: see `fxslim.training.lasso`."""
        if not self.asked.lasso:
            return
        if optimizer is None:
            raise InputError("lasso= needs the learning rate: give the Pruner its optimizer=.")
        rates = learning_rates(optimizer)
        for own in self.layers:
            rate = rates.get(id(own.layer.weight), 0.0)
            matrix = own.layer.matrix(own.layer.weight.data)
            own.layer.weight.data.copy_(own.layer.stored(shrink(matrix, self.pattern, rate * self.asked.lasso)))

    @torch.no_grad()
    def forget(self, optimizer: Any) -> None:
        """Clear what an optimizer remembers of masked weights."""
        for own in self.layers:
            gone = own.layer.stored(own.gone)

            def cleared(value: Tensor, gone: Tensor = gone) -> None:
                value.masked_fill_(gone, 0)

            forget(optimizer, own.layer.weight, cleared)

    def release(self) -> None:
        """Leave nothing behind but zeros."""

    # What is told and kept --------------------------------------------------------------------------------------------

    def sparsity(self) -> dict[str, float]:
        """Return the masked fraction of all weights."""
        gone, count = sum(int(own.gone.sum()) for own in self.layers), sum(own.gone.numel() for own in self.layers)
        return {"weights": gone / count}

    def scores(self) -> np.ndarray:
        """Return the scores of what is not masked."""
        return np.concatenate([self._left(own).double().cpu().numpy() for own in self.layers])

    def _left(self, own: MaskedLayer) -> Tensor:
        return own.score[~(own.gone if self.pattern.drop else own.chosen)]

    def state(self) -> dict[str, Tensor]:
        """Return masks and scores, by layer."""
        found = {"weights.due": torch.tensor(self.due)}
        for own in self.layers:
            for name in ("chosen", "wanted", "gone", "score"):
                found[f"weights.{own.layer.path}.{name}"] = getattr(own, name).detach().cpu().clone().contiguous()
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take masks and scores; see `state`."""
        self.due = int(state["weights.due"])
        self.heard = self.heard or any(bool(state[f"weights.{own.layer.path}.score"].any()) for own in self.layers)
        for own in self.layers:
            for name in ("chosen", "wanted", "gone", "score"):
                before = getattr(own, name)
                setattr(own, name, state[f"weights.{own.layer.path}.{name}"].to(before.device, before.dtype))


def chosen_layers(
    model: nn.Module, asked: WeightMasks, include: tuple[str, ...] = (), skip: tuple[str, ...] = ()
) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Return the layers whose weights are masked, and (path, reason) of those whose weights cannot be.

    Raises:
        RequestError: a glob matches no layer.
    """
    every, refused = layers(model, asked.kinds)
    for name, given in (("include", include), ("skip", skip)):
        for glob in given:
            if not any(matches((layer.path,), glob) for layer in every):
                raise RequestError(f"{name}={glob!r} matches no layer whose weights can be masked.")
    pattern = pattern_of(asked.pattern)
    found = []
    for layer in every:
        included = not include or any(matches((layer.path,), glob) for glob in include)
        if not included or any(matches((layer.path,), glob) for glob in skip):
            continue
        misfit = "" if asked.lock else pattern.misfit(layer.matrix(layer.weight).shape, layer.channels)
        if misfit:
            refused.append((layer.path, misfit))
        else:
            found.append(layer)
    return found, refused
