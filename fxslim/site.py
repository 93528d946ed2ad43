"""Sites: what can be narrowed, which tensor dimensions follow its units, and which units are kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from fxslim.errors import PlanError
from fxslim.record import MAX_ROWS, MAX_UNITS, Count, Dim, Few, Frozen, Many, Name, Rows


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
