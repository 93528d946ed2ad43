"""Narrow a module: slice its tensors, set its integers, overlay its configs, exactly as a plan says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxslim.edit import AnyEdit, AttentionEdit, AttributeEdit, ConfigEdit, GatherEdit, MultiheadEdit, SpreadEdit
from fxslim.errors import PlanError
from fxslim.express import set_fields
from fxslim.gather import Gather, gather_in_attention
from fxslim.multihead import is_narrowable, keep_heads
from fxslim.overlay import overlay, underlying
from fxslim.passes.folding.fold import check_fold, folded
from fxslim.passes.rows import Rows, columns
from fxslim.plan import Plan
from fxslim.program import forward_parameters, named_tensors
from fxslim.site import leads, removed_rows
from fxslim.spread import CONVOLUTIONS, Pick, Spread

SIZE_ATTRIBUTES = {
    "in": ("in_features", "nx", "in_channels"),
    "out": ("out_features", "nf", "out_channels", "num_features", "num_channels", "embedding_dim"),
}
"""Integers in which torch's and transformers' own layers repeat the shape of their weight."""
CACHE_SHAPE = "_get_static_cache_init_shape"
"""Method of transformers' models that reads heads and their width off the config, to make caches before the first call;
None lets them be made at the first call."""


def narrowed_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a module with a plan replayed on it; the module itself stays as it is.

    Only what is kept is copied: removed rows never exist twice.
    """
    check_fits(model, plan)
    tensors = named_tensors(model)
    sliced = _narrowed(tensors, plan)
    by_id = {id(tensors[name]): tensor for name, tensor in sliced.items()}
    memo: dict[int, Any] = {}
    for tensor in tensors.values():
        if id(tensor) not in memo:
            memo[id(tensor)] = _own(by_id.get(id(tensor), tensor), tensor)
    small = copy.deepcopy(model, memo)
    _attributes(small, plan)
    say_sizes(small, plan)
    return small


def replay(module: nn.Module, plan: Plan) -> nn.Module:
    """Replay a plan on a module in place: a dense model, or its skeleton on ``meta``.

    Raises:
        PlanError: the plan does not fit; the module is unchanged.
    """
    check_fits(module, plan)
    tensors = named_tensors(module)
    sliced = _narrowed(tensors, plan)
    by_id = {id(tensors[name]): _own(tensor, tensors[name], clone=False) for name, tensor in sliced.items()}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in by_id:
                    table[name] = by_id[id(tensor)]  # type: ignore[assignment]
    _attributes(module, plan)
    say_sizes(module, plan)
    return module


def changed_weights(model: nn.Module, small: nn.Module, plan: Plan) -> list[str]:
    """Return the parameters of a narrowed model that are not what a plan makes of the dense model's.

    Biases that have taken up constants are left out: they are computed. So is everything where names differ.
    """
    made = dict(named_tensors(model))
    made |= _narrowed(made, plan)
    computed = {fold.bias for part in plan.sites for fold in part.folds}
    return [
        name
        for name, own in small.named_parameters()
        if name in made and name not in computed
        and not (made[name].shape == own.shape and torch.equal(made[name].to(own), own))
    ]  # fmt: skip


def say_sizes(module: nn.Module, plan: Plan) -> None:
    """Say the new sizes in the model's config, where the plan found that it can."""
    config = getattr(module, "config", None)
    if config is not None and plan.config:
        set_fields(underlying(config), {path: new for path, (_, new) in plan.config.items()})


def check_fits(module: nn.Module, plan: Plan, computed: Mapping[str, torch.Tensor] | None = None) -> None:
    """Raise PlanError unless a plan's tensors and edits are those of a module.

    Args:
        module: the module that the plan is to be applied to.
        plan: the plan.
        computed: further tensors of the module that are no parameters, by name.
    """
    tensors = named_tensors(module) | dict(computed or {})
    for part in plan.sites:
        for piece in part.site.slices:
            tensor = tensors.get(piece.tensor)
            if tensor is None:
                raise PlanError(f"the plan narrows {piece.tensor}, which {type(module).__name__} does not have.")
            if piece.lead is not None and (piece.lead >= tensor.ndim or tensor.shape[piece.lead] != piece.experts):
                raise PlanError(
                    f"the plan expects {piece.tensor} to have {piece.experts} experts in dimension {piece.lead}, but "
                    f"its shape is {tuple(tensor.shape)}: it was made for another model, or is already applied."
                )
            if piece.dim >= tensor.ndim or tensor.shape[piece.dim] != piece.size:
                raise PlanError(
                    f"the plan expects {piece.tensor} to have {piece.size} rows in dimension {piece.dim}, but its "
                    f"shape is {tuple(tensor.shape)}: it was made for another model, or is already applied."
                )
        for fold in part.folds:
            check_fold(tensors, fold)
    for edit in plan.edits:
        try:
            owner: Any = module.get_submodule(edit.module)
        except AttributeError as error:
            raise PlanError(f"the plan edits {edit.module}.{edit.name}, which does not exist.") from error
        if isinstance(edit, GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit):
            _check_heads(owner, edit)
            continue
        holder = getattr(owner, "config", None) if isinstance(edit, ConfigEdit) else owner
        if type(getattr(holder, edit.name, None)) is not int or getattr(holder, edit.name) != edit.old:
            raise PlanError(
                f"the plan expects {edit.module}.{edit.name} to be {edit.old}, "
                f"found {getattr(holder, edit.name, None)!r}: it was made for another model, or is already applied."
            )


def _check_heads(owner: nn.Module, edit: GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit) -> None:
    if isinstance(edit, GatherEdit) and edit.name not in forward_parameters(owner)[0]:
        raise PlanError(f"the plan gathers {edit.name!r} of {edit.module}, whose forward does not take it.")
    if isinstance(edit, AttentionEdit) and getattr(owner, "config", None) is None:
        raise PlanError(f"the plan gathers in the attention of {edit.module}, which has no config.")
    if isinstance(edit, MultiheadEdit):
        if not is_narrowable(owner):
            raise PlanError(
                f"the plan narrows {edit.module} as torch's nn.MultiheadAttention, not a {type(owner).__name__}."
            )
        if owner.num_heads != edit.size:
            raise PlanError(
                f"the plan expects {edit.module}.num_heads to be {edit.size}, found {owner.num_heads!r}: it was made "
                "for another model, or is already applied."
            )
    if isinstance(edit, SpreadEdit) and edit.size > max(getattr(owner, "weight", torch.zeros(0)).shape):
        raise PlanError(f"the plan spreads {edit.module} over {edit.size} channels, more than it has.")
    if not edit.keep or any(head >= edit.size for head in edit.keep):
        verb = "keeps" if isinstance(edit, MultiheadEdit) else "gathers"
        what = "channels" if isinstance(edit, SpreadEdit) else "heads"
        raise PlanError(f"the plan {verb} {what} of {edit.module} that do not exist.")


def _narrowed(tensors: Mapping[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors that a plan changes, with rows taken out (or columns zeroed for what stays in place)."""
    made = folded(tensors, plan.sites)
    for name, change in changes(plan).items():
        made[name] = change.apply(made.get(name, tensors[name]))
    return made


@dataclass(frozen=True)
class Change:
    """What a plan does to one tensor, apart from the constants that a bias takes up before.

    Attributes:
        cleared: rows that become zero: columns of consumers, for what stays in place.
        removed: rows that are taken out, in this order.
    """

    cleared: tuple[Rows, ...] = ()
    removed: tuple[Rows, ...] = ()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the changed tensor; the tensor itself stays as it is."""
        with torch.no_grad():
            tensor = tensor.detach()
            if self.cleared:
                tensor = tensor.clone()
            for rows in self.cleared:
                rows.clear(tensor)
            for rows in self.removed:
                tensor = rows.without(tensor)
        return tensor

    def on(self, move: Callable[[Rows], Rows]) -> Change:
        """Return the change of a tensor that holds other rows."""
        return Change(tuple(map(move, self.cleared)), tuple(map(move, self.removed)))


def changes(plan: Plan) -> dict[str, Change]:
    """Return what a plan does to every tensor whose rows it takes out or zeroes, by canonical name."""
    cleared: dict[str, list[Rows]] = {}
    removed: dict[str, list[Rows]] = {}
    for part in plan.sites:
        if part.site.name in plan.zeroed or part.stay:
            for name, rows in columns(part):
                cleared.setdefault(name, []).append(rows)
    cut = plan.cut()
    lead = leads(cut)
    for (name, dim), gone in sorted(removed_rows(cut).items(), key=lambda item: -item[1].ndim):
        if gone.any():  # experts go after their rows
            removed.setdefault(name, []).append(Rows(dim, gone, lead.get((name, dim))))
    names = dict.fromkeys([*cleared, *removed])
    return {name: Change(tuple(cleared.get(name, ())), tuple(removed.get(name, ()))) for name in names}


def _own(tensor: torch.Tensor, like: torch.Tensor | None = None, *, clone: bool = True) -> torch.Tensor:
    """Return a tensor that shares nothing with the original, as a parameter where the original is one."""
    like = tensor if like is None else like
    data = tensor.detach()
    if clone and data.data_ptr() == like.data_ptr():
        data = data.clone()
    if isinstance(like, nn.Parameter):
        return nn.Parameter(data, requires_grad=like.requires_grad)
    return data


def _attributes(module: nn.Module, plan: Plan) -> None:
    """Set the integers that layers keep about their weights, and apply the plan's own edits."""
    for part in plan.cut():
        for piece in part.site.slices:
            path, _, leaf = piece.tensor.rpartition(".")
            owner = module.get_submodule(path)
            size = int(getattr(owner, leaf).shape[piece.dim])
            if leaf != "weight":
                continue
            if vars(owner).get("groups") == piece.size and piece.dim == 0 and isinstance(owner, CONVOLUTIONS):
                owner.groups = owner.in_channels = size  # depthwise: one group a channel
            if vars(owner).get("num_channels") == piece.size and "num_groups" in vars(owner):
                owner.num_groups = vars(owner)["num_groups"] * size // piece.size
            for name in SIZE_ATTRIBUTES[piece.role]:
                if vars(owner).get(name) == piece.size:
                    setattr(owner, name, size)
            if vars(owner).get("normalized_shape") == (piece.size,):
                owner.normalized_shape = (size,)  # type: ignore[assignment]
    for edit in plan.edits:
        apply_edit(module, edit)
    for child in module.modules() if plan.sites else ():
        if hasattr(child, CACHE_SHAPE):
            setattr(child, CACHE_SHAPE, _unknown)


def _unknown() -> None:
    """Let caches take the shape of what goes into them: a config says how many heads there were, in all layers."""


def apply_edit(module: nn.Module, edit: AnyEdit) -> None:
    """Apply one edit in place."""
    owner = module.get_submodule(edit.module)
    if isinstance(edit, AttributeEdit):
        setattr(owner, edit.name, edit.new)
        if edit.name == "groups" and isinstance(owner, CONVOLUTIONS):
            owner.in_channels = owner.weight.shape[1] * edit.new
    elif isinstance(edit, ConfigEdit):
        owner.config = overlay(owner.config, {edit.name: edit.new})
    elif isinstance(edit, GatherEdit):
        hook = Gather(edit.name, edit.axis, edit.size, edit.keep, edit.rank, edit.runs)
        owner.register_forward_pre_hook(hook, with_kwargs=True)
    elif isinstance(edit, SpreadEdit) and edit.name == "output":
        owner.register_forward_hook(Spread(edit.size, edit.keep), prepend=True)  # before that of an earlier narrowing
    elif isinstance(edit, SpreadEdit):
        owner.register_forward_pre_hook(Pick(edit.keep), with_kwargs=True)
    elif isinstance(edit, AttentionEdit):
        gather_in_attention(owner, edit.size, edit.keep)
    else:
        keep_heads(owner, edit.keep)
