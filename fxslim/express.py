"""Say a narrowed model's sizes in its own config, where that can: then it loads without fxslim."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.bounded import bounded
from fxslim.errors import PlanError
from fxslim.plan import Plan
from fxslim.report import Plain
from fxslim.sharing import evaluating
from fxslim.site import units_by_group

TRIES = 256
"""Most sets of fields that are tried."""
CLOSE = 1e-5
"""Relative difference between two computations of the same outputs."""

Fields = dict[str, tuple[int, int]]
"""Path of a config field -> its old and its new value."""
Shapes = dict[str, torch.Size]

_IMPOSSIBLE = (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, LookupError, ZeroDivisionError)
"""What configs and models raise for sizes that do not go together."""


def express(small: nn.Module, plan: Plan, inputs: Mapping[str, Any]) -> tuple[Fields, Plain] | None:
    """Find the changes of the config from which plain ``from_pretrained`` loads a narrowed model.

    Whole numbers of the config that equal an old size, and on which shapes of the tensors depend, are tried, few
    before many. What is found is loaded by the class's own ``from_pretrained``, and must compute the same.

    Args:
        small: a narrowed model that was built from ``small.config``; it is not changed.
        plan: what was narrowed.
        inputs: what to compare the outputs on.

    Returns:
        The fields to change and whether a plain load works; None for what is no model of transformers.
    """
    config: Any = getattr(small, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(type(small), "_from_config"):
        return None
    old = with_fields(config, {path: before for path, (before, _) in plan.config.items()})
    wanted = {name: tensor.shape for name, tensor in small.state_dict().items()}

    @functools.cache
    def shapes(fields: tuple[tuple[str, int], ...] = ()) -> Shapes | None:
        return _shapes(type(small), with_fields(old, dict(fields)), len(wanted))

    dense = shapes()
    if dense is None or dense.keys() != wanted.keys():
        return {}, Plain(False, "the config alone does not build the model")
    if uneven := _uneven(dense, wanted):
        return {}, Plain(False, f"layers of the same size got different ones ({uneven})")
    sizes = _sizes(plan)
    telling = [
        (path, value, new)
        for path, value in _integers(old)
        for new in sorted(sizes.get(value, set()) - {value})
        if _tells(shapes(((path, new),)), dense, wanted)
    ]
    why = "no field of the config says these sizes"
    for fields in itertools.islice(_subsets(telling), TRIES):
        changed = {path: new for path, (_, new) in fields.items()}
        said = ", ".join(f"{path} {before} -> {after}" for path, (before, after) in fields.items())
        config = with_fields(old, changed)
        if shapes(tuple(changed.items())) == wanted and _same(small, config, inputs):
            return fields, Plain(True, f"the config says its sizes: {said}" if said else "no shape has changed")
        if (refused := _refused(config)) and _built(type(small), config, len(wanted)) == wanted:
            why = f"the config would say {said}, but transformers refuses that: {refused}"
    return {}, Plain(False, why)


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


def check_fields(config: Any, plan: Plan) -> None:
    """Refuse a plan about other sizes of a narrowed model's config than its sites are about.

    What is built of the old values is then no larger than the sites say.

    Raises:
        PlanError: a field is not the new size there, or its sizes are none of the sites'.
    """
    if not plan.config:
        return
    sizes = _sizes(plan)
    for gone in plan.removed_rows().values():
        left = {gone.shape[-1] - int(row.sum()) for row in gone.reshape(-1, gone.shape[-1])}
        sizes.setdefault(gone.shape[-1], set()).update(left)
    after = set().union(*sizes.values())
    found = dict(_integers(config))
    for path, (old, new) in plan.config.items():
        if found.get(path) != new:
            raise PlanError(f"the plan says {path} of the config is {new}, which is {found.get(path)} there.")
        if old < new or old not in sizes or new not in after:
            raise PlanError(f"the plan says {path} of the config was {old} and is {new}: no site has these sizes.")


def _uneven(dense: Shapes, wanted: Shapes) -> str:
    """Name tensors of look-alike layers that differ in shape now and did not before; no single number says that."""
    found: dict[tuple[str, torch.Size], torch.Size] = {}
    for name, before in dense.items():
        alike = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        if found.setdefault((alike, before), wanted[name]) != wanted[name]:
            return alike
    return ""


def _tells(shapes: Shapes | None, dense: Shapes, wanted: Shapes) -> bool:
    """Tell whether a field changes shapes, those alone that have changed; what cannot be built may go with others."""
    if shapes is None:
        return True
    changed = {name for name in dense if shapes.get(name) != dense[name]}
    return bool(changed) and all(dense[name] != wanted[name] for name in changed)


def _subsets(found: list[tuple[str, int, int]]) -> Iterator[Fields]:
    """Yield sets of changes, at most one of each field, smallest first."""
    for size in range(len({path for path, _, _ in found}) + 1):
        for chosen in itertools.combinations(found, size):
            if len({path for path, _, _ in chosen}) == size:
                yield {path: (before, after) for path, before, after in chosen}


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


def _shapes(kind: type[nn.Module], config: Any, tensors: int) -> Shapes | None:
    """Return the shapes of a model's tensors, or None where it cannot be saved or built."""
    return None if _refused(config) else _built(kind, config, tensors)


def _refused(config: Any) -> str:
    """Return what transformers says against a config's sizes, which then can be neither saved nor loaded."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        if callable(validate := getattr(config, "validate", None)):
            validate()
    except (*_IMPOSSIBLE, StrictDataclassError) as error:
        said = str(error.__cause__ or error).strip() or type(error).__name__
        return said.splitlines()[-1].rstrip(".")
    return ""


def _built(kind: type[nn.Module], config: Any, tensors: int) -> Shapes | None:
    """Return the shapes of a model's tensors, or None where it cannot be built, or has many more than so many."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with torch.device("meta"), bounded(tensors):
            return {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    except (*_IMPOSSIBLE, StrictDataclassError):
        return None


def _same(small: nn.Module, config: Any, inputs: Mapping[str, Any]) -> bool:
    """Tell whether a model that is loaded plainly, with a config and a narrowed model's tensors, computes the same."""
    try:
        plain = _loaded(small, config)
    except _IMPOSSIBLE:
        return False
    try:
        with torch.no_grad(), evaluating(small):
            mine, other = (pytree.tree_leaves(model(**inputs)) for model in (small, plain))
    except _IMPOSSIBLE:
        return False
    pairs = [(a, b) for a, b in zip(mine, other, strict=False) if isinstance(a, torch.Tensor)]
    return len(mine) == len(other) and all(
        isinstance(b, torch.Tensor) and a.shape == b.shape
        and float((a.double() - b.double()).abs().max()) <= CLOSE * max(float(a.double().abs().max()), 1e-30)
        for a, b in pairs if a.numel()
    )  # fmt: skip


def _loaded(small: nn.Module, config: Any) -> nn.Module:
    """Return what ``from_pretrained`` makes of a config and a narrowed model's own tensors, which are shared."""
    parameter = next(p for p in small.parameters() if p.is_floating_point())
    options = {"config": config, "state_dict": small.state_dict(), "dtype": parameter.dtype}
    kind: Any = type(small)
    with torch.random.fork_rng(), _quiet():
        plain: nn.Module = kind.from_pretrained(
            None, **options, attn_implementation=getattr(config, "_attn_implementation", None)
        )
    return plain.to(parameter.device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Have transformers show no progress: nothing is read from any file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
