"""Reductions, softmax and norms: tie all labels along the axis, pass the rest."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxslim.labels import Value, axes_of
from fxslim.passes.rules.routing import best_of, competes, counts_up, operation_name
from fxslim.passes.rules.walk import Walk, concrete, parameter, rule, sizes

ALONG = (
    "aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.cumsum", "aten.cumprod",
    "aten.logcumsumexp", "aten.softmin", "aten._safe_softmax", "aten.sparsemax",
)  # fmt: skip


@rule(*ALONG)
def along(walk: Walk, node: fx.Node) -> Value:
    """Tie along one axis, which stays; where coordinates compete to be selected, each may be removed."""
    value, axis = walk.value(node.args[0]), int(concrete(parameter(node, "dim", 1)))
    if competes(walk, node, value, axis) or counts_up(node):
        return value
    return walk.tie_axes(value, [axis])


@rule("aten.fft_fft", "aten.fft_ifft", "aten.fft_rfft", "aten.fft_irfft", "aten.fft_hfft", "aten.fft_ihfft")
def transform(walk: Walk, node: fx.Node) -> Value:
    """Transform one axis, whose coordinates all mix, into another of its own length."""
    value = walk.value(node.args[0])
    axis = int(concrete(parameter(node, "dim", 2, -1))) % len(value.shape)
    mixed = walk.reduce(value, [axis], keepdim=True)
    return Value(sizes(node), mixed.labels, value.origin, value.looked_up)


REDUCTIONS = (
    "aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.prod", "aten.logsumexp", "aten.any", "aten.all",
    "aten.var", "aten.std", "aten.var_mean", "aten.std_mean", "aten.argmax", "aten.argmin", "aten.norm", "aten.max",
    "aten.min", "aten.linalg_vector_norm", "aten.median", "aten.count_nonzero",
)  # fmt: skip


@rule(*REDUCTIONS)
def reduction(walk: Walk, node: fx.Node) -> Any:
    """Tie along the reduced axes and remove them."""
    value = walk.value(node.args[0])
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    if "other" in names:  # max(x, y) is pointwise
        return walk.join(walk.operands(node), sizes(node))
    axes: Any = None
    if "dim" in names:
        axes = concrete(parameter(node, "dim", names.index("dim")))
    if axes is None or axes == []:
        axes = list(range(len(value.shape)))
    axes = [axes] if isinstance(axes, int) else list(axes)
    keepdim = bool(parameter(node, "keepdim", names.index("keepdim"), False)) if "keepdim" in names else False
    if operation_name(node) in ("aten.max", "aten.amax") and len(axes) == 1 and value.shape:
        value = best_of(walk, node, value, axes[0])
    reduced = walk.reduce(value, axes, keepdim=keepdim) if value.shape else value
    result = node.meta["val"]
    return tuple(reduced for _ in result) if isinstance(result, tuple | list) else reduced


@rule("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
def layer_norm(walk: Walk, node: fx.Node) -> Any:
    """Tie along the normalised axes; weight and bias go with them."""
    value = walk.value(node.args[0])
    count = len(node.args[1])  # type: ignore[arg-type]
    walk.tie_axes(value, list(range(len(value.shape) - count, len(value.shape))))
    extra = [walk.value(argument) for argument in node.args[2:4] if isinstance(argument, fx.Node)]
    joined = walk.join([value, *extra], value.shape)
    result = node.meta["val"]
    if isinstance(result, tuple | list):
        rest = walk.bare(node, joined.origin)
        return (joined, *rest[1:])
    return joined


@rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training")
def batch_norm(walk: Walk, node: fx.Node) -> Any:
    """In inference a batch norm is a scale and shift of each channel."""
    value = walk.value(node.args[0])
    spread = (1, -1) + (1,) * (len(value.shape) - 2)
    extra = []
    for argument in node.args[1:5]:
        if isinstance(argument, fx.Node):
            own = walk.value(argument)
            shape = tuple(own.shape[0] if size == -1 else 1 for size in spread)
            extra.append(walk.move(own, lambda t: t.reshape(spread), shape))
    joined = walk.join([value, *extra], value.shape)
    result = node.meta["val"]
    return (joined, *walk.bare(node, joined.origin)[1:]) if isinstance(result, tuple | list) else joined


@rule("aten.group_norm")
def group_norm(walk: Walk, node: fx.Node) -> Value:
    """Tie the channels of each group: a whole group may go, because the others' means do not depend on it."""
    value = walk.value(node.args[0])
    groups = int(concrete(node.args[1]))
    for labels in value.labels:
        places = list(range(2, len(value.shape)))
        if labels.shape[1] > 1:
            labels, places = labels.unflatten(1, (groups, -1)), [2, *(axis + 1 for axis in places)]
        walk.tie_along(labels, places)
    spread = (1, -1) + (1,) * (len(value.shape) - 2)
    extra = []
    for argument in node.args[2:4]:
        if isinstance(argument, fx.Node):
            own = walk.value(argument)
            shape = tuple(own.shape[0] if size == -1 else 1 for size in spread)
            extra.append(walk.move(own, lambda t: t.reshape(spread), shape))
    return walk.join([value, *extra], value.shape)


POOLS = (
    *(f"aten.{kind}_pool{places}d" for kind in ("adaptive_avg", "adaptive_max", "avg", "max") for places in (1, 2, 3)),
    "aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_nearest3d", "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa",
)  # fmt: skip


def _passes(node: fx.Node, place: int) -> bool:
    """Tell whether a pool leaves one of its axes as it is: windows of one, one after the other."""
    if "adaptive" in str(node.target) or "pool" not in str(node.target):
        return False
    window, stride, padding = (concrete(parameter(node, name, position, default)) for name, position, default in
                               (("kernel_size", 1, None), ("stride", 2, []), ("padding", 3, 0)))  # fmt: skip
    sizes_ = [
        x[place % len(x)] if isinstance(x, list | tuple) and x else x for x in (window, stride or window, padding)
    ]
    return sizes_ in ([1, 1, 0], [1, 1, []])


@rule(*POOLS)
def pool(walk: Walk, node: fx.Node) -> Any:
    """Pooling and resizing mix places, (B, C, ...) or (C, ...), not channels."""
    value = walk.value(node.args[0])
    count = int(next(digit for digit in str(node.target).split(".")[1] if digit.isdigit()))
    mixed = [len(value.shape) - count + i for i in range(count) if not _passes(node, i)]
    if any(axes_of(labels) & set(mixed) for labels in value.labels):
        return walk.opaque(node, f"{node.target} over a labelled axis")
    if isinstance(node.meta["val"], tuple | list):
        return walk.opaque(node, f"no rule for the indices of {node.target}")
    return Value(sizes(node), value.labels, value.origin, value.looked_up)


@rule("aten.one_hot")
def one_hot(walk: Walk, node: fx.Node) -> Value:
    """Add an unlabelled axis."""
    value = walk.value(node.args[0])
    return walk.move(value, lambda t: t.unsqueeze(-1).expand(sizes(node)), sizes(node))
