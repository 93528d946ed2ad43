"""Models that are compared have to compute the same, as far as they claim to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxslim.errors import FxslimError, VerifyError
from fxslim.passes.paths import Path
from fxslim.passes.prepare import fingerprint
from fxslim.passes.verify import compare, refer
from fxslim.plan import Plan
from fxslim.report import Record


class DisagreementError(VerifyError):
    """Two models that stand for one plan compute something else."""

    def __init__(self, what: str, error: VerifyError) -> None:
        super().__init__(error.site, error.max_abs, error.tolerance, error.where)
        text = (
            f"{what} disagree at {error.site} ({error.where}): largest difference {error.max_abs:.3g}, allowed "
            f"{error.tolerance:.3g}. Were weights trained or changed since? check=False times them all the same."
        )
        self.args = (text,)


def record_of(model: nn.Module) -> Record | None:
    """Return what a narrowed model carries, in whichever form; None for a dense one."""
    found = getattr(model, "fxslim", None)
    return found if isinstance(found, Record) else None


def check_agreement(models: Mapping[str, nn.Module], inputs: Mapping[str, Any], baseline: str) -> tuple[str, ...]:
    """Compare the models that stand for one plan, and with the masked dense one where it is among them.

    Args:
        models: the models, by name, in eval mode.
        inputs: keyword inputs.
        baseline: the model that ratios refer to.

    Returns:
        What was not compared, and why.

    Raises:
        DisagreementError: two of them differ by more than `fxslim.verify` allows.
    """
    records = {name: record_of(model) for name, model in models.items()}
    plans: dict[str, Plan] = {name: record.plan for name, record in records.items() if record is not None}
    dense = [name for name, record in records.items() if record is None]
    prints = {name: fingerprint(models[name]) for name in dense} if plans else {}
    notes, used = [], {baseline}
    first: dict[str, str] = {}
    for name, plan in plans.items():
        twin = first.setdefault(_cut(plan), name)
        own = next((other for other in dense if prints[other] == plan.fingerprint), None)
        if twin != name:
            notes += _compared(models, twin, plan.spent(), name, inputs, f"{twin} and {name}")
        elif plan.weights_changed:
            notes.append(f"{name}: its weights were repaired, so that no dense model computes the same")
        elif own is None:
            notes.append(f"{name}: the dense model that it was made of is not among those compared")
        else:
            used.add(own)
            notes += _compared(models, own, plan, name, inputs, f"{own}, masked, and {name}")
    others = [name for name in dense if name not in used]
    return (*notes, *(f"{name}: fxslim made it of none of these; what it computes is its own" for name in others))


def _cut(plan: Plan) -> str:
    """Return what tells plans apart: what goes out of which model."""
    return repr((plan.fingerprint, sorted((part.site.name, part.keep) for part in plan), plan.weights_changed))


def _compared(
    models: Mapping[str, nn.Module], one: str, plan: Plan, other: str, inputs: Mapping[str, Any], what: str
) -> list[str]:
    """Compare two models as `fxslim.verify` would; return why not, if not."""
    kinds = [{p.dtype for p in models[name].parameters() if p.is_floating_point()} for name in (one, other)]
    if kinds[0] != kinds[1]:
        return [f"{what}: their weights are of different dtypes"]
    try:
        found = refer(models[one], plan, [Path("as given", inputs)])
        compare(models[one], models[other], plan, found)
    except VerifyError as error:
        raise DisagreementError(what, error) from error
    except FxslimError as error:
        return [f"{what}: {error}"]
    return []
