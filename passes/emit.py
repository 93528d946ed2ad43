"""Turn a graph into a GraphModule of our own: the model's names and signature, nothing that export left behind."""

from __future__ import annotations

import builtins
import copy
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from fxslim.dtypes import Following, limit_of
from fxslim.errors import InputError, UnsupportedModelError
from fxslim.passes.annotate import ASSERTIONS, operation
from fxslim.program import CallSpec, Program, SizeRange, hint, is_symbolic

OPTIONS = (bool, int, float, str)
CACHE_FREE = frozenset(
    {("use_cache", False), ("output_attentions", False), ("output_hidden_states", False), ("return_dict", True)}
)
"""Options whose default is None and that say what a graph does anyway: it returns no cache and nothing extra."""


@dataclass(frozen=True)
class Caller:
    """Binds a call to the traced inputs, and the results to the model's output type.

    Attributes:
        call: the traced call.
        inputs: (name, fixed sizes by axis, dtype) of every leaf of the example; None where a leaf is no tensor.
        name: what to call the model in errors.
        ranges: sizes for which the trace holds.
        following: what follows the dtype when the graph is cast.
    """

    call: CallSpec
    inputs: tuple[tuple[str, Mapping[int, int], bool] | None, ...]
    name: str
    ranges: tuple[SizeRange, ...] = ()
    following: Following = field(default_factory=Following)

    def bind(self, given: Mapping[str, Any], options: Mapping[str, Any]) -> list[Any]:
        """Return the leaves of the inputs in the graph's order; raise InputError for anything that was not traced."""
        given = {name: self._meant(name, value) for name, value in {**given, **options}.items()}
        for name, value in given.items():
            if name not in self.call.example and not self._harmless(name, value):
                raise InputError(
                    f"{self.name} was compiled without the input {name!r}, so it cannot be given now. Compile with "
                    f"example_inputs that hold it, or use fxslim.slim, which keeps the whole forward."
                )
        leaves = []
        for name, traced in self.call.example.items():
            leaves.extend(self._leaves(name, traced, given))
        for leaf, spec in zip(leaves, self.inputs, strict=True):
            self._check(leaf, spec)
        return leaves

    def _meant(self, name: str, value: Any) -> Any:
        """Return a default that the signature could not spell out in the place of the None that stands for it."""
        default = self.call.defaults.get(name)
        left_out = value is None and default is not inspect.Parameter.empty and not _writable(default)
        return default if left_out else value

    def _harmless(self, name: str, value: Any) -> bool:
        """Tell whether a value given for something that was not traced means what was traced."""
        default = self.call.defaults.get(name)
        if default is inspect.Parameter.empty:
            default = None
        if value is default:
            return True
        if not isinstance(value, OPTIONS):
            return isinstance(value, tuple | list | dict) and type(value) is type(default) and value == default
        return value == default if isinstance(default, OPTIONS) else default is None and (name, value) in CACHE_FREE

    def _leaves(self, name: str, traced: Any, given: Mapping[str, Any]) -> list[Any]:
        value = given.get(name)
        if value is None and isinstance(traced, torch.Tensor):
            if name not in self.call.filled:
                raise InputError(f"{self.name} was compiled with the input {name!r}; give it.")
            like = self._like(name, traced, given)
            return [torch.ones(like.shape[: traced.ndim], dtype=traced.dtype, device=like.device)]
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(traced)):
            if value is not traced and _plain(value) != _plain(traced):
                raise InputError(f"{self.name} was compiled with {name}={traced!r}; it cannot take {value!r}.")
            return pytree.tree_leaves(traced)
        if isinstance(traced, torch.Tensor) and not isinstance(value, torch.Tensor):
            raise InputError(f"input {name!r} must be a tensor, not {type(value).__name__}.")
        leaves, spec = pytree.tree_flatten(value)
        if spec != pytree.tree_structure(traced):
            raise InputError(f"{self.name} was compiled with another structure of the input {name!r}.")
        return leaves

    def _like(self, name: str, traced: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """Return the given input that had a mask's shape when both were traced; ids before pixels."""
        example = {k: v for k, v in self.call.example.items() if isinstance(given.get(k), torch.Tensor)}
        shaped = [k for k, v in example.items() if v.shape[: traced.ndim] == traced.shape] or list(example)
        side = name.startswith("decoder_")
        best = min(shaped, key=lambda k: (k.startswith("decoder_") != side, example[k].is_floating_point()))
        found: torch.Tensor = given[best]
        return found

    def _check(self, leaf: Any, spec: tuple[str, Mapping[int, int], bool] | None) -> None:
        if spec is None:
            return
        name, fixed, floating = spec
        if not isinstance(leaf, torch.Tensor):
            raise InputError(f"input {name!r} must be a tensor, not {type(leaf).__name__}.")
        if leaf.is_floating_point() != floating:
            raise InputError(f"input {name!r} is {leaf.dtype}; {self.name} was compiled with another kind of numbers.")
        for axis, size in fixed.items():
            if leaf.ndim <= axis or leaf.shape[axis] != size:
                raise InputError(
                    f"input {name!r} has shape {tuple(leaf.shape)}, but axis {axis} was fixed at {size} when "
                    f"{self.name} was traced; compile with example_inputs of that size, or use fxslim.slim."
                )

        for limit in self.ranges:
            size = leaf.shape[limit.axis] if limit.input == name and leaf.ndim > limit.axis else limit.low
            if size < limit.low or (limit.high is not None and size > limit.high):
                raise InputError(
                    f"input {name!r} has size {size} along axis {limit.axis}; this graph of {self.name} holds for "
                    f"{limit}. Compile with example_inputs of that size, or use fxslim.slim."
                )

    def result(self, leaves: Any) -> Any:
        """Return the results as the model returns them."""
        return pytree.tree_unflatten(list(leaves), self.call.out_spec)


def _plain(value: Any) -> Any:
    """Return numbers in lists: a tensor that was traced as plain numbers may be given as either."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _writable(default: Any) -> bool:
    """Tell whether a default can be spelled out in generated code."""
    return isinstance(default, bool | int | str) or (isinstance(default, float) and math.isfinite(default))


class CallCodeGen(CodeGen):
    """Generates ``forward`` with the model's own signature."""

    def __init__(self, call: CallSpec) -> None:
        super().__init__()
        self.names = tuple(dict.fromkeys([*call.names, *call.example]))
        self.defaults = {name: default for name, default in call.defaults.items() if _writable(default)}

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        """Return the head of ``forward``."""
        parameters = ", ".join(f"{name}={self.defaults.get(name)!r}" for name in self.names)
        given = ", ".join(f"{name!r}: {name}" for name in self.names)
        placeholders = ", ".join(name.split(":")[0].split("#")[0].split("=")[0].strip() for name in free_vars)
        bound = f"{placeholders}, = " if placeholders else ""
        rest = "options"
        while rest in self.names:
            rest += "_"
        return (
            f"def forward(self, {parameters}, **{rest}){maybe_return_annotation}:\n"
            f"    {bound}self._caller.bind({{{given}}}, {rest})"
        )

    def generate_output(self, output_args: Any, **_: Any) -> str:
        """Return the last line of ``forward``."""
        return f"return self._caller.result({output_args!r})"


class CompiledModule(fx.GraphModule):
    """A compiled model: called like the model, for inference."""

    _caller: Caller

    @property
    def fxslim(self) -> Any:
        """Return the plan and the report."""
        return self.meta["fxslim"]

    @property
    def example(self) -> Mapping[str, Any]:
        """Return the inputs that were traced."""
        return self._caller.call.example

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        """Copy everything: fx alone would keep only what the graph reads, and forget how it is called."""
        root = nn.Module()
        root.training = False
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(root, table, copy.deepcopy(getattr(self, table), memo))
        kind: type[CompiledModule] = type(self).__mro__[1]  # fx makes a class of its own for every instance
        copied = kind(root, copy.deepcopy(self.graph, memo), class_name=type(self).__name__)
        for table in ("_parameters", "_buffers", "_modules"):
            getattr(copied, table).update(getattr(root, table))
        copied._non_persistent_buffers_set = root._non_persistent_buffers_set
        copied.meta.update(self.meta)
        copied._caller = self._caller
        memo[id(self)] = copied
        return copied.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModule:
        """Move and cast; what names a dtype on purpose keeps it."""
        own = {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}
        following = self._caller.following
        if following.reason and any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in own):
            raise UnsupportedModelError(
                f"this graph cannot be cast: {following.reason}; cast the model and compile it again."
            )
        meant = {name: _get(self, name) for name in following.meant}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in meant.items():
            path, _, leaf = name.rpartition(".")
            self.get_submodule(path)._buffers[leaf] = tensor.to(_get(self, name).device)
        return self

    def train(self, mode: bool = True) -> CompiledModule:
        """Refuse training mode: dropout and losses were left out of the trace."""
        if mode:
            raise UnsupportedModelError(
                "a compiled graph is for inference: dropout was traced in eval mode. Use fxslim.slim for a module "
                "that trains."
            )
        return super().train(False)


def emit(
    program: Program, graph: fx.Graph, tensors: Mapping[str, torch.Tensor], *, name: str, following: Following
) -> CompiledModule:
    """Turn a rewritten graph into a module.

    Args:
        program: where the graph came from.
        graph: the rewritten graph; it is taken over.
        tensors: canonical tensor name -> tensor.
        name: the model's class name.
        following: what follows the dtype when the graph is cast.
    """
    _strip_assertions(graph)
    follow_device(graph, [node for node in graph.find_nodes(op="placeholder") if node.name in program.inputs])
    tensors = {name: _own(tensor, program.tensors.get(name)) for name, tensor in tensors.items()}
    root = nn.Module()
    for tensor_name, tensor in tensors.items():
        _register(root, tensor_name, tensor, program)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in program.tensor_of:
            with graph.inserting_before(node):
                attribute = graph.get_attr(program.tensor_of[node.name])
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
    _follow_dtype(graph, program.tensors, following)
    graph.eliminate_dead_code()
    graph.set_codegen(CallCodeGen(program.call))
    module = CompiledModule(root, graph, class_name=name)
    for tensor_name, tensor in tensors.items():
        _register(module, tensor_name, tensor, program)
    for alias, canonical in program.aliases.items():
        _register(module, alias, _get(module, canonical), program)
    module._caller = Caller(program.call, specs(program), name, program.ranges, following)
    return module.eval()


def _own(tensor: torch.Tensor, original: torch.Tensor | None) -> torch.Tensor:
    """Copy a tensor that is still the model's own: casting or loading into the graph must not reach the model."""
    if tensor is not original:
        return tensor
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _strip_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and operation(node) in ASSERTIONS:
            graph.erase_node(node)


def follow_device(graph: fx.Graph, inputs: Iterable[fx.Node]) -> None:
    """Let every baked device follow the first input that is a tensor, so that the module can move."""
    anchor = next((node for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)), None)
    if anchor is None:
        return
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        device = graph.call_function(builtins.getattr, (anchor, "device"))
    for node in graph.nodes:
        if node.op == "call_function" and node is not device:
            node.args = pytree.tree_map(lambda a: device if isinstance(a, torch.device) else a, node.args)
            node.kwargs = pytree.tree_map(lambda a: device if isinstance(a, torch.device) else a, node.kwargs)


def _follow_dtype(graph: fx.Graph, own: Mapping[str, torch.Tensor], following: Following) -> None:
    """Let every dtype that is the model's, and every number that is a limit of it, follow a parameter."""
    if not following.places:
        return
    parameters = (node for node in graph.find_nodes(op="get_attr") if isinstance(own.get(node.target), nn.Parameter))
    anchor = next(node for node in parameters if own[node.target].is_floating_point())
    made: dict[str, fx.Node] = {}
    with graph.inserting_after(anchor):
        for what in sorted({what for places in following.places.values() for what in places.values()}):
            reads = (builtins.getattr, (anchor, "dtype")) if what == "dtype" else (limit_of, (anchor, what))
            made[what] = graph.call_function(*reads)
    for node in graph.nodes:
        for place, what in following.places.get(node.name, {}).items():
            if isinstance(place, str):
                node.kwargs = {**node.kwargs, place: made[what]}
            else:
                node.args = (*node.args[:place], made[what], *node.args[place + 1 :])


def _register(root: nn.Module, name: str, tensor: torch.Tensor, program: Program) -> None:
    path, _, leaf = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else []:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    original = program.tensors.get(name)
    if isinstance(original, nn.Parameter) or isinstance(tensor, nn.Parameter):
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=bool(original is not None and original.requires_grad))
        owner._parameters[leaf] = tensor
        owner._buffers.pop(leaf, None)
    else:
        owner._parameters.pop(leaf, None)
        vars(owner).pop(leaf, None)
        owner.register_buffer(leaf, tensor, persistent=name not in program.constants | program.transient)


def _get(root: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(root.get_submodule(path), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def specs(program: Program) -> tuple[tuple[str, Mapping[int, int], bool] | None, ...]:
    """Return what a call has to fit: name, sizes that are fixed, and whether it is floating point, for every leaf."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs: list[tuple[str, Mapping[int, int], bool] | None] = []
    for name in program.inputs:
        value = nodes[name].meta.get("val")
        if not isinstance(value, torch.Tensor):
            specs.append(None)
            continue
        fixed = {axis: hint(size) for axis, size in enumerate(value.shape) if not is_symbolic(size)}
        specs.append((name, fixed, value.is_floating_point()))
    return tuple(specs)
