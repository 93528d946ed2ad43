"""Put the graphs of several regions side by side into one program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.program import CallSpec, Program, Region, forward_parameters


@dataclass(frozen=True)
class Part:
    """One region before it is put beside the others.

    Attributes:
        path: path of the module.
        program: its own trace; names are relative to the module.
        calls: how many calls it stands for.
    """

    path: str
    program: Program
    calls: int


def unite(
    parts: Iterable[Part],
    naming: tuple[dict[str, torch.Tensor], dict[str, str]],
    transient: frozenset[str],
    call: CallSpec,
) -> Program:
    """Return one program of all parts: tensors that they share are one, every input and every output is a region's.

    Args:
        parts: the regions, in the order of execution.
        naming: the model's tensors by canonical name, and their aliases.
        transient: names of buffers that are no part of the state dict.
        call: how the whole model is called.
    """
    parts = tuple(parts)
    tensors, aliases = dict(naming[0]), naming[1]
    union = _Union(fx.Graph(), {}, {}, tensors, {id(tensor): name for name, tensor in tensors.items()}, set())
    for part in parts:
        union.placeholders(part)
    outputs: list[Any] = []
    regions = []
    for part in parts:
        found = union.body(part)
        regions.append(union.region(part, (len(outputs), len(outputs) + len(found))))
        outputs.extend(found)
    union.graph.output(tuple(outputs))
    return Program(
        graph=union.graph,
        tensor_of=union.tensor_of,
        tensors=tensors,
        aliases=aliases,
        inputs=tuple(name for region in regions for name in region.inputs),
        call=call,
        notes=_notes(parts),
        constants=frozenset(union.constants),
        transient=transient,
        regions=tuple(regions),
    )


def whole_call(model: nn.Module, example: Mapping[str, Any], result: Any, filled: frozenset[str]) -> CallSpec:
    """Return how a model that is not traced as a whole is called, and what it returns."""
    names, defaults, trailing = forward_parameters(model)
    return CallSpec(
        names=names,
        defaults=defaults,
        example=example,
        filled=filled & set(example),
        in_spec=pytree.tree_structure(dict(example)),
        out_spec=pytree.tree_structure(result),
        trailing=trailing,
    )


@dataclass(frozen=True)
class _Union:
    """The graph that is being put together."""

    graph: fx.Graph
    twins: dict[fx.Node, fx.Node]
    tensor_of: dict[str, str]
    tensors: dict[str, torch.Tensor]
    names: dict[int, str]
    constants: set[str]

    def placeholders(self, part: Part) -> None:
        for node in part.program.graph.find_nodes(op="placeholder"):
            self._copy(node, part)
            own = part.program.tensor_name(node)
            if own is not None:
                self.tensor_of[self.twins[node].name] = self._name(part, own)

    def body(self, part: Part) -> tuple[Any, ...]:
        """Copy the operations of a part; return its outputs."""
        for node in part.program.graph.nodes:
            if node.op == "call_function":
                self._copy(node, part)
        results = part.program.graph.output_node().args[0]
        return tuple(self.twins[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in results)  # type: ignore[union-attr]

    def region(self, part: Part, outputs: tuple[int, int]) -> Region:
        program = part.program
        name_of = {node.name: self.twins[node].name for node in program.graph.find_nodes(op="placeholder")}
        return Region(
            path=part.path,
            call=program.call,
            inputs=tuple(name_of[name] for name in program.inputs),
            outputs=outputs,
            own={name_of[at]: name for at, name in program.tensor_of.items() if name not in program.constants},
            ranges=tuple(replace(limit, input=name_of[limit.input]) for limit in program.ranges),
            calls=part.calls,
        )

    def _copy(self, node: fx.Node, part: Part) -> None:
        twin = self.graph.node_copy(node, self.twins.__getitem__)
        stack = node.meta.get("nn_module_stack") or {}
        if stack:
            inside = {key: (_join(part.path, path), kind) for key, (path, kind) in stack.items()}
            twin.meta["nn_module_stack"] = inside
        self.twins[node] = twin

    def _name(self, part: Part, own: str) -> str:
        """Return the canonical name of a part's tensor; constants that tracing has lifted get one."""
        tensor = part.program.tensors[own]
        if id(tensor) not in self.names:
            name = f"{part.path}.{own}"
            while name in self.tensors:
                name += "_"
            self.names[id(tensor)] = name
            self.tensors[name] = tensor
            self.constants.add(name)
        return self.names[id(tensor)]


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if inner else outer


def _notes(parts: tuple[Part, ...]) -> tuple[str, ...]:
    """Return what the parts' traces say, once, with the paths of those that say it."""
    said: dict[str, list[str]] = {}
    for part in parts:
        for note in part.program.notes:
            said.setdefault(note, []).append(part.path)
    return tuple(f"in {', '.join(dict.fromkeys(paths))}: {note}" for note, paths in said.items())
