"""The passes up to a plan and its cut: trace, label, find, name, choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from fxslim.errors import PlanError, TraceError, UnsupportedModelError
from fxslim.inputs import bind
from fxslim.passes.annotate import Labels, annotate
from fxslim.passes.choose import Choice, Request, choose
from fxslim.passes.cut import Cut, closed
from fxslim.passes.family import Family, Found
from fxslim.passes.find import find
from fxslim.passes.folding.constants import constants
from fxslim.passes.folding.foldable import still
from fxslim.passes.inference.optimized import OptimizedModule
from fxslim.passes.lift import lift
from fxslim.passes.name import Naming, names
from fxslim.passes.pad import padded
from fxslim.passes.prepare import fingerprint, permanent
from fxslim.passes.regional import is_regional
from fxslim.passes.sites import Sites, name_sites, same_slices
from fxslim.pipeline import Facts
from fxslim.plan import Plan
from fxslim.program import Program
from fxslim.regions import trace_regions
from fxslim.sharing import refuse, share
from fxslim.site import SitePlan, removed_rows
from fxslim.trace import trace

MASKS = frozenset({"attention_mask", "decoder_attention_mask"})
"""Inputs that callers may leave out and that stand for ones then."""


@dataclass(frozen=True)
class Subject:
    """The model that is worked on.

    Attributes:
        original: the user's model; never changed.
        model: a copy that shares its weights, with computed weights made permanent and buffers of its own.
        example_inputs: what the user gave, or None.
    """

    original: nn.Module
    model: nn.Module
    example_inputs: Any


def subject(model: nn.Module, example_inputs: Any) -> Subject:
    """Prepare a model for a pipeline: what is run is a copy that shares the weights and has buffers of its own.

    Raises:
        UnsupportedModelError: the model cannot be narrowed, or has become something that cannot be.
    """
    if is_regional(model) or isinstance(model, OptimizedModule):
        made = "optimize made" if isinstance(model, OptimizedModule) else "compile made, region by region,"
        raise UnsupportedModelError(f"this is what fxslim.{made} of another model: narrow that one.")
    refuse(model)
    return Subject(model, share(permanent(model), buffers=False), example_inputs)


@dataclass(frozen=True)
class Trace:
    """Trace the model. Ensures: a functional graph, shared tensors, open batch and length where possible.

    A model that cannot be traced as a whole gives the graphs of its regions, side by side.

    Attributes:
        open_axes: how many leading axes of the inputs take other sizes; None for all that can.
    """

    open_axes: int | None = None

    requires: ClassVar[tuple[type, ...]] = (Subject,)
    ensures: ClassVar[tuple[type, ...]] = (Program,)

    def run(self, facts: Facts) -> Facts:
        """Trace."""
        what = facts.get(Subject)
        filled = MASKS if what.example_inputs is None else frozenset()
        candidates = bind(what.model, what.example_inputs)
        try:
            if self.open_axes is None:
                return facts.adding(trace(what.model, *candidates, filled=filled))
            return facts.adding(trace(what.model, *candidates, filled=filled, open_axes=self.open_axes))
        except TraceError as error:
            whole = error
        return facts.adding(trace_regions(what.model, *candidates, whole=whole, filled=filled))


@dataclass(frozen=True)
class Annotate:
    """Label every coordinate. Ensures: whatever is not understood is pinned, with a reason."""

    requires: ClassVar[tuple[type, ...]] = (Program,)
    ensures: ClassVar[tuple[type, ...]] = (Labels,)

    def run(self, facts: Facts) -> Facts:
        """Annotate."""
        return facts.adding(annotate(facts.get(Program)))


@dataclass(frozen=True)
class Find:
    """Find families of coordinates. Ensures: random keeps of each are boxes everywhere, or experts' own."""

    requires: ClassVar[tuple[type, ...]] = (Program, Labels)
    ensures: ClassVar[tuple[type, ...]] = (Found,)

    def run(self, facts: Facts) -> Facts:
        """Find."""
        program, labels = facts.get(Program), facts.get(Labels)
        return facts.adding(lift(program, labels, find(program, labels)))


@dataclass(frozen=True)
class Name:
    """Match the patterns. Ensures: a match or a near miss for every linear."""

    requires: ClassVar[tuple[type, ...]] = (Program,)
    ensures: ClassVar[tuple[type, ...]] = (Naming,)

    def run(self, facts: Facts) -> Facts:
        """Name."""
        return facts.adding(names(facts.get(Program)))


@dataclass(frozen=True)
class Order:
    """Make sites of families. Ensures: unique names, order of execution, the site graph."""

    requires: ClassVar[tuple[type, ...]] = (Subject, Program, Labels, Found, Naming)
    ensures: ClassVar[tuple[type, ...]] = (Sites,)

    def run(self, facts: Facts) -> Facts:
        """Order."""
        model = facts.get(Subject).model
        return facts.adding(
            name_sites(model, facts.get(Program), facts.get(Labels), facts.get(Found), facts.get(Naming))
        )


@dataclass(frozen=True)
class Choose:
    """Choose what goes. Ensures: a plan that keeps at least one unit of every site."""

    request: Request

    requires: ClassVar[tuple[type, ...]] = (Subject, Program, Labels, Sites)
    ensures: ClassVar[tuple[type, ...]] = (Plan,)

    def run(self, facts: Facts) -> Facts:
        """Choose."""
        model, program, sites = facts.get(Subject).model, facts.get(Program), facts.get(Sites)
        constant = still(program, facts.get(Labels), constants(program, model), sites.sites)
        refused = (*sites.refused, *(sites.routers if self.request.experts else ()))
        choice: Choice = choose(sites.sites, program.tensors, self.request, refused=refused, constant=constant)
        return facts.adding(new_plan(model, choice, self.request))


def new_plan(model: nn.Module, choice: Choice, request: Request) -> Plan:
    """Return a plan for a model with today's versions."""
    import importlib.metadata

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return Plan(
        fxslim=version("fxslim") or "unknown",
        torch=version("torch") or "unknown",
        transformers=version("transformers"),
        fingerprint=fingerprint(model),
        sites=choice.sites,
        requested=request.asked(),
        notes=choice.notes,
    )


@dataclass(frozen=True)
class Reread:
    """Check a given plan against the model's own sites. Ensures: the plan's slices are those that the labels give."""

    requires: ClassVar[tuple[type, ...]] = (Subject, Sites, Plan)
    ensures: ClassVar[tuple[type, ...]] = ()

    def run(self, facts: Facts) -> Facts:
        """Check."""
        plan, model = facts.get(Plan), facts.get(Subject).model
        check_plan(plan, model)
        mine = {site.name: site for site in facts.get(Sites).sites}
        for part in plan:
            site = mine.get(part.site.name)
            if site is None or not (
                same_slices(site.slices, part.site.slices)
                or same_slices(site.slices, part.site.slices, removed_rows(p for p in plan if p is not part))
            ):
                raise PlanError(
                    f"the plan's site {part.site.name} is not what this model's graph says it is; make the plan anew "
                    "with fxslim.plan and this version."
                )
        return facts


def check_plan(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError for a plan of another model."""
    own = fingerprint(model)
    if plan.weights_changed:
        raise PlanError("the plan repaired weights, so it cannot be applied to the dense model again.")
    if plan.fingerprint != own:
        raise PlanError(
            f"the plan was made for another model ({plan.fingerprint.model_class}), not for this "
            f"{own.model_class}: names, shapes or sizes in the config differ. Make a plan for this model."
        )


@dataclass(frozen=True)
class Pad:
    """Fill up what a given plan keeps. Ensures: every kernel can take what is left, and the plan says what stays."""

    requires: ClassVar[tuple[type, ...]] = (Sites, Plan)
    ensures: ClassVar[tuple[type, ...]] = (Plan,)

    def run(self, facts: Facts) -> Facts:
        """Pad."""
        return facts.adding(padded(facts.get(Plan), {site.name: site for site in facts.get(Sites).sites}))


@dataclass(frozen=True)
class Take:
    """Turn the plan into a cut of the labels. Ensures: closed under parents."""

    requires: ClassVar[tuple[type, ...]] = (Labels, Sites, Plan)
    ensures: ClassVar[tuple[type, ...]] = (Cut,)

    def run(self, facts: Facts) -> Facts:
        """Cut."""
        return facts.adding(cut_of(facts.get(Labels), facts.get(Sites), facts.get(Plan).sites))


def cut_of(labels: Labels, sites: Sites, parts: tuple[SitePlan, ...], *, masks: bool = False) -> Cut:
    """Return the cut that removes the rows that site plans take out, or the inputs that their masks take.

    Of what is counted per expert, it removes as many channels as every expert loses, the last ones.
    """
    families = [sites.families[part.site.name] for part in parts]
    none = np.zeros(0, dtype=np.int64)
    units = [_channels(part, f, masks=masks) for part, f in zip(parts, families, strict=True)]
    gone = [f.leaves[own[f.unit_of]] for own, f in zip(units, families, strict=True)]
    members = [f.members for f in families]
    return closed(labels, np.concatenate([none, *gone]), np.concatenate([none, *members]))


def _channels(part: SitePlan, family: Family, *, masks: bool) -> np.ndarray:
    """Return which of the channels that the labels tell apart go.  (channels,) bool"""
    if family.experts == 1:
        return part.gone if masks else part.taken
    kept = family.channels if masks else len(part.left) // family.experts
    return np.arange(family.channels) >= kept
