"""Choose which units go: what does nothing first, then the lowest scores, the same number in every group."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxslim.errors import InputError, RequestError
from fxslim.passes.folding.foldable import Still
from fxslim.plan import Note
from fxslim.site import Fold, Site, SitePlan, Slice, units_by_group

FFN = ("ffn", "gated_ffn")
FRACTIONS = ("ffn", "heads", "kv_groups", "experts", "value")
"""What can be asked for, as fractions of units."""


@dataclass(frozen=True)
class Request:
    """What to take out, as fractions of each site's units.

    Attributes:
        ffn: channels of feed-forward sites.
        heads: query heads of attention sites, equally many per key/value group.
        kv_groups: whole key/value groups of attention sites.
        experts: experts that are routed to, equally many per routing group.
        value: value channels that all heads of an attention share, and those of attentions whose heads do not go,
            equally many per head.
        round_to: the kept number of rows in the consumer is rounded up to a multiple of this.
        include: globs over module paths: only there (task heads only where included).
        skip: globs over module paths: not there.
    """

    ffn: float = 0.0
    heads: float = 0.0
    kv_groups: float = 0.0
    experts: float = 0.0
    value: float = 0.0
    round_to: int = 1
    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in FRACTIONS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RequestError(f"{name}={value!r}: give the fraction to remove, a number from 0 up to 1.")
            if value == 1:
                raise RequestError(f"{name}=1 asks for every unit; at least one has to stay. Ask for less.")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise RequestError(f"round_to={self.round_to!r}: give a whole number of at least 1.")

    @property
    def lossless(self) -> bool:
        """Tell whether nothing was asked for, so that only zeros and constants go."""
        return not any(getattr(self, name) for name in FRACTIONS)

    def asked(self) -> dict[str, float | int | str | tuple[str, ...]]:
        """Return what was asked for, without defaults."""
        values = {name: getattr(self, name) for name in (*FRACTIONS, "include", "skip")}
        asked = {name: value for name, value in values.items() if value}
        return asked | ({"round_to": self.round_to} if self.round_to != 1 else {})


@dataclass(frozen=True)
class Choice:
    """Chosen sites, and what was asked for and not done."""

    sites: tuple[SitePlan, ...]
    notes: tuple[Note, ...]


def choose(
    sites: Sequence[Site],
    tensors: Mapping[str, torch.Tensor],
    request: Request,
    *,
    refused: Sequence[Note] = (),
    constant: Mapping[str, Still] | None = None,
) -> Choice:
    """Choose what goes at every selected site.

    Args:
        sites: every site of the model.
        tensors: canonical tensor name -> tensor.
        request: what was asked for.
        refused: consumers whose channels have to stay, to be named where channels were asked for.
        constant: site name -> which of its units are constant, where any are.

    Raises:
        RequestError: a glob matches nothing.
        InputError: a weight holds NaN.
    """
    selected, notes = select(sites, request)
    plans: list[SitePlan] = []
    taken: dict[tuple[str, int, str], set[int]] = {}
    for site in selected:
        seen = measure(site, tensors)
        if not seen.real:
            notes.append(Note(where=site.name, reason="weights are on meta: units were chosen by number, not by score"))
        own = (constant or {}).get(site.name)
        if own is not None:
            seen = dataclasses.replace(seen, zero=seen.zero | (own.gone if request.lossless else own.zero))
        kind = "zero" if own is None or (own.zero == own.gone).all() else "zero or constant"
        gone, note = _lossless(site, seen.zero, kind) if request.lossless else pick(site, seen, request)
        if own is not None and request.lossless:
            noun = {"attention": "heads", "generic": "units"}.get(site.kind, "channels")
            notes.extend(Note(where=site.name, reason=f"{count} constant {noun} stay: {reason}")
                         for reason, count in own.blocked(seen.zero).items())  # fmt: skip
        if note:
            notes.append(Note(where=site.name, reason=note))
        asked = bool(gone.any())
        gone = rounded(site, gone, seen, request.round_to)
        if asked and not gone.any():
            multiple = math.lcm(request.round_to, site.multiple)
            notes.append(Note(where=site.name, reason=f"rounded up to a multiple of {multiple}, everything stays"))
        if gone.any():
            keep = tuple(int(unit) for unit in np.flatnonzero(~gone))
            folds = own.folding(site, gone) if own is not None and request.lossless else ()
            plans.append(SitePlan(site=site, keep=keep, folds=_once(folds, taken)))
    notes.extend(unmet(selected, request))
    if not request.lossless:
        notes.extend(refused)
    return Choice(tuple(plans), tuple(merged(notes)))


def _once(folds: Iterable[Fold], taken: dict[tuple[str, int, str], set[int]]) -> tuple[Fold, ...]:
    """Leave out the rows that another site has folded: heads and the channels that they share have rows in common."""
    made = []
    for fold in folds:
        before = taken.setdefault((fold.tensor, fold.dim, fold.bias), set())
        rows = {row: value for row, value in zip(fold.rows, fold.values, strict=True) if row not in before}
        before.update(rows)
        if rows:
            made.append(fold.model_copy(update={"rows": tuple(rows), "values": tuple(rows.values())}))
    return tuple(made)


def select(sites: Sequence[Site], request: Request) -> tuple[list[Site], list[Note]]:
    """Return the sites that a request is about."""
    notes: list[Note] = []
    for option in ("include", "skip"):
        for glob in getattr(request, option):
            if not any(_matches(site, glob) for site in sites):
                raise RequestError(
                    f"{option}={glob!r} matches no module with a site; sites are in "
                    f"{', '.join(sorted({site.module or '(root)' for site in sites})[:8]) or 'no module'}…"
                )
    chosen = []
    for site in sites:
        included = any(_matches(site, glob) for glob in request.include)
        if any(_matches(site, glob) for glob in request.skip) or (request.include and not included):
            continue
        if site.task_head and not included:
            if not request.lossless:
                notes.append(
                    Note(where=site.name, reason="a task head behind the last block: left alone unless included")
                )
            continue
        chosen.append(site)
    return chosen, notes


def _matches(site: Site, glob: str) -> bool:
    """A glob names a site by its name, its module, a module that holds it, or any module that it touches."""
    return matches((site.name, site.module, *site.modules()), glob)


def matches(paths: Iterable[str], glob: str) -> bool:
    """Tell whether a glob names one of these paths, or a module that holds one."""
    every = {".".join(parts[:i]) for parts in (path.split(".") for path in paths) for i in range(1, len(parts) + 1)}
    return any(fnmatch.fnmatchcase(path, glob) for path in every)


@dataclass(frozen=True)
class Measured:
    """What the weights say of a site's units.

    Attributes:
        zero: units whose rows are zero in every consumer.  (units,)
        scores: L2 norm over all rows that a unit owns alone.  (units,)
        groups: L2 norm over all rows of a group, those that its units share included.  (groups,)
        real: False where weights are on ``meta``.
    """

    zero: np.ndarray
    scores: np.ndarray
    groups: np.ndarray
    real: bool


def measure(site: Site, tensors: Mapping[str, torch.Tensor]) -> Measured:
    """Measure a site's units by magnitude."""
    of = np.arange(site.units) if site.groups is None else np.asarray(site.groups)
    zero = np.full(site.units, site.kind != "experts")  # an expert that returns zeros still takes its share of the sum
    own, shared = np.zeros(site.units), np.zeros(site.group_count)
    for piece in site.slices:
        tensor = tensors[piece.tensor].detach()
        if tensor.device.type == "meta":
            return Measured(np.zeros(site.units, dtype=bool), np.zeros(site.units), np.zeros(site.group_count), False)
        squares = _squares(piece, tensor)
        owner = piece.owners()
        owned = owner >= 0
        if piece.role == "in":
            alive = np.zeros(site.units if piece.groups is None else max(piece.groups) + 1, dtype=bool)
            np.logical_or.at(alive, owner[owned], _nonzero(tensor, piece, squares)[owned])
            zero &= ~(alive if piece.groups is None else alive[list(piece.groups)])
            zero &= piece.direct
        if piece.groups is None:
            np.add.at(own, owner[owned], squares[owned])
        elif piece.groups == site.groups:
            np.add.at(shared, owner[owned], squares[owned])
    np.add.at(shared, of, own)
    return Measured(zero, np.sqrt(own), np.sqrt(shared), True)


def _squares(piece: Slice, tensor: torch.Tensor) -> np.ndarray:
    """Return the sum of squares of every row.  (rows,)"""
    rest = [other for other in range(tensor.ndim) if other not in (piece.dim, piece.lead)]
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    norms = _norms(tensor, rest, dtype)
    if piece.lead is not None and piece.lead > piece.dim:
        norms = norms.T
    squares: np.ndarray = norms.double().square().cpu().numpy().reshape(-1)
    if not np.isfinite(squares).all():
        bad = "NaN" if np.isnan(squares).any() else "infinite values"
        raise InputError(f"{piece.tensor} holds {bad}; repair the checkpoint before narrowing it.")
    return squares


def _norms(tensor: torch.Tensor, rest: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dim=rest, dtype=dtype) if rest else tensor.to(dtype).abs()


def _nonzero(tensor: torch.Tensor, piece: Slice, squares: np.ndarray) -> np.ndarray:
    """Return which rows hold anything but zeros; tiny values whose squares vanish count.  (rows,) bool"""
    nonzero: np.ndarray = squares > 0
    suspects = np.flatnonzero(~nonzero)
    if len(suspects):
        places = torch.from_numpy(suspects).to(tensor.device)
        if piece.lead is None:
            rows = tensor.index_select(piece.dim, places).movedim(piece.dim, 0)
        else:
            rows = tensor.movedim((piece.lead, piece.dim), (0, 1))[places // piece.size, places % piece.size]
        nonzero[suspects] = (rows.reshape(len(suspects), -1) != 0).any(dim=1).cpu().numpy()
    return nonzero


def _lossless(site: Site, zero: np.ndarray, kind: str) -> tuple[np.ndarray, str]:
    """Take out what does nothing: whole groups first, then as many per group as the group with the fewest has."""
    gone = np.zeros(site.units, dtype=bool)
    if zero.all():
        gone = np.ones(site.units, dtype=bool)
        every = units_by_group(site)
        for members in every if site.groups_stay else every[:1]:
            gone[members if site.groups is not None and not site.groups_stay else members[:1]] = False
        return gone, f"every unit is {kind}; one has to stay"
    if site.groups is None:
        return zero.copy(), ""
    rest = []
    for members in units_by_group(site):
        if zero[members].all() and not site.groups_stay:
            gone[members] = True
        else:
            rest.append(members)
    fewest = min(min(int(zero[members].sum()), len(members) - 1) for members in rest)
    for members in rest:
        gone[members[zero[members]][:fewest]] = True
    left = int((zero & ~gone).sum())
    what, each = ("channels", "head" if site.of_values else "expert") if site.groups_stay else ("heads", "group")
    return gone, f"{left} {kind} {what} stay: every {each} keeps the same number of {what}" if left else ""


def pick(site: Site, seen: Measured, request: Request) -> tuple[np.ndarray, str]:
    """Take out the asked fraction of a site's units, zeros first, then by ascending score; `rounded` comes after.

    Args:
        site: the site.
        seen: what goes first, and the scores of the rest.
        request: the fractions.

    Returns:
        Which units go, (units,) bool, and why nothing does, where something was asked for.
    """
    gone = np.zeros(site.units, dtype=bool)
    zero, scores = seen.zero, seen.scores
    asked = ("ffn", request.ffn) if site.kind in FFN else ("value", request.value) if site.of_values else None
    if site.kind == "experts":
        return _experts(site, seen, request.experts)
    if asked is not None:
        name, fraction = asked
        every = units_by_group(site)
        for own in every:
            gone[_lowest(own, zero, scores)[: count_of(fraction, len(own))]] = True
        short = fraction and not gone.any()
        return gone, f"{name}={fraction} of {len(every[0])} channels is less than one" if short else ""
    if site.kind != "attention":
        return gone, "no pattern names this site, so neither ffn= nor heads= reaches it"
    note = ""
    groups = [np.array([unit]) for unit in range(site.units)] if site.groups is None else units_by_group(site)
    if request.kv_groups:
        dead = np.array([zero[members].all() for members in groups])
        for group in _lowest(np.arange(len(groups)), dead, seen.groups)[: count_of(request.kv_groups, len(groups))]:
            gone[groups[group]] = True
        if not gone.any():
            note = f"kv_groups={request.kv_groups} of {len(groups)} groups is less than one"
    if request.heads:
        before = gone.copy()
        for members in units_by_group(site):
            left = members[~before[members]]
            gone[_lowest(left, zero, scores)[: count_of(request.heads, len(left))]] = True
        if (gone == before).all():
            each = (
                f" per group of {len(units_by_group(site)[0])}"
                if site.groups is not None
                else f" of {site.units} heads"
            )
            note = f"heads={request.heads} is less than one head{each}"
    return gone, note


def _experts(site: Site, seen: Measured, fraction: float) -> tuple[np.ndarray, str]:
    """Take out the asked fraction of the experts of every group, as far as enough are left to select from."""
    gone = np.zeros(site.units, dtype=bool)
    every = units_by_group(site)
    count = min(count_of(fraction, len(every[0])), len(every[0]) - site.least)
    for own in every:
        gone[_lowest(own, seen.zero, seen.scores)[:count]] = True
    each = "" if site.groups is None else " of every group"
    if fraction and count_of(fraction, len(every[0])) > count:
        return gone, f"experts={fraction}: at least {site.least} experts{each} have to stay, as many as are selected"
    return gone, f"experts={fraction} of {len(every[0])} experts is less than one" if fraction and not count else ""


def count_of(fraction: float, units: int) -> int:
    """Return how many of ``units`` a fraction is: rounded down, and at least one stays."""
    return min(part_of(fraction, units), units - 1) if units else 0


def part_of(fraction: float, count: int) -> int:
    """Return how many of a number a fraction is: rounded down, but 0.7 of 10 is 7, and 0.29 of 10⁸ is 29·10⁶."""
    return math.floor(fraction * count + 1e-9 + 1e-12 * count)


def _lowest(units: np.ndarray, zero: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return units in the order in which they go: zeros, then ascending scores, the last number first among equals."""
    return units[np.lexsort((-units, scores[units], ~zero[units]))]


def rounded(site: Site, gone: np.ndarray, seen: Measured, multiple: int) -> np.ndarray:
    """Keep more units until the consumer's kept rows are a multiple, and the site's own is met (or all of them)."""
    if (multiple == 1 and site.multiple == 1) or not gone.any() or site.kind == "experts":
        return gone
    consumer = next(piece for piece in site.slices if piece.role == "in")
    width = int((consumer.owners() == 0).sum()) or 1
    alive = [members for members in units_by_group(site) if not gone[members].all()]
    times = consumer.experts  # sizes are those of one expert
    dropped = [_lowest(members[gone[members]], seen.zero, seen.scores) for members in alive]
    for more in range(max(map(len, dropped)) + 1):
        kept = gone.copy()
        for units in dropped:
            kept[units[max(len(units) - more, 0) :]] = False
        count = int((~kept).sum()) // times
        if (count * width) % multiple == 0 and count % site.multiple == 0:
            break
    return kept


def unmet(sites: Sequence[Site], request: Request) -> Iterable[Note]:
    kinds = {site.kind for site in sites}
    left = " among what include= and skip= leave" if request.include or request.skip else ""
    if request.ffn and not kinds & set(FFN):
        yield Note(where="ffn", reason=f"no feed-forward site was found{left}; fxslim.inspect(model) says why")
    if (request.heads or request.kv_groups) and "attention" not in kinds and not any(site.of_values for site in sites):
        yield Note(where="heads", reason=f"no attention site was found{left}; fxslim.inspect(model) says why")
    if request.experts and "experts" not in kinds:
        yield Note(
            where="experts", reason=f"no experts were found{left or ' that can go'}; fxslim.inspect(model) says why"
        )
    if request.value and not any(site.of_values for site in sites):
        yield Note(where="value", reason="no attention was found whose value channels can go by themselves")


def merged(notes: list[Note]) -> Iterable[Note]:
    """Say the same thing about many sites once."""
    by_reason: dict[str, list[str]] = {}
    for note in notes:
        by_reason.setdefault(note.reason, []).append(note.where)
    for reason, where in by_reason.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        yield Note(where=f"{where[0]}{more}", reason=reason)
