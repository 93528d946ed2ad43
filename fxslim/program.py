"""The traced model: one ATen graph, its tensors under the model's own names, and how to call it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class CallSpec:
    """How the traced forward is called and what it returns.

    Attributes:
        names: parameters of the model's ``forward`` in order, ``*args``/``**kwargs`` left out.
        defaults: their default values (``inspect.Parameter.empty`` where there is none).
        example: the keyword arguments that were traced, tensors and plain values.
        filled: names among ``example`` whose tensor may be left out by the caller and is then made of ones, with the
            shape of the main input (attention masks).
        in_spec: pytree of ``example``; its leaves are the graph's user placeholders, in order.
        out_spec: pytree of the model's output.
        trailing: whether ``forward`` takes ``**kwargs``.

    """

    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    example: Mapping[str, Any]
    filled: frozenset[str]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    trailing: bool


@dataclass(frozen=True)
class SizeRange:
    """The sizes of one axis of one input for which the trace took the branches that it took."""

    input: str
    axis: int
    low: int
    high: int | None

    def __str__(self) -> str:
        bounds = [f"at least {self.low}"] if self.low else []
        bounds += [f"at most {self.high}"] if self.high is not None else []
        return "sizes of " + " and ".join(bounds)


@dataclass(frozen=True)
class Region:
    """A module that was traced by itself, in one of the ways in which the rest of the model calls it.

    Attributes:
        path: the module's path.
        call: how it is called: ``example`` holds its arguments by name, without those that are its defaults.
        inputs: placeholder names in the program's graph of the leaves of ``call.example``, in order.
        outputs: which of the graph's outputs are this region's: from, to.
        own: placeholder name -> name of the tensor inside the module, constants that tracing has lifted left out.
        ranges: sizes for which the trace holds; they name the placeholders in ``inputs``.
        calls: how many calls of the example run it stands for.
    """

    path: str
    call: CallSpec
    inputs: tuple[str, ...]
    outputs: tuple[int, int]
    own: Mapping[str, str]
    ranges: tuple[SizeRange, ...]
    calls: int


@dataclass(frozen=True)
class Program:
    """A model as one functional ATen graph, or as the graphs of its regions side by side in one.

    Placeholders come first: the model's tensors (``tensor_of`` maps a placeholder's name to the tensor's name), then
    the user's inputs (``inputs``). ``node.meta["val"]`` holds fake tensors with symbolic batch and length where the
    model allows it; ``node.meta["nn_module_stack"]`` says which module an operation came from.

    Attributes:
        graph: the graph; never edited in place, passes work on copies.
        tensor_of: placeholder name -> canonical tensor name (parameter, buffer or lifted constant).
        tensors: canonical tensor name -> the model's own tensor (not a copy).
        aliases: every further name of a tensor -> its canonical name.
        inputs: placeholder names of the user's inputs, in the order of the flattened example.
        call: how to call it.
        notes: what the user should know about the trace (sizes that had to be fixed, and why).
        ranges: sizes for which the trace holds, where it does not hold for all.
        constants: names of tensors that tracing has lifted; no module of the model holds them.
        transient: names of buffers that the model's state_dict leaves out.
        regions: the modules that were traced by themselves; empty where the whole model is one graph.
        untraced: path of a module that is part of no region -> why; ``""`` is the whole model.
        held: names of tensors that something outside of the regions reads or owns as well -> what.
        open_axes: how many leading axes of the inputs were traced for other sizes; None for all that can be.
    """

    graph: fx.Graph
    tensor_of: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    inputs: tuple[str, ...]
    call: CallSpec
    notes: tuple[str, ...] = ()
    constants: frozenset[str] = field(default_factory=frozenset)
    ranges: tuple[SizeRange, ...] = ()
    transient: frozenset[str] = field(default_factory=frozenset)
    regions: tuple[Region, ...] = ()
    untraced: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    open_axes: int | None = None

    def tensor_name(self, node: object) -> str | None:
        """Return the canonical tensor name of a placeholder node, or None for any other node."""
        if isinstance(node, fx.Node) and node.op == "placeholder":
            return self.tensor_of.get(node.name)
        return None

    def with_reasons(self, untraced: Mapping[str, str], held: Mapping[str, str]) -> Program:
        """Return a program of regions that says what is in none of them, and which tensors have to stay."""
        return replace(self, untraced=untraced, held=held)


UNBACKED = 12
"""Example value for sizes that depend on data and were not measured; divisible by the example batch sizes."""
MEASURED: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()
"""The sizes of a trace that depend on data, as they are on its example: symbol -> size."""


def hint(size: Any) -> int:
    """Return the example value of a size that may be symbolic."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.has_hint():
        return int(size.node.hint)
    expression = size.node.expr
    env = size.node.shape_env
    known = {**getattr(env, "backed_var_to_val", {}), **MEASURED.get(env, {})}
    values = {symbol: known.get(symbol, UNBACKED) for symbol in expression.free_symbols}
    return int(expression.subs(values))


def is_symbolic(size: Any) -> bool:
    """Tell whether a size stays open (batch, length) rather than fixed by the trace."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the example shape of a node's value (``()`` for plain numbers)."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if isinstance(value, torch.Tensor):
        return tuple(hint(size) for size in value.shape)
    return ()


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module a node came from (``""`` for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    return path


def has_forward(module: torch.nn.Module) -> bool:
    """Tell whether a module can be called: lists cannot, nor can those that hold the tensors of a graph."""
    return "forward" in vars(module) or type(module).forward is not torch.nn.Module.forward


def common_path(paths: Iterable[str]) -> str:
    """Return the deepest module path that contains all given paths."""
    split = [path.split(".") if path else [] for path in paths]
    if not split:
        return ""
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer under each of its names."""
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return dict(every)


def forward_parameters(module: torch.nn.Module) -> tuple[tuple[str, ...], dict[str, Any], bool]:
    """Return names, defaults and whether ``**kwargs`` is taken, of a module's ``forward``."""
    names: list[str] = []
    defaults: dict[str, Any] = {}
    trailing = False
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            trailing = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            names.append(parameter.name)
            defaults[parameter.name] = parameter.default
    return tuple(names), defaults, trailing
