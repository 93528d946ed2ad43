"""Trace a model that cannot be traced as a whole region by region: the largest submodules that can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.calls import by_name, entry, signature_of
from fxslim.errors import FxslimError, TraceError
from fxslim.opaque import Opaque, opaque, same_around, without_tensors
from fxslim.outside import private, read_outside, storage
from fxslim.plan import Note
from fxslim.program import Program, named_tensors
from fxslim.recording import Call, Shaped, has_forward, recording
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
    program = replace(unite(parts, named_once(model), transient_names(model), call), opaque=search.calls)
    left = program.left_out
    untraced = _untraced(model, root, search.failed, paths, left)
    return _with_reasons(program, shadow, untraced, read_outside(shadow, example, paths, left))


def _with_reasons(program: Program, shadow: nn.Module, untraced: dict[str, str], read: Mapping[int, str]) -> Program:
    """Add what was not traced, and which tensors the rest of the model needs as they are."""
    paths, left = frozenset(region.path for region in program.regions), program.left_out
    nearest = [(_above(path, paths | left), id(m)) for path, m in shadow.named_modules(remove_duplicate=False)]
    inside = {m for path, m in nearest if path in paths} - {m for path, m in nearest if path in left}
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
        given = pytree.tree_map(private, dict(candidate))
        root = Call("", arguments=given)
        try:
            with recording(shadow, root), torch.no_grad(), quiet():
                result = shadow(**given)
        except Exception:  # noqa: BLE001 - a model may raise anything; why it was not traced is reported
            continue
        return root, candidate, result
    raise whole


class _Search:
    """Finds the topmost calls whose modules can be traced for every one of these calls."""

    def __init__(self, model: nn.Module, shadow: nn.Module, failed: dict[str, str]) -> None:
        self.model = model
        self.shadow = shadow
        self.failed = failed
        self.traced: dict[str, list[tuple[Program, list[Call]]]] = {}
        self.looks: dict[Any, str] = {}
        self.opaque: dict[str, frozenset[str]] = {}
        self.calls: dict[str, Opaque] = {}

    def parts(self, root: Call) -> tuple[Part, ...]:
        """Return the regions in the order of their first call."""
        while True:
            calls = self._topmost(root)
            refused = [path for path, of_path in calls.items() if path not in self.failed and not self._all(of_path)]
            if not refused:
                break
        self._again(root)
        return tuple(
            Part(path, program, len(met), frozenset(_inside(path, self.opaque.get(path, ())).values()))
            for path in self._topmost(root)
            for program, met in self.traced[path]
        )

    def _again(self, root: Call) -> None:
        """Trace modules again whose parts are what cannot be traced, with each call of these parts as one operation.

        The smallest ones are enough: what goes in and out of such a part stays anyway.
        """
        loose: frozenset[str] = frozenset()
        deepest = sorted(self.failed, key=lambda path: path.count("."), reverse=True)
        for path in (path for path in deepest if path and self.failed[path] != TOO_SMALL):
            below = frozenset(one for one in loose if one.startswith(f"{path}."))
            known = [parts for one, parts in self.opaque.items() if one.startswith(f"{path}.")]
            if not below:
                loose |= frozenset() if known else {path}
                continue
            parts = below.union(*known)
            if not self._worth(path, parts):
                continue
            loose -= below
            reason = self.failed.pop(path)
            if self._all(list(root.within(frozenset({path}))), parts):
                self.opaque[path] = parts
            else:
                self.failed[path] = reason
                loose |= {path}

    def _worth(self, path: str, parts: frozenset[str]) -> bool:
        """Tell whether a module multiplies at least twice besides what these parts of it do."""
        own = self.model.get_submodule(path).named_parameters(prefix=path, remove_duplicate=False)
        return sum(parameter.ndim > 1 and _above(name, parts) is None for name, parameter in own) > 1

    def _topmost(self, call: Call) -> dict[str, list[Call]]:
        """Return the calls below one that have not failed, by path."""
        found: dict[str, list[Call]] = {}
        for inner in call.inner:
            if inner.path in self.failed:
                for path, calls in self._topmost(inner).items():
                    found.setdefault(path, []).extend(calls)
                continue
            found.setdefault(inner.path, []).append(inner)
            for part in inner.within(self.opaque.get(inner.path, frozenset())):
                for path, calls in self._topmost(part).items():
                    found.setdefault(path, []).extend(calls)
        return found

    def _all(self, calls: list[Call], parts: frozenset[str] = frozenset()) -> bool:
        """Trace a module, but for some parts of it, for all of its calls; note why where one of them cannot be."""
        path = calls[0].path
        module = self.model.get_submodule(path)
        reason = _refusal(module) or next((call.refusal for call in calls if call.refusal is not None), None)
        for call in sorted(calls, key=_small_axes) if reason is None else ():
            reason = self._one(path, call, parts)
            if reason is not None:
                break
        if reason is not None:
            self.failed[path] = reason
            self.traced.pop(path, None)
        elif parts:
            self._either_way(path, parts)
        return reason is None

    def _either_way(self, path: str, parts: frozenset[str]) -> None:
        """Add graphs for calls with the opposite of a yes-or-no argument, where nothing but the parts depends on it."""
        ways, signature = self.traced[path], signature_of(self.model.get_submodule(path))
        for program, met in tuple(ways):
            for name in (name for name, value in met[0].arguments.items() if type(value) is bool):
                arguments = by_name(signature, (), met[0].arguments | {name: not met[0].arguments[name]})
                if any(_fits(known, arguments) for known, _ in ways):
                    continue
                try:
                    other = self._program(path, met[0], arguments, parts)
                except FxslimError:
                    continue
                if same_around(program.graph, other.graph):
                    ways.append((other, []))

    def _one(self, path: str, call: Call, parts: frozenset[str]) -> str | None:
        """Trace a module for one call, or find that it was; return why it cannot be."""
        ways = self.traced.setdefault(path, [])
        for program, met in ways:
            if any(call is one for one in met):
                return None
            if _fits(program, call.arguments) and _kinds(call, parts) == _kinds(met[0], parts):
                met.append(call)
                return None
        if len(ways) == MOST_WAYS:
            return f"it is called in more than {MOST_WAYS} ways"
        module = self.model.get_submodule(path)
        look = (type(module), *_look(call.arguments), frozenset(_inside(path, parts).values()))
        if look not in self.looks:
            for part in call.within(parts):
                if part.refusal or part.secret:
                    return f"{part.path} is part of no graph: {part.refusal or part.secret}"
            try:
                ways.append((self._program(path, call, call.arguments, parts), [call]))
                return None
            except FxslimError as error:
                self.looks[look] = first_line(error)
        return self.looks[look]

    def _program(self, path: str, call: Call, arguments: Mapping[str, Any], parts: frozenset[str]) -> Program:
        """Trace a module for some arguments, and the calls of some parts of it as they were in a recorded call."""
        inside, shadow = _inside(path, parts), self.shadow.get_submodule(path)
        recorded = {relative: [c for c in call.within(parts) if c.path == part] for part, relative in inside.items()}
        with opaque(shadow, recorded, self.calls):
            program = trace_part(self.model.get_submodule(path), shadow, arguments, bool(parts))
        return without_tensors(program, recorded)


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
    if any(own._forward_hooks or own._forward_pre_hooks for own in module.modules()) or "forward" in vars(module):
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


def _inside(path: str, parts: Iterable[str]) -> dict[str, str]:
    """Return path of a part -> its path inside a module."""
    return {part: part[len(path) + 1 :] for part in parts}


def _kinds(call: Call, parts: frozenset[str]) -> list[Any]:
    """Return what a graph fixes of the results of parts that are not traced."""
    made = [pytree.tree_flatten(part.returned) for part in call.within(parts)]
    kinds = [[(x.dtype, len(x.shape)) if isinstance(x, Shaped) else x for x in leaves] for leaves, _ in made]
    return [(spec, kind) for (_, spec), kind in zip(made, kinds, strict=True)]


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


def _untraced(
    model: nn.Module, root: Call, failed: Mapping[str, str], paths: frozenset[str], left: frozenset[str]
) -> dict[str, str]:
    """Return every module with products that is part of no region, outermost first, with the reason."""
    called: set[str] = set()
    waiting = [root]
    while waiting:
        call = waiting.pop()
        called.add(call.path)
        waiting.extend(call.inner)
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if _above(path, paths | left) in paths or not any(p.ndim > 1 for p in module.parameters()):
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
