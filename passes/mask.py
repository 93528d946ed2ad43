"""The dense model with a plan's masks active: the reference for everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from fxslim.errors import PlanError
from fxslim.passes.folding.fold import fills, folded
from fxslim.passes.narrow import check_fits
from fxslim.passes.routing import Routing, routers
from fxslim.passes.rows import clear
from fxslim.plan import Plan
from fxslim.program import has_forward, named_tensors
from fxslim.site import SitePlan, leads


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Mask the consumers' inputs of every site while the context is open; afterwards the model is as before.

    What goes is masked at zero, and where the plan folds a constant, at that. Where a consumer's weight is not read by
    its own module's call, its columns are zeroed for the time being instead, and its bias takes up the constants. Whole
    experts are minus infinity wherever they compete to be selected.
    """
    computed = _computed(model, plan)
    check_fits(model, plan, computed)
    hooked, columns = _places(model, plan)
    lead = leads(plan.sites)
    constants = fills(plan.sites)
    followed = routers(plan.sites)
    unhooked = [_unhooked(part, columns) for part in plan.sites]
    for name in [*followed, *(name for name, _ in columns), *(fold.bias for part in unhooked for fold in part.folds)]:
        if name in computed:
            raise PlanError(
                f"{name} is computed at every call (pruned or parametrized) and has to be masked itself; make it "
                "permanent first, with torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
    handles: list[Any] = []
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    tensors = named_tensors(model)
    try:
        for path, (key, gone) in hooked.items():
            module = model.get_submodule(path)
            hook = _mask_input(gone, constants.get(key))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            for name, bias in folded(tensors, unhooked).items():
                saved.append((tensors[name], tensors[name].detach().clone()))
                tensors[name].data.copy_(bias)
            for (name, dim), gone in columns.items():
                tensor = tensors[name]
                saved.append((tensor, tensor.detach().clone()))
                clear(tensor.data, dim, gone, lead.get((name, dim)))
        with Routing(tensors, followed) if followed else nullcontext():
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for tensor, values in reversed(saved):
            tensor.data.copy_(values)


def _computed(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the plan's tensors that pruning or parametrizations compute: attributes that are no parameters."""
    known = named_tensors(model)
    found: dict[str, torch.Tensor] = {}
    for part in plan.sites:
        for name in [*(piece.tensor for piece in part.site.slices), *(fold.bias for fold in part.folds)]:
            path, _, leaf = name.rpartition(".")
            if name in known:
                continue
            try:
                value = getattr(model.get_submodule(path), leaf)
            except AttributeError:
                continue  # the check names it
            if isinstance(value, torch.Tensor):
                found[name] = value
    return found


def _places(
    model: nn.Module, plan: Plan
) -> tuple[dict[str, tuple[tuple[str, int], np.ndarray]], dict[tuple[str, int], np.ndarray]]:
    """Return which input coordinates of which modules, and which columns of which tensors, are masked.

    A module comes with the tensor dimension that its input meets; those of a graph are never called.
    """
    hooked: dict[str, tuple[tuple[str, int], np.ndarray]] = {}
    columns: dict[tuple[str, int], np.ndarray] = {}
    for part in plan.sites:
        for piece in part.site.slices:
            if piece.role != "in":
                continue
            gone = piece.per_expert(piece.removed(part.gone))
            key = (piece.tensor, piece.dim)
            if piece.hook is not None and has_forward(model.get_submodule(piece.hook)):
                hooked[piece.hook] = (key, hooked[piece.hook][1] | gone if piece.hook in hooked else gone)
            else:
                columns[key] = columns[key] | gone if key in columns else gone
    return hooked, columns


def _unhooked(part: SitePlan, columns: Mapping[tuple[str, int], np.ndarray]) -> SitePlan:
    """Return a site's plan with those folds alone whose consumers are masked by their columns."""
    folds = tuple(fold for fold in part.folds if (fold.tensor, fold.dim) in columns)
    return part.model_copy(update={"folds": folds})


def _mask_input(gone: np.ndarray, constant: np.ndarray | None) -> Any:
    mask = torch.from_numpy(gone)
    held = torch.from_numpy(constant) if constant is not None else None

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_fill(args[0], mask, held, module), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: _fill(kwargs[name], mask, held, module)}

    return hook


def _fill(value: torch.Tensor, mask: torch.Tensor, held: torch.Tensor | None, module: nn.Module) -> torch.Tensor:
    if value.is_nested:  # rows of different lengths, as torch's encoder packs them
        return torch.nested.as_nested_tensor([_fill(row, mask, held, module) for row in value.unbind()])
    if value.shape[-1] != mask.shape[0]:
        raise PlanError(
            f"the input of {type(module).__name__} has {value.shape[-1]} channels, the plan masks {mask.shape[0]}: "
            "the plan was made for another model, or is already applied."
        )
    if held is None:
        return value.masked_fill(mask.to(value.device), 0)
    return torch.where(mask.to(value.device), held.to(value), value)
