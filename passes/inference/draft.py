"""A graph on its way to inference alone: a private copy, the tensors that it reads, and inputs to try it with."""

from __future__ import annotations

import builtins
import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxslim.passes.emit import CompiledModule


@dataclass(frozen=True)
class Draft:
    """A graph that passes rewrite, for one device and one dtype.

    Attributes:
        graph: a private copy.
        tensors: target of a ``get_attr`` node -> tensor; those of the given graph, or made of them.
        samples: leaves of inputs that the given graph takes, in several sizes.
    """

    graph: fx.Graph
    tensors: Mapping[str, torch.Tensor]
    samples: tuple[tuple[Any, ...], ...]

    def copied(self) -> Draft:
        """Return a draft with a graph of its own."""
        return Draft(copy.deepcopy(self.graph), self.tensors, self.samples)

    def holding(self, tensors: Mapping[str, torch.Tensor]) -> Draft:
        """Return this draft without what nobody reads, with those of these tensors that are read."""
        self.graph.eliminate_dead_code()
        read = {node.target for node in self.graph.find_nodes(op="get_attr")}
        return Draft(self.graph, {name: own for name, own in tensors.items() if name in read}, self.samples)


def drafted(graph: CompiledModule, samples: tuple[tuple[Any, ...], ...]) -> Draft:
    """Return a draft of a compiled graph, in which every device is the one on which the graph's tensors are."""
    made = copy.deepcopy(graph.graph)
    tensors = {node.target: _tensor(graph, node.target) for node in made.find_nodes(op="get_attr")}
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) == 1:
        (device,) = devices
        for node in made.find_nodes(op="call_function", target=builtins.getattr):
            if node.args[1] == "device":
                put(node, device)
    return Draft(made, tensors, samples)


def put(node: fx.Node, value: Any) -> None:
    """Put a plain value in the place of a node."""

    def swapped(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, swapped)
        user.kwargs = fx.node.map_arg(user.kwargs, swapped)
    node.graph.erase_node(node)


class Run(fx.Interpreter):
    """Runs a draft node by node, and shows every value to somebody."""

    def __init__(self, draft: Draft, show: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(torch.nn.Module(), graph=draft.graph)
        self.tensors = draft.tensors
        self.show = show

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Return a tensor of the draft."""
        return self.tensors[target]

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and show what it returns."""
        value = super().run_node(n)
        self.show(n, value)
        return value


def storage(tensor: torch.Tensor) -> int:
    """Return what tensors over the same memory have in common."""
    return int(tensor.untyped_storage()._cdata)


def reads(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> Counter[int]:
    """Count the nodes that read the memory of a tensor, under whatever name."""
    return Counter(storage(tensors[str(node.target)]) for node in graph.find_nodes(op="get_attr"))


def is_alone(node: fx.Node, tensors: Mapping[str, torch.Tensor], read: Counter[int]) -> bool:
    """Tell whether one operation alone reads a stored tensor, and nothing reads another one over the same memory."""
    return len(node.users) == 1 and read[storage(tensors[str(node.target)])] == 1


def add(tensors: dict[str, torch.Tensor], kind: str, tensor: torch.Tensor) -> str:
    """Keep a tensor under a name that is free; return the name."""
    number = len(tensors)
    while f"{kind}_{number}" in tensors:
        number += 1
    tensors[f"{kind}_{number}"] = tensor
    return f"{kind}_{number}"


def _tensor(graph: CompiledModule, name: Any) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(graph.get_submodule(path), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()
