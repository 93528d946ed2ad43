"""What products make of constants: channels whose weights are zero, or meet nothing but constants, are constant."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxslim.passes.folding.facts import CONSTANT, VARIES, Fact, Result, Tracker, fact, rule
from fxslim.passes.folding.rows import DROPOUT, HIDDEN, OTHER, UNKNOWN, bounded, unequal
from fxslim.passes.rules.contraction import matmul_names
from fxslim.passes.rules.walk import parameter, sizes
from fxslim.program import module_path
from fxslim.spelling import letters_of

PADDING = "a convolution pads its input with zeros"


@rule("aten.linear", source=True)
def linear(tracker: Tracker, node: fx.Node) -> Result:
    """``x (..., in) @ weight (out, in).T + bias``."""
    batch = "abcdefgh"[: len(sizes(node)) - 1]
    out = _contract(tracker, node, node.args[0], node.args[1], (batch + "i", "oi", batch + "o"))
    return _plus(tracker, node, out, parameter(node, "bias", 2))


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", source=True)
def matmul(tracker: Tracker, node: fx.Node) -> Result:
    """Matrix product with broadcast batch axes."""
    first, second = node.args[:2]
    return _contract(tracker, node, first, second, matmul_names(len(_shape(first)), len(_shape(second))))


@rule("aten.addmm", "aten.baddbmm", source=True)
def addmm(tracker: Tracker, node: fx.Node) -> Result:
    """``bias + first @ second``."""
    if parameter(node, "beta", 3, 1) != 1 or parameter(node, "alpha", 4, 1) != 1:
        return None
    first, second = node.args[1:3]
    out = _contract(tracker, node, first, second, matmul_names(len(_shape(first)), len(_shape(second))))
    return _plus(tracker, node, out, node.args[0])


@rule("aten.einsum", source=True)
def einsum(tracker: Tracker, node: fx.Node) -> Result:
    """Einstein sums of two operands."""
    operands: Any = node.args[1]
    if len(operands) != 2:
        return None
    names = letters_of(str(node.args[0]).replace(" ", ""), [len(_shape(operand)) for operand in operands])
    first, second = operands
    return None if names is None else _contract(tracker, node, first, second, (names[0], names[1], names[2]))


@rule("aten.scaled_dot_product_attention")
def attention(tracker: Tracker, node: fx.Node) -> Result:
    """Constant values pass where every row of the weights sums to one."""
    value = tracker.known(node.args[2])
    if value is None:
        return None
    grouped = parameter(node, "enable_gqa", 7, False) and value.state.shape[-3] > 1
    if grouped:
        times = sizes(node)[-3] // value.state.shape[-3]
        value = value.map(lambda t: t.repeat_interleave(times, dim=-3))
    value = value.over([-2 % value.state.ndim])
    return _weighted(tracker, node, value) if _moves(value) else value


def _moves(known: Fact) -> bool:
    """Tell whether any constant is not zero, so that the weights it is summed by matter."""
    return bool((known.constant & (known.value != 0)).any())


def _weighted(tracker: Tracker, node: fx.Node, known: Fact, weights: Any = None) -> Fact | None:
    """Return what attention makes of values that are constant over the positions.

    Args:
        tracker: the walk.
        node: the fused attention, or the product of weights and values.
        known: what is known of the values, laid out as the result.
        weights: the weights; None for a fused attention.
    """
    reason = _unequal(tracker, node) if weights is None else unequal(tracker.program, weights)
    if reason is None:
        dropping = tracker.dropping
        dropped = dropping is not None and module_path(node) in dropping
        reason = UNKNOWN if dropping is None else DROPOUT if dropped else None
    return known if reason is None else tracker.losing(known, known.value != 0, reason)


def _unequal(tracker: Tracker, node: fx.Node) -> str | None:
    """Return why the rows of a fused attention may not sum to one."""
    if parameter(node, "dropout_p", 4, 0.0):
        return DROPOUT
    mask = parameter(node, "attn_mask", 3)
    if not isinstance(mask, fx.Node):
        return None
    floating = mask.meta["val"].is_floating_point()
    return None if floating and bounded(tracker.program, mask) else HIDDEN


def _shape(argument: Any) -> tuple[int, ...]:
    return sizes(argument)


def _plus(tracker: Tracker, node: fx.Node, out: Fact | None, bias: Any) -> Fact | None:
    """Add a bias."""
    if out is None or bias is None:
        return out
    rank = len(sizes(node))
    own = tracker.laid(bias, rank)
    both = out.constant & own.constant
    state = torch.where(both, CONSTANT, torch.where(own.constant, out.state.int(), VARIES)).to(torch.int16)
    return fact(state, (out.value + own.value).to(node.meta["val"].dtype))


def _contract(tracker: Tracker, node: fx.Node, first: Any, second: Any, names: tuple[str, str, str]) -> Fact | None:
    """Multiply two values and sum over the axes that the output lacks."""
    left, right, out = names
    tensors = tracker.tensor(first), tracker.tensor(second)
    if tensors[1] is not None and tensors[0] is None:
        return _by_weight(tracker, node, (first, left), (tensors[1], right), out)
    if tensors[0] is not None and tensors[1] is None:
        return _by_weight(tracker, node, (second, right), (tensors[0], left), out)
    if tensors[0] is None and tensors[1] is None:
        for weights, (values, letters) in (((first, left), (second, right)), ((second, right), (first, left))):
            known = tracker.known(values)
            if known is not None:
                return _of_two(tracker, node, weights, (known, letters), out)
    return None


def _of_two(
    tracker: Tracker, node: fx.Node, weights: tuple[Any, str], values: tuple[Fact, str], out: str
) -> Fact | None:
    """Sum constant values by weights that depend on data: attention weights, in any order of the operands.

    Args:
        tracker: the walk.
        node: the product.
        weights: one operand, and its letters.
        values: what is known of the other, and its letters.
        out: the letters of the result.
    """
    (argument, own), (known, letters) = weights, values
    summed = [letter for letter in letters if letter not in out]
    spread = _spread(known.over([letters.index(letter) for letter in summed]), letters, out)
    if not _moves(spread):
        return fact(spread.state, spread.value)
    if summed != [own[-1]]:
        return tracker.losing(spread, spread.value != 0, OTHER)
    return _weighted(tracker, node, spread, argument)


def _spread(known: Fact, letters: str, out: str) -> Fact:
    """Lay a fact's axes out in the order of an output; axes of its own are of size 1 and go."""
    kept = [letter for letter in out if letter in letters]
    order = [letters.index(letter) for letter in kept]
    rest = [axis for axis in range(len(letters)) if axis not in order]

    def lay(t: torch.Tensor) -> torch.Tensor:
        own = dict(zip(letters, t.shape, strict=True))
        return t.permute(*order, *rest).reshape([own.get(letter, 1) for letter in out])

    return known.map(lay)


def _by_weight(
    tracker: Tracker, node: fx.Node, data: tuple[Any, str], weight: tuple[torch.Tensor, str], out: str
) -> Fact | None:
    """Multiply data by a tensor of the model."""
    (argument, letters), (tensor, own) = data, weight
    summed = [letter for letter in own if letter not in out]
    free = [letter for letter in own if letter in out]
    shape = dict(zip(letters, sizes(argument), strict=True))
    extent = dict(zip(own, tensor.shape, strict=True))
    if not summed or set(free) & set(letters) or any(shape.get(letter) != extent[letter] for letter in summed):
        return None
    matrix = tensor.permute([own.index(letter) for letter in (*free, *summed)])
    matrix = matrix.reshape(math.prod(extent[letter] for letter in free), -1)
    known = tracker.known(argument)
    if known is not None:
        known = known.over([axis for axis, letter in enumerate(letters) if letter not in summed])
        full = [shape[letter] if letter in summed else 1 for letter in letters]
        order = [letters.index(letter) for letter in summed]
        rest = [axis for axis in range(len(letters)) if axis not in order]
        known = known.map(lambda t: t.expand(full).permute(*order, *rest).reshape(-1))
    made = channels(matrix, known)
    if made is None:
        return None
    made = Fact(made.state, made.value.to(node.meta["val"].dtype))
    return _spread(made.map(lambda t: t.reshape([extent[letter] for letter in free])), "".join(free), out)


def channels(matrix: torch.Tensor, known: Fact | None) -> Fact | None:
    """Return which channels of a product are constant, before a bias.

    Args:
        matrix: (out, in).
        known: what is known of the inputs, (in,); None for nothing.
    """
    constant = known.constant if known is not None else torch.zeros(matrix.shape[1], dtype=torch.bool)
    data = (~constant).nonzero().reshape(-1).to(matrix.device)
    rows = torch.arange(len(matrix), device=matrix.device)
    if len(data):
        rows = (matrix[:, data[0]] == 0).nonzero().reshape(-1)
        rows = rows[~(matrix[rows][:, data] != 0).any(dim=1)]
    if not len(rows):
        return None
    state = torch.zeros(len(matrix), dtype=torch.int16)
    value = torch.zeros(len(matrix), dtype=matrix.dtype)
    state[rows.cpu()] = CONSTANT
    if known is not None and bool(constant.any()):
        weights = matrix[rows][:, constant.to(matrix.device)].cpu().double()
        value[rows.cpu()] = (weights @ known.value[constant].double()).to(matrix.dtype)
    return Fact(state, value)


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", source=True)
def convolution(tracker: Tracker, node: fx.Node) -> Result:
    """Contract the channel axis and the kernel; zeros around the input are another value than a constant."""
    weight, groups = tracker.tensor(node.args[1]), parameter(node, "groups", 6, 1)
    if weight is None or len(sizes(node.args[0])) != weight.ndim:  # type: ignore[arg-type]
        return None
    known = tracker.known(node.args[0])
    if known is not None:
        known = known.over([axis for axis in range(weight.ndim) if axis != 1])
        known = tracker.losing(known, known.value != 0, PADDING) if pads(node) else known
    if known is not None:
        count = sizes(node.args[0])[1]  # type: ignore[arg-type]
        known = known.map(lambda t: t.reshape(-1).expand(count))
    kernel = weight.flatten(2)
    if groups == 1:
        spread = known and known.map(lambda t: t.repeat_interleave(kernel.shape[2]))
        made = channels(kernel.flatten(1), spread)
    elif kernel.shape[1] == 1 and groups == len(kernel):
        made = _depthwise(kernel[:, 0], known)
    else:
        return None
    if made is None:
        return None
    shape = (1, -1) + (1,) * (weight.ndim - 2)
    bias = parameter(node, "bias", 2)
    out = fact(made.state.reshape(shape), made.value.reshape(shape))
    if bias is None or out is None:
        return out
    own = tracker.operand(bias)
    if own is None:
        return None
    return fact(out.state, (out.value + own.value.reshape(shape)).to(node.meta["val"].dtype))


def _depthwise(kernel: torch.Tensor, known: Fact | None) -> Fact | None:
    """Scale each channel by the sum of its kernel.  (channels, positions of the kernel)"""
    zero = ~(kernel != 0).any(dim=1).cpu()
    if known is None:
        return fact(torch.where(zero, CONSTANT, VARIES).to(torch.int16), torch.zeros(len(kernel), dtype=kernel.dtype))
    state = torch.where(zero, CONSTANT, known.state.int()).to(torch.int16)
    value = torch.where(known.constant, known.value.double() * kernel.double().sum(dim=1).cpu(), 0.0)
    return fact(state, value.to(kernel.dtype))


def pads(node: fx.Node) -> bool:
    """Tell whether a convolution sees zeros around its input."""
    padding = parameter(node, "padding", 4, 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)
