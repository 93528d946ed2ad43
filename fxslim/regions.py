"""Trace a model that cannot be traced as a whole region by region: the largest submodules that can be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.calls import by_name, entry, signature_of
from fxslim.errors import FxslimError, InputError, TraceError
from fxslim.outside import private, read_outside, storage
from fxslim.plan import Note
from fxslim.program import Program, has_forward, named_tensors
from fxslim.sharing import named_once, share, transient_names, without_caches
from fxslim.trace import quiet, trace_part
from fxslim.unite import Part, unite, whole_call

MOST_WAYS = 8
"""Largest number of ways in which one module is called that are traced."""
TOO_SMALL = "a single product: nothing inside it could go"
NEVER_CALLED = "it was not called on the example inputs"


def region_notes(program: Program) -> tuple[Note, ...]:
    """Say which modules were traced by themselves, and which are part of no trace, with the reason."""
    ways: dict[str, int] = {}
    for region in program.regions:
        ways[region.path] = ways.get(region.path, 0) + 1
    if not ways:
        return ()
    traced = (path if count == 1 else f"{path} ({count} ways to call it)" for path, count in ways.items())
    why: dict[str, list[str]] = {}
    for path, reason in program.untraced.items():
        why.setdefault(reason, []).append(path or "the model as a whole")
    return (
        Note(where="traced by themselves", reason=", ".join(traced)),
        *(Note(where=", ".join(paths), reason=f"not traced: {reason}") for reason, paths in why.items()),
    )


@dataclass
class Call:
    """One call of a module: what it was given, and the calls inside it."""

    path: str
    arguments: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    inner: list[Call] = field(default_factory=list)


def trace_regions(
    model: nn.Module, *candidates: Mapping[str, Any], whole: TraceError, filled: frozenset[str] = frozenset()
) -> Program:
    """Trace the largest submodules that can be traced, as they are called on the first candidate that the model takes.

    Args:
        model: any module; parametrizations must have been made permanent before. It is not changed.
        candidates: keyword inputs in the order of ``forward``'s signature.
        whole: why it cannot be traced as a whole.
        filled: names of inputs that callers may leave out later (see CallSpec).

    Raises:
        TraceError: ``whole``, where no region was found or the model does not run.
    """
    shadow = share(model, buffers=False).eval()
    without_caches(shadow)
    root, example, result = _record(shadow, candidates, whole)
    search = _Search(model, shadow, {"": first_line(whole)})
    parts = search.parts(root)
    if not parts:
        raise whole
    paths = frozenset(part.path for part in parts)
    call = whole_call(model, example, result, filled)
    program = unite(parts, named_once(model), transient_names(model), call)
    return _with_reasons(
        program, shadow, _untraced(model, root, search.failed, paths), read_outside(shadow, example, paths)
    )


def _with_reasons(program: Program, shadow: nn.Module, untraced: dict[str, str], read: Mapping[int, str]) -> Program:
    """Add what was not traced, and which tensors the rest of the model needs as they are."""
    inside = {id(m) for region in program.regions for m in shadow.get_submodule(region.path).modules()}
    held: dict[str, str] = {}
    for name, tensor in named_tensors(shadow).items():
        canonical = program.aliases.get(name, name)
        if id(shadow.get_submodule(name.rpartition(".")[0])) not in inside:
            held[canonical] = f"also {name}, outside of the traced regions"
        elif storage(tensor) in read:
            held.setdefault(canonical, read[storage(tensor)])
    return program.with_reasons(untraced, held)


def _record(
    shadow: nn.Module, candidates: tuple[Mapping[str, Any], ...], whole: TraceError
) -> tuple[Call, Mapping[str, Any], Any]:
    """Run the model on the first candidate that it takes; return the tree of its calls, the inputs, the result."""
    for candidate in candidates:
        root = Call("")
        try:
            with recording(shadow, root), torch.no_grad(), quiet():
                result = shadow(**pytree.tree_map(private, dict(candidate)))
        except Exception:  # noqa: BLE001 - a model may raise anything; why it was not traced is reported
            continue
        return root, candidate, result
    raise whole


@contextmanager
def recording(module: nn.Module, root: Call) -> Iterator[None]:
    """Record the calls of all submodules as a tree, while the context is open."""
    stack = [root]
    handles: list[Any] = []

    def before(path: str, signature: inspect.Signature) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(path)
            try:
                call.arguments = by_name(signature, args, kwargs)
            except InputError as error:
                call.refusal = str(error)
            stack[-1].inner.append(call)
            stack.append(call)

        return hook

    def after(*_: Any) -> None:
        stack.pop()

    try:
        for path, child in module.named_modules():
            if path and has_forward(child):
                hook = before(path, signature_of(child))
                handles.append(child.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
                handles.append(child.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Search:
    """Finds the topmost calls whose modules can be traced for every one of these calls."""

    def __init__(self, model: nn.Module, shadow: nn.Module, failed: dict[str, str]) -> None:
        self.model = model
        self.shadow = shadow
        self.failed = failed
        self.traced: dict[str, list[tuple[Program, list[Call]]]] = {}
        self.looks: dict[Any, str] = {}

    def parts(self, root: Call) -> tuple[Part, ...]:
        """Return the regions in the order of their first call."""
        while True:
            calls = self._topmost(root)
            refused = [path for path, of_path in calls.items() if path not in self.failed and not self._all(of_path)]
            if not refused:
                break
        return tuple(Part(path, program, len(met)) for path in calls for program, met in self.traced[path])

    def _topmost(self, call: Call) -> dict[str, list[Call]]:
        """Return the calls below one that have not failed, by path."""
        found: dict[str, list[Call]] = {}
        for inner in call.inner:
            if inner.path in self.failed:
                for path, calls in self._topmost(inner).items():
                    found.setdefault(path, []).extend(calls)
            else:
                found.setdefault(inner.path, []).append(inner)
        return found

    def _all(self, calls: list[Call]) -> bool:
        """Trace a module for all of its topmost calls; note why where one of them cannot be."""
        path = calls[0].path
        module = self.model.get_submodule(path)
        reason = _refusal(module) or next((call.refusal for call in calls if call.refusal is not None), None)
        for call in sorted(calls, key=_small_axes) if reason is None else ():
            reason = self._one(path, call)
            if reason is not None:
                break
        if reason is not None:
            self.failed[path] = reason
            self.traced.pop(path, None)
        return reason is None

    def _one(self, path: str, call: Call) -> str | None:
        """Trace a module for one call, or find that it was; return why it cannot be."""
        ways = self.traced.setdefault(path, [])
        for program, met in ways:
            if any(call is one for one in met):
                return None
            if _fits(program, call.arguments):
                met.append(call)
                return None
        if len(ways) == MOST_WAYS:
            return f"it is called in more than {MOST_WAYS} ways"
        module = self.model.get_submodule(path)
        look = (type(module), *_look(call.arguments))
        if look not in self.looks:
            try:
                ways.append((trace_part(module, self.shadow.get_submodule(path), call.arguments), [call]))
                return None
            except FxslimError as error:
                self.looks[look] = first_line(error)
        return self.looks[look]


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or of what caused it."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def _refusal(module: nn.Module) -> str | None:
    """Say why a module is not worth tracing, or must not be replaced by its graph."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    plain = type(module).__module__.startswith("torch.nn.") or not any(True for _ in module.children())
    if len(matrices) < 2 and plain:
        return TOO_SMALL
    hooks = [
        hook for own in module.modules() for hook in (*own._forward_hooks.values(), *own._forward_pre_hooks.values())
    ]
    if not all(getattr(hook, "inert", False) for hook in hooks) or "forward" in vars(module):
        return "it has forward hooks, or a forward that was replaced"
    return None


def _small_axes(call: Call) -> int:
    """Count axes of size 0 or 1: a trace fixes those, so other calls come first."""
    leaves = pytree.tree_leaves(call.arguments)
    return sum(size < 2 for leaf in leaves if isinstance(leaf, torch.Tensor) for size in leaf.shape)


def _look(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two calls have in common that export takes or refuses alike."""
    leaves, spec = pytree.tree_flatten(dict(arguments))
    kinds = [(leaf.dtype, leaf.ndim) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves]
    return (str(spec), tuple(kinds))


def _fits(program: Program, arguments: Mapping[str, Any]) -> bool:
    wanted = entry(program.call.example, program.inputs, program.ranges, program.graph)
    return wanted.misfit(arguments) is None


def _above(name: str, paths: frozenset[str]) -> str | None:
    """Return the path among ``paths`` that is a name's own or above it."""
    while name:
        if name in paths:
            return name
        name = name.rpartition(".")[0]
    return None


def _untraced(model: nn.Module, root: Call, failed: Mapping[str, str], paths: frozenset[str]) -> dict[str, str]:
    """Return every module with products that is part of no region, outermost first, with the reason."""
    called: set[str] = set()
    waiting = [root]
    while waiting:
        call = waiting.pop()
        called.add(call.path)
        waiting.extend(call.inner)
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if _above(path, paths) is not None or not any(p.ndim > 1 for p in module.parameters()):
            continue
        inside = f"{path}." if path else ""
        if path in failed:
            found[path] = failed[path]
            continue
        reached = not has_forward(module) or any(one.startswith(inside) for one in called | paths)
        if not reached and not any(found.get(above) == NEVER_CALLED for above in _parents(path)):
            found[path] = NEVER_CALLED
    return found


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path
