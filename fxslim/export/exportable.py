"""A model as one exported program that takes and returns tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.errors import TraceError
from fxslim.inputs import bind, fresh
from fxslim.passes.emit import CompiledModule
from fxslim.passes.inference.optimized import PackedModule
from fxslim.passes.paths import Path
from fxslim.passes.regional import is_regional
from fxslim.program import Program, is_symbolic
from fxslim.sharing import share, without_caches
from fxslim.trace import exported

OTHER_SIZES = ((3, 11), (1, 5))
"""Batches and lengths that are compared as well, where the trace left them open."""


@dataclass(frozen=True)
class Exportable:
    """A model, ready to be written.

    Attributes:
        module: a copy that shares the model's tensors; its forward returns tensors by name.
        program: the exported program of it.
        traced: the same as fxslim sees it: inputs and open sizes.
        outputs: names of what it returns.
    """

    module: nn.Module
    program: torch.export.ExportedProgram
    traced: Program
    outputs: tuple[str, ...]

    @property
    def example(self) -> Mapping[str, Any]:
        """Return the inputs that were traced."""
        return self.traced.call.example

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Return a word for every open size: input -> axis -> word."""
        words: dict[str, str] = {}
        for name, values in self._values().items():
            side = "decoder_" if name.startswith("decoder_") else ""
            for axis, size in enumerate(values):
                if is_symbolic(size):
                    word = ("batch", f"{side}sequence")[axis] if axis < 2 else f"{name}_{axis}"
                    words.setdefault(str(size), word)
        return {
            name: {axis: words[str(size)] for axis, size in enumerate(values) if is_symbolic(size)}
            for name, values in self._values().items()
        }

    @property
    def sizes(self) -> dict[str, tuple[int | str, ...]]:
        """Return every input's sizes, words where they are open."""
        open_axes = self.axes
        return {
            name: tuple(open_axes[name].get(axis) or int(size) for axis, size in enumerate(values))
            for name, values in self._values().items()
        }

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield the traced inputs, and fresh ones of other sizes."""
        yield dict(self.example)
        seen = {_shapes(self.example)}
        for seed, (batch, length) in enumerate(OTHER_SIZES):
            inputs = fresh(self.traced, seed=seed, batch=batch, length=length)
            if _shapes(inputs) not in seen:
                seen.add(_shapes(inputs))
                yield inputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return what the model itself returns."""
        return dict(zip(self.outputs, Path("as given", inputs).run(self.module), strict=True))

    def _values(self) -> dict[str, tuple[Any, ...]]:
        nodes = {node.name: node.meta.get("val") for node in self.traced.graph.find_nodes(op="placeholder")}
        names = named_tensors(self.example)
        values = [nodes[name] for name in self.traced.inputs if isinstance(nodes[name], torch.Tensor)]
        return {name: tuple(value.shape) for name, value in zip(names, values, strict=True)}


def exportable(model: nn.Module, example_inputs: Any, *, dynamic: bool) -> Exportable:
    """Export a copy of a model.

    Args:
        model: a module, or a compiled graph.
        example_inputs: as in `fxslim.inspect`.
        dynamic: leave sizes open.

    Raises:
        TraceError: the model is not one graph.
    """
    if is_regional(model):
        raise TraceError(
            f"{type(model).__name__} was traced in regions: it is a module with several graphs inside, and no format "
            "holds those. Export the parts that can be traced by themselves."
        )
    if isinstance(model, CompiledModule):
        inductors = any(part._compiled_call_impl is not None for part in model.modules())
        if inductors or isinstance(model, PackedModule):
            made = "code of inductor is" if inductors else "prepacked weights are"
            raise TraceError(
                f"{made} for this machine alone, and no format holds that. Export the graph itself, or what "
                "fxslim.optimize returns without inductor=True and prepack=True."
            )
        module = _around(model)
        candidates = (model.example,) if example_inputs is None else bind(model, example_inputs)
    else:
        module = share(model).eval()
        without_caches(module)
        candidates = bind(module, example_inputs)
    forward = _agreeing(model) if isinstance(model, CompiledModule) else module.forward

    def named(**given: Any) -> dict[str, torch.Tensor]:
        return named_tensors(forward(**given))

    module.forward = named
    program, traced = exported(module, candidates, open_axes=None if dynamic else 0)
    with torch.no_grad():
        outputs = tuple(named(**traced.call.example))
    return Exportable(module, program, traced, outputs)


def _around(graph: CompiledModule) -> nn.Module:
    """Return a module that holds a graph's tensors and is none itself: export would take its generated code apart."""
    module = nn.Module()
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(module, table, getattr(graph, table))
    return module.eval()


def _agreeing(graph: CompiledModule) -> Callable[..., Any]:
    """Return a graph's forward, which first says what sizes of inputs are equal, as they were when it was traced.

    Export compares sizes as they come up. What it finds to be equal late, it has held to be different until then.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    for number, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if is_symbolic(size):
                places.setdefault(str(size), []).append((number, axis))

    def forward(**given: Any) -> Any:
        leaves = graph._caller.bind(given, {})
        for (number, axis), *others in places.values():
            for other, along in others:
                torch._check(leaves[other].shape[along] == leaves[number].shape[axis])
        return graph(**given)

    return forward


def named_tensors(tree: Any) -> dict[str, torch.Tensor]:
    """Return the tensors in nested containers by their paths: ``logits``, ``hidden_states.0``; ``output`` alone."""
    leaves = pytree.tree_flatten_with_path(tree)[0]
    return {
        ".".join(map(_step, path)) or "output": leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)
    }  # fmt: skip


def _step(key: Any) -> str:
    return str(next(getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field)))


def _shapes(inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in named_tensors(inputs).values())
