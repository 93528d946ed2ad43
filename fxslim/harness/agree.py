"""Models that are compared have to compute the same, as far as they claim to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fxslim.errors import VerifyError
from fxslim.passes.mask import masked
from fxslim.passes.paths import Path
from fxslim.passes.prepare import fingerprint
from fxslim.passes.verify import HALF, TOLERANCE, distance
from fxslim.plan import Plan
from fxslim.report import Record


def record_of(model: nn.Module) -> Record | None:
    """Return what a narrowed model carries, in whichever form; None for a dense one."""
    meta = getattr(model, "meta", None)
    found = meta.get("fxslim") if isinstance(meta, dict) else None
    found = getattr(model, "fxslim", None) if found is None else found
    return found if isinstance(found, Record) else None


def check_agreement(models: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare the models that stand for one plan, and with the masked dense one where it is among them.

    Args:
        models: the models, by name.
        inputs: keyword inputs.

    Returns:
        What was not compared, and why.

    Raises:
        VerifyError: two of them differ by more than the tolerance of their dtype.
    """
    records = {name: record_of(model) for name, model in models.items()}
    plans: dict[str, Plan] = {name: record.plan for name, record in records.items() if record is not None}
    dense = [name for name, record in records.items() if record is None]
    notes = []
    first: dict[str, str] = {}
    for name, plan in plans.items():
        twin = first.setdefault(_cut(plan), name)
        if twin != name:
            _compare(models[twin], None, models[name], inputs, f"{twin} and {name}")
            continue
        if plan.weights_changed:
            notes.append(f"{name}: its weights were repaired, so that no dense model computes the same")
            continue
        own = next((other for other in dense if fingerprint(models[other]) == plan.fingerprint), None)
        if own is None:
            notes.append(f"{name}: the dense model that it was made of is not among those compared")
        else:
            _compare(models[own], plan, models[name], inputs, f"{own}, masked, and {name}")
    return tuple(notes)


def _cut(plan: Plan) -> str:
    """Return what tells plans apart: what goes out of which model."""
    return repr((plan.fingerprint, sorted((part.site.name, part.keep) for part in plan), plan.weights_changed))


def _compare(one: nn.Module, plan: Plan | None, other: nn.Module, inputs: Mapping[str, Any], what: str) -> None:
    path = Path("as given", inputs)
    with nullcontext() if plan is None else masked(one, plan):
        expected = path.run(one)
    found = path.run(other)
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise VerifyError("output", float("inf"), 0.0, f"{what}: shapes {shapes[1]} instead of {shapes[0]}")
    lowest = max((t.dtype for t in expected if t.is_floating_point()), key=lambda d: torch.finfo(d).eps)
    worst, scale = distance(expected, found)
    allowed = TOLERANCE.get(lowest, HALF) * max(scale, 1e-30)
    if not worst <= allowed:
        raise VerifyError("output", worst, allowed, f"{what} (check=False compares them all the same)")
