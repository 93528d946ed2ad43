"""Rewrite a program's graph for a cut: narrowed tensors, new sizes, gathers at the edges of side inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxslim.errors import NarrowError
from fxslim.labels import Value
from fxslim.passes.annotate import Labels, operation
from fxslim.passes.cut import Cut
from fxslim.passes.folding.fold import fills, folded
from fxslim.passes.masking import masks
from fxslim.passes.resize import RESIZES, Scaled, moves, resized, take
from fxslim.passes.rows import cleared, without
from fxslim.passes.rules.pointwise import joins
from fxslim.passes.rules.walk import Use, concrete, parameter
from fxslim.program import Program, is_symbolic
from fxslim.site import SitePlan, leads, removed_rows
from fxslim.spelling import letters_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph and its tensors, with the nodes of the original graph that the new ones stand for."""

    graph: fx.Graph
    tensors: Mapping[str, torch.Tensor]
    twin: Mapping[fx.Node, fx.Node]


def rewrite(program: Program, cut: Cut, parts: Sequence[SitePlan] = ()) -> Rewritten:
    """Return the graph with what a cut removes taken out; the program is not changed.

    Args:
        program: the program.
        cut: what goes.
        parts: what that is at the sites; their constants are folded into biases, and what stays gets zero columns.

    Raises:
        NarrowError: an operation cannot be rewritten for this cut.
    """
    graph, twin = copied(program)
    dense = dict(program.tensors) | folded(program.tensors, parts)
    with torch.no_grad():
        for part in parts:
            dense |= cleared(program.tensors, dense, part) if part.stay else {}
    apart = _apart(parts)
    tensors = {name: narrowed(program, cut, name, tensor, apart) for name, tensor in dense.items()}
    for old in program.graph.nodes:
        if old.op != "call_function" or old.target is operator.getitem:
            continue
        new = twin[old]
        _align(old, new, cut, graph)
        if operation(old) == "aten.sym_size":
            _dense_size(old, new, cut, graph, twin)
        if operation(old) in RESIZES:
            _resize(old, new, cut, graph, twin)
    for old, new in twin.items():
        _annotate_shape(old, new, cut)
    return Rewritten(graph, tensors, twin)


def copied(program: Program) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a program's graph; return the copy and original node -> copied node."""
    graph = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, twin)
    graph.output(output)
    for old in program.graph.nodes:
        if old in twin:
            twin[old].meta = dict(old.meta)
    return graph, twin


Apart = Mapping[tuple[str, int], tuple[np.ndarray, int]]
"""Tensor dimensions whose rows differ between experts: which go, (experts, size), and the experts' dimension."""


def _apart(parts: Sequence[SitePlan]) -> Apart:
    lead = leads(parts)
    return {key: (gone, lead[key]) for key, gone in removed_rows(parts).items() if key in lead}


def narrowed(program: Program, cut: Cut, name: str, tensor: torch.Tensor, apart: Apart) -> torch.Tensor:
    """Return what stays of a tensor (the tensor itself where nothing goes).

    Of rows that experts have apart, the cut knows the number alone; which of them go is the plan's to say. An expert
    that goes as a whole goes last.
    """
    for dim in range(tensor.ndim):
        if (name, dim) in apart and apart[name, dim][0].any():
            tensor = without(tensor.detach(), dim, *apart[name, dim])
    for dim, size in enumerate(program.tensors[name].shape):
        if (name, dim) in cut.labels.starts and (name, dim) not in apart:
            removed = cut.removed[cut.labels.of(name, dim, size)]
            if removed.any():
                rows = torch.from_numpy((~removed).nonzero()[0]).to(tensor.device)
                tensor = tensor.detach().index_select(dim, rows)
    return tensor


def _dense_size(old: fx.Node, new: fx.Node, cut: Cut, graph: fx.Graph, twin: dict[fx.Node, fx.Node]) -> None:
    """Let a size that is read off a narrowed axis keep its old meaning: every use of it is scaled by itself."""
    value = cut.labels.values.get(old.args[0])  # type: ignore[arg-type]
    if not isinstance(value, Value) or not cut.touches(value):
        return
    axis = int(old.args[1])  # type: ignore[arg-type]
    before, after = value.shape[axis], cut.shape(value)[axis]
    if before == after:
        return
    with graph.inserting_after(new):
        grown = graph.call_function(operator.mul, (new, before))
    with graph.inserting_after(grown):
        dense = graph.call_function(operator.floordiv, (grown, after))
    grown.meta["val"], dense.meta["val"] = new.meta["val"] * before, new.meta["val"]
    new.replace_all_uses_with(dense, delete_user_cb=lambda user: user is not grown)
    twin[old] = dense


def _resize(old: fx.Node, new: fx.Node, cut: Cut, graph: fx.Graph, twin: Mapping[fx.Node, fx.Node]) -> None:
    call = resized(old, cut)
    if call.target is old.target and call.args == old.args and call.kwargs == dict(old.kwargs):
        return
    standing = dict(zip(_nodes(old), _nodes(new), strict=True))  # operands may have been gathered

    def translate(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return standing.get(argument, twin[argument])
        if isinstance(argument, Scaled):
            return _scaled(argument, new, graph, twin)
        if isinstance(argument, tuple | list):
            return [translate(item) for item in argument]
        return argument

    new.target = call.target
    new.args = tuple(translate(argument) for argument in call.args)
    new.kwargs = {name: translate(argument) for name, argument in call.kwargs.items()}


def _nodes(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among a call's arguments, in their order."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _scaled(size: Scaled, before: fx.Node, graph: fx.Graph, twin: Mapping[fx.Node, fx.Node]) -> Any:
    """Shrink one size for one use; a symbolic number is never changed in place, other views may share it."""
    if not isinstance(size.old, fx.Node):
        return int(size.old) * size.kept // size.total
    with graph.inserting_before(before):
        scaled = graph.call_function(operator.mul, (twin[size.old], size.kept))
        scaled = graph.call_function(operator.floordiv, (scaled, size.total))
    scaled.meta["val"] = size.old.meta["val"] * size.kept // size.total
    return scaled


def _align(old: fx.Node, new: fx.Node, cut: Cut, graph: fx.Graph) -> None:
    """Gather operands that keep more than their partners: side inputs such as per-head tables."""
    name = operation(old)
    if name == "aten.scaled_dot_product_attention":
        value = cut.labels.values[old]
        operands = old.args[:3] if not parameter(old, "enable_gqa", 7, False) else ()
        for argument in dict.fromkeys((*operands, parameter(old, "attn_mask", 3))):
            if isinstance(argument, fx.Node):
                rank = len(value.shape)
                axes = range(max(rank - len(argument.meta["val"].shape), 0), rank - 2)
                _gather(old, new, argument, value, cut, graph, axes)
        return
    if name in ("aten.matmul", "aten.bmm", "aten.einsum"):
        _align_product(old, new, cut, graph)
        return
    if name == "aten.cat":
        _align_pieces(old, new, cut, graph)
        return
    if name in PER_CHANNEL:
        _align_channels(old, new, cut, graph, PER_CHANNEL[name])
        return
    if name in ("aten.stack", "aten.embedding") or moves(old) or name in RESIZES:
        return
    if name in ("aten.baddbmm", "aten.addmm"):
        value, bias = cut.labels.values[old], old.args[0]
        if isinstance(bias, fx.Node) and isinstance(cut.labels.values.get(bias), Value):
            _gather(old, new, bias, value, cut, graph, range(len(value.shape)))
        return
    value = cut.labels.values.get(old)
    if not isinstance(value, Value) or not cut.touches(value) or not (name in BY_INDEX or joins(old)):
        return
    for argument in old.all_input_nodes:
        if isinstance(cut.labels.values.get(argument), Value):
            _gather(old, new, argument, value, cut, graph, range(len(value.shape)))


def _align_channels(old: fx.Node, new: fx.Node, cut: Cut, graph: fx.Graph, operands: Mapping[str, int]) -> None:
    """Gather what a layer holds for each channel where it keeps more of them: other layers share it."""
    value = cut.labels.values.get(old)
    value = value[0] if isinstance(value, tuple) else value
    if not isinstance(value, Value) or not cut.touches(value):
        return
    rank = len(value.shape)
    axis = rank - 1 if operation(old) == "aten.linear" else min(1, rank - 1)
    if operation(old) in CONVOLUTIONS:  # of one image, too
        axis = rank + 1 - len(parameter(old, "weight", 1).meta["val"].shape)
    letters = "".join("c" if other == axis else "." for other in range(rank))
    for role, position in operands.items():
        argument = parameter(old, role, position)
        if isinstance(argument, fx.Node) and isinstance(cut.labels.values.get(argument), Value):
            _gather(old, new, argument, value, cut, graph, [axis], ("c", letters))


def _align_pieces(old: fx.Node, new: fx.Node, cut: Cut, graph: fx.Graph) -> None:
    """Gather pieces that keep more than what they are put together with; along the axis itself each has its own."""
    value = cut.labels.values.get(old)
    if not isinstance(value, Value) or not cut.touches(value):
        return
    rank = len(value.shape)
    along = int(concrete(parameter(old, "dim", 1, 0))) % rank
    for argument in dict.fromkeys(old.all_input_nodes):
        own = cut.labels.values.get(argument)
        if isinstance(own, Value) and len(own.shape) == rank and 0 not in own.shape:  # nothing carries no labels
            _gather(old, new, argument, value, cut, graph, [axis for axis in range(rank) if axis != along])


def _align_product(old: fx.Node, new: fx.Node, cut: Cut, graph: fx.Graph) -> None:
    """Gather heads of attention weights whose values are gone: heads that a norm ties stay in queries and keys."""
    value = cut.labels.values.get(old)
    if not isinstance(value, Value) or not cut.touches(value):
        return
    if operation(old) == "aten.einsum":
        operands: Any = old.args[1]
        ranks = [len(argument.meta["val"].shape) for argument in operands]
        letters = letters_of(str(old.args[0]).replace(" ", ""), ranks) or ()
        terms = dict(zip(operands, letters, strict=False))
    else:
        operands, letters = old.args[:2], ()
        terms = dict.fromkeys(operands)
    for argument, term in terms.items():
        if isinstance(cut.labels.values.get(argument), Value):
            axes = range(len(value.shape) - (2 if term is None else 0))
            _gather(old, new, argument, value, cut, graph, axes, None if term is None else (term, letters[-1]))


CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
_AFFINE = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
PER_CHANNEL: Mapping[str, Mapping[str, int]] = {
    "aten.linear": {"bias": 2},
    **{name: {"weight": 1, "bias": 2} for name in CONVOLUTIONS},
    "aten.batch_norm": _AFFINE,
    "aten._native_batch_norm_legit_no_training": _AFFINE,
    "aten.group_norm": {"weight": 2, "bias": 3},
    "aten.prelu": {"weight": 1},
    "aten._prelu_kernel": {"weight": 1},
}
"""Operands whose first axis is the result's channels, by their positions."""
BY_INDEX = ("aten.gather", "aten.take_along_dim")
"""Operations whose index has the result's shape: a table of positions, repeated for heads."""


def _gather(
    old: fx.Node,
    new: fx.Node,
    argument: fx.Node,
    value: Value,
    cut: Cut,
    graph: fx.Graph,
    axes: Sequence[int],
    letters: tuple[str, str] | None = None,
) -> None:
    """Insert an index_select on one operand for every axis where it keeps more than the output does.

    Axes are aligned at the last one, or by their letters, the operand's and the output's.
    """
    operand: Value = cut.labels.values[argument]
    missing = len(value.shape) - len(operand.shape)
    for axis in axes:
        own = axis - missing if letters is None else letters[0].find(letters[1][axis])
        labels = value.along(axis)
        if own < 0 or operand.shape[own] == 1 or labels is None:
            continue
        mine = operand.along(own)
        wanted, present = cut.positions(value, axis), cut.positions(operand, own)
        if wanted is None or present is None:
            if mine is not None and (letters is not None or not cut.differs(operand, value, axis - len(value.shape))):
                continue  # both keep different coordinates per group, in the same way
            raise NarrowError(f"{operation(old)}: a table would have to be gathered differently in every group")
        if torch.equal(wanted, present):
            continue
        if len(wanted) == value.shape[axis] and len(present) == operand.shape[own]:
            continue  # nothing goes: sizes that data decide have no true examples
        if is_symbolic(old.meta["val"].shape[axis]):
            period = _period(cut, value, axis)
            wanted, present = wanted[wanted < period], present[present < period]
        places = torch.searchsorted(present, wanted)
        if places.numel() and (int(places.max()) >= present.numel() or not torch.equal(present[places], wanted)):
            raise NarrowError(f"{operation(old)}: an operand lost coordinates that the result keeps")
        _insert_gather(new, argument, own, places, graph, symbolic=is_symbolic(old.meta["val"].shape[axis]),
                       present=len(present))  # fmt: skip


def _period(cut: Cut, value: Value, axis: int) -> int:
    """Return after how many coordinates labels repeat along an axis that holds a batch as well (batch times heads)."""
    labels = value.along(axis)
    assert labels is not None
    row = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])[0]
    period = len(torch.unique(row))
    if row.numel() % period or not torch.equal(row, row[:period].repeat(row.numel() // period)):
        raise NarrowError("labels do not repeat along an open axis")
    return period


def _insert_gather(
    new: fx.Node, argument: fx.Node, axis: int, places: torch.Tensor, graph: fx.Graph, *, symbolic: bool, present: int
) -> None:
    source = next(node for node in new.all_input_nodes if node.name == argument.name)
    chosen = tuple(places.tolist())
    with graph.inserting_before(new):
        if symbolic:
            picked = graph.call_function(_take_of_each, (source, axis, present, chosen))
        else:
            picked = graph.call_function(take, (source, axis, chosen))
    picked.meta["val"] = source.meta["val"]
    new.replace_input_with(source, picked)


def _take_of_each(tensor: torch.Tensor, axis: int, period: int, places: tuple[int, ...]) -> torch.Tensor:
    """Take coordinates of every run of ``period`` along an axis."""
    runs = tensor.unflatten(axis, (-1, period))
    return take(runs, axis + 1, places).flatten(axis, axis + 1)


def _annotate_shape(old: fx.Node, new: fx.Node, cut: Cut) -> None:
    """Record the example shape after the cut where it changed, for counting and printing."""
    value = cut.labels.values.get(old)
    if isinstance(value, Value) and cut.touches(value):
        dtype = old.meta["val"].dtype
        new.meta["val"] = torch.empty(cut.shape(value), dtype=dtype, device="meta")
    elif isinstance(value, tuple) and cut.touches(value):
        new.meta["val"] = tuple(
            torch.empty(cut.shape(item), dtype=own.dtype, device="meta") if isinstance(item, Value) else own
            for item, own in zip(value, old.meta["val"], strict=True)
        )


def insert_masks(program: Program, labels: Labels, cut: Cut, parts: Sequence[SitePlan] = ()) -> Rewritten:
    """Return the graph with masks on the consumers' inputs instead of anything taken out.

    Where the sites' plans fold a constant, the mask is that constant instead of zero. What differs between experts is
    no coordinate of their input: their columns are zeroed.
    """
    made = masks(program, labels, cut, parts)
    graph, twin = copied(program)
    tensors = {**program.tensors, **made.tensors}
    known: dict[bytes, fx.Node] = {}
    held = _constants(labels, parts)
    first = next(iter(graph.nodes))

    def buffer(name: str, values: torch.Tensor, before: fx.Node) -> fx.Node:
        """Return a tensor of the graph's own, in its shape."""
        flat = values.reshape(-1)
        key = str(flat.dtype).encode() + flat.numpy().tobytes()
        if key not in known:
            full = f"fxslim_{name}_{len(known)}"
            tensors[full] = flat
            with graph.inserting_before(first):
                known[key] = graph.get_attr(full)
            known[key].meta["val"] = flat
        if values.ndim == 1:
            return known[key]
        with graph.inserting_before(before):
            spread = graph.call_function(aten.reshape.default, (known[key], list(values.shape)))
        spread.meta["val"] = values
        return spread

    for mask in (one for own in made.inputs.values() for one in own):
        new, value = twin[mask.node], mask.source.meta["val"]
        source = next(node for node in new.all_input_nodes if node.name == mask.source.name)
        gone = buffer("mask", mask.gone, new)
        call: tuple[Any, tuple[Any, ...]] = (aten.masked_fill.Scalar, (source, gone, mask.value))
        constant = held(mask.use) if mask.use is not None else torch.zeros(1)
        if constant.any():
            shaped = constant.to(value.dtype).reshape(mask.gone.shape)
            call = (aten.where.self, (gone, buffer("constant", shaped, new), source))
        with graph.inserting_before(new):
            masked = graph.call_function(*call)
        masked.meta["val"] = value
        new.replace_input_with(source, masked)
    return Rewritten(graph, tensors, twin)


def _constants(labels: Labels, parts: Sequence[SitePlan]) -> Callable[[Use], torch.Tensor]:
    """Return what plans fold of the coordinates that a product sums over: use -> (coordinates,), zero for nothing."""
    ranges = [(labels.starts[key], values) for key, values in fills(parts).items()]

    def of(use: Use) -> torch.Tensor:
        own = use.labels.numpy()
        constant = np.zeros(len(own))
        for start, values in ranges:
            inside = (own >= start) & (own < start + len(values))
            constant[inside] = values[own[inside] - start]
        return torch.from_numpy(constant)

    return of


def example_macs_graph(program: Program, cut: Cut) -> fx.Graph:
    """Return a copy of the graph whose recorded shapes are those after a cut; it is for counting, not for running."""
    graph, twin = copied(program)
    for old, new in twin.items():
        _annotate_shape(old, new, cut)
        name = program.tensor_name(old)
        if name is not None:
            shape = cut.shape(cut.labels.values[old])
            new.meta["val"] = torch.empty(shape, dtype=program.tensors[name].dtype, device="meta")
    return graph
