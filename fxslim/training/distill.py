"""Learn from the dense model while masks grow: a hook on the model adds what is learnt to the loss that it returns."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, MutableMapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxslim.errors import InputError
from fxslim.training.config import Distillation
from fxslim.training.hooks import Hook

ITEMS = "num_items_in_batch"
"""The keyword by which a Trainer says how many items all accumulated batches hold."""
IGNORED = -100
"""The label of tokens that count nowhere."""


class Teaching:
    """The dense model beside the one that is trained.

    While it is active, the model's outputs in training mode have another loss: its own and what the teacher adds.

    Attributes:
        dtype: in which the teacher multiplies; None for what is set where the model is called.

    Args:
        model: the model that is trained; its outputs hold a loss, and logits under names that end so.
        asked: how much counts what.
        teacher: the dense model; None for a copy of the model as it is now.
    """

    def __init__(self, model: nn.Module, asked: Distillation, teacher: nn.Module | None = None) -> None:
        self.asked = asked
        self.dtype: torch.dtype | None = None
        self._summed: bool | None = None
        self.teacher = self.copy_of(model) if teacher is None else _apart_from(model, teacher).eval()
        self.handles: list[Any] = [model.register_forward_hook(Hook(self._learn), with_kwargs=True)]
        if asked.hidden:
            self.handles.append(model.register_forward_pre_hook(Hook(self._show), with_kwargs=True))

    @staticmethod
    def copy_of(model: nn.Module) -> nn.Module:
        """Return a copy to learn from."""
        return copy.deepcopy(model).requires_grad_(requires_grad=False).eval()

    @cached_property
    def fingerprint(self) -> str:
        """Return what tells this teacher from others: a digest of its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.teacher.named_parameters(), key=lambda item: item[0]):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _show(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask for hidden states in training."""
        return (args, {**kwargs, "output_hidden_states": True}) if _trains(module) else None

    def _learn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add to the loss in training."""
        if not _trains(module):
            return None
        if not isinstance(output, MutableMapping) or output.get("loss") is None:
            raise InputError(
                "distillation adds to the loss that the model returns, and it returned none: give it labels, and leave "
                "label_smoothing_factor and compute_loss_func of a Trainer alone (return_dict must be on)."
            )
        place = output["loss"].device
        if next(self.teacher.parameters()).device != place:
            self.teacher.to(place)
        given = {name: value for name, value in kwargs.items() if name not in ("labels", ITEMS)}
        dense = self._teach(place, *args, **given)
        learnt = loss_from(output, dense, kwargs, self.asked, kind=_problem(module))
        if self._sums(place, args, kwargs):
            learnt = learnt * (kwargs["labels"] != IGNORED).sum() / kwargs[ITEMS]
        output["loss"] = self.asked.task * output["loss"] + learnt
        return output

    @torch.no_grad()
    def _teach(self, place: torch.device, *args: Any, **kwargs: Any) -> Any:
        """Return what the dense model says."""
        with torch.autocast(place.type, self.dtype) if self.dtype else nullcontext():
            return self.teacher(*args, **kwargs)

    def _sums(self, place: torch.device, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Tell whether the loss is a sum over this batch, divided by the number of items of all accumulated batches.

        Some models take that number and return the mean over their batch all the same, so the teacher is asked, once.
        """
        if kwargs.get(ITEMS) is None or not isinstance(kwargs.get("labels"), Tensor):
            return False
        if self._summed is None:
            one, two = (
                float(self._teach(place, *args, **{**kwargs, ITEMS: times * kwargs[ITEMS]})["loss"]) for times in (1, 2)
            )
            self._summed = abs(one - 2 * two) <= 0.01 * abs(one)
        return self._summed


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _apart_from(model: nn.Module, teacher: nn.Module) -> nn.Module:
    """Return a teacher that can be put to its place beside a model."""
    if not isinstance(teacher, nn.Module):
        raise InputError(f"teacher= takes the dense model, a torch.nn.Module, not {type(teacher).__name__}.")
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise InputError(
            "teacher= shares weights with the model that is trained, and would change with it: leave teacher= out for "
            "a copy of the model as it is now, or give another model."
        )
    return teacher


def _problem(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "problem_type", None) or ""


def loss_from(
    output: Mapping[str, Any],
    dense: Mapping[str, Any],
    inputs: Mapping[str, Any],
    asked: Distillation,
    *,
    kind: str = "",
) -> Tensor:
    """Return what is learnt from the dense model's outputs.

    Args:
        output: outputs of the model that learns.
        dense: outputs of the dense model.
        inputs: what both were given: ``attention_mask`` and ``labels`` say which tokens count.
        asked: how much counts what.
        kind: ``problem_type`` of the model's config.

    Raises:
        InputError: there is nothing to learn from.
    """
    total: Tensor | None = None
    if asked.logits:
        names = [name for name, value in output.items() if str(name).endswith("logits") and isinstance(value, Tensor)]
        if not names:
            raise InputError(f"distillation compares logits, and the outputs are {', '.join(output)}; take hidden=1.0.")
        parts = [_apart(output[name], dense[name], inputs, asked.temperature, kind) for name in names]
        total = asked.logits * torch.stack(parts).mean()
    if asked.hidden:
        hidden = asked.hidden * _hidden(output, dense, inputs)
        total = hidden if total is None else total + hidden
    assert total is not None
    return total


def _apart(mine: Tensor, theirs: Tensor, inputs: Mapping[str, Any], temperature: float, kind: str) -> Tensor:
    """Return how far logits are apart: a divergence, or a squared difference where there is one number per row."""
    mine, theirs = mine.float() if mine.dtype != torch.float64 else mine, theirs.to(mine.device)
    theirs = theirs.to(mine.dtype)
    if mine.shape[-1] == 1 or kind == "regression":
        apart = (mine - theirs).square().mean(-1)
    elif kind == "multi_label_classification":
        target = theirs.sigmoid()
        apart = functional.binary_cross_entropy_with_logits(mine, target, reduction="none").mean(-1)
        apart = apart - functional.binary_cross_entropy(target, target, reduction="none").mean(-1)
    else:
        first, second = (functional.log_softmax(value / temperature, -1) for value in (mine, theirs))
        apart = functional.kl_div(first, second, log_target=True, reduction="none").sum(-1) * temperature**2
    counts = _counts(apart.shape, inputs)
    return apart.mean() if counts is None else (apart * counts).sum() / counts.sum().clamp_min(1)


def _counts(shape: torch.Size, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens count, where rows are tokens.  (B, S)"""
    for name, padding in (("labels", IGNORED), ("decoder_attention_mask", 0), ("attention_mask", 0)):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape == shape:
            return (value != padding).float()
    return None


def _hidden(output: Mapping[str, Any], dense: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
    """Return the mean squared difference of hidden states, layer by layer."""
    parts = []
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        for mine, theirs in zip(output.get(name) or (), dense.get(name) or (), strict=True):
            apart = (mine - theirs.to(mine)).float().square().mean(-1)
            mask = inputs.get("attention_mask")
            real = mask if isinstance(mask, Tensor) and mask.shape == apart.shape else None
            parts.append(apart.mean() if real is None else (apart * real).sum() / real.sum().clamp_min(1))
    if not parts:
        raise InputError("distillation with hidden= needs hidden_states, and the model returned none.")
    return torch.stack(parts).mean()
