"""Compare the masked dense model with the narrowed one, on inputs that were not used for tracing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.errors import FxslimError, InputError, VerifyError
from fxslim.passes.mask import masked
from fxslim.passes.paths import Path
from fxslim.passes.wide import in_float32, widened
from fxslim.plan import Note, Plan
from fxslim.report import Difference, Verification

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference allowed, relative to the output's largest absolute value, by the lowest dtype inside the model."""
IN_TRAINING = 1000
"""Times as much in training mode: norms divide by the deviation of a few rows, which magnifies rounding."""
INNER_FLOAT32 = 1e-6
"""The same for a float64 model that computes parts in float32."""
SMALL = 1e-6
"""Outputs smaller than this, against the largest one, are compared by the largest one's scale times this."""
HALF = 0.05
"""The same for half-precision models that are too large for a float32 copy, or do not run as one."""
NOT_WIDE = f"in half precision, within {HALF:.0%} of the largest output, as a float32 copy of the model does not run: "


class _LowestFloat(TorchDispatchMode):
    """Records the lowest floating-point precision that any operation returns."""

    lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            floating = isinstance(item, torch.Tensor) and item.is_floating_point()
            if floating and torch.finfo(item.dtype).eps > torch.finfo(self.lowest).eps:
                self.lowest = item.dtype
        return result


@dataclass(frozen=True)
class Reference:
    """What the masked dense model returns along one path.

    Attributes:
        path: how it was run.
        outputs: its floating-point results.
        exact: the same in float32, for a model in half precision that runs as such a copy; else None.
        lowest: the lowest floating-point precision inside it.
    """

    path: Path
    outputs: list[torch.Tensor]
    exact: list[torch.Tensor] | None
    lowest: torch.dtype


def refer(
    model: nn.Module,
    plan: Plan,
    paths: Sequence[Path],
    *,
    around: Callable[[Path], AbstractContextManager[Any]] = nullcontext,
    skipped: list[Note] | None = None,
) -> tuple[Reference, ...]:
    """Run the masked dense model along every path, each time inside a context of the caller's.

    Args:
        model: the dense model.
        plan: what is masked.
        paths: the paths; those of our own that the model cannot be run along are left out.
        around: a context for each run.
        skipped: takes a note for each path that was left out.
    """
    wide = in_float32(model) if paths else None
    made = []
    for path in paths:
        try:
            with masked(model, plan), around(path), _LowestFloat() as seen:  # type: ignore[no-untyped-call]
                outputs = path.run(model)
        except FxslimError:
            raise
        except Exception as error:
            if not path.own:
                raise
            if skipped is not None:
                reason = f"the dense model cannot be run this way: {_said(error)}"
                skipped.append(Note(where=f"not verified: {path.name}", reason=reason))
            continue
        exact = None
        if wide is not None:
            try:
                with masked(wide, plan):
                    exact = path.run(wide)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - a model may cast to half precision by itself
                wide = None
                if skipped is not None:
                    skipped.append(Note(where="verified less strictly", reason=NOT_WIDE + _said(error)))
        made.append(Reference(path, outputs, exact, seen.lowest))
    return tuple(made)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def compare(model: nn.Module, small: nn.Module, plan: Plan, references: Sequence[Reference]) -> Verification:
    """Run the narrowed model along every path and compare with the masked one.

    Args:
        model: the dense model, to find the first wrong site with; masked for the time being.
        small: the narrowed model (module form or graph form).
        plan: what was taken out.
        references: what the masked dense model returns.

    Raises:
        VerifyError: they differ by more than the tolerance; it names the first site that is wrong.
    """
    differences = []
    for reference in references:
        path = reference.path
        try:
            found = path.run(small)
        except FxslimError:
            raise
        except Exception as error:
            site, _ = first_wrong(model, small, plan, path)
            raise VerifyError(site, float("inf"), 0.0, f"{path.name}: {type(error).__name__}: {error}") from error
        _same_shapes(reference.outputs, found, path)
        measured = _full(reference, found) if reference.exact is None else _half(reference, found)
        if not measured.max_abs <= measured.tolerance and reference.lowest == torch.float32:
            with suppress(RuntimeError, NotImplementedError):  # of kernels that have no float64, float32 decides
                measured = _half(_against_float64(model, plan, reference), found)
        if not measured.max_abs <= measured.tolerance:
            site, max_abs = first_wrong(model, small, plan, path)
            raise VerifyError(site, max_abs or measured.max_abs, measured.tolerance, path.name)
        differences.append(measured)
    if references and not any(t.numel() for reference in references for t in reference.outputs):
        raise InputError(
            "nothing could be compared: the model returned no tensor with elements on these inputs; give "
            "example_inputs that are not empty."
        )
    floating = [t for reference in references for t in reference.outputs if t.is_floating_point() and t.numel()]
    if floating and all(bool(t.isnan().all()) for t in floating):
        raise InputError(
            "nothing could be compared: everything that the model returns on these inputs is NaN; give example_inputs "
            "(or weights) with which it computes numbers."
        )
    return Verification(tuple(differences))


def _against_float64(model: nn.Module, plan: Plan, reference: Reference) -> Reference:
    """Add float64 results to a reference, where float32 rounding alone may be above the plain tolerance."""
    wide = widened(model, torch.float64)
    with masked(wide, plan):
        return replace(reference, exact=reference.path.run(wide))


def _same_shapes(reference: list[torch.Tensor], found: list[torch.Tensor], path: Path) -> None:
    shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in found]
    if shapes[0] != shapes[1]:
        raise VerifyError("output", float("inf"), 0.0, f"{path.name}: shapes {shapes[1]} instead of {shapes[0]}")


@dataclass(frozen=True)
class Gap:
    """How far two tensors are apart, and the largest value of the reference that is no stand-in for infinity."""

    max_abs: float
    scale: float


def gap(reference: torch.Tensor, found: torch.Tensor, *, count: torch.Tensor | None = None) -> Gap:
    """Measure one tensor; equal infinities and equal stand-ins for them (the dtype's minimum) do not differ.

    Args:
        reference: the reference.
        found: the tensor to compare.
        count: which positions count; None for all.
    """
    limit = torch.finfo(reference.dtype).max / 4 if reference.is_floating_point() else float("inf")
    if reference.is_complex():
        reference, found = torch.view_as_real(reference), torch.view_as_real(found)
        count = None if count is None else count[..., None].expand(reference.shape)
    a, b = reference.double(), found.double().to(reference.device)
    same = (a == b) | (a.isnan() & b.isnan())
    if count is not None:
        same = same | ~count
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    usual = a[a.isfinite() & (a.abs() < limit) & (True if count is None else count)]
    return Gap(
        float(difference.max()) if difference.numel() else 0.0, float(usual.abs().max()) if usual.numel() else 0.0
    )


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest difference over several tensors, and the scale of the tensor in which it is largest."""
    gaps = [gap(a, b) for a, b in zip(first, second, strict=True)]
    worst = max(gaps, key=lambda g: g.max_abs / max(g.scale, 1e-30), default=Gap(0.0, 0.0))
    return worst.max_abs, worst.scale


def _full(reference: Reference, found: list[torch.Tensor]) -> Difference:
    """Compare with the plain tolerance, each output by its own scale; whole numbers have to be equal."""
    floating = [t for t in reference.outputs if t.is_floating_point() or t.is_complex()]
    outer = max((t.dtype for t in floating), key=lambda d: torch.finfo(d).eps, default=torch.float64)
    inner_float32 = outer == torch.float64 and reference.lowest != torch.float64
    relative = INNER_FLOAT32 if inner_float32 else TOLERANCE.get(reference.lowest, HALF)
    if relative == TOLERANCE[torch.float64] and reference.path.training:
        relative *= IN_TRAINING
    pairs = list(zip(reference.outputs, found, strict=True))
    gaps = [gap(a, b) for a, b in pairs]
    allowed = [
        relative * max(g.scale, SMALL * max(h.scale for h in gaps), 1e-30)
        if a.is_floating_point() or a.is_complex()
        else 0.0
        for g, (a, _) in zip(gaps, pairs, strict=True)
    ]
    return _worst(reference.path, gaps, allowed)


def _half(reference: Reference, found: list[torch.Tensor]) -> Difference:
    """Against a wider dtype: at most twice the masked dense model's own rounding, where that is finite."""
    assert reference.exact is not None
    gaps, allowed = [], []
    eps = torch.finfo(reference.lowest).eps
    for exact, own, new in zip(reference.exact, reference.outputs, found, strict=True):
        if not (own.is_floating_point() or own.is_complex()):  # rounding decides ties: say which share differs
            gaps.append(Gap(_share(exact != new), 1.0))
            allowed.append(max(2 * _share(exact != own), 0.0 if reference.lowest == torch.float32 else HALF))
            continue
        finite = own.isfinite() & exact.isfinite() & (own.abs() < torch.finfo(own.dtype).max / 4)
        rounding = gap(exact, own, count=finite)
        gaps.append(gap(exact, new, count=finite))
        allowed.append(2 * max(rounding.max_abs, eps * rounding.scale))
    return _worst(reference.path, gaps, allowed)


def _share(differs: torch.Tensor) -> float:
    return float(differs.double().mean()) if differs.numel() else 0.0


def _worst(path: Path, gaps: list[Gap], allowed: list[float]) -> Difference:
    """Return the output that comes nearest to its tolerance, or goes furthest beyond."""
    rows = list(zip(gaps, allowed, strict=True))
    worst, tolerance = max(rows, key=lambda row: row[0].max_abs / max(row[1], 1e-300), default=(Gap(0.0, 0.0), 0.0))
    return Difference(path.name, worst.max_abs, worst.scale, tolerance)


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
    if len(found) < len(reference) and not isinstance(small, fx.GraphModule):  # it stopped on the way
        return owners[reference[len(found)][0]], float("inf")
    return "output", 0.0


def _outputs(model: nn.Module, owners: Mapping[str, str], path: Path) -> list[tuple[str, torch.Tensor]]:
    record: list[tuple[str, torch.Tensor]] = []
    handles = []
    modules = dict(model.named_modules())
    try:
        for name in owners:
            if name in modules:
                handles.append(modules[name].register_forward_hook(
                    lambda module, args, out, name=name: record.append((name, _plain(out)))))  # fmt: skip
        path.run(model)
    except Exception:  # noqa: BLE001 - the run itself may be what is wrong; what was recorded still tells where
        return record
    finally:
        for handle in handles:
            handle.remove()
    return record


def _plain(value: torch.Tensor) -> torch.Tensor:
    """Copy a tensor; rows of different lengths are padded."""
    return value.detach().to_padded_tensor(0.0) if value.is_nested else value.detach().clone()
