"""Compare the masked dense model with the narrowed one, on inputs that were not used for tracing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.errors import VerifyError
from fxslim.passes.mask import masked
from fxslim.passes.paths import Path
from fxslim.plan import Plan
from fxslim.report import Difference, Verification

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference allowed, relative to the largest absolute value of the output, by lowest dtype inside the model."""
INNER_FLOAT32 = 1e-6
"""The same for a float64 model that computes parts in float32."""
LARGE = 1_000_000_000
"""Parameters above which a half-precision model is not copied to float32 for its verification."""


class _LowestFloat(TorchDispatchMode):
    """Records the lowest floating-point precision that any operation returns."""

    lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                if torch.finfo(item.dtype).eps > torch.finfo(self.lowest).eps:
                    self.lowest = item.dtype
        return result


def compare(model: nn.Module, small: nn.Module, plan: Plan, paths: Sequence[Path]) -> Verification:
    """Run both models along every path and compare.

    Args:
        model: the dense model; masked for the time being.
        small: the narrowed model (module form or graph form).
        plan: what was taken out.
        paths: how to run them.

    Raises:
        VerifyError: they differ by more than the tolerance; it names the first site that is wrong.
    """
    wide = _wide(model)
    differences = []
    for path in paths:
        with masked(model, plan), _LowestFloat() as seen:
            reference = path.run(model)
        found = path.run(small)
        _same_count(reference, found, path)
        if wide is not None:
            with masked(wide, plan):
                exact = path.run(_with_inputs(wide))
            differences.append(_half(exact, reference, found, path, seen.lowest))
        else:
            differences.append(_full(reference, found, path, seen.lowest))
        last = differences[-1]
        if not last.max_abs <= last.tolerance:
            site, max_abs = first_wrong(model, small, plan, path)
            raise VerifyError(site, max_abs or last.max_abs, last.tolerance, path.name)
    return Verification(tuple(differences))


def _wide(model: nn.Module) -> nn.Module | None:
    """Return a float32 copy of a half-precision model, as the reference for its rounding."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in floating)
    if not halves or sum(p.numel() for p in floating) > LARGE:
        return None
    return copy.deepcopy(model).float()


def _with_inputs(wide: nn.Module) -> nn.Module:
    """Let a float32 model take half-precision inputs."""

    def widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
        cast = {name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for name, value in kwargs.items()}  # fmt: skip
        return args, cast

    if not wide._forward_pre_hooks:
        wide.register_forward_pre_hook(widen, with_kwargs=True)
    return wide


def _same_count(reference: list[torch.Tensor], found: list[torch.Tensor], path: Path) -> None:
    shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in found]
    if shapes[0] != shapes[1]:
        raise VerifyError("output", float("inf"), 0.0, f"{path.name}: shapes {shapes[1]} instead of {shapes[0]}")


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference and the largest absolute value; equal infinities do not differ."""
    worst, scale = 0.0, 0.0
    for a, b in zip(first, second, strict=True):
        a, b = a.double(), b.double().to(a.device)
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, torch.zeros_like(a), (a - b).abs())
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0, key=_nan_last)
        finite = a[a.isfinite()]
        scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    return worst, scale


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _full(reference: list[torch.Tensor], found: list[torch.Tensor], path: Path, lowest: torch.dtype) -> Difference:
    worst, scale = distance(reference, found)
    outer = max((t.dtype for t in reference), key=lambda d: torch.finfo(d).eps, default=torch.float32)
    relative = INNER_FLOAT32 if outer == torch.float64 and lowest != torch.float64 else TOLERANCE.get(lowest, 0.05)
    return Difference(path.name, worst, scale, relative * max(scale, 1e-30))


def _half(
    exact: list[torch.Tensor], reference: list[torch.Tensor], found: list[torch.Tensor], path: Path, lowest: torch.dtype
) -> Difference:
    """Half precision: against float32, at most twice the masked dense model's own rounding."""
    own, scale = distance(exact, reference)
    worst, _ = distance(exact, found)
    floor = torch.finfo(lowest).eps * scale
    return Difference(path.name, worst, scale, 2 * max(own, floor))


def first_wrong(model: nn.Module, small: nn.Module, plan: Plan, path: Path) -> tuple[str, float]:
    """Return the first site (in execution order) whose consumer's output differs most tellingly, and by how much."""
    owners: dict[str, str] = {}
    for part in plan.sites:
        for piece in part.site.slices:
            if piece.hook is not None:
                owners.setdefault(piece.hook, part.site.name)
    with masked(model, plan):
        reference = _outputs(model, owners, path)
    found = _outputs(small, owners, path)
    for (where, before), (other, after) in zip(reference, found, strict=False):
        if where != other or before.shape != after.shape:
            return owners.get(where, "output"), float("inf")
        worst, scale = distance([before], [after])
        if not worst <= 1e-4 * scale:
            return owners[where], worst
    return "output", 0.0


def _outputs(model: nn.Module, owners: Mapping[str, str], path: Path) -> list[tuple[str, torch.Tensor]]:
    record: list[tuple[str, torch.Tensor]] = []
    handles = []
    modules = dict(model.named_modules())
    try:
        for name in owners:
            if name in modules:
                handles.append(modules[name].register_forward_hook(
                    lambda module, args, out, name=name: record.append((name, out.detach().clone()))))  # fmt: skip
        path.run(model)
    except Exception:  # noqa: BLE001 - the run itself may be what is wrong; what was recorded still tells where
        return record
    finally:
        for handle in handles:
            handle.remove()
    return record
