"""The graph form of a model that is traced in regions: its own module, with a graph in the place of each region."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.calls import Entry, by_name, entry, signature_of
from fxslim.errors import InputError, NarrowError, UnsupportedModelError
from fxslim.outside import outermost
from fxslim.passes.emit import follow_device
from fxslim.passes.narrow import narrowed_copy
from fxslim.passes.paths import Path
from fxslim.passes.rewrite import Rewritten
from fxslim.plan import Plan
from fxslim.program import Program, Region, named_tensors
from fxslim.sharing import without_caches


@dataclass(frozen=True)
class Way:
    """One graph of a region.

    Attributes:
        entry: the calls that it takes.
        graph: takes the tensors, then the leaves of the arguments; returns the leaves of the result.
        tensors: names of the tensors inside the module, in the order in which the graph takes them.
        result: structure of the result.
    """

    entry: Entry
    graph: fx.GraphModule
    tensors: tuple[str, ...]
    result: pytree.TreeSpec

    def __deepcopy__(self, memo: dict[int, Any]) -> Way:
        """Copy the graph; the rest never changes."""
        return replace(self, graph=copy.deepcopy(self.graph, memo))


class RegionForward:
    """Stands in the place of a module's ``forward`` and runs one of its graphs.

    Attributes:
        module: the module; its tensors are read at every call, so that it can be moved and loaded.
        path: its path in the model.
        ways: its graphs.
    """

    def __init__(self, module: nn.Module, path: str, ways: tuple[Way, ...]) -> None:
        self.module = module
        self.path = path
        self.ways = ways
        self.signature = signature_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph that was traced for such a call; InputError where there is none."""
        if self.module.training:
            raise UnsupportedModelError(
                "a compiled model is for inference: dropout was traced in eval mode. Use fxslim.slim for a module that "
                "trains."
            )
        arguments = by_name(self.signature, args, kwargs)
        reason = None
        for way in self.ways:
            misfit = way.entry.misfit(arguments)
            if misfit is None:
                tensors = [_get(self.module, name) for name in way.tensors]
                leaves = way.graph(*tensors, *pytree.tree_leaves(arguments))
                return pytree.tree_unflatten(list(leaves), way.result)
            reason = reason or misfit
        raise InputError(unlike(self.path, reason))


def unlike(path: str, reason: str | None) -> str:
    """Say that a region is called in a way that was not traced."""
    return (
        f"{path} was compiled for other calls: {reason}. Compile with example_inputs that lead there, or use "
        "fxslim.slim, which keeps the model's own forward."
    )


def is_regional(model: nn.Module) -> bool:
    """Tell whether a model holds graphs in the place of regions."""
    return any(isinstance(vars(module).get("forward"), RegionForward) for module in model.modules())


def leads_as_traced(model: nn.Module, program: Program, way: Path) -> bool:
    """Tell whether a dense model calls its regions as they were traced, along a path.

    Raises:
        Exception: whatever the model raises for other reasons.
    """
    entries: dict[str, list[Entry]] = {}
    for region in program.regions:
        entries.setdefault(region.path, []).append(_entry(region, program))
    signatures = {path: signature_of(model.get_submodule(path)) for path in entries}

    def enter(path: str, args: Any, kwargs: Any) -> None:
        arguments = by_name(signatures[path], args, kwargs)
        reasons = [one.misfit(arguments) for one in entries[path]]
        if None not in reasons:
            raise InputError(unlike(path, reasons[0]))

    try:
        with outermost(model, frozenset(entries), enter, lambda: None):
            way.run(model)
    except InputError:
        return False
    return True


def _entry(region: Region, program: Program) -> Entry:
    return entry(region.call.example, region.inputs, region.ranges, program.graph)


def emit_regions(model: nn.Module, program: Program, made: Rewritten, plan: Plan) -> nn.Module:
    """Return a copy of a model with narrowed tensors, and a narrowed graph in the place of each region's forward.

    Args:
        model: the dense model.
        program: its regions.
        made: their graphs, narrowed or masked, and the tensors that belong to them.
        plan: what is taken out of the tensors; where the graphs are masked, what is zeroed in them instead.
    """
    small = narrowed_copy(model, plan.model_copy(update={"edits": (), "spread": ()}))
    without_caches(small)
    _check(small, program, made)
    ways: dict[str, list[Way]] = {}
    for region in program.regions:
        module = small.get_submodule(region.path)
        ways.setdefault(region.path, []).append(_way(region, program, made, module))
    for path, of_path in ways.items():
        module = small.get_submodule(path)
        module.forward = RegionForward(module, path, tuple(of_path))
    return small.eval()


def _check(small: nn.Module, program: Program, made: Rewritten) -> None:
    """Raise NarrowError unless the graphs' tensors are the module's, row for row."""
    tensors = named_tensors(small)
    used = {program.tensor_of[node.name] for node in program.graph.find_nodes(op="placeholder")
            if node.name in program.tensor_of}  # fmt: skip
    for name in used - program.constants:
        if tensors[name].shape != made.tensors[name].shape:
            raise NarrowError(f"{name} keeps other rows in the graph than in the module")


def _way(region: Region, program: Program, made: Rewritten, module: nn.Module) -> Way:
    """Take one region out of the rewritten graph; its constants and masks become buffers of the module."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    needed = _needed(region, made)
    placed = {node.name: node for node in made.graph.find_nodes(op="placeholder")}
    tensors: list[str] = []
    for node in (node for node in made.graph.nodes if node in needed):
        if node.name in region.own:
            tensors.append(region.own[node.name])
        elif node.op == "get_attr":
            tensors.append(_buffer(module, made.tensors[str(node.target)]))
        elif node.name in program.tensor_of:
            tensors.append(_buffer(module, made.tensors[program.tensor_of[node.name]]))
        else:
            continue
        twins[node] = _placeholder(graph, node)
    for name in region.inputs:
        twins[placed[name]] = _placeholder(graph, placed[name])
    for node in made.graph.nodes:
        if node.op == "call_function" and node in needed:
            twins[node] = graph.node_copy(node, twins.__getitem__)
    graph.output(fx.map_arg(_results(region, made), twins.__getitem__))
    follow_device(graph, [twins[placed[name]] for name in region.inputs])
    graph.eliminate_dead_code()
    return Way(_entry(region, program), fx.GraphModule(nn.Module(), graph), tuple(tensors), region.call.out_spec)


def _results(region: Region, made: Rewritten) -> tuple[Any, ...]:
    first, last = region.outputs
    results: Any = made.graph.output_node().args[0]
    return tuple(results[first:last])


def _needed(region: Region, made: Rewritten) -> set[fx.Node]:
    """Return the nodes that a region's results are computed from."""
    needed: set[fx.Node] = set()
    waiting = [leaf for leaf in _results(region, made) if isinstance(leaf, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return needed


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.placeholder(node.name)
    made.meta = dict(node.meta)
    return made


def _buffer(module: nn.Module, tensor: torch.Tensor) -> str:
    """Register a tensor that no module holds; return its name."""
    number = 0
    while f"fxslim_constant_{number}" in module._buffers:
        if module._buffers[f"fxslim_constant_{number}"] is tensor:
            return f"fxslim_constant_{number}"
        number += 1
    module.register_buffer(f"fxslim_constant_{number}", tensor.detach(), persistent=False)
    return f"fxslim_constant_{number}"


def _get(module: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(path), leaf)
    return tensor
