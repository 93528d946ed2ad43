"""Run a traced graph on many batches side by side, step by step, holding only what is still to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxslim.lazy import saved_by_name
from fxslim.passes.annotate import ASSERTIONS, operation
from fxslim.passes.emit import Caller, specs
from fxslim.passes.masking import Masks
from fxslim.program import Program

Intercept = Callable[[fx.Node, torch.Tensor], torch.Tensor]
"""Takes a node and the value it is about to multiply, returns what it multiplies instead."""


class Tape:
    """One program on a list of batches, all at the same place in the graph.

    Memory: what later operations read (hidden states and masks, between two layers), for every batch.

    Args:
        program: the program; not one of regions.
        batches: keyword inputs, each with the structure of the traced example.
        tensors: canonical tensor name -> tensor; read when an operation is run, so that it may change on the way.
        masks: what is masked; their tensors come before the others.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Mapping[str, Any]],
        tensors: Mapping[str, torch.Tensor],
        masks: Masks | None = None,
    ) -> None:
        self.program, self.tensors, self.masks = program, tensors, masks or Masks()
        self.caller = Caller(program.call, specs(program), "the model", program.ranges)
        self.nodes = [n for n in _needed(program.graph) if n.op != "placeholder"]
        self.values: list[dict[fx.Node, Any]] = [self._inputs(batch) for batch in batches]
        self.at = 0
        self._place = {node: i for i, node in enumerate(self.nodes)}
        self._ends: dict[int, list[fx.Node]] = {}
        for node in program.graph.nodes:
            last = max((self._place[user] for user in node.users if user in self._place), default=-1)
            self._ends.setdefault(last, []).append(node)

    def fork(self, masks: Masks | None = None) -> Tape:
        """Return a second tape at the same place, with other masks if any; running one leaves the other where it is."""
        other = object.__new__(Tape)
        other.__dict__.update(self.__dict__)
        other.masks = masks or self.masks
        other.values = [dict(values) for values in self.values]
        return other

    def place(self, node: fx.Node) -> int:
        """Return a node's place in the order of execution."""
        return self._place[node]

    def meets(self, masks: Masks) -> fx.Node:
        """Return the first operation that reads anything that is masked."""

        def masked(node: fx.Node) -> bool:
            return node in masks.inputs or any(
                self.program.tensor_name(a) in masks.tensors for a in node.all_input_nodes
            )

        return next((node for node in self.nodes if masked(node)), self.nodes[-1])

    @torch.no_grad()
    def advance(self, until: fx.Node) -> None:
        """Run everything before a node, on every batch."""
        end = self._place[until]
        for i in range(self.at, end):
            for values in self.values:
                self._step(self.nodes[i], values)
                for dead in self._ends.get(i, ()):
                    values.pop(dead, None)
        self.at = max(self.at, end)

    def holds(self, node: fx.Node) -> bool:
        """Tell whether a node's value is there now."""
        return all(node in values for values in self.values)

    @torch.no_grad()
    def peek(self, node: fx.Node, batch: int) -> Any:
        """Return what a node computes from what is there, without going on; it is not computed again."""
        self._step(node, self.values[batch])
        return self.values[batch][node]

    @torch.no_grad()
    def outputs(self, batch: int) -> Any:
        """Run one batch to its end and return the outputs as the model returns them; the tape stays where it is."""
        return self.finish(batch)

    def finish(
        self,
        batch: int,
        intercept: Intercept | None = None,
        read: Mapping[fx.Node, fx.Node] | None = None,
        after: Intercept | None = None,
    ) -> Any:
        """Run one batch to its end, with gradients where they are enabled.

        Args:
            batch: which.
            intercept: called with a node and what it reads, for the nodes of ``read``.
            read: node -> the operand of it that is intercepted.
            after: called with every node and its tensor; what it returns is handed on.
        """
        values = dict(self.values[batch])
        with saved_by_name(self.tensors):
            return self._finished(values, intercept, read or {}, after)

    def _finished(
        self,
        values: dict[fx.Node, Any],
        intercept: Intercept | None,
        read: Mapping[fx.Node, fx.Node],
        after: Intercept | None,
    ) -> Any:
        for i in range(self.at, len(self.nodes)):
            node = self.nodes[i]
            if node.op == "output":
                leaves: Any = fx.map_arg(node.args[0], lambda n: self._value(n, values))
                return pytree.tree_unflatten(list(leaves), self.program.call.out_spec)
            if intercept is not None and node in read:
                held = self._value(read[node], values)
                values[node] = self._compute(node, {**values, read[node]: intercept(node, held)})
            else:
                self._step(node, values)
            if after is not None and isinstance(values.get(node), torch.Tensor):
                values[node] = after(node, values[node])
            for dead in self._ends.get(i, ()):
                values.pop(dead, None)
        raise AssertionError("a graph ends in its output")

    def _inputs(self, batch: Mapping[str, Any]) -> dict[fx.Node, Any]:
        leaves = self.caller.bind(batch, {})
        nodes = {node.name: node for node in self.program.graph.find_nodes(op="placeholder")}
        return {nodes[name]: leaf for name, leaf in zip(self.program.inputs, leaves, strict=True)}

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        name = self.program.tensor_name(node)
        if name is None or node in values:
            return values[node]
        held = self.masks.tensors if name in self.masks.tensors else self.tensors
        return held[name].detach()

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        for mask in self.masks.inputs.get(node, ()):
            held = self._value(mask.source, values)
            values = {**values, mask.source: held.masked_fill(mask.gone.to(held.device), mask.value)}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, values))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _step(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.op == "call_function" and node not in values:
            values[node] = self._compute(node, values)


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that the outputs depend on, in order; assertions are left out."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        asserts = node.op == "call_function" and operation(node) in ASSERTIONS
        if not asserts and (node.op == "output" or any(user in needed for user in node.users)):
            needed.add(node)
    return [node for node in graph.nodes if node in needed]
