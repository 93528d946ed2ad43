"""What a picture shows, before anybody decides how it looks: sites, what flows between them, and operations.

Plain data: frozen, JSON, no tensors and no graph nodes. Every writer draws this, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxslim.errors import InputError

INPUT = "input"
OUTPUT = "output"
"""Where a model begins and ends, in feeds; no site has such a name."""

STAYS = "stays"
"""Id of the group of everything that has to stay and is no stream that sites share."""


@dataclass(frozen=True)
class Group:
    """Coordinates that belong together, as labels say: what flows along an edge.

    Attributes:
        id: the site's name, the name of a stream, or ``stays``.
        kind: ``site`` for a site's units; ``stream`` for what several sites read and add to (a residual stream);
            ``stays`` for the rest of what has to stay.
        width: how many units, or how wide the stream is; 0 where that says nothing.
        reason: why it stays; empty for sites.
    """

    id: str
    kind: Literal["site", "stream", "stays"]
    width: int
    reason: str = ""


@dataclass(frozen=True)
class Rows:
    """One dimension of a tensor that follows a site's units."""

    tensor: str
    dim: int
    size: int
    left: int
    role: str


@dataclass(frozen=True)
class Box:
    """A site.

    Attributes:
        name: its name.
        kind: its kind.
        module: deepest module that holds its tensors.
        unit: what its units are: ``heads``, ``channels``, ``experts``.
        units: how many there are.
        kept: how many are kept; all of them where nothing was taken out.
        keep: runs of units that are kept, (first, count) each.
        groups: number of groups with a count of their own (key/value heads); 0 where any units may go.
        roles: role -> weights.
        rows: what follows the units.
        ops: numbers of the operations that it flows through, those that make it and those that sum it up.
        note: how it was narrowed, where that is not the plain way; whether it is a task head.
        damage: what taking units out was expected to cost the output; None where nothing was measured.
    """

    name: str
    kind: str
    module: str
    unit: str
    units: int
    kept: int
    keep: tuple[tuple[int, int], ...]
    groups: int = 0
    roles: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rows: tuple[Rows, ...] = ()
    ops: tuple[int, ...] = ()
    note: str = ""
    damage: float | None = None

    @property
    def ratio(self) -> float:
        """Return which part is kept."""
        return self.kept / self.units


@dataclass(frozen=True)
class Feed:
    """One site's output reaches another's input without passing a third.

    Attributes:
        source: a site, or ``input``.
        target: a site, or ``output``.
        group: the stream that carries it; empty where it is not known.
        certain: False where only the order is known (a plan by itself does not say what feeds what).
    """

    source: str
    target: str
    group: str = ""
    certain: bool = True


@dataclass(frozen=True)
class Op:
    """One operation of the graph.

    Attributes:
        name: the node's name.
        op: the operation's name (``aten.linear``), or ``input`` or ``output``.
        module: path of the module that it came from.
        inputs: numbers of the operations whose results it reads.
        shape: its result's shape; B and S are open sizes.
        dtype: its result's dtype.
        after: the shape after narrowing, where that differs.
        ratio: which part of the result is left.
        tensors: names of the tensors that it reads.
        roles: (site, role) of what it plays in a pattern.
        pinned: why something was decided to stay here.
        groups: ids of the groups that its result carries.
    """

    name: str
    op: str
    module: str
    inputs: tuple[int, ...]
    shape: str
    dtype: str
    after: str = ""
    ratio: float = 1.0
    tensors: tuple[str, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    pinned: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stay:
    """What stays, or what the reader should know: where, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Total:
    """A size of the whole model."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Picture:
    """A model's sites, what flows between them, and its operations.

    Attributes:
        title: the model's class.
        sites: in the order of execution.
        feeds: which site's output reaches which.
        groups: what flows along edges.
        modules: path -> class of every module that an operation came from; the class is empty where it is not known.
        ops: operations in the order of the graph; empty where there is no graph (a plan by itself).
        stays: what cannot be narrowed, or was not, with the reason.
        notes: what the reader should know.
        totals: sizes of the whole model before and after.
        narrowed: whether something was taken out: then there is a before and an after.
    """

    title: str
    sites: tuple[Box, ...] = ()
    feeds: tuple[Feed, ...] = ()
    groups: tuple[Group, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    ops: tuple[Op, ...] = ()
    stays: tuple[Stay, ...] = ()
    notes: tuple[Stay, ...] = ()
    totals: tuple[Total, ...] = ()
    narrowed: bool = False

    def site(self, name: str) -> Box:
        """Return a site by name.

        Raises:
            InputError: there is none of that name.
        """
        for box in self.sites:
            if box.name == name:
                return box
        some = ", ".join(box.name for box in self.sites[:3])
        raise InputError(f"no site is called {name!r}; there are {len(self.sites)}: {some}, …")

    def scale(self, box: Box) -> float:
        """Return how wide a site's box is, of the widest one of the same kind of units (1.0)."""
        return box.units / max(other.units for other in self.sites if other.unit == box.unit)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Compress ascending numbers into (first, count)."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def parents(paths: Iterable[str]) -> dict[str, str]:
    """Nest what things are in: the module paths that hold several of these paths, each below the nearest one above.

    Args:
        paths: one module path for every thing that is drawn, repetitions included.

    Returns:
        Path -> the path around it (``""`` for none). Modules that hold no more than one of the modules below, and
        nothing themselves, are left out.
    """
    own = list(paths)
    inside: dict[str, set[str]] = {}
    for number, path in enumerate(own):
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            below = parts[end] if end < len(parts) else f"={number}"
            inside.setdefault(".".join(parts[:end]), set()).add(below)
    kept = {path for path, below in inside.items() if len(below) > 1}
    return {path: around(path.rpartition(".")[0], kept) for path in sorted(kept)}


def around(path: str, kept: Iterable[str]) -> str:
    """Return the nearest of the kept paths at or above a path."""
    while path and path not in kept:
        path = path.rpartition(".")[0]
    return path
