"""New arguments for the operations that carry sizes, after a cut."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxslim.errors import NarrowError
from fxslim.labels import Value
from fxslim.passes.annotate import operation
from fxslim.passes.cut import Cut
from fxslim.passes.rules import counted
from fxslim.passes.rules.indexing import scattered
from fxslim.passes.rules.movement import CREATIONS, MOVES, anyhow
from fxslim.passes.rules.pointwise import joins
from fxslim.passes.rules.walk import concrete, parameter
from fxslim.program import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Scaled:
    """A size that shrinks with a cut: ``old * kept // total``."""

    old: Any
    kept: int
    total: int


@dataclass(frozen=True)
class Call:
    """An operation with new arguments; sizes may be ``Scaled``."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, tensor: torch.Tensor) -> Any:
        """Run on a concrete tensor in the place of the first argument."""
        args = tuple(_number(argument) for argument in self.args[1:])
        kwargs = {name: _number(argument) for name, argument in self.kwargs.items()}
        return anyhow(self.target)(tensor, *args, **kwargs)


def _number(argument: Any) -> Any:
    if isinstance(argument, Scaled):
        return concrete(argument.old) * argument.kept // argument.total
    if isinstance(argument, tuple | list):
        return [_number(item) for item in argument]
    return concrete(argument)


Resize = Callable[[fx.Node, Cut], Call]
RESIZES: dict[str, Resize] = {}


def _for(*names: str) -> Callable[[Resize], Resize]:
    def register(function: Resize) -> Resize:
        for name in names:
            RESIZES[name] = function
        return function

    return register


def resized(node: fx.Node, cut: Cut) -> Call:
    """Return a node's call after a cut.

    Raises:
        NarrowError: the operation cannot be rewritten for this cut.
    """
    handler = RESIZES.get(operation(node))
    return handler(node, cut) if handler is not None else Call(node.target, node.args, dict(node.kwargs))


def _scaled(old: Any, before: int, after: int) -> Any:
    return old if before == after or (isinstance(old, int) and old == -1) else Scaled(old, after, before)


def _sizes(node: fx.Node, cut: Cut, given: Any) -> list[Any]:
    """Scale a list of sizes that spells a node's output shape."""
    value = cut.labels.values[node]
    return [_scaled(old, b, a) for old, b, a in zip(given, value.shape, cut.shape(value), strict=True)]


def _listed(node: fx.Node, position: int) -> tuple[Any, ...]:
    """Return the sizes of a call, given as one list or spread over arguments."""
    given = node.args[position]
    return tuple(given) if isinstance(given, tuple | list) else tuple(node.args[position:])


@_for("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.broadcast_to")
def _view(node: fx.Node, cut: Cut) -> Call:
    if not isinstance(node.args[1], tuple | list):
        return Call(node.target, node.args, dict(node.kwargs))  # view(dtype)
    sizes = _sizes(node, cut, _listed(node, 1))
    return Call(node.target, (node.args[0], sizes, *node.args[2:]), dict(node.kwargs))


@_for("aten.unflatten")
def _unflatten(node: fx.Node, cut: Cut) -> Call:
    value = cut.labels.values[node]
    given = list(node.args[2])  # type: ignore[arg-type]
    axis = int(concrete(node.args[1])) % len(shape_of(node.args[0]))
    after = cut.shape(value)
    sizes = [_scaled(old, value.shape[axis + i], after[axis + i]) for i, old in enumerate(given)]
    return Call(node.target, (node.args[0], node.args[1], sizes), dict(node.kwargs))


@_for(*(name for name in CREATIONS if not name.startswith("aten.new_")))
def _create(node: fx.Node, cut: Cut) -> Call:
    return Call(node.target, (_sizes(node, cut, _listed(node, 0)), *node.args[1:]), dict(node.kwargs))


@_for(*(name for name in CREATIONS if name.startswith("aten.new_")))
def _create_like(node: fx.Node, cut: Cut) -> Call:
    return Call(node.target, (node.args[0], _sizes(node, cut, _listed(node, 1)), *node.args[2:]), dict(node.kwargs))


@_for("aten.repeat", "aten.tile")
def _repeat(node: fx.Node, cut: Cut) -> Call:
    source, value = cut.labels.values[node.args[0]], cut.labels.values[node]  # type: ignore[index]
    missing = len(value.shape) - len(source.shape)
    after_in, after_out = (1,) * missing + cut.shape(source), cut.shape(value)
    times = list(_listed(node, 1))
    for axis, old in enumerate(times):
        before = concrete(old)
        if after_out[axis] % after_in[axis]:
            raise NarrowError("copies of an axis keep different coordinates")
        times[axis] = _scaled(old, before, after_out[axis] // after_in[axis])
    return Call(node.target, (node.args[0], times), dict(node.kwargs))


@_for("aten.repeat_interleave")
def _repeat_interleave(node: fx.Node, cut: Cut) -> Call:
    times = parameter(node, "repeats", 1)
    axis = parameter(node, "dim", 2)
    if not isinstance(times, int) or axis is None:
        return Call(node.target, node.args, dict(node.kwargs))
    source, value = cut.labels.values[node.args[0]], cut.labels.values[node]  # type: ignore[index]
    before, after = cut.shape(source)[axis], cut.shape(value)[axis]
    if after % before:
        raise NarrowError("copies of an axis keep different coordinates")
    return Call(node.target, (node.args[0], after // before, axis), {})


@_for("aten.split", "aten.chunk", "aten.unsafe_split", "aten.unsafe_chunk", "aten.split_with_sizes",
      "aten.tensor_split")  # fmt: skip
def _split(node: fx.Node, cut: Cut) -> Call:
    parts = cut.labels.values[node]
    axis = int(concrete(parameter(node, "dim", 2, 0)))
    before = [part.shape[axis] for part in parts]
    after = [cut.shape(part)[axis] for part in parts]
    if before == after:
        return Call(node.target, node.args, dict(node.kwargs))
    return Call(aten.split_with_sizes.default, (node.args[0], after, axis), {})


@_for("aten.slice", "aten.narrow")
def _slice(node: fx.Node, cut: Cut) -> Call:
    same = Call(node.target, node.args, dict(node.kwargs))
    source: Value = cut.labels.values[node.args[0]]  # type: ignore[index]
    axis = int(concrete(parameter(node, "dim", 1, 0))) % len(source.shape)
    size = source.shape[axis]
    if cut.shape(source)[axis] == size:
        return same
    if "narrow" in operation(node):
        start, step = int(concrete(node.args[2])), 1
        end = start + int(concrete(node.args[3]))
    else:
        start, end, step = (concrete(parameter(node, n, p, d)) for n, p, d in
                            (("start", 2, 0), ("end", 3, None), ("step", 4, 1)))  # fmt: skip
    chosen = range(size)[slice(start, end, step)]
    if len(chosen) == size:
        return same
    if step == 1:
        first, last = (cut.before(source, axis, place) for place in (chosen.start, chosen.stop))
        if first is None or last is None:
            raise NarrowError("a slice cuts through an axis on which different coordinates stay")
        return Call(aten.slice.Tensor, (node.args[0], axis, first, last), {})
    return Call(take, (node.args[0], axis, _places(cut, source, axis, list(chosen))), {})


def take(tensor: torch.Tensor, axis: int, places: tuple[int, ...]) -> torch.Tensor:
    """Take coordinates along an axis."""
    return tensor.index_select(axis, torch.tensor(places, dtype=torch.int64, device=tensor.device))


def _places(cut: Cut, source: Value, axis: int, chosen: list[int]) -> tuple[int, ...]:
    """Return where chosen coordinates of an axis lie after a cut; what went is left out."""
    places: list[int] = []
    for position in chosen:
        first, last = cut.before(source, axis, position), cut.before(source, axis, position + 1)
        if first is None or last is None:
            raise NarrowError("coordinates are chosen on an axis on which different ones stay")
        places.extend(range(first, last))
    return tuple(places)


@_for("aten.index", "aten.index_select")
def _index(node: fx.Node, cut: Cut) -> Call:
    """Indexing by a constant of the graph becomes a choice of what is left."""
    same = Call(node.target, node.args, dict(node.kwargs))
    source = cut.labels.values.get(node.args[0])  # type: ignore[arg-type]
    picks = _picks(node)
    if len(picks) > 1 and (form := _counted(node, cut)) is not None:
        return Call(counted.pick, (node.args[0], *form), {})
    if len(picks) != 1 or not isinstance(source, Value):
        return same
    ((axis, index),) = picks.items()
    axis %= len(source.shape)
    size, known = source.shape[axis], cut.labels.known.get(index)
    if known is None or cut.shape(source)[axis] == size:
        return same
    return Call(take, (node.args[0], axis, _places(cut, source, axis, (known % size).tolist())), {})


@_for("aten.index_put")
def _index_put(node: fx.Node, cut: Cut) -> Call:
    """What counts an axis counts what is left of it."""
    form = _counted(node, cut)
    if form is None:
        return Call(node.target, node.args, dict(node.kwargs))
    return Call(counted.put, (node.args[0], *form, *node.args[2:]), dict(node.kwargs))


def _counted(node: fx.Node, cut: Cut) -> tuple[Any, ...] | None:
    """Return how a narrowed axis is counted, and the other indices, or None where none is."""
    form = counted.counted(node)
    source = cut.labels.values.get(node.args[0])  # type: ignore[arg-type]
    if form is None or not isinstance(source, Value) or cut.shape(source)[form.axis] == form.size:
        return None
    indices: Any = node.args[1]
    others = [None if axis == form.axis else index for axis, index in enumerate(indices)]
    return (form.axis, form.place, form.rank), others


def _picks(node: fx.Node) -> dict[int, fx.Node]:
    """Return axis -> index of a node that indexes."""
    if operation(node) == "aten.index_select":
        return {int(concrete(node.args[1])): node.args[2]}  # type: ignore[dict-item]
    return {axis: index for axis, index in enumerate(node.args[1]) if index is not None}  # type: ignore[arg-type]


@_for("aten.slice_scatter", "aten.select_scatter")
def _scatter(node: fx.Node, cut: Cut) -> Call:
    """Writing into a piece of a narrowed axis: the piece lies elsewhere."""
    same = Call(node.target, node.args, dict(node.kwargs))
    value: Value = cut.labels.values[node]
    axis, chosen = scattered(node, value.shape)
    if cut.shape(value)[axis] == value.shape[axis]:
        return same
    first, last = (cut.before(value, axis, place) for place in (chosen.start, chosen.stop))
    if first is None or last is None or chosen.step != 1:
        raise NarrowError("a piece is written into an axis on which different coordinates stay")
    if operation(node) == "aten.select_scatter":
        if last != first + 1:
            raise NarrowError("a single coordinate of a narrowed axis is written")
        return Call(node.target, (*node.args[:2], axis, first), {})
    return Call(node.target, (*node.args[:2], axis, first, last), {})


@_for("aten.select")
def _select(node: fx.Node, cut: Cut) -> Call:
    source: Value = cut.labels.values[node.args[0]]  # type: ignore[index]
    axis = int(concrete(node.args[1])) % len(source.shape)
    if cut.shape(source)[axis] == source.shape[axis]:
        return Call(node.target, node.args, dict(node.kwargs))
    index = int(concrete(node.args[2])) % source.shape[axis]
    first, last = cut.before(source, axis, index), cut.before(source, axis, index + 1)
    if first is None or last != first + 1:
        raise NarrowError("a single coordinate of a narrowed axis is selected")
    return Call(node.target, (node.args[0], axis, first), {})


@_for("aten.histc")
def _histogram(node: fx.Node, cut: Cut) -> Call:
    """One bin for each coordinate that is left."""
    value: Value = cut.labels.values[node]
    before, after = value.shape[0], cut.shape(value)[0]
    if before == after:
        return Call(node.target, node.args, dict(node.kwargs))
    return Call(node.target, (node.args[0], after, 0, after - 1), {})


@_for("aten.topk")
def _topk(node: fx.Node, cut: Cut) -> Call:
    """As many are selected as before: there have to be as many."""
    source: Value = cut.labels.values[node.args[0]]  # type: ignore[index]
    axis = int(concrete(parameter(node, "dim", 2, -1))) % len(source.shape)
    if cut.shape(source)[axis] < int(concrete(node.args[1])):
        raise NarrowError("fewer are left than are selected")
    return Call(node.target, node.args, dict(node.kwargs))


@_for("aten.roll", "aten.unfold", "aten.unbind", "aten.diagonal", "aten.pixel_shuffle", "aten.pixel_unshuffle",
      "aten.rot90")  # fmt: skip
def _unaffected(node: fx.Node, cut: Cut) -> Call:
    """Operations that mix an axis: no rewriting is known for a narrowed one."""
    source: Value = cut.labels.values[node.args[0]]  # type: ignore[index]
    shape = cut.shape(source)
    mixed = {"aten.unbind": ("dim", 1, 0), "aten.unfold": ("dimension", 1, 0), "aten.roll": ("dims", 2, ())}
    given = parameter(node, *mixed[operation(node)]) if operation(node) in mixed else ()
    axes = concrete(given if isinstance(given, tuple | list) else [given]) or range(len(shape))
    if any(shape[axis] != source.shape[axis] for axis in axes):
        raise NarrowError(f"{operation(node)} over a narrowed axis")
    return Call(node.target, node.args, dict(node.kwargs))


@_for("aten.group_norm")
def _group_norm(node: fx.Node, cut: Cut) -> Call:
    """Whole groups go, so that there are fewer of them and each is as large as before."""
    source: Value = cut.labels.values[node.args[0]]  # type: ignore[index]
    before, after = source.shape[1], cut.shape(source)[1]
    groups = int(concrete(node.args[1]))
    if groups * after % before:
        raise NarrowError("a part of a group that is normalised together would go")
    return Call(node.target, (node.args[0], groups * after // before, *node.args[2:]), dict(node.kwargs))


@_for("aten.conv1d", "aten.conv2d", "aten.conv3d")
def _convolution(node: fx.Node, cut: Cut) -> Call:
    groups = parameter(node, "groups", 6, 1)
    source: Value = cut.labels.values[node.args[0]]  # type: ignore[index]
    before, after = source.shape[1], cut.shape(source)[1]
    if groups == 1 or before == after:
        return Call(node.target, node.args, dict(node.kwargs))
    defaults: tuple[Any, ...] = (None, None, None, 1, 0, 1, groups)
    args = tuple(node.args) + defaults[len(node.args) :]
    return Call(node.target, (*args[:6], groups * after // before), dict(node.kwargs))


@_for("aten.scaled_dot_product_attention")
def _attention(node: fx.Node, cut: Cut) -> Call:
    """The kernel pairs queries with keys by their numbers: equally many per key where it is told to share them."""
    if parameter(node, "enable_gqa", 7, False):
        query, key = (cut.labels.values[argument] for argument in node.args[:2])  # type: ignore[index]
        times = query.shape[-3] // key.shape[-3]
        queries, keys = cut.positions(query, -3), cut.positions(key, -3)
        if queries is None or keys is None:
            raise NarrowError("what is left of the heads is not a box")
        counts = torch.bincount(queries // times, minlength=key.shape[-3])
        if counts.nonzero().reshape(-1).tolist() != keys.tolist() or len(set(counts[keys].tolist())) > 1:
            raise NarrowError("the heads that share keys and values are not equally many")
    return Call(node.target, node.args, dict(node.kwargs))


def moves(node: fx.Node) -> bool:
    """Tell whether a node only moves data, so that a cut can be tried on its labels."""
    name = operation(node)
    return name in MOVES or name in ("aten.expand", "aten.broadcast_to", "aten.repeat", "aten.repeat_interleave",
                                     "aten.split", "aten.chunk", "aten.split_with_sizes", "aten.unbind")  # fmt: skip


def spelled(argument: Any, cut: Cut) -> Any:
    """Put constants of the graph in the place of the nodes that stand for them."""
    if isinstance(argument, tuple | list):
        return type(argument)(spelled(item, cut) for item in argument)
    return cut.labels.known.get(argument, argument) if isinstance(argument, fx.Node) else argument


def _check_operands(node: fx.Node, value: Value, cut: Cut) -> None:
    """Raise NarrowError where an operand would have to be gathered differently in every row of a result."""
    for argument in node.all_input_nodes:
        operand = cut.labels.values.get(argument)
        if not isinstance(operand, Value):
            continue
        for axis in range(-len(operand.shape), 0):
            if operand.shape[axis] > 1 and cut.differs(operand, value, axis):
                raise NarrowError(f"{operation(node)}: an operand would have to be gathered differently in every group")


def check(node: fx.Node, cut: Cut) -> None:
    """Raise NarrowError unless a cut commutes with a data movement, and leaves operands that fit each other.

    A movement is run on the labels before and after the cut; what comes out must be the same.
    """
    value = cut.labels.values.get(node)
    if value is None or node.target is operator.getitem:
        return
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, Value):
            cut.shape(item)
    if isinstance(value, Value) and joins(node) and cut.touches(value):
        _check_operands(node, value, cut)
    call = resized(node, cut)
    source = cut.labels.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    indexing = operation(node) in ("aten.index", "aten.index_select")
    moving = moves(node) or (indexing and all(index in cut.labels.known for index in _picks(node).values()))
    if not moving or not isinstance(source, Value):
        return
    plain = Call(node.target, spelled(node.args, cut), dict(node.kwargs))
    call = Call(call.target, spelled(call.args, cut), call.kwargs)
    for labels in source.labels:
        full = labels.expand(source.shape)
        expected = plain.run(full)
        try:
            found = call.run(cut.compress(source, full))
        except (RuntimeError, ValueError, IndexError) as error:  # sizes that do not fit each other
            raise NarrowError(f"what is left does not pass through {operation(node)}") from error
        if isinstance(value, Value):
            expected, found, pieces = [expected], [found], [value]
        else:
            pieces = list(value)
        for own, want, got in zip(pieces, expected, found, strict=True):
            want = cut.compress(own, want)
            if want.shape != got.shape or not bool((want == got).all()):
                raise NarrowError(f"what is left does not pass through {operation(node)} in order")
