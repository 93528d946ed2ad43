"""Plans: which units of which site are kept. Data only: frozen, JSON, no tensors, no graph nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from fxslim.edit import Edit, SpreadEdit, chained
from fxslim.errors import PlanError
from fxslim.record import Few, FieldPath, Frozen, Many, Name, Whole
from fxslim.site import Fold, SitePlan, Slice, blocks_of, leads, removed_rows
from fxslim.tables import Shown, Table

MAX_JSON = 1 << 26
"""Longest plan that is read, in bytes: three times that of half the channels of 32 layers of 8 experts of 14336."""
MAX_TOTAL = 1 << 28
"""Most rows and units of all sites together: what a plan is checked with is never larger than these say."""


class Note(Frozen):
    """Something that was asked for and not done, or that the user should know: where, and why."""

    where: str
    reason: str


class Fingerprint(Frozen):
    """What a plan needs to know of a model to be refused on another: no values, dtype, device or path.

    Attributes:
        model_class: name of the root class.
        digest: SHA-256 over tensor names, shapes, aliases and the config's size-bearing fields.
    """

    model_class: str
    digest: str


class Plan(Shown, Frozen):
    """Which units of which site are kept, and every edit on modules that this needs.

    Attributes:
        sites: the sites that are narrowed; a site that keeps everything does not appear.
        edits: changes of integers in modules (module form); empty until ``slim`` has found them.
        spread: sites that the module form narrows in their linears alone: no integer says their width, and what lies
            between the linears keeps it, with zeros.
        zeroed: sites that the module form cannot express: units stay in place, their consumer columns are zero.
        requested: what was asked for.
        notes: what was asked for and not done, with its reason.
        weights_changed: whether repaired weights are part of the result; always False without repair.
        config: path of a config field -> its old and its new value, where the narrowed model's config says its sizes.
        tried: whether edits were looked for and verified on layers of a checkpoint, so that none are missing.
    """

    schema_version: Literal[1] = 1
    fxslim: str
    torch: str
    transformers: str | None = None
    fingerprint: Fingerprint
    sites: Many[SitePlan] = ()
    edits: Many[Edit] = ()
    spread: Many[Name] = ()
    zeroed: Many[Name] = ()
    requested: Annotated[dict[str, float | int | str | Many[str]], Few] = Field(default_factory=dict)
    notes: Many[Note] = ()
    weights_changed: bool = False
    config: Annotated[dict[FieldPath, tuple[Whole, Whole]], Few] = Field(default_factory=dict)
    tried: bool = False

    @model_validator(mode="after")
    def _sound(self) -> Plan:
        names = [part.site.name for part in self.sites]
        if len(set(names)) < len(names):
            raise ValueError("a site appears twice")
        total = sum(part.site.units + sum(piece.rows for piece in part.site.slices) for part in self.sites)
        if total > MAX_TOTAL:
            raise ValueError(f"its sites would have {total} rows; {MAX_TOTAL} are the most")
        for part in self.sites:
            if not part.folds_fit():
                where = ", ".join(dict.fromkeys(fold.tensor for fold in part.folds))
                raise ValueError(f"site {part.site.name}: a fold of {where} is not about rows that go")
        return self

    def spent(self) -> Plan:
        """Return the plan as it looks from a model that it was applied to: nothing is left to take out."""
        return self.model_copy(update={"sites": (), "edits": (), "spread": (), "zeroed": (), "config": {}})

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the plan as JSON."""
        return self.model_dump_json(indent=indent)

    @staticmethod
    def from_file(path: str | PathLike[str]) -> Plan:
        """Read a plan from a file; what is too large to be one is not read."""
        file = Path(path)
        try:
            if file.stat().st_size > MAX_JSON:
                raise PlanError(f"{file} has {file.stat().st_size} bytes; plans have at most {MAX_JSON}.")
            return Plan.from_json(file.read_bytes())
        except OSError as error:
            raise PlanError(f"{file} cannot be read: {error.strerror or error}.") from error

    @staticmethod
    def from_json(text: str | bytes | dict[str, Any]) -> Plan:
        """Read a plan; raise PlanError with the place of the first fault."""
        try:
            if not isinstance(text, dict) and len(text) > MAX_JSON:
                raise ValueError(f"it is longer than {MAX_JSON} bytes")
            data = text if isinstance(text, dict) else json.loads(text, parse_constant=_no_number)
            return Plan.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise PlanError(f"not a valid fxslim plan: {place} {first['msg']}".replace(":  ", ": ")) from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a valid fxslim plan: {error}") from error

    def __iter__(self) -> Iterator[SitePlan]:  # type: ignore[override]
        return iter(self.sites)

    def parts(self) -> list[Table | str]:
        """Return what is kept, site by site, and what was not done."""
        rows = [
            (part.site.name, part.site.kind, len(part.keep), part.site.units, f"{len(part.keep) / part.site.units:.0%}")
            for part in self.sites
        ]
        said = [f"note: {note.where}: {note.reason}" for note in self.notes]
        title = f"narrowed: {len(rows)}"
        return [Table(("site", "kind", "kept#", "of#", "#"), rows, title) if rows else "nothing to take out", *said]

    def then(self, other: Plan) -> Plan:
        """Return the plan that does this one and then, on the result, another.

        The composition is in terms of the dense model that this plan was made for. A site that one of the two leaves in
        place, with zero columns, appears once for each.
        """
        narrowed = self.cut()
        rows = removed_rows(narrowed)
        mine = {part.site.name: part for part in self.sites if part.site.name not in (*self.zeroed, *self.spread)}
        sites = {part.site.name: part for part in self.sites}
        zeroed, spread = list(self.zeroed), list(self.spread)
        for part in other.sites:
            name = part.site.name
            before = mine.get(name)
            folds = tuple(_dense_rows(fold, rows.get((fold.tensor, fold.dim))) for fold in part.folds)
            present = () if before is None else _present(before, rows)
            placed = name in (*other.zeroed, *other.spread)
            if before is not None and not placed and len(present) == part.site.units:
                left = {present[unit] for unit in part.left} | _filling(before, present, part)
                kept = {present[unit] for unit in part.keep} | left.difference(present)
                keep = tuple(sorted(kept.difference(before.stay)))
                if keep:
                    stay = tuple(sorted(left.difference(keep)))
                    sites[name] = before.model_copy(
                        update={"keep": keep, "stay": stay, "folds": (*before.folds, *folds)}
                    )
                    continue
            own = next(n for n in (name, *(f"{name}+{i}" for i in range(2, len(sites) + 3))) if n not in sites)
            slices = tuple(_widened(piece, rows, leads(narrowed)) for piece in part.site.slices)
            site = part.site.model_copy(update={"name": own, "slices": slices})
            sites[own] = part.model_copy(update={"site": site, "folds": folds})
            if name in other.zeroed:
                zeroed.append(own)
            if name in other.spread:
                spread.append(own)
        return self.model_copy(
            update={
                "sites": tuple(sites.values()),
                "edits": chained(self.edits, other.edits),
                "spread": tuple(spread),
                "zeroed": tuple(zeroed),
                "requested": {**self.requested, **other.requested},
                "notes": (*self.notes, *other.notes),
                "weights_changed": self.weights_changed or other.weights_changed,
                "config": _joined_fields(self.config, other.config),
                "tried": self.tried and other.tried,
            }
        )

    def cut(self) -> tuple[SitePlan, ...]:
        """Return the sites that lose rows in the module form, each with the slices that do."""
        linears = {(edit.module, edit.name) for edit in self.edits if isinstance(edit, SpreadEdit)}

        def narrowed(piece: Slice) -> bool:
            path, _, leaf = piece.tensor.rpartition(".")
            return (path, f"{piece.role}put") in linears and leaf in ("weight", "bias")

        parts = []
        for part in self.sites:
            if part.site.name in self.spread:
                slices = tuple(piece for piece in part.site.slices if narrowed(piece))
                part = part.model_copy(update={"site": part.site.model_copy(update={"slices": slices})})
            if part.site.name not in self.zeroed:
                parts.append(part)
        return tuple(parts)

    def removed_rows(self) -> dict[tuple[str, int], np.ndarray]:
        """Return which rows of which tensor dimension go.

        (tensor, dim) -> (size,) bool; (experts, size) where they differ between experts.
        """
        return removed_rows(self.sites)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _present(part: SitePlan, rows: Mapping[tuple[str, int], np.ndarray]) -> tuple[int, ...]:
    """Return the units that a narrowed model has: those whose rows are left, of experts that are."""
    for piece in part.site.slices:
        gone = rows.get((piece.tensor, piece.lead)) if piece.lead is not None else None
        if gone is not None and gone.any() and part.site.groups is not None:
            return tuple(unit for unit in part.left if not gone[part.site.groups[unit]])
    return part.left


def _filling(part: SitePlan, present: tuple[int, ...], further: SitePlan) -> set[int]:
    """Return units of experts that are gone: as many of each as are left of the others."""
    if len(present) == len(part.left) or part.site.groups is None:
        return set()
    experts = {part.site.groups[unit] for unit in present}
    count = len(further.left) // len(experts)
    absent: dict[int, list[int]] = {}
    for unit in part.left:
        if part.site.groups[unit] not in experts:
            absent.setdefault(part.site.groups[unit], []).append(unit)
    return {unit for units in absent.values() for unit in units[:count]}


def _widened(piece: Slice, rows: Mapping[tuple[str, int], np.ndarray], lead: Mapping[tuple[str, int], int]) -> Slice:
    """Return a slice of a narrowed tensor in terms of the tensor before."""
    key = (piece.tensor, piece.dim)
    gone = rows.get(key, np.zeros(piece.size, dtype=bool))
    fewer = rows.get((piece.tensor, piece.lead)) if piece.lead is not None else None
    if not gone.any() and (fewer is None or not fewer.any()):
        return piece
    owner = np.full(gone.shape, -1, dtype=np.int64)
    if gone.ndim == 1 and piece.lead is None:
        owner[~gone] = piece.owners()
        return piece.model_copy(update={"size": len(gone), "blocks": blocks_of(owner)})
    experts = len(fewer) if fewer is not None else piece.experts if gone.ndim == 1 else len(gone)
    gone = np.broadcast_to(gone, (experts, gone.shape[-1]))
    own = np.full((experts, piece.size), -1, dtype=np.int64)
    own[slice(None) if fewer is None else ~fewer] = piece.per_expert(piece.owners())
    owner = np.full(gone.shape, -1, dtype=np.int64)
    owner[~gone] = own.reshape(-1)
    update = {"size": gone.shape[-1], "blocks": blocks_of(owner.reshape(-1)), "experts": experts,
              "lead": piece.lead if piece.lead is not None else lead[key]}  # fmt: skip
    return piece.model_copy(update=update)


def _dense_rows(fold: Fold, gone: np.ndarray | None) -> Fold:
    """Return a fold of a narrowed tensor in terms of the tensor before; experts' rows take no folds."""
    if gone is None or gone.ndim > 1 or not gone.any():
        return fold
    kept = np.flatnonzero(~gone)
    return fold.model_copy(update={"rows": tuple(int(kept[row]) for row in fold.rows)})


def _joined_fields(one: dict[str, tuple[int, int]], other: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the fields that two plans change one after the other."""
    found = dict(one)
    for path, (old, new) in other.items():
        found[path] = (one[path][0] if path in one else old, new)
    return found
