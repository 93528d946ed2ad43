"""The dense model with a plan's masks active: the reference for everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fxslim.errors import PlanError
from fxslim.passes.narrow import check_fits
from fxslim.plan import Plan
from fxslim.program import named_tensors


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Mask the consumers' inputs of every site while the context is open; afterwards the model is as before.

    Where a consumer's weight is not read by its own module's call, its columns are zeroed for the time being instead.
    """
    computed = _computed(model, plan)
    check_fits(model, plan, computed)
    hooked, columns = _places(plan)
    for name, _ in columns:
        if name in computed:
            raise PlanError(
                f"{name} is computed at every call (pruned or parametrized) and has to be masked itself; make it "
                "permanent first, with torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
    handles: list[Any] = []
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    tensors = named_tensors(model)
    try:
        for path, gone in hooked.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(_mask_input(gone), with_kwargs=True))
        with torch.no_grad():
            for (name, dim), gone in columns.items():
                tensor = tensors[name]
                saved.append((tensor, tensor.detach().clone()))
                rows = torch.from_numpy(np.flatnonzero(gone)).to(tensor.device)
                tensor.data.index_fill_(dim, rows, 0)
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
        for piece in part.site.slices:
            path, _, leaf = piece.tensor.rpartition(".")
            if piece.tensor in known:
                continue
            try:
                value = getattr(model.get_submodule(path), leaf)
            except AttributeError:
                continue  # the check names it
            if isinstance(value, torch.Tensor):
                found[piece.tensor] = value
    return found


def _places(plan: Plan) -> tuple[dict[str, np.ndarray], dict[tuple[str, int], np.ndarray]]:
    """Return which input coordinates of which modules, and which columns of which tensors, are masked."""
    hooked: dict[str, np.ndarray] = {}
    columns: dict[tuple[str, int], np.ndarray] = {}
    for part in plan.sites:
        for piece in part.site.slices:
            if piece.role != "in":
                continue
            gone = piece.removed(part.gone)
            if piece.hook is not None:
                hooked[piece.hook] = hooked[piece.hook] | gone if piece.hook in hooked else gone
            else:
                key = (piece.tensor, piece.dim)
                columns[key] = columns[key] | gone if key in columns else gone
    return hooked, columns


def _mask_input(gone: np.ndarray) -> Any:
    mask = torch.from_numpy(gone)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_fill(args[0], mask, module), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: _fill(kwargs[name], mask, module)}

    return hook


def _fill(value: torch.Tensor, mask: torch.Tensor, module: nn.Module) -> torch.Tensor:
    if value.is_nested:  # rows of different lengths, as torch's encoder packs them
        return torch.nested.as_nested_tensor([_fill(row, mask, module) for row in value.unbind()])
    if value.shape[-1] != mask.shape[0]:
        raise PlanError(
            f"the input of {type(module).__name__} has {value.shape[-1]} channels, the plan masks {mask.shape[0]}: "
            "the plan was made for another model, or is already applied."
        )
    return value.masked_fill(mask.to(value.device), 0)
