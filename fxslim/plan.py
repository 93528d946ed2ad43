"""Sites and plans: what can be narrowed, and what is to be. Data only: frozen, JSON, no tensors, no graph nodes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fxslim.errors import PlanError
from fxslim.tables import Shown, Table

MAX_UNITS = 1 << 22
MAX_JSON = 1 << 26
"""Longest plan that is read, in bytes: three times that of half the channels of 32 layers of 8 experts of 14336."""
MAX_FIELDS = 1 << 10
"""Most fields of one object of a plan."""

MAX_ROWS = 1 << 24
"""Most rows of one dimension of a tensor, those of all experts together."""
MAX_TOTAL = 1 << 28
"""Most rows and units of all sites together: what a plan is checked with is never larger than these say."""
MAX_RANK = 64

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Rows = Annotated[int, Field(ge=0, le=MAX_ROWS)]
Dim = Annotated[int, Field(ge=0, lt=MAX_RANK)]
Whole = Annotated[int, Field(ge=1, le=1 << 40)]
Attribute = Annotated[str, Field(max_length=256, pattern=r"^_?[A-Za-z][A-Za-z0-9_]*$")]
FieldPath = Annotated[str, Field(max_length=1024, pattern=r"^_?[A-Za-z][A-Za-z0-9_]*(\._?[A-Za-z][A-Za-z0-9_]*)*$")]
Name = Annotated[str, Field(max_length=1024, pattern=r"^[^/\\\x00]*$")]


Entry = TypeVar("Entry")
Many = Annotated[tuple[Entry, ...], Field(fail_fast=True)]
"""A sequence of which the first fault is told: millions of them would take minutes to collect."""


def _few(data: Any) -> Any:
    """Refuse an object with more fields than any has, before a fault is found in each of them."""
    if isinstance(data, dict) and len(data) > MAX_FIELDS:
        raise ValueError(f"an object has {len(data)} fields; {MAX_FIELDS} are the most")
    return data


Few = BeforeValidator(_few)


class Frozen(BaseModel):
    """A record that never changes and takes nothing it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        return _few(data)


class Block(Frozen):
    """Rows of consecutive owners, evenly spaced.

    Owner ``first + i`` (``0 <= i < count``) owns rows ``start + i * step`` up to ``start + i * step + width``.
    """

    first: Count
    count: Count
    start: Count
    step: Count
    width: Count

    @property
    def end(self) -> int:
        """Return the number after its last row."""
        return self.start + max(self.count - 1, 0) * self.step + self.width

    @model_validator(mode="after")
    def _sound(self) -> Block:
        if self.count > 1 and self.step < self.width:
            raise ValueError("two owners of a block would share rows")
        return self


class Slice(Frozen):
    """One dimension of one tensor that follows the units of a site.

    Attributes:
        tensor: canonical name of the parameter or buffer.
        dim: the dimension.
        size: its size before narrowing.
        role: ``in`` where the dimension is summed over (the consumer, where masks sit), ``out`` elsewhere.
        blocks: which rows belong to which owner; rows in no block stay.
        groups: unit -> owner. None where the owners are the units themselves; otherwise an owner's rows go when all
            units of the group are gone (keys and values shared by several query heads).
        hook: path of the module whose (first) input is this dimension, where masking that input masks the site; None
            where only the tensor itself can be masked.
        direct: whether products read the tensor itself, at most moved or cast; where they read something computed from
            it, zeros in the tensor say nothing.
        lead: the dimension that counts experts, where each of them has rows of its own; blocks are about the rows of
            all experts, one expert after the other.
        experts: how many experts there are; 1 where rows are the same everywhere.
    """

    tensor: Name
    dim: Dim
    size: Rows
    role: Literal["in", "out"]
    blocks: Many[Block]
    groups: Many[Count] | None = None
    hook: Name | None = None
    direct: bool = True
    lead: Dim | None = None
    experts: Annotated[int, Field(ge=1, le=MAX_UNITS)] = 1

    @model_validator(mode="after")
    def _sound(self) -> Slice:
        if self.rows > MAX_ROWS:
            raise ValueError(f"{self.tensor} would have {self.rows} rows; {MAX_ROWS} are the most")
        if self.lead == self.dim:
            raise ValueError(f"dimension {self.dim} of {self.tensor} cannot count experts and their rows")
        if any(after.start < before.end for before, after in zip(self.blocks, self.blocks[1:], strict=False)):
            raise ValueError(f"blocks of {self.tensor} must not overlap, and must be in order")
        return self

    @property
    def rows(self) -> int:
        """Return the number of rows, those of all experts."""
        return self.size * self.experts

    def owners(self) -> np.ndarray:
        """Return the owner of every row, -1 where a row stays.  (rows,)"""
        owner = np.full(self.rows, -1, dtype=np.int64)
        for block in self.blocks:
            numbers = np.arange(block.count)
            rows = block.start + numbers[:, None] * block.step + np.arange(block.width)
            owner[rows] = block.first + numbers[:, None]
        return owner

    def per_expert(self, rows: np.ndarray) -> np.ndarray:
        """Return something about rows with an axis for the experts, where there are any.  (rows,) -> (experts, size)"""
        return rows if self.lead is None else rows.reshape(self.experts, self.size)

    def removed(self, gone: np.ndarray) -> np.ndarray:
        """Return which rows go when these units go.  (units,) bool -> (rows,) bool"""
        if self.groups is not None:
            groups = np.asarray(self.groups)
            alive = np.zeros(int(groups.max()) + 1, dtype=bool)
            np.logical_or.at(alive, groups, ~gone)
            gone = ~alive
        owner = self.owners()
        return np.where(owner >= 0, gone[np.maximum(owner, 0)], False)


def blocks_of(owner: np.ndarray) -> tuple[Block, ...]:
    """Compress the owner of every row (-1: stays) into blocks.  (size,) -> blocks"""
    if not len(owner):
        return ()
    edges = np.flatnonzero(np.diff(owner)) + 1
    starts = np.concatenate([[0], edges])
    widths = np.diff(np.concatenate([starts, [len(owner)]]))
    owned = owner[starts] >= 0
    starts, widths, who = starts[owned], widths[owned], owner[starts[owned]]
    if not len(who):
        return ()
    steps = np.diff(starts)
    follows = (np.diff(who) == 1) & (np.diff(widths) == 0)
    blocks: list[Block] = []
    first = 0
    while first < len(who):
        last = first
        if first < len(follows) and follows[first]:
            same = follows[first:] & (steps[first:] == steps[first])
            last = first + (int(np.argmin(same)) if not same.all() else len(same))
        count, step = last - first + 1, int(steps[first]) if last > first else 0
        blocks.append(Block(first=int(who[first]), count=count, start=int(starts[first]), step=step,
                            width=int(widths[first])))  # fmt: skip
        first = last + 1
    return tuple(blocks)


Kind = Literal["ffn", "gated_ffn", "attention", "experts", "generic"]


class Site(Frozen):
    """One place that can be narrowed.

    Attributes:
        name: unique name, ``<module>:<kind>``.
        kind: what the patterns call it; ``generic`` where no pattern names it.
        module: deepest module that holds all its tensors.
        units: how many units (channels, query heads).
        groups: unit -> group; None where any units may go. Otherwise the same number must stay in every group that
            stays (query heads of one key/value head).
        slices: every tensor dimension that follows the units.
        roles: role -> weight tensors, as the pattern names them.
        task_head: whether it lies behind the last repeated block.
        multiple: the number of units whose rows are left (in every group, where all groups stay) has to be a multiple
            of this: kernels want aligned strides.
        groups_stay: whether no group may go as a whole (channels of an expert, experts that are routed in groups, value
            channels of a head whose weights are read elsewhere).
        least: how many units have to stay (in every group, where there are groups).
    """

    name: Name
    kind: Kind
    module: Name
    units: Annotated[int, Field(ge=2, le=MAX_UNITS)]
    groups: Many[Count] | None = None
    slices: Many[Slice]
    roles: Annotated[dict[str, Many[Name]], Few] = Field(default_factory=dict)
    task_head: bool = False
    multiple: Annotated[int, Field(ge=1, le=MAX_UNITS)] = 1
    groups_stay: bool = False
    least: Annotated[int, Field(ge=1, le=MAX_UNITS)] = 1

    @model_validator(mode="after")
    def _sound(self) -> Site:
        if self.groups is not None and len(self.groups) != self.units:
            raise ValueError(f"site {self.name}: groups names {len(self.groups)} units, the site has {self.units}")
        if self.groups is not None and max(self.groups) >= self.units:
            raise ValueError(f"site {self.name}: there are at most as many groups as units")
        for part in self.slices:
            if part.groups is not None and len(part.groups) != self.units:
                raise ValueError(f"site {self.name}: slice {part.tensor} groups {len(part.groups)} units")
            if part.groups is not None and max(part.groups) >= self.units:
                raise ValueError(f"site {self.name}: slice {part.tensor} has more owners than the site has units")
            owners = self.units if part.groups is None else max(part.groups) + 1
            for block in part.blocks:
                if block.first + block.count > owners or block.end > part.rows:
                    raise ValueError(f"site {self.name}: a block of {part.tensor} lies outside the tensor or the units")
        return self

    @property
    def of_values(self) -> bool:
        """Tell whether the units are value channels of an attention, not heads."""
        return self.kind == "generic" and self.roles.keys() == {"v", "out"}

    @property
    def group_count(self) -> int:
        """Return the number of groups (key/value heads); one per unit where units are free."""
        return self.units if self.groups is None else max(self.groups) + 1

    def modules(self) -> tuple[str, ...]:
        """Return the paths of the modules that own its tensors."""
        return tuple(dict.fromkeys(part.tensor.rpartition(".")[0] for part in self.slices))


def units_by_group(site: Site) -> list[np.ndarray]:
    """Return the units of every group, or all of them where there are no groups."""
    if site.groups is None:
        return [np.arange(site.units)]
    groups = np.asarray(site.groups)
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1])


class Fold(Frozen):
    """Constants that a consumer's bias takes up: ``bias + weight[:, rows] @ values``, over the dense weight.

    The numbers are part of the plan, because finding them takes a trace, and a plan is replayed where there is none.

    Attributes:
        tensor: canonical name of the consumer's weight; one of its site's slices.
        dim: the dimension that is summed over.
        bias: canonical name of the bias, as long as the weight's outputs.
        rows: rows of the dimension that go, ascending.
        values: what the consumer's input holds there, whatever the model's input is.
    """

    tensor: Name
    dim: Count
    bias: Name
    rows: Many[Count]
    values: Many[Annotated[float, Field(allow_inf_nan=False)]]

    def inside(self, path: str) -> Fold | None:
        """Return it for a module by itself, or None where that does not hold the bias."""
        prefix = f"{path}." if path else ""
        if not (self.tensor.startswith(prefix) and self.bias.startswith(prefix)):
            return None
        names = {"tensor": self.tensor[len(prefix) :], "bias": self.bias[len(prefix) :]}
        return self.model_copy(update=names)


class SitePlan(Frozen):
    """A site and the units of it that are kept.

    Attributes:
        site: the site.
        keep: units that are kept, in ascending order.
        folds: constants of units that go; they are masked at these values, and without one at zero.
        stay: units that go, but whose rows stay in the tensors, with zero columns, to fill up a site's multiple.
    """

    site: Site
    keep: Many[Count]
    folds: Many[Fold] = ()
    stay: Many[Count] = ()

    @model_validator(mode="after")
    def _sound(self) -> SitePlan:
        name = self.site.name
        if not self.keep:
            raise ValueError(f"site {name}: at least one unit stays")
        for which, units in (("keep", self.keep), ("stay", self.stay)):
            if list(units) != sorted(set(units)) or max(units, default=0) >= self.site.units:
                raise ValueError(f"site {name}: {which} must be ascending unit numbers below {self.site.units}")
        if set(self.keep) & set(self.stay):
            raise ValueError(f"site {name}: a unit is kept, or its rows stay with zero columns, not both")
        each = len(self.left) if self.site.groups is None else len(self.left) // self.site.group_count
        if self.site.least > 1 and each < self.site.least:
            where = "" if self.site.groups is None else " of every group"
            raise ValueError(f"site {name}: at least {self.site.least} units{where} have to stay")
        if self.site.groups is not None:
            groups = np.asarray(self.site.groups)[list(self.left)]
            counts = np.bincount(groups, minlength=self.site.group_count)
            if self.site.groups_stay and not counts.all():
                raise ValueError(f"site {name}: no group may go as a whole")
            if len(set(counts[counts > 0].tolist())) > 1:
                raise ValueError(f"site {name}: every group that stays must keep the same number of units")
        return self

    def folds_fit(self) -> bool:
        """Tell whether its folds are about rows that go, each row once in a bias."""
        gone: dict[tuple[str, int], np.ndarray] = {}
        for piece in self.site.slices if self.folds else ():
            if piece.role == "in":
                removed = piece.removed(self.gone)
                before = gone.get((piece.tensor, piece.dim), np.zeros_like(removed))
                if before.shape != removed.shape:
                    return False
                gone[piece.tensor, piece.dim] = before | removed
        for fold in self.folds:
            own = gone.get((fold.tensor, fold.dim), np.zeros(0, dtype=bool))
            rows = np.asarray(fold.rows, dtype=np.int64)
            if len(rows) != len(fold.values) or len(np.unique(rows)) != len(rows):
                return False
            if (rows >= len(own)).any() or not own[rows].all():
                return False
        return True

    @property
    def gone(self) -> np.ndarray:
        """Return which units go: what masks take.  (units,) bool"""
        gone = np.ones(self.site.units, dtype=bool)
        gone[list(self.keep)] = False
        return gone

    @property
    def left(self) -> tuple[int, ...]:
        """Return the units whose rows are left in the tensors, in ascending order."""
        return tuple(sorted((*self.keep, *self.stay))) if self.stay else self.keep

    @property
    def taken(self) -> np.ndarray:
        """Return the units whose rows are taken out of the tensors.  (units,) bool"""
        taken = np.ones(self.site.units, dtype=bool)
        taken[list(self.left)] = False
        return taken


class SizeEdit(Frozen):
    """An integer that becomes smaller."""

    module: Name
    name: Attribute
    old: Whole
    new: Whole

    @model_validator(mode="after")
    def _sound(self) -> SizeEdit:
        if self.new > self.old:
            raise ValueError(f"{self.name} would grow from {self.old} to {self.new}")
        return self


class AttributeEdit(SizeEdit):
    """An integer attribute of a module that follows the narrowed sizes."""

    edit: Literal["attribute"] = "attribute"


class ConfigEdit(SizeEdit):
    """A config field that one module reads at run time, overlaid for that module alone."""

    edit: Literal["config"] = "config"


class GatherEdit(Frozen):
    """A tensor that a module takes and of which it needs some heads only: gathered before each call.

    Attributes:
        module: the module that takes it.
        name: the parameter of the module's ``forward``.
        axis: the axis that holds the heads.
        size: number of heads before; an axis of any other size is left alone.
        keep: the heads that are kept.
        rank: number of axes of the tensor that was seen; tensors of any other rank are left alone.
        runs: whether the axis holds batch times heads, every run of ``size`` one batch row.
    """

    edit: Literal["gather"] = "gather"
    module: Name
    name: Attribute
    axis: Dim
    size: Count
    keep: Many[Count]
    rank: Dim
    runs: bool = False


class AttentionEdit(Frozen):
    """A module whose attention function gets per-head tensors (biases, masks) of all heads: gathered just before it.

    Attributes:
        module: the module, which reads its attention implementation from its config.
        name: the config field that it reads.
        size: number of heads before.
        keep: the heads that are kept.
    """

    edit: Literal["attention"] = "attention"
    module: Name
    name: Attribute = "_attn_implementation"
    size: Count
    keep: Many[Count]


class MultiheadEdit(Frozen):
    """An ``nn.MultiheadAttention`` that computes with some of its heads.

    Attributes:
        module: the attention.
        name: the attribute that counts its heads.
        size: number of heads before.
        keep: the heads that are kept.
    """

    edit: Literal["multihead"] = "multihead"
    module: Name
    name: Literal["num_heads"] = "num_heads"
    size: Count
    keep: Many[Count]


class SpreadEdit(Frozen):
    """A linear that is narrowed by itself, while what reads or feeds it keeps the dense width.

    Attributes:
        module: the linear.
        name: ``output`` where zeros are put in the places of channels that it does not compute any more, ``input``
            where it takes the kept channels of what it is given.
        size: the width around it.
        keep: the channels that are kept.
    """

    edit: Literal["spread"] = "spread"
    module: Name
    name: Literal["input", "output"]
    size: Count
    keep: Many[Count]


AnyEdit = AttributeEdit | ConfigEdit | GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit
Edit = Annotated[AnyEdit, Field(discriminator="edit")]


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
                "edits": _chained(self.edits, other.edits),
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


def removed_rows(parts: Iterable[SitePlan]) -> dict[tuple[str, int], np.ndarray]:
    """Return which rows of which tensor dimension site plans take out; see `Plan.removed_rows`."""
    rows: dict[tuple[str, int], np.ndarray] = {}
    for part in parts:
        for piece in part.site.slices:
            removed = piece.per_expert(piece.removed(part.taken))
            key = (piece.tensor, piece.dim)
            if key in rows and rows[key].shape[-1] != removed.shape[-1]:
                raise PlanError(f"two slices of {piece.tensor} disagree about its size")
            rows[key] = rows[key] | removed if key in rows else removed
    return rows


def leads(parts: Iterable[SitePlan]) -> dict[tuple[str, int], int]:
    """Return which dimension counts the experts, where rows differ between them.  (tensor, dim) -> dimension"""
    slices = (piece for part in parts for piece in part.site.slices)
    return {(piece.tensor, piece.dim): piece.lead for piece in slices if piece.lead is not None}


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


def _chained(first: tuple[AnyEdit, ...], second: tuple[AnyEdit, ...]) -> tuple[AnyEdit, ...]:
    """Return edits that do the first ones and then the second ones."""
    made = {(edit.edit, edit.module, edit.name): edit for edit in first}
    for edit in second:
        key = (edit.edit, edit.module, edit.name)
        before = made.get(key)
        if before is None:
            made[key] = edit
        elif isinstance(edit, GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit):
            assert isinstance(before, GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit)
            keep = tuple(before.keep[head] for head in edit.keep)
            made[key] = before.model_copy(update={"keep": keep})
        else:
            made[key] = before.model_copy(update={"new": edit.new})
    return tuple(made.values())
