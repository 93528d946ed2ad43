"""Find the integers that a narrowed module still holds: attributes, and config fields that it reads at run time.

Integers are recorded while the module runs; those whose value is a size that changed are candidates; the smallest set
of them that makes the module compute what the masked one does, along every path, is what the plan records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxslim.edit import AnyEdit, AttentionEdit, ConfigEdit, GatherEdit
from fxslim.multihead import is_narrowable
from fxslim.passes.heads import head_edits
from fxslim.passes.spreads import can_spread, spread_edits
from fxslim.passes.trial import Edited, Trial
from fxslim.passes.watch import Watch
from fxslim.plan import Plan
from fxslim.site import SitePlan

Looks = tuple[Any, ...]
"""What modules have in common that need the same edits."""


@dataclass(frozen=True)
class Edits:
    """Edits that were found, sites that are narrowed in their linears alone, and sites for which nothing does."""

    edits: tuple[AnyEdit, ...]
    spread: tuple[str, ...]
    stuck: tuple[str, ...]


def find_edits(
    model: nn.Module,
    plan: Plan,
    sizes: Sizes,
    watches: Mapping[str, Watch],
    *,
    left: frozenset[str] = frozenset(),
    linears: frozenset[str] = frozenset(),
) -> Edits:
    """Find the integer edits that a plan needs.

    Args:
        model: the dense model.
        plan: the plan, without edits.
        sizes: site name -> old size -> new sizes, over every axis that the site changes.
        watches: what was seen of modules while the masked model ran. A module that was not watched takes the edits of
            one that looks alike; the verification has to show that this was right.
        left: names of sites that stay in place: a verification failed there.
        linears: names of sites that are narrowed in their linears, where that can be, and not tried otherwise.
    """
    found: list[AnyEdit] = []
    spread: list[SitePlan] = []
    stuck: list[str] = []
    known: dict[Looks, _Known] = {}

    def so_far(*more: SitePlan, rest: tuple[str, ...] = ()) -> Plan:
        """Return the plan with what was found, some more sites narrowed in their linears, and others left in place."""
        every, zeroed = (*spread, *more), (*stuck, *rest)
        others = tuple(part for part in plan.sites if part not in every)
        narrow = plan.model_copy(update={"sites": others, "zeroed": zeroed})
        edits = (*found, *spread_edits(model, narrow, every))
        names = tuple(part.site.name for part in every)
        return plan.model_copy(update={"edits": edits, "spread": names, "zeroed": zeroed})

    for path, every in holders(model, plan).items():
        named = [part for part in every if part.site.name in linears and can_spread(model, part)]
        spread.extend(named)
        stays = [part for part in every if part.site.name in left | linears and part not in named]
        stuck.extend(part.site.name for part in stays)
        parts = [part for part in every if part not in (*named, *stays)]
        heads = head_edits(model, plan, parts)
        found.extend(heads or ())
        if is_narrowable(model.get_submodule(path)):  # nothing else in there holds a size
            stuck.extend(part.site.name for part in parts if heads is None)
            continue
        looks = _looks(model, path, parts)
        own = known.get(looks, _Known())
        if path not in watches:
            found.extend(_likewise(model, path, parts, own.edits, _merged(sizes, parts)))
            spread.extend(part for i, part in enumerate(parts) if i in own.spread)
            stuck.extend(part.site.name for i, part in enumerate(parts) if i in own.stuck)
            continue
        edits, kept = _most(model, so_far(), path, parts, watches[path], sizes, own.edits)
        if not kept:
            found = [edit for edit in found if edit not in (heads or ())]
        found.extend(edits)
        apart: list[SitePlan] = []
        for part in parts:
            if part not in kept and can_spread(model, part):
                rest = tuple(p.site.name for p in parts if p not in (*kept, *apart, part))
                trial = so_far(*apart, part, rest=rest)
                narrowed = Trial(model, trial, path, [*kept, *apart, part], watches[path], {}, whole=False)
                apart.extend([part] if narrowed.search(()) == () else [])
        spread.extend(apart)
        rest_of = [part for part in parts if part not in (*kept, *apart)]
        stuck.extend(part.site.name for part in rest_of)
        known[looks] = _Known(
            tuple((edit.module[len(path) :], edit) for edit in edits),
            frozenset(parts.index(part) for part in apart),
            frozenset(parts.index(part) for part in rest_of),
        )
    done = so_far()
    return Edits(done.edits, done.spread, tuple(stuck))


@dataclass(frozen=True)
class _Known:
    """What modules of one look need: edits by where they are, and which of their sites are spread or stuck."""

    edits: tuple[Edited, ...] = ()
    spread: frozenset[int] = frozenset()
    stuck: frozenset[int] = frozenset()


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
        return Trial(model, trial, path, kept, seen, _merged(sizes, kept)).search(known)

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
            keeps = [part.left for part in parts if part.site.units == edit.size]
            edits.extend(edit.model_copy(update={"module": module, "keep": keep}) for keep in keeps[:1])
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
