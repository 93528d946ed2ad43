"""Find the integers that a narrowed module still holds: attributes, and config fields that it reads at run time.

Integers are recorded while the module runs; those whose value is a size that changed are candidates; the smallest set
of them that makes the module compute what the masked one does, along every path, is what the plan records.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.multihead import is_narrowable
from fxslim.overlay import underlying
from fxslim.passes.heads import head_edits
from fxslim.passes.narrow import apply_edit, narrowed_copy
from fxslim.passes.paths import Path, tensors_of
from fxslim.passes.verify import distance
from fxslim.plan import AnyEdit, AttentionEdit, AttributeEdit, ConfigEdit, GatherEdit, Plan, SitePlan
from fxslim.program import forward_parameters
from fxslim.trace import share

IMPLEMENTATION_FIELD = "_attn_implementation"
MOST = 4
"""Largest number of integers that are changed together in one module."""
TRIES = 300
"""Largest number of sets of integers that are tried on one module."""
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""A wrong integer shows far above these; the final verification is the exact one."""


KEPT = (bool, int, float, str, torch.dtype, torch.device, nn.Module)
"""Arguments that no call changes."""

Edited = tuple[str, AnyEdit]
"""The module of an edit relative to the one that holds it, and the edit."""
Looks = tuple[Any, ...]
"""What modules have in common that need the same edits."""


@dataclass
class Recorded:
    """One call of a module: a private copy of what went in, what came out, and with which attention implementation."""

    args: Any
    kwargs: Any
    out: list[torch.Tensor]
    path: Path
    attention: str | None


@dataclass
class Watch:
    """Calls of one module, the integers it read while it ran, and the modules that read an attention implementation."""

    calls: list[Recorded] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    read: dict[tuple[str, str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Edits:
    """Edits that were found, and sites for which none do."""

    edits: tuple[AnyEdit, ...]
    stuck: tuple[str, ...]


def find_edits(
    model: nn.Module,
    plan: Plan,
    sizes: Sizes,
    watches: Mapping[str, Watch],
) -> Edits:
    """Find the integer edits that a plan needs.

    Args:
        model: the dense model.
        plan: the plan, without edits.
        sizes: site name -> old size -> new sizes, over every axis that the site changes.
        watches: what was seen of modules while the masked model ran. A module that was not watched takes the edits of
            one that looks alike; the verification has to show that this was right.
    """
    found: list[AnyEdit] = []
    stuck: list[str] = []
    known: dict[Looks, tuple[tuple[Edited, ...], frozenset[int]]] = {}
    for path, parts in holders(model, plan).items():
        heads = head_edits(model, plan, parts)
        found.extend(heads or ())
        if is_narrowable(model.get_submodule(path)):  # nothing else in there holds a size
            stuck.extend(part.site.name for part in parts if heads is None)
            continue
        looks = _looks(model, path, parts)
        alike, left = known.get(looks, ((), frozenset()))
        if path not in watches:
            found.extend(_likewise(model, path, parts, alike, _merged(sizes, parts)))
            stuck.extend(part.site.name for i, part in enumerate(parts) if i in left)
            continue
        so_far = plan.model_copy(update={"edits": tuple(found), "zeroed": tuple(stuck)})
        edits, kept = _most(model, so_far, path, parts, watches[path], sizes, alike)
        if not kept:
            found = [edit for edit in found if edit not in (heads or ())]
        stuck.extend(part.site.name for part in parts if part not in kept)
        own = tuple((e.module[len(path) :], e) for e in edits)
        known[looks] = own, frozenset(i for i, part in enumerate(parts) if part not in kept)
        found.extend(edits)
    return Edits(tuple(found), tuple(stuck))


Sizes = Mapping[str, Mapping[int, frozenset[int]]]
"""Site name -> old size -> new sizes."""


def _merged(sizes: Sizes, parts: Sequence[SitePlan]) -> dict[int, frozenset[int]]:
    merged: dict[int, frozenset[int]] = {}
    for part in parts:
        for old, new in sizes.get(part.site.name, {}).items():
            merged[old] = merged.get(old, frozenset()) | new
    return merged


def _most(
    model: nn.Module,
    plan: Plan,
    path: str,
    parts: list[SitePlan],
    seen: Watch,
    sizes: Sizes,
    known: Sequence[Edited],
) -> tuple[tuple[AnyEdit, ...], list[SitePlan]]:
    """Return edits for all sites of a module, or for as many as can go together, one after the other."""

    def search(kept: list[SitePlan]) -> tuple[AnyEdit, ...] | None:
        rest = tuple(part.site.name for part in parts if part not in kept)
        trial = plan.model_copy(update={"zeroed": (*plan.zeroed, *rest)})
        return _Trial(model, trial, path, kept, seen, _merged(sizes, kept)).search(known)

    edits = search(parts)
    if edits is not None or len(parts) == 1:
        return edits or (), parts if edits is not None else []
    best: tuple[AnyEdit, ...] = ()
    kept: list[SitePlan] = []
    for part in parts:
        more = search([*kept, part])
        if more is not None:
            best, kept = more, [*kept, part]
    return best, kept


def holders(model: nn.Module, plan: Plan) -> dict[str, list[SitePlan]]:
    """Return the modules with a forward that hold a plan's sites, innermost first."""
    by_module: dict[str, list[SitePlan]] = {}
    for part in plan.sites:
        by_module.setdefault(_called(model, part.site.module), []).append(part)
    return dict(sorted(by_module.items(), key=lambda item: -len(item[0].split(".")) if item[0] else 0))


def to_watch(model: nn.Module, plan: Plan, *, thorough: bool) -> tuple[str, ...]:
    """Return which modules to watch: all that hold sites, or one of each look."""
    first: dict[Looks, str] = {}
    every = {p: parts for p, parts in holders(model, plan).items() if not is_narrowable(model.get_submodule(p))}
    for path, parts in every.items():
        first.setdefault(_looks(model, path, parts), path)
    return tuple(every) if thorough else tuple(first.values())


def _looks(model: nn.Module, path: str, parts: Sequence[SitePlan]) -> Looks:
    module = model.get_submodule(path)
    return (type(module), tuple((part.site.kind, part.site.module[len(path) :]) for part in parts))


def _likewise(
    model: nn.Module,
    path: str,
    parts: Sequence[SitePlan],
    known: Sequence[Edited],
    sizes: Mapping[int, frozenset[int]],
) -> list[AnyEdit]:
    """Return the edits of a module that looks like one whose edits are known."""
    edits: list[AnyEdit] = []
    for suffix, edit in known:
        module = f"{path}{suffix}"
        if isinstance(edit, GatherEdit | AttentionEdit):
            part = next(p for p in parts if p.site.units == edit.size)
            edits.append(edit.model_copy(update={"module": module, "keep": part.keep}))
            continue
        owner: Any = model.get_submodule(module)
        old = getattr(owner.config if isinstance(edit, ConfigEdit) else owner, edit.name, None)
        if old is None:
            continue  # looks alike and is not; the verification will say so
        same = {"module": module, "old": old}
        edits.extend(edit.model_copy(update=same | {"new": new}) for new in sorted(sizes.get(old, ()))[:1])
    return edits


def _called(model: nn.Module, path: str) -> str:
    """Return the nearest module at or above a path that has a forward of its own."""
    while path:
        module = model.get_submodule(path)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            return path
        path = path.rpartition(".")[0]
    return path


@contextmanager
def watching(model: nn.Module, watches: Mapping[str, Watch], way: Path) -> Iterator[None]:
    """Record what modules take, return and read, while the model runs along a path."""
    with _recording(model, watches):
        handles = []
        if not way.generate and not way.fused:
            for path, seen in watches.items():
                handles.extend(_record_calls(model.get_submodule(path), seen, way))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _record_calls(module: nn.Module, seen: Watch, way: Path) -> list[Any]:
    pending: list[tuple[Any, Any]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        pending.append(_private((args, kwargs)))

    def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        taken, named = pending.pop()
        if not any(call.path is way for call in seen.calls):  # one call of each path is enough
            results = [t.detach().clone() for t in tensors_of(out)]
            seen.calls.append(Recorded(taken, named, results, way, _implementation(module)))

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _shared_config(module: nn.Module) -> Any:
    """Return the first config that a module or one inside it holds, without overlays."""
    return next((underlying(c) for m in module.modules() if (c := vars(m).get("config")) is not None), None)


def _implementation(module: nn.Module) -> str | None:
    return getattr(_shared_config(module), IMPLEMENTATION_FIELD, None)


def _private(tree: Any) -> Any:
    """Copy a call's arguments: tensors, and objects that a call may change, such as caches."""
    return pytree.tree_map(_copied, tree)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone()
    if leaf is None or isinstance(leaf, KEPT) or hasattr(leaf, "to_dict"):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # noqa: BLE001 - objects refuse copies in any way they like; the call then gets the original
        return leaf


@contextmanager
def _recording(model: nn.Module, watches: Mapping[str, Watch]) -> Iterator[None]:
    """Record the integers that modules read from themselves and from their config, while the context is open."""
    swapped: list[tuple[nn.Module, type]] = []
    configs: list[tuple[nn.Module, Any]] = []
    try:
        for path, seen in watches.items():
            for name, module in model.get_submodule(path).named_modules():
                full = f"{path}.{name}".strip(".") if name else path
                if type(module).__module__.startswith("torch.nn.modules.linear"):
                    continue
                config = vars(module).get("config")
                if config is not None and not isinstance(config, dict | str | int):
                    configs.append((module, config))
                    module.config = _reader(config, functools.partial(_note_config, seen, full))
                swapped.append((module, type(module)))
                _swap(module, lambda n, v, full=full, seen=seen: seen.read.setdefault(("attribute", full, n), v))
        yield
    finally:
        for module, kind in reversed(swapped):  # nested modules are watched twice
            module.__class__ = kind
        for module, config in reversed(configs):
            module.config = config


def _swap(module: nn.Module, note: Any) -> None:
    """Give one module a class that reports the integers read from its instance."""
    kind = type(module)

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if type(value) is int and name in object.__getattribute__(self, "__dict__"):
            note(name, value)
        return value

    module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def _note_config(seen: Watch, module: str, name: str, value: Any) -> None:
    if name == IMPLEMENTATION_FIELD:
        if module not in seen.attention:
            seen.attention.append(module)
    else:
        seen.read.setdefault(("config", module, name), value)


def _reader(config: Any, note: Any) -> Any:
    """Return a view of a config that reports the integers read from it."""
    from fxslim.overlay import _OWN, overlay

    view = overlay(config, {})
    kind: Any = type(view)

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if (type(value) is int and name not in _OWN) or name == IMPLEMENTATION_FIELD:
            note(name, value)
        return value

    object.__setattr__(view, "__class__", type(kind.__name__, (kind,), {"__getattribute__": read}))
    return view


class _Trial:
    """Tries edits on a narrowed copy of one module."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        path: str,
        parts: Sequence[SitePlan],
        seen: Watch,
        sizes: Mapping[int, frozenset[int]],
    ) -> None:
        self.path = path
        self.seen = seen
        self.candidates = [*_integers(seen, sizes), *_gathers(model.get_submodule(path), path, parts, seen)]
        self.narrowed = _narrowed_part(model, plan, path, parts)

    def search(self, known: Sequence[Edited]) -> tuple[AnyEdit, ...] | None:
        """Return the smallest set of edits under which the module computes what the masked one does."""
        keys = {(edit.edit, suffix, edit.name) for suffix, edit in known}
        tried = [edit for edit in self.candidates if (edit.edit, edit.module[len(self.path) :], edit.name) in keys]
        order: list[tuple[AnyEdit, ...]] = [tuple(tried)] if tried else []
        for count in range(min(MOST, len(self.candidates)) + 1):
            for chosen in itertools.combinations(self.candidates, count):
                if len({(e.edit, e.module, e.name) for e in chosen}) == count:
                    order.append(chosen)
        return next((edits for edits in order[:TRIES] if self._passes(edits)), None)

    def _passes(self, edits: Sequence[AnyEdit]) -> bool:
        if not self.seen.calls:
            return not edits  # never called on its own; the whole model decides
        undo: list[Callable[[], Any]] = []
        try:
            for edit in edits:
                undo.append(_restorer(self._holder(edit), edit))
                apply_edit(self._holder(edit), edit.model_copy(update={"module": ""}))
            return all(self._call(call) for call in self.seen.calls)
        finally:
            for restore in reversed(undo):
                restore()

    def _holder(self, edit: AnyEdit) -> nn.Module:
        return self.narrowed.get_submodule(edit.module[len(self.path) :].strip("."))

    def _call(self, call: Recorded) -> bool:
        args, kwargs = _private((call.args, call.kwargs))
        try:
            with torch.no_grad(), call.path.mode(self.narrowed), _attention_of(self.narrowed, call.attention):
                out = tensors_of(self.narrowed(*args, **kwargs))
        except Exception:  # noqa: BLE001 - a wrong integer shows as any error
            return False
        mine = [t for t, want in zip(out, call.out, strict=False) if t.shape == want.shape]
        if len(out) != len(call.out) or not mine or out[0].shape != call.out[0].shape:
            return False
        want = [want for t, want in zip(out, call.out, strict=True) if t.shape == want.shape]
        worst, scale = distance(want, mine)
        close = max((CLOSE.get(t.dtype, 1e-3) for t in want), default=1e-3)
        return worst <= close * max(scale, 1e-12)


@contextmanager
def _attention_of(module: nn.Module, implementation: str | None) -> Iterator[None]:
    inner = _shared_config(module)
    if implementation is None or inner is None:
        yield
        return
    before = inner._attn_implementation
    inner._attn_implementation = implementation
    try:
        yield
    finally:
        inner._attn_implementation = before


def _restorer(holder: nn.Module, edit: AnyEdit) -> Callable[[], Any]:
    """Return what undoes an edit."""
    if isinstance(edit, GatherEdit):
        tables: list[Any] = [holder._forward_pre_hooks, holder._forward_pre_hooks_with_kwargs]
        before = [dict(table) for table in tables]

        def restore() -> None:
            for table, entries in zip(tables, before, strict=True):
                table.clear()
                table.update(entries)

        return restore
    name = edit.name if isinstance(edit, AttributeEdit) else "config"
    value = getattr(holder, name)
    return lambda: setattr(holder, name, value)


def _integers(seen: Watch, sizes: Mapping[int, frozenset[int]]) -> list[AnyEdit]:
    """Return every integer that was read and equals a size that changed, with its possible new values."""
    made: list[AnyEdit] = []
    for (kind, module, name), value in seen.read.items():
        for new in sorted(sizes.get(value, frozenset())):
            made_kind = AttributeEdit if kind == "attribute" else ConfigEdit
            made.append(made_kind(module=module, name=name, old=value, new=new))
    return made


def _gathers(module: nn.Module, path: str, parts: Sequence[SitePlan], seen: Watch) -> list[AnyEdit]:
    """Return every per-head tensor that the module takes, and every attention function that may be given one."""
    names, _, _ = forward_parameters(module)
    made: dict[tuple[Any, ...], AnyEdit] = {}
    for part in parts:
        units = part.site.units
        for call in seen.calls if part.site.kind == "attention" else ():
            given = dict(zip(names, call.args, strict=False)) | call.kwargs
            tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and k in names}
            rows = next((len(t) for t in tensors.values() if t.ndim >= 2), 0)
            for name, tensor in tensors.items():
                for axis, size in enumerate(tensor.shape):
                    runs = axis == 0 and size == rows * units and size != units
                    if (size == units and axis < max(tensor.ndim - 1, 1)) or runs:
                        edit = GatherEdit(module=path, name=name, axis=axis, size=units, keep=part.keep, runs=runs)
                        made.setdefault((name, axis, runs, units), edit)
        for reader in seen.attention:
            made.setdefault((reader, units), AttentionEdit(module=reader, size=units, keep=part.keep))
    return list(made.values())


def _narrowed_part(model: nn.Module, plan: Plan, path: str, parts: Sequence[SitePlan]) -> nn.Module:
    """Return a copy of one module, narrowed at its own sites and at those that lie inside it."""
    prefix = f"{path}." if path else ""
    own = []
    for part in plan.sites:
        if (
            part not in parts
            and part.site.name not in plan.zeroed
            and not all(piece.tensor.startswith(prefix) for piece in part.site.slices)
        ):
            continue  # it would change the module's results
        slices = tuple(
            piece.model_copy(update={"tensor": piece.tensor[len(prefix) :]})
            for piece in part.site.slices
            if piece.tensor.startswith(prefix)
        )
        folds = tuple(fold for fold in (fold.inside(path) for fold in part.folds) if fold is not None)
        site = part.site.model_copy(update={"slices": slices})
        own.append(part.model_copy(update={"site": site, "folds": folds}))
    edits = tuple(
        edit.model_copy(update={"module": edit.module[len(prefix) :]})
        for edit in plan.edits
        if f"{edit.module}.".startswith(prefix)
    )
    inner = plan.model_copy(update={"sites": tuple(own), "edits": edits})
    return narrowed_copy(_shell(model.get_submodule(path)), inner)


def _shell(module: nn.Module) -> nn.Module:
    """Copy a module that shares its tensors with the original; hooks stay behind."""
    shell = share(module)
    for child in shell.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
    return shell
