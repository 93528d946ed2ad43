"""The module of an optimized graph: called like the graph that it was made of, for one device and one dtype."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.dtypes import Following
from fxslim.errors import InputError, UnsupportedModelError
from fxslim.passes.emit import CompiledModule
from fxslim.passes.inference.draft import Draft


class OptimizedModule(CompiledModule):
    """A compiled graph whose constants are computed, so that it can neither be moved nor cast.

    Attributes:
        _dtypes: those of the given graph's parameters; constants may have others.
    """

    _dtypes: frozenset[torch.dtype]

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        """Copy, and compile again what is compiled: torch leaves that out."""
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, OptimizedModule)
        copied._dtypes = self._dtypes
        for name, own in self.named_children():
            if own._compiled_call_impl is not None:
                copied.get_submodule(name).compile(dynamic=True)
        return copied

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        """Refuse another device and another dtype; what was cast to the dtype that it has, it is already."""

        def keeps(device: torch.device, dtype: torch.dtype) -> bool:
            moved = fn(torch.empty(0, dtype=dtype, device=device))
            return (moved.device, moved.dtype) == (device, dtype)

        tensors = [*self.parameters(), *self.buffers()]
        own = self._dtypes or {tensor.dtype for tensor in tensors}
        for device, dtype in sorted(product({tensor.device for tensor in tensors}, own), key=str):
            if not keeps(device, dtype):
                raise UnsupportedModelError(
                    f"an optimized graph stays in {dtype} on {device}: what depends on either was computed. Move or "
                    "cast the graph that it was made of, and optimize that."
                )
        super()._apply(lambda tensor: fn(tensor) if keeps(tensor.device, tensor.dtype) else tensor, recurse)
        return self


class PackedModule(OptimizedModule):
    """An optimized graph with weights that lie in memory as oneDNN multiplies them; what else reads them fails."""

    @property
    def packed(self) -> tuple[nn.Parameter, ...]:
        """Return those weights."""
        return tuple(own for own in self.parameters() if own.is_mkldnn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what products of packed weights would do wrong without a word."""
        if torch.is_autocast_enabled("cpu"):
            raise InputError(
                "a prepacked graph multiplies in the dtype of its weights, and autocast does not reach it: call it "
                "outside of autocast, cast the graph before it is optimized, or optimize without prepack=True."
            )
        leaves = pytree.tree_leaves((args, kwargs)) if torch.is_grad_enabled() else ()
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
            raise InputError(
                "a prepacked graph has no gradients, and an input requires one: call it under torch.no_grad(), or "
                "optimize without prepack=True."
            )
        with torch.no_grad():
            return super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        """Copy packed weights, too, which torch refuses."""
        for weight in self.packed:
            memo.setdefault(id(weight), nn.Parameter(weight.detach().clone(), requires_grad=False))
        return super().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled."""
        raise _unwritten()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: nobody could write it, and nobody else read it."""
        raise _unwritten()


def _unwritten() -> UnsupportedModelError:
    return UnsupportedModelError(
        "prepacked weights are for this process alone: they cannot be written, sent or shared. Take the graph that "
        "they were made of, and optimize that again where it is read."
    )


def emitted(draft: Draft, given: CompiledModule) -> OptimizedModule:
    """Turn a draft into a module; it shares the tensors that it has not made itself.

    Args:
        draft: the rewritten graph.
        given: the graph that it was made of.
    """
    root = nn.Module()
    graph, flat = copy.deepcopy(draft.graph), _flat(draft.tensors)
    for node in graph.find_nodes(op="get_attr"):
        node.target = flat[str(node.target)]
    for name, tensor in draft.tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            root.register_parameter(flat[name], nn.Parameter(tensor, requires_grad=False))
        else:
            root.register_buffer(flat[name], tensor)
    graph.set_codegen(given.graph._codegen)
    kind = PackedModule if any(tensor.is_mkldnn for tensor in draft.tensors.values()) else OptimizedModule
    made = kind(root, graph, class_name=type(given).__name__)
    made.meta.update(given.meta)
    made._caller = dataclasses.replace(given._caller, following=Following())
    made._dtypes = frozenset(p.dtype for p in given.parameters() if p.is_floating_point())
    return made.eval()


def _flat(names: Iterable[str]) -> dict[str, str]:
    """Return a name without dots for every name: a path of modules is walked anew at every call."""
    flat: dict[str, str] = {}
    for name in names:
        made = name.replace(".", "_")
        while made in flat.values():
            made += "_"
        flat[name] = made
    return flat


def through_inductor(made: OptimizedModule) -> OptimizedModule:
    """Return a module whose graph is one call of what ``torch.compile`` makes of a graph's operations."""
    inner = fx.GraphModule(made, _plain(made.graph), class_name="Operations").eval()
    inner.compile(dynamic=True)
    outer = fx.Graph()
    leaves = [outer.placeholder(node.name) for node in made.graph.find_nodes(op="placeholder")]
    outer.output(outer.call_module("operations", tuple(leaves)))
    outer.set_codegen(made.graph._codegen)
    root = nn.Module()
    root.add_module("operations", inner)
    whole = OptimizedModule(root, outer, class_name=type(made).__name__)
    whole.meta.update(made.meta)
    whole._caller, whole._dtypes = made._caller, made._dtypes
    return whole.eval()


def _plain(graph: fx.Graph) -> fx.Graph:
    """Return a copy that takes the leaves of the inputs, and returns those of the results."""
    copied = copy.deepcopy(graph)
    copied.set_codegen(fx.graph.CodeGen())
    return copied
