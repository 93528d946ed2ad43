"""Read the operations of a graph: shapes, what flows through them, what patterns call them, and what stays."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxslim.draw.flow import Flow
from fxslim.draw.picture import Op
from fxslim.labels import Value
from fxslim.match import operation
from fxslim.passes.annotate import ASSERTIONS, Labels
from fxslim.passes.cut import Cut
from fxslim.passes.sites import Sites
from fxslim.plan import Plan
from fxslim.program import Program, is_symbolic, module_path

LETTERS = ("B", "S")
"""What open sizes of an input's first two axes are called; others keep the names that the trace gave them."""


def traced_ops(program: Program, labels: Labels, sites: Sites, flow: Flow, cut: Cut | None) -> tuple[Op, ...]:
    """Return the operations of a traced program that compute tensors, its inputs and its output."""
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in program.inputs]
    letters = _letters(inputs)
    roles, pinned, refused = _roles(program, sites), _pinned(labels), _refused(program, sites)
    streams = {group.id for group in flow.groups if group.kind == "stream"}
    carried = {node: flow.of(labels.values.get(node)) for node in program.graph.nodes}

    def op(node: fx.Node, tensors: tuple[str, ...]) -> dict[str, Any]:
        after, ratio = _left(node, labels.values.get(node), cut, letters)
        shared = any(streams & set(carried[argument]) for argument in node.all_input_nodes)
        why = [] if shared else [f"what it reads stays: {refused[name]}" for name in tensors if name in refused]
        return {
            "after": after,
            "ratio": ratio,
            "roles": tuple(roles.get(node.name, ())) + tuple(r for name in tensors for r in roles.get(name, ())),
            "pinned": (*pinned.get(node.name, ()), *why),
            "groups": carried[node],
        }

    return tuple(_ops(program.graph, inputs, program.tensor_name, letters, op))


def plain_ops(module: fx.GraphModule, plan: Plan | None) -> tuple[Op, ...]:
    """Return the operations of a graph without labels, with the roles that a plan knows its weights by."""
    roles: dict[str, list[tuple[str, str]]] = {}
    for part in plan or ():
        for role, weights in part.site.roles.items():
            for weight in weights:
                roles.setdefault(weight, []).append((part.site.name, role))
    inputs = [*module.graph.find_nodes(op="placeholder")]

    def op(node: fx.Node, tensors: tuple[str, ...]) -> dict[str, Any]:
        return {"roles": tuple(role for name in tensors for role in roles.get(name, ()))}

    def tensor(node: fx.Node) -> str | None:
        return str(node.target) if node.op == "get_attr" else None

    return tuple(_ops(module.graph, inputs, tensor, _letters(inputs), op))


def _ops(
    graph: fx.Graph,
    inputs: Sequence[fx.Node],
    tensor: Callable[[fx.Node], str | None],
    letters: Mapping[str, str],
    more: Callable[[fx.Node, tuple[str, ...]], dict[str, Any]],
) -> Iterator[Op]:
    """Yield what computes tensors, in order; the tensors of a model are part of what reads them."""
    number: dict[fx.Node, int] = {}
    for node in graph.nodes:
        known = _tensors(node.meta.get("val")) or node.op in ("call_module", "call_method", "output")
        computes = node.op in ("call_function", "call_module", "call_method", "output") and known
        if not (computes or node in inputs) or operation(node) in ASSERTIONS:
            continue
        read = node.all_input_nodes
        tensors = tuple(dict.fromkeys(name for name in map(tensor, read) if name is not None))
        shape, dtype = _described(node.meta.get("val"), letters)
        kind = "input" if node in inputs else operation(node)
        found = tuple(number[argument] for argument in read if argument in number)
        number[node] = len(number)
        yield Op(node.name, kind, module_path(node), found, shape, dtype, tensors=tensors, **more(node, tensors))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in (value if isinstance(value, tuple | list) else (value,)) if isinstance(one, torch.Tensor)]


def _letters(inputs: Iterable[fx.Node]) -> dict[str, str]:
    """Name the open sizes of the first axes of the inputs."""
    letters: dict[str, str] = {}
    for node in inputs:
        for value in _tensors(node.meta.get("val")):
            for size, letter in zip(value.shape, LETTERS, strict=False):
                if is_symbolic(size) and str(size) not in letters:
                    more = sum(given.startswith(letter) for given in letters.values())
                    letters[str(size)] = f"{letter}{more + 1}" if more else letter
    return letters


def _described(value: Any, letters: Mapping[str, str]) -> tuple[str, str]:
    """Return shapes and dtypes in words."""
    tensors = _tensors(value)
    shapes = (_shape([_size(size, letters) for size in one.shape]) for one in tensors)
    return ", ".join(shapes), ", ".join(dict.fromkeys(str(one.dtype).removeprefix("torch.") for one in tensors))


def _shape(sizes: Iterable[str]) -> str:
    return "×".join(sizes) or "scalar"


def _size(size: Any, letters: Mapping[str, str]) -> str:
    if not is_symbolic(size):
        return str(int(size))
    return re.sub(r"\w+", lambda word: letters.get(word[0], word[0]), str(size))


def _left(node: fx.Node, value: Any, cut: Cut | None, letters: Mapping[str, str]) -> tuple[str, float]:
    """Return the shape that a cut leaves, where it leaves another one, and which part that is."""
    if cut is None or not cut.touches(value):
        return "", 1.0
    texts, before, after = [], 0, 0
    values = value if isinstance(value, tuple) else (value,)
    for own, tensor in zip(values, _tensors(node.meta.get("val")), strict=False):
        if not isinstance(own, Value):
            continue
        left = cut.shape(own)
        before, after = before + math.prod(own.shape), after + math.prod(left)
        sizes = zip(tensor.shape, own.shape, left, strict=True)
        texts.append(_shape(_size(size, letters) if old == new else str(new) for size, old, new in sizes))
    return ", ".join(texts), after / before


def _roles(program: Program, sites: Sites) -> dict[str, list[tuple[str, str]]]:
    """Return what patterns call tensors and nodes: name -> (site, role)."""
    roles: dict[str, list[tuple[str, str]]] = {}
    for site in sites.sites:
        for role, weights in site.roles.items():
            for weight in weights:
                roles.setdefault(weight, []).append((site.name, role))
        for piece in site.slices:
            match = sites.naming.by_consumer(piece.tensor) if piece.role == "in" else None
            if match is None or match.kind != site.kind:
                continue
            for role, node in match.nodes.items():
                if role not in site.roles and role not in ("source", "target"):
                    roles.setdefault(node, []).append((site.name, role))
    return roles


def _pinned(labels: Labels) -> dict[str, tuple[str, ...]]:
    """Return why coordinates stay, by the node where that was decided."""
    reasons: dict[str, dict[str, None]] = {}
    for pin in labels.components.pins.values():
        reasons.setdefault(pin.node, {})[pin.reason] = None
    return {node: tuple(found) for node, found in reasons.items()}


def _refused(program: Program, sites: Sites) -> dict[str, str]:
    """Return why what linears read cannot be narrowed, by their weights."""
    weights = {f"{note.where}.weight": note.reason for note in sites.pinned}
    return {program.aliases.get(weight, weight): reason for weight, reason in weights.items()}
