"""Trace a model into a Program with ``torch.export``: one ATen graph, symbolic batch and length, no weights copied."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxslim.errors import TraceError
from fxslim.exporter import applies, export_patched
from fxslim.functional import functionalize, mutates
from fxslim.measured import measure
from fxslim.program import CallSpec, Program, SizeRange, forward_parameters, is_symbolic
from fxslim.sharing import named_once, refuse, share, transient_names, without_caches
from fxslim.spelling import inline_regions, pair_einsums, spell_shapes

LOGGERS = ("torch.export", "torch.onnx", "torch._export", "torch.fx", "torch._dynamo", "torch._subclasses.fake_tensor")


def trace(
    model: nn.Module,
    *candidates: Mapping[str, Any],
    filled: frozenset[str] = frozenset(),
    open_axes: int | None = None,
) -> Program:
    """Trace ``model`` on the first of the candidate keyword inputs that it can be traced on.

    The model itself is not changed: a copy that shares every tensor is traced in eval mode with caches off.

    Args:
        model: any module; parametrizations must have been made permanent before.
        candidates: keyword inputs in the order of ``forward``'s signature.
        filled: names of inputs that callers may leave out later (see CallSpec).
        open_axes: how many leading axes of every input take other sizes; None for all that can.

    Raises:
        UnsupportedModelError: the model has nothing to narrow or holds quantized weights.
        TraceError: ``torch.export`` cannot take the model as a whole.
    """
    refuse(model)
    shadow = share(model).eval()
    without_caches(shadow)
    with quiet(), torch.no_grad():
        exported, example = _export(shadow, candidates, type(model).__name__, open_axes)
        exported = _without_writes(exported)
    program = replace(_program(model, exported, example, filled), open_axes=open_axes)
    given = next(candidate for candidate in candidates if candidate.keys() == example.keys())
    return replace(program, notes=(*program.notes, *_plain_notes(given, example)))


def exported(
    module: nn.Module, candidates: tuple[Mapping[str, Any], ...], *, open_axes: int | None = None
) -> tuple[torch.export.ExportedProgram, Program]:
    """Export a module as it stands, for a file: nothing is made functional or spelled out in what is exported.

    Args:
        module: a (shared) copy in eval mode, without caches.
        candidates: see `trace`.
        open_axes: see `trace`.

    Returns:
        The exported program, and what `trace` would make of it.

    Raises:
        TraceError: ``torch.export`` cannot take it as a whole.
    """
    with quiet(), torch.no_grad():
        whole, example = _export(module, candidates, type(module).__name__, open_axes)
        return whole, _program(module, whole, example, frozenset())


def _without_writes(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Take operations apart where in-place ones cannot be made functional one by one."""
    written = any(mutates(node) for node in exported.graph.nodes)
    return exported.run_decompositions({}) if written and not functionalize(copy.deepcopy(exported.graph)) else exported


def _plain_notes(given: Mapping[str, Any], example: Mapping[str, Any]) -> tuple[str, ...]:
    """Say which tensors were traced as plain numbers."""
    return tuple(
        f"{name}: the graph form holds for these values alone, which forward reads as plain numbers (the module form "
        "takes others)."
        for name, value in example.items()
        if isinstance(given[name], torch.Tensor) and not isinstance(value, torch.Tensor)
    )


def trace_part(module: nn.Module, shadow: nn.Module, arguments: Mapping[str, Any]) -> Program:
    """Trace a module inside a model as it is called there.

    Args:
        module: the module, whose tensors the program is to hold.
        shadow: its twin in a (shared) copy in eval mode, without caches.
        arguments: the arguments of the call by name; tensors are copied.

    Raises:
        TraceError: ``torch.export`` cannot take it, or its graph could not stand in its place.
    """
    own = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, dict(arguments))
    with quiet(), torch.no_grad():
        exported, example = _export(shadow, (own,), type(module).__name__)
        if pytree.tree_structure(example) != pytree.tree_structure(own):
            raise TraceError("it can be traced for plain numbers only where it is given a tensor")
        exported = _without_writes(exported)
    if len(exported.graph_signature.user_outputs) != len(exported.graph_signature.output_specs):
        raise TraceError("it changes a buffer or an input in place")
    program = _program(module, exported, example, frozenset())
    if next(iter(program.graph.find_nodes(op="get_attr")), None) is not None:
        raise TraceError("its graph holds graphs")
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Silence export's own warnings and logs; what matters is raised."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # export prints graphs that it gave up on
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dynamic(value: Any, open_axes: int | None) -> Any:
    from torch.export import Dim

    if not isinstance(value, torch.Tensor):
        return None
    # Open heights and widths cost minutes in windowed attention.
    axes = range(value.ndim - 3 if _is_image(value) else value.ndim)[:open_axes]
    return {axis: Dim.AUTO for axis in axes if value.shape[axis] > 1} or None


def _is_image(value: torch.Tensor) -> bool:
    """Tell whether a tensor looks like channels of heights and widths, whose sizes are fixed."""
    return value.ndim >= 4 and value.is_floating_point() and bool(value.shape[-3] > 1)


Exported = tuple[torch.export.ExportedProgram, dict[str, Any]]
Attempt = Callable[[], Exported]


MOST_GUARDS = 100
"""Questions about open sizes after which a trace is given up: loops over blocks and windows ask thousands, each slower
than the one before, and what comes of it holds for the traced sizes anyway. Other models ask fewer than twenty."""


class _TooManyGuardsError(Exception):
    """A trace asks too many questions about open sizes."""


class _FewGuards(TorchFunctionMode):
    """Give a trace up that asks too many questions about open sizes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            size: Any = next(filter(is_symbolic, result.shape), None)
            if size is not None and len(size.node.shape_env.guards) > MOST_GUARDS:
                raise _TooManyGuardsError(f"more than {MOST_GUARDS} questions about open sizes")
        return result


def _exporters(shadow: nn.Module, example: dict[str, Any], open_axes: int | None) -> Iterator[list[Attempt]]:
    """Yield the ways to export a model, by itself and by the library that it comes from, most open sizes first."""

    def dynamic(inputs: dict[str, Any], axes: int | None = open_axes) -> dict[str, Any]:
        return {name: pytree.tree_map(lambda x: _dynamic(x, axes), value) for name, value in inputs.items()}

    def plainly(shapes: Any) -> Exported:
        with _taking(shadow, tuple(example)):
            return torch.export.export(shadow, (), example, dynamic_shapes=shapes, strict=False), example

    def within(shapes: Any) -> Exported:
        with _FewGuards():
            return plainly(shapes)

    batch: list[Attempt] = [lambda: within(dynamic(example, 1))] if open_axes is None else []
    yield [lambda: within(dynamic(example)), *batch, lambda: plainly(None)]
    if applies(shadow):
        yield [lambda: export_patched(shadow, example, dynamic), lambda: export_patched(shadow, example, None)]


@contextmanager
def _taking(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Let a module that takes ``**kwargs`` name what it is given: export cannot open sizes inside ``**kwargs``."""
    if set(names) <= set(forward_parameters(module)[0]):
        yield
        return
    forward, own = module.forward, vars(module).get("forward")

    def named(**given: Any) -> Any:
        return forward(**given)

    kind = inspect.Parameter.KEYWORD_ONLY
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    module.forward = named
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _export(
    shadow: nn.Module, candidates: tuple[Mapping[str, Any], ...], name: str, open_axes: int | None = None
) -> Exported:
    first: Exception | None = None
    for candidate in candidates:
        for attempts in _exporters(shadow, dict(candidate), open_axes):
            for attempt in attempts:
                try:
                    exported, example = attempt()
                    _require_operations(exported.graph)
                    return exported, example
                except (GuardOnDataDependentSymNode, _PythonCallError) as error:
                    first = first or error
                    break  # fixed sizes do not help
                except Exception as error:  # noqa: BLE001 - export raises anything; the first error is reported below
                    first = first or error
    message = str(first).strip().splitlines()
    raise TraceError(
        f"{name} cannot be traced as a whole: {type(first).__name__}: {message[0] if message else ''} "
        "Check that the model runs on these example_inputs; control flow that depends on tensor values has to "
        "be taken out of forward, or slim the submodules one by one."
    ) from first


class _PythonCallError(Exception):
    """A graph calls a Python function: a mask function under ``vmap``."""


def _require_operations(graph: fx.Graph) -> None:
    """Raise an error for a graph that calls Python functions."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.flat_apply):
        raise _PythonCallError(
            f"the graph calls a Python function ({node.args[1] if len(node.args) > 1 else node.name})"
        )


def _program(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    example: dict[str, Any],
    filled: frozenset[str],
) -> Program:
    graph = copy.deepcopy(exported.graph_module).graph
    renamed = _renamed(exported.graph, graph)
    inline_regions(graph)
    functionalize(graph)
    spell_shapes(graph)
    pair_einsums(graph)
    graph.eliminate_dead_code()  # what nobody reads (averaged attention weights) must not tie what it is made of
    tensors, aliases = named_once(model)
    tensor_of: dict[str, str] = {}
    inputs: list[str] = []
    constants: set[str] = set()
    for spec in exported.graph_signature.input_specs:
        kind = spec.kind.name
        if kind == "USER_INPUT":
            inputs.append(renamed[spec.arg.name])
        elif kind in ("PARAMETER", "BUFFER"):
            assert spec.target is not None
            tensor_of[renamed[spec.arg.name]] = aliases.get(spec.target, spec.target)
        elif kind == "CONSTANT_TENSOR":
            assert spec.target is not None
            name = aliases.get(spec.target, spec.target)
            tensor_of[renamed[spec.arg.name]] = name
            if name not in tensors:
                tensors[name] = exported.constants[spec.target]
                constants.add(name)
        else:
            raise TraceError(f"the traced graph takes a {kind} ({spec.target}), which fxslim cannot carry.")
    if len(exported.graph_signature.user_outputs) != len(exported.graph_signature.output_specs):
        _drop_mutations(graph, exported)
    names, defaults, trailing = forward_parameters(model)
    assert exported.call_spec.out_spec is not None
    call = CallSpec(
        names=names,
        defaults=defaults,
        example=example,
        filled=filled & set(example),
        in_spec=pytree.tree_structure(example),
        out_spec=_returned(model, exported.call_spec.out_spec),
        trailing=trailing,
    )
    given = {name: tensors[tensor] for name, tensor in tensor_of.items()}
    measure(graph, {**given, **dict(zip(inputs, pytree.tree_leaves(example), strict=False))})
    ranges = _ranges(graph, tuple(inputs), exported)
    notes = (*_fixed_sizes(graph, tuple(inputs)), *_range_notes(ranges))
    return Program(
        graph,
        tensor_of,
        tensors,
        aliases,
        tuple(inputs),
        call,
        notes,
        constants=frozenset(constants),
        transient=transient_names(model),
        ranges=ranges,
    )


def _renamed(before: fx.Graph, after: fx.Graph) -> dict[str, str]:
    """Return placeholder -> its name in a copy of the graph, which avoids Python's own names such as ``input``."""
    return {
        old.name: new.name
        for old, new in zip(before.find_nodes(op="placeholder"), after.find_nodes(op="placeholder"), strict=True)
    }


def _drop_mutations(graph: fx.Graph, exported: torch.export.ExportedProgram) -> None:
    """Drop outputs that only write buffers back: the emitted graph is for inference."""
    output = graph.output_node()
    keep = [
        arg
        for arg, spec in zip(output.args[0], exported.graph_signature.output_specs, strict=True)  # type: ignore[arg-type]
        if spec.kind.name == "USER_OUTPUT"
    ]
    output.args = (tuple(keep),)


def _ranges(graph: fx.Graph, inputs: tuple[str, ...], exported: torch.export.ExportedProgram) -> tuple[SizeRange, ...]:
    """Return the sizes for which the trace holds, where export found limits (beyond its own 0 and 1)."""
    found = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name not in inputs or not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            symbol = getattr(size, "node", None)
            limits = exported.range_constraints.get(symbol.expr) if symbol is not None else None
            if limits is None:
                continue
            low = int(limits.lower) if limits.lower.is_Integer else 0
            high = int(limits.upper) if limits.upper.is_Integer and int(limits.upper) < UNBOUNDED else None
            if low > 2 or high is not None:
                found.append(SizeRange(node.name, axis, low if low > 2 else 0, high))
    return tuple(found)


UNBOUNDED = 1 << 40


def _range_notes(ranges: tuple[SizeRange, ...]) -> tuple[str, ...]:
    return tuple(
        f"{r.input}: the graph form takes {r} along axis {r.axis}, where tables end or forward branches; the module "
        "form takes what the model takes."
        for r in ranges
    )


def _returned(model: nn.Module, spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return how a model returns its results: export runs the operations of a compiled graph, not its own forward."""
    call = getattr(getattr(model, "_caller", None), "call", None)
    return call.out_spec if isinstance(call, CallSpec) else spec


def _fixed_sizes(graph: fx.Graph, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Say which batch or length sizes the trace had to fix."""
    notes = []
    for node in graph.nodes:
        if node.op != "placeholder" or node.name not in inputs:
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            continue
        last = value.ndim if value.ndim < 3 and not value.is_floating_point() else max(value.ndim - 1, 1)
        for axis in range(last):  # the last axis of numbers are features
            if not is_symbolic(value.shape[axis]) and not (axis and _is_image(value)):
                notes.append(
                    f"{node.name}: axis {axis} is fixed at {int(value.shape[axis])}; the graph form accepts no other "
                    "size there (the module form does)."
                )
        if _is_image(value):
            notes.append(
                f"{node.name}: heights and widths are fixed at {tuple(map(int, value.shape[-2:]))}; the graph form "
                "accepts no others (the module form takes what the model takes)."
            )
    return tuple(notes)
