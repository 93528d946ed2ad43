"""Count multiply-accumulates, parameters and weight bytes exactly.

One multiply-accumulate (MAC) is one product that is added into a sum: a linear layer from ``D`` to ``F`` channels on
``B`` sequences of ``S`` tokens takes ``B * S * D * F``. Only products of matrices count; biases, activations, norms,
softmax and other element-wise work do not (the convention of ``torch.utils.flop_counter``, where one MAC is two FLOPs).
Attention is counted dense: causal and padding masks save nothing here.

Nothing that multiplies matrices is skipped in silence: `macs` names what it has no rule for, `macs_of` raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fxslim.errors import FxslimError

__all__ = ["Macs", "UncountedError", "macs", "macs_of", "parameters", "weight_bytes"]

aten = torch.ops.aten

Shape: TypeAlias = Sequence[int]
Rule: TypeAlias = Callable[..., int]
"""Takes the op's own arguments with every tensor replaced by its shape, and ``out_shape``; returns MACs."""


class UncountedError(FxslimError, ValueError):
    """Report ops that multiply matrices and have no rule; ``ops`` holds their names."""

    def __init__(self, ops: tuple[str, ...]) -> None:
        super().__init__(f"no rule counts the multiplications of {', '.join(ops)}; add one to fxslim.count.RULES")
        self.ops = ops


@dataclass(frozen=True)
class Macs:
    """Hold the MACs of a graph: their sum, those of each node, and the nodes that could not be counted.

    ``uncounted`` names nodes whose op multiplies matrices but has no rule, or whose sizes are unknown (no
    ``meta["val"]``, or a size that depends on data); ``total`` is exact if and only if it is empty. A node inside the
    subgraph of a higher-order op is named ``outer/inner``; ``by_node`` books its MACs on the outer node.
    """

    total: int
    by_node: Mapping[str, int]
    uncounted: tuple[str, ...]


# --- Rules ----------------------------------------------------------------------------------------------------------


def _mm(self: Shape, mat2: Shape, *_: object, **__: object) -> int:
    """Count ``[..., M, K] @ [..., K, N]`` without broadcasting: M * K * N each."""
    return prod(self) * mat2[-1]


def _after_bias(rule: Rule) -> Rule:
    """Count ``self + product`` as the product alone."""
    return lambda self, *args, **kwargs: rule(*args, **kwargs)


def _mv(self: Shape, vec: Shape, *_: object, **__: object) -> int:
    """Count ``[M, K] @ [K]`` and the dot product ``[K] @ [K]``."""
    return prod(self)


def _matmul(self: Shape, other: Shape, *, out_shape: Shape, **_: object) -> int:
    """Count a product with broadcast batch axes: K for each element of the result."""
    return prod(out_shape) * self[-1]


def _inner(self: Shape, other: Shape, *, out_shape: Shape, **_: object) -> int:
    """Count a contraction of both last axes; a 0-d operand only scales."""
    return prod(out_shape) * self[-1] if self and other else 0


def _tensordot(self: Shape, other: Shape, dims_self: Sequence[int], *_: object, **__: object) -> int:
    """Count a contraction over ``dims_self``."""
    return prod(self) * prod(other) // max(1, prod(self[dim] for dim in dims_self))


def _linear(input: Shape, weight: Shape, *_: object, **__: object) -> int:
    """Count ``[..., D]`` by ``[F, D]`` (or ``[D]``): D * F for each row."""
    return prod(input) * prod(weight[:-1])


def _conv(input: Shape, weight: Shape, *_: object, out_shape: Shape, **__: object) -> int:
    """Count a convolution, ``weight`` ``[out, in / groups, *kernel]``: one kernel for each element of the result.

    Padding is counted as if it were data, as ``torch.utils.flop_counter`` does.
    """
    return prod(out_shape) * prod(weight[1:])


def _conv_transpose(input: Shape, weight: Shape, *_: object, **__: object) -> int:
    """Count a transposed convolution, ``weight`` ``[in, out / groups, *kernel]``: one kernel per input element."""
    return prod(input) * prod(weight[1:])


def _convolution(
    input: Shape,
    weight: Shape,
    bias: Shape | None,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    transposed: bool,
    *_: object,
    out_shape: Shape,
    **__: object,
) -> int:
    """Count the general convolution, transposed or not."""
    return _conv_transpose(input, weight) if transposed else _conv(input, weight, out_shape=out_shape)


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Count attention of query ``[B, H, S, E]``, key ``[B, K, T, E]``, value ``[B, K, T, Ev]``: B*H*S*T*(E + Ev).

    Every query head attends, whether its key and value are its own or its group's.
    """
    return _scores(query, key) * (query[-1] + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Count the backward pass of attention: scores again, and gradients of scores, value, query and key."""
    return _scores(query, key) * (3 * query[-1] + 2 * value[-1])


def _scores(query: Shape, key: Shape) -> int:
    """Return the number of attention scores; batch axes and heads of size one, or of a group, are shared."""
    shared = zip_longest(reversed(query[:-2]), reversed(key[:-2]), fillvalue=1)
    return prod(max(sizes) for sizes in shared) * query[-2] * key[-2]


def _grouped_mm(self: Shape, mat2: Shape, *_: object, **__: object) -> int:
    """Count a grouped product whose groups cover the ragged axis, as the experts' do.

    ``[T, K] @ [G, K, N]``, ``[M, T] @ [T, N]`` (ragged K), ``[G, M, K] @ [K, T]`` (ragged N), or a plain batch.
    """
    rows = prod(self[1:]) if len(self) > len(mat2) else prod(self)
    return rows * mat2[-1]


def _einsum(equation: str, tensors: Sequence[Shape], *, path: Sequence[int] | None = None, **_: object) -> int:
    """Count the pairwise contractions in the order in which ``torch.einsum`` takes them.

    A label that one operand alone holds and nobody needs later is summed before the product; a pair that shares no
    label to sum over is an element-wise product, and free.
    """
    operands, result = _subscripts(equation, tensors)
    total = 0
    steps = iter(path) if path else None
    while len(operands) > 1:
        first, second = sorted((next(steps), next(steps))) if steps else (0, 1)
        right, left = operands.pop(second), operands.pop(first)
        kept = result.union(*operands)
        sizes = {label: max(left.get(label, 1), right.get(label, 1)) for label in left | right if label in kept}
        summed = {label: min(left[label], right[label]) for label in left if label in right and label not in kept}
        total += prod(sizes.values()) * prod(summed.values()) if summed else 0
        operands.insert(len(operands) if steps else 0, sizes)
    return total


def _subscripts(equation: str, shapes: Sequence[Shape]) -> tuple[list[dict[str, int]], set[str]]:
    """Read an einsum equation into the sizes of each operand's labels and the labels of the result."""
    terms, arrow, target = equation.replace(" ", "").partition("->")
    operands: list[dict[str, int]] = []
    for term, shape in zip(terms.split(","), shapes, strict=True):
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail) if dots else 0
        labels = [*head, *(f".{hidden - axis}" for axis in range(hidden)), *tail]
        operands.append(dict(zip(labels, shape, strict=True)))
    ellipsis = {label for sizes in operands for label in sizes if label.startswith(".")}
    if arrow:
        return operands, set(target.replace("...", "")) | (ellipsis if "..." in target else set())
    letters = terms.replace("...", "").replace(",", "")
    return operands, {label for label in letters if letters.count(label) == 1} | ellipsis


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten._int_mm, aten._scaled_mm), _mm),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten._addmm_activation), _after_bias(_mm)),
    **dict.fromkeys((aten.baddbmm, aten.baddbmm_, aten.addbmm, aten.addbmm_), _after_bias(_mm)),
    **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _mv),
    **dict.fromkeys((aten.addmv, aten.addmv_), _after_bias(_mv)),
    **dict.fromkeys((aten.matmul, aten.linalg_matmul), _matmul),
    aten.inner: _inner,
    aten.tensordot: _tensordot,
    aten.linear: _linear,
    aten.einsum: _einsum,
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _conv),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _conv_transpose),
    **dict.fromkeys((aten.convolution, aten._convolution, aten.convolution_overrideable), _convolution),
    aten.mkldnn_convolution: _conv,
    aten.scaled_dot_product_attention: _attention,
    aten._scaled_dot_product_attention_math: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    torch.ops.higher_order.flex_attention: _attention,
    **dict.fromkeys((aten._grouped_mm, aten._scaled_grouped_mm), _grouped_mm),
}
"""MACs by op (an ``OpOverloadPacket``, or a higher-order op)."""

NAMED_RULES: Mapping[str, Rule] = {
    "transformers::grouped_mm_fallback": _grouped_mm,
    "mkldnn::_linear_pointwise": _linear,
}
"""MACs by qualified name, for ops that other libraries register when they are imported, or not every torch has."""


def _rule(target: object) -> Rule | None:
    """Return the rule of a node's target."""
    if not isinstance(target, torch._ops.OpOverload):
        return RULES.get(target)
    return RULES.get(target.overloadpacket) or NAMED_RULES.get(target._schema.name)


# --- Ops without a rule ---------------------------------------------------------------------------------------------

_MULTIPLIER = re.compile(
    r"(add|badd|addb|b|hsp|sspadd|ge)?mm|matmul|(add)?mv|v?dot|inner|einsum|tensordot|(bi|tri)?linear|conv(olution)?"
    r"|attention|transformer|lstm|gru|rnn|cdist|euclidean|linalg"
)
_FREE = re.compile(r"upsample|norm|linalg_(cross|diagonal|vander|vecdot|check)|_quantize_weight|_flatten_weight|pack$")
_PLAIN_NAMESPACES = frozenset({"aten", "prims", "prim", "export"})


def _multiplies(target: object, *, matrices: int) -> bool:
    """Judge whether an op without a rule may multiply matrices, given how many floating tensors it takes.

    By the words of its name; an op that is not torch's own is suspect as soon as it takes two tensors.
    """
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in _PLAIN_NAMESPACES:
            return matrices > 1
        name = target.overloadpacket.__name__
    words = [re.sub(r"\d+d?$", "", word) for word in name.split("_")]
    needed = 1 if "linalg" in words else 2
    return matrices >= needed and any(map(_MULTIPLIER.fullmatch, words)) and not _FREE.search(name)


def _is_matrix(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and (value.is_floating_point() or value.is_complex())


# --- Graphs ---------------------------------------------------------------------------------------------------------

_ONCE = re.compile(r"wrap|hints_wrapper|strict_mode|invoke_subgraph|activation_checkpoint")
"""Higher-order ops that run each of their subgraphs exactly once."""


class _UnknownSizeError(Exception):
    """Signal a value without shape, or a size without a hint."""


def macs(graph: fx.Graph) -> Macs:
    """Count the MACs of an ATen graph as ``torch.export`` produces it, from the shapes in ``node.meta["val"]``.

    Symbolic sizes count at their hint: the size that was traced. Subgraphs of ``no_grad`` and ``autocast`` blocks are
    counted in place; of a ``cond``, the dearer branch.
    """
    by_node: dict[str, int] = {}
    uncounted: list[str] = []
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        rule = _rule(node.target)
        if rule is not None:
            try:
                by_node[node.name] = _size(rule(*_sized(node.args), **_sized(node.kwargs), out_shape=_shape(node)))
            except _UnknownSizeError:
                uncounted.append(node.name)
        elif subgraphs := list(_subgraphs(node)):
            counts = [macs(subgraph) for subgraph in subgraphs]
            uncounted += [f"{node.name}/{name}" for count in counts for name in count.uncounted]
            total = _nested(node, counts)
            if total:
                by_node[node.name] = total
            elif total is None:
                uncounted.append(node.name)
        elif node.op == "call_module" or _multiplies(node.target, matrices=_matrices(node)):
            uncounted.append(node.name)
    return Macs(total=sum(by_node.values()), by_node=by_node, uncounted=tuple(uncounted))


def _nested(node: fx.Node, counts: Sequence[Macs]) -> int | None:
    """Return the MACs of a node that runs subgraphs, or None if it is unknown how often it runs them."""
    totals = [count.total for count in counts]
    if not any(totals):
        return 0
    if node.target is torch.ops.higher_order.cond:
        return max(totals)
    return sum(totals) if node.op == "call_module" or _ONCE.search(str(node.target)) else None


def _subgraphs(node: fx.Node) -> Iterator[fx.Graph]:
    """Yield the graphs that a node calls."""
    names = [str(node.target)] if node.op == "call_module" else []
    names += [str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"]
    for name in names:
        owned = _owned(node.graph, name)
        if isinstance(owned, fx.GraphModule):
            yield owned.graph


def _owned(graph: fx.Graph, name: str) -> object:
    """Return what ``name`` denotes on the module that owns the graph, or None."""
    found: object = graph.owning_module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _value(node: fx.Node) -> object:
    """Return the (fake) value of a node."""
    value: object = node.meta.get("val")
    return _owned(node.graph, str(node.target)) if value is None and node.op == "get_attr" else value


def _matrices(node: fx.Node) -> int:
    """Count the floating tensors a node takes; a value that is unknown may be one."""
    operands: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), operands.append)
    return sum(value is None or _is_matrix(value) for value in map(_value, operands))


def _sized(arguments: Any) -> Any:
    """Replace every node in (nested) arguments by its shape, or by its value where that is not a tensor."""
    return fx.node.map_arg(arguments, _shape)


def _shape(node: fx.Node) -> Any:
    value = _value(node)
    if value is None:
        raise _UnknownSizeError(node.name)
    if isinstance(value, torch.Tensor):
        return tuple(map(_size, value.shape))
    return value


def _size(size: int | torch.SymInt) -> int:
    """Return a size as it was traced."""
    if not isinstance(size, torch.SymInt):
        return size
    hint = size.node.hint
    if hint is None:
        raise _UnknownSizeError(str(size))
    return int(hint)


# --- Running models -------------------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Collect the ops that the FLOP counter runs without counting, and that multiply matrices."""

    def __init__(self, counted: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = counted
        self.missed: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", func)
        if packet not in self.counted:
            leaves = tree_leaves((args, kwargs))
            if _multiplies(func, matrices=sum(map(_is_matrix, leaves))):
                self.missed[str(packet)] = None
        return func(*args, **(kwargs or {}))


def macs_of(module_or_callable: Callable[..., object], /, *args: Any, **kwargs: Any) -> int:
    """Run a callable once and count the MACs of what it runs, on real, fake or meta tensors.

    Runs under ``torch.utils.flop_counter.FlopCounterMode``, with rules added for what it misses (seen in torch 2.13:
    attention on CPU, matrix-vector products and grouped products count as nothing), and with the fused encoder layer
    of ``nn.TransformerEncoder`` off. Meta tensors run as fake ones: models ask them for values, unless they trace.
    Training or not, gradients or not: as the caller has set them; a backward pass inside the callable counts too.

    Raises `UncountedError` if an op ran that multiplies matrices and has no rule.
    """
    extra = {packet: _flops(rule) for packet, rule in RULES.items() if packet not in flop_registry}
    for name, rule in NAMED_RULES.items():
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            extra[packet] = _flops(rule)
    watch, counter = _Watch({**flop_registry, **extra}), FlopCounterMode(display=False, custom_mapping=extra)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _simulated(module_or_callable, args, kwargs), watch, counter:
            module_or_callable(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    if watch.missed:
        raise UncountedError(tuple(watch.missed))
    return _size(counter.get_total_flops()) // 2


def _simulated(function: object, *arguments: object) -> AbstractContextManager[object]:
    """Return what makes meta tensors fake ones, if there are any."""
    leaves: list[object] = tree_leaves(arguments)
    leaves += function.parameters() if isinstance(function, nn.Module) else []
    meta = any(isinstance(leaf, torch.Tensor) and leaf.is_meta and not isinstance(leaf, FakeTensor) for leaf in leaves)
    return FakeTensorMode(allow_non_fake_inputs=True) if meta else nullcontext()


def _flops(rule: Rule) -> Callable[..., int]:
    """Turn a rule into a formula of the FLOP counter."""
    return lambda *args, **kwargs: 2 * rule(*args, **kwargs)


# --- Weights --------------------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> int:
    """Count the elements of the module's parameters, each tensor once; buffers do not count.

    Weights are tied if they are one ``Parameter``, or several over the same memory.
    """
    return sum(parameter.numel() for parameter in _distinct(module))


def weight_bytes(module: nn.Module) -> int:
    """Count the bytes of the module's parameters, each tensor once; buffers do not count."""
    return sum(parameter.numel() * parameter.element_size() for parameter in _distinct(module))


def _distinct(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield each parameter tensor once."""
    seen: set[object] = set()
    for parameter in module.parameters():
        try:
            key: object = (parameter.untyped_storage()._cdata, parameter.storage_offset(), parameter.numel())
        except (NotImplementedError, RuntimeError):  # a tensor subclass without memory of its own
            key = id(parameter)
        if key not in seen:
            seen.add(key)
            yield parameter
