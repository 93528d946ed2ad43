"""Try edits on a narrowed copy of one module: does it compute what was recorded of the masked one?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxslim.edit import AnyEdit, AttentionEdit, AttributeEdit, ConfigEdit, GatherEdit
from fxslim.passes.narrow import apply_edit, narrowed_copy
from fxslim.passes.paths import tensors_of
from fxslim.passes.verify import distance
from fxslim.passes.watch import Recorded, Watch, private, shared_config
from fxslim.plan import Plan
from fxslim.program import forward_parameters
from fxslim.sharing import share
from fxslim.site import SitePlan

MOST = 4
"""Largest number of integers that are changed together in one module."""
TRIES = 300
"""Largest number of sets of integers that are tried on one module."""
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""A wrong integer shows far above these; the final verification is the exact one."""

Edited = tuple[str, AnyEdit]
"""The module of an edit relative to the one that holds it, and the edit."""


class Trial:
    """Tries edits on a narrowed copy of one module."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        path: str,
        parts: Sequence[SitePlan],
        seen: Watch,
        sizes: Mapping[int, frozenset[int]],
        *,
        whole: bool = True,
    ) -> None:
        """Make a narrowed copy.

        Args:
            model: the dense model.
            plan: what is narrowed, with the edits so far.
            path: the module.
            parts: the sites that it holds and that are narrowed.
            seen: what was recorded of it.
            sizes: old size -> new sizes.
            whole: whether every result counts; if not, the first one does, and what the module hands through. Values of
                removed heads that nobody reads, such as their attention weights, may then be anything.
        """
        self.path = path
        self.whole = whole
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
        found = next((edits for edits in order[:TRIES] if self._passes(edits)), None)
        if found is None and self._passes((), unread=True):
            return ()
        return found

    def _passes(self, edits: Sequence[AnyEdit], *, unread: bool = False) -> bool:
        """Say whether the module computes what it should; its first result may be one that nobody reads."""
        if not self.seen.calls:
            return not edits  # never called on its own; the whole model decides
        undo: list[Callable[[], Any]] = []
        try:
            for edit in edits:
                undo.append(_restorer(self._holder(edit), edit))
                apply_edit(self._holder(edit), edit.model_copy(update={"module": ""}))
            return all(self._call(call, unread=unread) for call in self.seen.calls)
        finally:
            for restore in reversed(undo):
                restore()

    def _holder(self, edit: AnyEdit) -> nn.Module:
        return self.narrowed.get_submodule(edit.module[len(self.path) :].strip("."))

    def _call(self, call: Recorded, *, unread: bool) -> bool:
        args, kwargs = private((call.args, call.kwargs))
        try:
            with torch.no_grad(), call.path.mode(self.narrowed), _attention_of(self.narrowed, call.attention):
                out = tensors_of(self.narrowed(*args, **kwargs))
        except Exception:  # noqa: BLE001 - a wrong integer shows as any error
            return False
        mine = [t for t, want in zip(out, call.out, strict=False) if t.shape == want.shape]
        if len(out) != len(call.out) or not mine:
            return False
        if any(out[i].shape != call.out[i].shape for i in ((0,) if not unread else ()) + tuple(call.through)):
            return False
        want = [want for t, want in zip(out, call.out, strict=True) if t.shape == want.shape]
        if not self.whole:
            pairs = [(out[i], call.out[i]) for i in sorted({0, *call.through})]
            mine, want = [t for t, _ in pairs], [t for _, t in pairs]
        worst, scale = distance(want, mine)
        close = max((CLOSE.get(t.dtype, 1e-3) for t in want), default=1e-3)
        return worst <= close * max(scale, 1e-12)


@contextmanager
def _attention_of(module: nn.Module, implementation: str | None) -> Iterator[None]:
    inner = shared_config(module)
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
                        edit = GatherEdit(module=path, name=name, axis=axis, size=units, keep=part.left,
                                          rank=tensor.ndim, runs=runs)  # fmt: skip
                        made.setdefault((name, axis, runs, units, tensor.ndim), edit)
        for reader in seen.attention:
            made.setdefault((reader, units), AttentionEdit(module=reader, size=units, keep=part.left))
    return list(made.values())


def _narrowed_part(model: nn.Module, plan: Plan, path: str, parts: Sequence[SitePlan]) -> nn.Module:
    """Return a copy of one module, narrowed at its own sites and at those that lie inside it, masked at the others."""
    prefix = f"{path}." if path else ""
    own, stays = [], []
    for part in plan.sites:
        slices = tuple(
            piece.model_copy(update={"tensor": piece.tensor[len(prefix) :]})
            for piece in part.site.slices
            if piece.tensor.startswith(prefix)
        )
        if not slices:
            continue
        partly = part not in parts and len(slices) < len(part.site.slices)
        if partly or part.site.name in plan.zeroed:  # narrowed, it would change the module's results; it is masked
            stays.append(part.site.name)
        folds = tuple(fold for fold in (fold.inside(path) for fold in part.folds) if fold is not None)
        site = part.site.model_copy(update={"slices": slices})
        own.append(part.model_copy(update={"site": site, "folds": folds}))
    edits = tuple(
        edit.model_copy(update={"module": edit.module[len(prefix) :]})
        for edit in plan.edits
        if f"{edit.module}.".startswith(prefix)
    )
    inner = plan.model_copy(update={"sites": tuple(own), "edits": edits, "zeroed": tuple(stays)})
    return narrowed_copy(share(model.get_submodule(path)), inner)
