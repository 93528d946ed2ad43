"""Say a narrowed model's sizes in its own config, where that can: then it loads without fxslim."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.errors import PlanError
from fxslim.plan import Plan, units_by_group

TRIES = 256
"""Most sets of fields that are tried."""
CLOSE = 1e-5
"""Relative difference between two computations of the same outputs."""

Fields = dict[str, tuple[int, int]]
"""Path of a config field -> its old and its new value."""


def express(small: nn.Module, plan: Plan, inputs: Mapping[str, Any]) -> Fields | None:
    """Return the changes of the config from which a model of the same class has the sizes of a narrowed one.

    Whole numbers of the config that equal an old size, and on which shapes of the tensors depend, are tried, few
    before many. What is found is built, given the narrowed weights, and must compute the same.

    Args:
        small: a narrowed model that was built from ``small.config``; it is not changed.
        plan: what was narrowed.
        inputs: what to compare the outputs on.

    Returns:
        The fields, or None where no config says these sizes.
    """
    config: Any = getattr(small, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    sizes = _sizes(plan)
    old = with_fields(config, {path: before for path, (before, _) in plan.config.items()})
    dense = _shapes(type(small), old)
    found = [
        (path, value, new)
        for path, value in _integers(old)
        for new in sorted(sizes.get(value, set()) - {value})
        if _shapes(type(small), with_fields(old, {path: new})) != dense  # others say something else
    ]
    wanted = {name: tensor.shape for name, tensor in small.state_dict().items()}
    for fields in itertools.islice(_subsets(found), TRIES):
        changed = with_fields(old, {path: new for path, (_, new) in fields.items()})
        if _shapes(type(small), changed) == wanted and _same(small, type(small), changed, inputs):
            return fields
    return None


def with_fields(config: Any, values: Mapping[str, int]) -> Any:
    """Return a copy of a config with other values at some paths."""
    changed = copy.deepcopy(config)
    set_fields(changed, values)
    return changed


def set_fields(config: Any, values: Mapping[str, int]) -> None:
    """Set whole numbers of a config, in place."""
    for path, value in values.items():
        *outer, leaf = path.split(".")
        owner = config
        for name in outer:
            owner = getattr(owner, name, None)
        if type(getattr(owner, leaf, None)) is not int:
            raise PlanError(f"the plan says {path} of the config, which is no whole number there.")
        setattr(owner, leaf, value)


def _sizes(plan: Plan) -> dict[int, set[int]]:
    """Return what each old size became: units, groups and rows of matrices."""
    found: dict[int, set[int]] = {}
    for part in plan.sites:
        site = part.site
        found.setdefault(site.units, set()).add(len(part.keep))
        if site.groups is not None:
            kept = set(part.keep)
            groups = sum(bool(kept & set(own.tolist())) for own in units_by_group(site))
            found.setdefault(site.group_count, set()).add(groups)
        for piece in site.slices:
            owners = piece.owners()
            gone = int((owners >= 0).sum()) - int(sum((owners == unit).sum() for unit in part.keep))
            found.setdefault(piece.size, set()).add(piece.size - gone)
    return found


def _integers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            yield prefix + name, value
        elif hasattr(value, "to_dict"):
            yield from _integers(value, f"{prefix}{name}.")


def _subsets(found: list[tuple[str, int, int]]) -> Iterator[Fields]:
    """Return sets of changes, at most one of each field, smallest first."""
    for size in range(1, len({path for path, _, _ in found}) + 1):
        for chosen in itertools.combinations(found, size):
            if len({path for path, _, _ in chosen}) == size:
                yield {path: (old, new) for path, old, new in chosen}


def _shapes(kind: type[nn.Module], config: Any) -> dict[str, torch.Size] | None:
    """Return the shapes of a model's tensors, or None where it cannot be built."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        if callable(validate := getattr(config, "validate", None)):
            validate()  # what could not be saved is no answer
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, ZeroDivisionError,
            StrictDataclassError):  # fmt: skip
        return None  # sizes that do not go together


def _same(small: nn.Module, kind: type[nn.Module], config: Any, inputs: Mapping[str, Any]) -> bool:
    """Tell whether a model that is built from a config computes the same with the same weights."""
    with torch.random.fork_rng():
        plain: Any = kind(config)
    dtypes = {p.dtype for p in small.parameters() if p.is_floating_point()}
    if len(dtypes) == 1:  # parameters alone: some buffers stay in float32
        for parameter in plain.parameters():
            parameter.data = parameter.data.to(*dtypes)
    plain.to(next(small.parameters()).device).load_state_dict(small.state_dict())
    training = small.training
    small.eval()
    plain.eval()
    try:
        with torch.no_grad():
            mine, other = (pytree.tree_leaves(model(**inputs)) for model in (small, plain))
    finally:
        small.train(training)
    pairs = [(a, b) for a, b in zip(mine, other, strict=False) if isinstance(a, torch.Tensor)]
    return len(mine) == len(other) and all(
        isinstance(b, torch.Tensor) and a.shape == b.shape
        and float((a.double() - b.double()).abs().max()) <= CLOSE * max(float(a.double().abs().max()), 1e-30)
        for a, b in pairs if a.numel()
    )  # fmt: skip
