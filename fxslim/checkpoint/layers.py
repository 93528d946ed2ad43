"""Layers that are alike: one of each kind shows what all of them need, so that the others are not loaded.

Two layers of a list are alike if they have the same classes, shapes, plain attributes (but for the layer's own number)
and hooks, and a plan takes equally many units out of the same sites. They run the same code on the same sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxslim.edit import AnyEdit, AttentionEdit, GatherEdit, MultiheadEdit, SpreadEdit
from fxslim.errors import NarrowError, UnsupportedModelError
from fxslim.hf.files import reading_whole
from fxslim.passes.heads import head_edits
from fxslim.passes.spreads import spread_edits
from fxslim.plan import Note, Plan
from fxslim.program import named_tensors
from fxslim.site import SitePlan

PLAIN = (bool, int, float, str, torch.dtype, type(None))

Alike = Mapping[str, str]
"""Path of a layer -> path of the one that stands for it."""


def alike(model: nn.Module, plan: Plan) -> Alike:
    """Return which layers of a model need not be loaded to try a plan, and which others stand for them."""
    found: dict[str, str] = {}
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists.append(path)
            layers = {f"{path}.{key}": layer for key, layer in module.named_children()}
            first: dict[str, str] = {}
            apart = _bound(model, plan, layers)
            numbers = _numbers(layers)
            for own, layer in layers.items():
                parts = [part for part in plan.sites if _inside(part, own)]
                looks = f"{_looks(layer, numbers)} {[_taken(part, own) for part in parts]}"
                stands = own if own in apart or not parts else first.setdefault(looks, own)
                if stands != own:
                    found[own] = stands
    return found


def _inside(part: SitePlan, path: str) -> bool:
    return all(piece.tensor.startswith(f"{path}.") for piece in part.site.slices)


def _bound(model: nn.Module, plan: Plan, layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the layers that share tensors or sites with others."""
    homes: dict[int, set[str]] = {}
    for name, tensor in named_tensors(model).items():
        homes.setdefault(id(tensor), set()).add(_layer(name, layers))
    shared = [homes[id(tensor)] for tensor in named_tensors(model).values()]
    sites = [{_layer(piece.tensor, layers) for piece in part.site.slices} for part in plan.sites]
    return {path for several in (*shared, *sites) if len(several) > 1 for path in several}


def _layer(name: str, layers: Mapping[str, nn.Module]) -> str:
    """Return the layer that a tensor is in, or nothing."""
    return next((path for path in layers if name.startswith(f"{path}.")), "")


def _numbers(layers: Mapping[str, nn.Module]) -> set[tuple[str, str]]:
    """Return the attributes that hold a layer's own number, in all of them: (path inside the layer, name)."""
    every = [
        {(name, key) for name, module in layer.named_modules() for key, value in vars(module).items()
         if type(value) is int and value == number}
        for number, layer in enumerate(layers.values())
    ]  # fmt: skip
    return set.intersection(*every) if every else set()


def _looks(layer: nn.Module, numbers: set[tuple[str, str]]) -> str:
    """Describe everything about a layer that decides what it computes, but for the numbers in its tensors."""
    rows: list[Any] = []
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items()
                 if _is_plain(value) and key != "training" and (name, key) not in numbers}  # fmt: skip
        tensors = {key: tuple(tensor.shape) for table in (module._parameters, module._buffers)
                   for key, tensor in table.items() if tensor is not None}  # fmt: skip
        hooks = [type(hook).__name__ for table in (module._forward_hooks, module._forward_pre_hooks)
                 for hook in table.values()]  # fmt: skip
        rows.append((name, type(module).__module__, type(module).__qualname__, sorted(plain.items()), tensors, hooks))
    return repr(rows)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(one) for one in value)
    return isinstance(value, PLAIN)


def _taken(part: SitePlan, path: str) -> str:
    """Describe a site of a layer and how many of its units go."""
    groups = len({part.site.groups[unit] for unit in part.left}) if part.site.groups is not None else 0
    site = part.site.model_dump_json().replace(f'"{path}.', '"').replace(f'"{path}:', '":')
    return f"{site} {len(part.left)} {len(part.stay)} {groups}"


def shortened(original: type[Any], left_out: Alike) -> type[Any]:
    """Return a subclass whose models lack some layers; the others keep their names, and are loaded as always."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        for path in left_out:
            holder, _, key = path.rpartition(".")
            del self.get_submodule(holder)._modules[key]
        ignored = {rf"^(.*\.)?{re.escape(path)}\." for path in left_out}
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *ignored}

    same = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    body = {"__init__": build, "_load_pretrained_model": reading_whole(original)}
    return type(original.__name__, (original,), {**body, **same})


def without(plan: Plan, left_out: Alike) -> Plan:
    """Return the part of a plan that is about the layers that are loaded."""
    sites = tuple(part for part in plan.sites if not any(_inside(part, path) for path in left_out))
    return plan.model_copy(update={"sites": sites, "notes": ()})


def extended(model: nn.Module, plan: Plan, found: Plan, left_out: Alike) -> Plan:
    """Give every layer the edits that were found for the one that stands for it.

    Args:
        model: the dense skeleton.
        plan: the whole plan, without edits.
        found: the plan of the layers that were loaded, with edits.
        left_out: which layer stands for which.

    Raises:
        UnsupportedModelError: an edit that names units cannot be carried over.
    """
    twins = {part.site.name: _twins(part, plan, left_out) for part in found.sites}
    spread = [twin for name in found.spread for twin in twins[name]]
    stuck = tuple(twin.site.name for name in found.zeroed for twin in twins[name])
    edits: list[AnyEdit] = [edit for edit in found.edits if not isinstance(edit, SpreadEdit | MultiheadEdit)]
    for path, stands in left_out.items():
        edits += [_carried(edit, path, stands, found, twins) for edit in edits
                  if f"{edit.module}.".startswith(f"{stands}.")]  # fmt: skip
    if any(isinstance(edit, MultiheadEdit) for edit in found.edits):
        edits += head_edits(model, plan, [part for part in plan.sites if part.site.name not in stuck]) or ()
    others = tuple(part for part in plan.sites if part not in spread)
    rest = plan.model_copy(update={"sites": others, "zeroed": stuck, "edits": tuple(edits)})
    every = (*edits, *spread_edits(model, rest, spread))
    names = tuple(part.site.name for part in spread)
    said = {note.where: note.reason for note in found.notes}
    reasons = {twin.site.name: said.get(name, "") for name in twins for twin in twins[name]}
    notes = [Note(where=name, reason=reasons[name]) for name in (*names, *stuck)]
    return plan.model_copy(update={"edits": every, "spread": names, "zeroed": stuck, "config": found.config,
                                   "notes": (*plan.notes, *notes)})  # fmt: skip


def _twins(part: SitePlan, plan: Plan, left_out: Alike) -> list[SitePlan]:
    """Return a site's plan and those of the same site in layers that it stands for."""
    names = {part.site.name}
    for path, stands in left_out.items():
        if _inside(part, stands):
            names.add(f"{path}{part.site.name[len(stands) :]}")
    return [own for own in plan.sites if own.site.name in names]


def _carried(edit: AnyEdit, path: str, stands: str, found: Plan, twins: Mapping[str, list[SitePlan]]) -> AnyEdit:
    module = f"{path}{edit.module[len(stands) :]}"
    if not isinstance(edit, GatherEdit | AttentionEdit):
        return edit.model_copy(update={"module": module})
    for part in found.sites:
        if _inside(part, stands) and part.site.units == edit.size and part.left == edit.keep:
            keep = next(twin.left for twin in twins[part.site.name] if _inside(twin, path))
            return edit.model_copy(update={"module": module, "keep": keep})
    raise UnsupportedModelError(
        f"what {edit.module} is given keeps units of no site of its own, so that {path} cannot be treated alike; load "
        "the model and use fxslim.slim."
    )


def check_alike(narrowed: nn.Module, left_out: Alike) -> None:
    """Raise NarrowError unless layers that were alike before they were narrowed are alike now."""
    for path, stands in left_out.items():
        holder, _, _ = path.rpartition(".")
        numbers = _numbers({f"{holder}.{key}": own for key, own in narrowed.get_submodule(holder).named_children()})
        mine, other = (_looks(narrowed.get_submodule(own), numbers) for own in (path, stands))
        if mine != other:
            raise NarrowError(f"{path} was narrowed otherwise than {stands}, which stands for it; please report this.")
