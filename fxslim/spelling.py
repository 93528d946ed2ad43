"""One spelling for what export may write in several ways, so that passes meet one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxslim.errors import TraceError
from fxslim.program import is_symbolic

REGION_OPS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
SHAPED_LIKE = {
    torch.ops.aten.view_as.default: torch.ops.aten.reshape.default,
    torch.ops.aten.reshape_as.default: torch.ops.aten.reshape.default,
    torch.ops.aten.expand_as.default: torch.ops.aten.expand.default,
}
"""Operations that take a shape from another tensor, and what they do with it."""


def inline_regions(graph: fx.Graph) -> None:
    """Inline the bodies of ``no_grad`` and ``autocast(enabled=False)`` regions."""
    owner: Any = graph.owning_module
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in REGION_OPS:
            continue
        position = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        body_node: Any = node.args[position]
        if str(node.target) == "wrap_with_autocast" and node.args[2]:  # (device, dtype, enabled, cache, body, ...)
            raise TraceError("the model runs a region under autocast; trace it with autocast off.")
        body: Any = owner.get_submodule(body_node.target)
        copies: dict[fx.Node, Any] = {}
        inner = iter(node.args[position + 1 :])
        for sub in body.graph.nodes:
            if sub.op == "placeholder":
                copies[sub] = next(inner)
        with graph.inserting_before(node):
            results = graph.graph_copy(body.graph, copies)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
        if not body_node.users:
            graph.erase_node(body_node)
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in REGION_OPS:
            inline_regions(graph)
            return


def spell_shapes(graph: fx.Graph) -> None:
    """Spell out the shapes that operations take from another tensor, so that passes meet one form."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in SHAPED_LIKE:
            continue
        value, like = node.args
        with graph.inserting_before(node):
            sizes = [_size_node(graph, like, axis, size) for axis, size in enumerate(node.meta["val"].shape)]
        node.target = SHAPED_LIKE[node.target]
        node.args = (value, sizes)


def _size_node(graph: fx.Graph, like: Any, axis: int, size: Any) -> Any:
    if not is_symbolic(size):
        return int(size)
    read = graph.call_function(torch.ops.aten.sym_size.int, (like, axis))
    read.meta["val"] = size
    return read


def pair_einsums(graph: fx.Graph) -> None:
    """Take einsums of several operands apart, in the order in which torch multiplies them, so that each is a product.

    A letter is summed over as soon as no other operand and no axis of the result has it.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.einsum.default or len(node.args[1]) < 3:
            continue
        operands = list(node.args[1])
        letters = letters_of(str(node.args[0]).replace(" ", ""), [value.meta["val"].ndim for value in operands])
        if letters is None:
            continue
        terms, out = list(letters[:-1]), letters[-1]
        steps = iter(node.kwargs.get("path") or ())
        while len(operands) > 2:
            first, second = sorted((next(steps, 0), next(steps, 1)))
            right, left = operands.pop(second), operands.pop(first)
            names = terms.pop(second), terms.pop(first)
            needed = {letter for term in (*terms, out) for letter in term}
            kept = "".join(letter for letter in dict.fromkeys(names[1] + names[0]) if letter in needed)
            with graph.inserting_before(node):
                pair = graph.call_function(node.target, (f"{names[1]},{names[0]}->{kept}", [left, right]))
            pair.meta = node.meta | {"val": _outer(left, names[1], right, names[0], kept)}
            place = len(operands) if node.kwargs.get("path") else 0
            operands.insert(place, pair)
            terms.insert(place, kept)
        node.args, node.kwargs = (f"{','.join(terms)}->{out}", operands), {}


def _outer(left: fx.Node, first: str, right: fx.Node, second: str, kept: str) -> torch.Tensor:
    """Return what stands for the product of two values that keeps these letters."""
    sizes: dict[str, Any] = {}
    for node, names in ((left, first), (right, second)):
        for letter, size in zip(names, node.meta["val"].shape, strict=True):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
    made: torch.Tensor = left.meta["val"].new_empty([sizes[letter] for letter in kept])
    return made


def letters_of(equation: str, ranks: Sequence[int]) -> tuple[str, ...] | None:
    """Expand an einsum equation into one letter per axis: each operand's, then the result's.

    None where an operand has a letter twice.
    """
    inputs, _, out = equation.partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        letters = [letter for letter in sorted(set(inputs)) if letter.isalpha()]
        out = ("..." if "..." in inputs else "") + "".join(x for x in letters if inputs.count(x) == 1)
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    most = max(rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True))
    dots = "".join(spare[:most])
    expanded = []
    for term, rank in zip(terms, ranks, strict=True):
        count = rank - len(term.replace("...", ""))
        expanded.append(term.replace("...", dots[len(dots) - count :]))
    expanded.append(out.replace("...", dots))
    return None if any(len(set(term)) != len(term) for term in expanded) else tuple(expanded)
