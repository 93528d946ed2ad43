"""The pass that chooses and repairs on calibration data, and the model with repaired weights that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fxslim.batches import read
from fxslim.calibration import Calibration
from fxslim.count import macs, parameters
from fxslim.dtypes import Following
from fxslim.errors import NarrowError, UnsupportedModelError
from fxslim.passes.annotate import Labels
from fxslim.passes.choose import FFN, Choice, Request, choose, select
from fxslim.passes.emit import emit
from fxslim.passes.fitting.budget import Price
from fxslim.passes.fitting.fit import Recipe, fit
from fxslim.passes.fitting.latency import Latency
from fxslim.passes.masking import Masks, masks
from fxslim.passes.pipelines import inspecting
from fxslim.passes.planning import Subject, check_plan, cut_of, new_plan
from fxslim.passes.prepare import fingerprint
from fxslim.passes.rewrite import example_macs_graph, rewrite
from fxslim.passes.sites import Sites
from fxslim.pipeline import Facts, Pipeline
from fxslim.plan import Note, Plan
from fxslim.program import Program
from fxslim.report import Fit, Reached
from fxslim.sharing import share
from fxslim.site import Site, SitePlan


@dataclass(frozen=True)
class Repaired:
    """A model like the dense one, with repaired weights at the consumers; it shares all others.

    Attributes:
        model: the model.
        tensors: canonical name -> tensors that are its own.
        fits: what was done, site by site.
        tokens: how many tokens were looked at.
        reached: what became of the targets.
    """

    model: nn.Module
    tensors: Mapping[str, torch.Tensor]
    fits: tuple[Fit, ...]
    tokens: int
    reached: tuple[Reached, ...] = ()


@dataclass(frozen=True)
class Calibrate:
    """Choose what goes on calibration data. Ensures: a plan, and a model whose masked form was repaired.

    Attributes:
        request: fractions, globs.
        recipe: how to choose and repair.
        data: calibration data, or None.
        plan: a plan that is repaired as it is, or None.
        build: makes the narrowed model of a plan, to be timed; needed for targets of time.
        progress: whether to show a progress bar.
        weights: the numbers, where the program's tensors hold shapes alone; what was repaired is then no model.
        changed: where repaired tensors are put; by default, into memory.
    """

    request: Request
    recipe: Recipe
    data: Calibration | None
    plan: Plan | None = None
    build: Callable[[Plan], nn.Module] | None = None
    progress: bool = False
    weights: Mapping[str, torch.Tensor] | None = None
    changed: MutableMapping[str, torch.Tensor] | None = None

    requires: ClassVar[tuple[type, ...]] = (Subject, Program, Labels, Sites)
    ensures: ClassVar[tuple[type, ...]] = (Plan, Repaired)

    def run(self, facts: Facts) -> Facts:
        """Choose and repair."""
        model, program, labels = facts.get(Subject).model, facts.get(Program), facts.get(Labels)
        sites = facts.get(Sites)
        if program.regions:
            raise UnsupportedModelError(
                "this model cannot be traced as a whole, and calibration data flows through the whole graph; leave "
                "calibration=, target= and method= out to choose by magnitude."
            )
        if any(tensor.device.type == "meta" for tensor in program.tensors.values()):
            raise UnsupportedModelError("the weights are on meta: choosing by data needs them.")
        if self.plan is not None:
            check_plan(self.plan, model)
        filled = program if self.weights is None else dataclasses.replace(program, tensors=self.weights)
        choice = choose(sites.sites, filled.tensors, self.request, refused=sites.refused)
        reached = [site for site in select(sites.sites, self.request)[0] if _reached(site)]
        asked = {part.site.name: part for part in (choice.sites if self.plan is None else self.plan.sites)}
        if not self.recipe.targets:
            reached = [site for site in reached if site.name in asked]

        def count(parts: tuple[SitePlan, ...]) -> int:
            return macs(example_macs_graph(program, cut_of(labels, sites, parts))).total

        def masking(parts: Sequence[SitePlan]) -> Masks | None:
            try:
                return masks(filled, labels, cut_of(labels, sites, tuple(parts), masks=True), parts)
            except NarrowError:
                return None

        made = fit(program, reached, self.recipe, self.data, self._price(facts, count), asked, masking,
                   fixed=self.plan is not None, progress=self.progress,
                   weights=self.weights, changed=self.changed)  # fmt: skip
        notes = (*(() if self.recipe.targets else choice.notes), *made.notes)
        notes = notes if self.data is not None else (*notes, weak_choice(self.recipe.method))
        plan = self.plan or new_plan(model, Choice(made.parts, notes), self.request)
        plan = plan.model_copy(update={"requested": {**plan.requested, **requested(self.recipe)}})
        tokens = self.data.tokens if self.data is not None else 0
        repaired = _with(model, made.tensors) if self.weights is None else model
        return facts.adding(plan, Repaired(repaired, made.tensors, made.fits, tokens, made.reached))

    def _price(self, facts: Facts, count: Callable[[tuple[SitePlan, ...]], int]) -> Price:
        """Return what a model costs after site plans."""
        model, program = facts.get(Subject).model, facts.get(Program)
        own = [tensor for name, tensor in program.tensors.items() if name not in program.constants]
        known = sum(tensor.numel() for tensor in own if isinstance(tensor, nn.Parameter))
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        every = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        whole = sum(tensor.numel() * tensor.element_size() for tensor in every)
        timed = [one for one in self.recipe.targets if one.resource == "time"]
        latency = self._latency(facts, timed[0].inputs) if timed else None
        return Price(program, count, (parameters(model) - known, whole - size), latency)

    def _latency(self, facts: Facts, inputs: object) -> Latency:
        model, program = facts.get(Subject).model, facts.get(Program)
        labels, sites = facts.get(Labels), facts.get(Sites)
        given = dict(read(model, inputs).inputs if inputs is not None else program.call.example)

        def sketch(parts: tuple[SitePlan, ...]) -> nn.Module:
            made = rewrite(program, cut_of(labels, sites, parts), parts)
            return emit(program, made.graph, made.tensors, name=type(model).__name__, following=Following())

        def build(parts: tuple[SitePlan, ...]) -> nn.Module:
            plan = new_plan(model, Choice(parts, ()), self.request)
            return sketch(parts) if self.build is None else self.build(plan)

        dense = sketch(()) if self.build is None else model
        return Latency(dense, build, sketch, given, fingerprint(model).digest)


def requested(recipe: Recipe) -> dict[str, str | tuple[str, ...]]:
    """Return what was asked of the choice, for the plan."""
    asked: dict[str, str | tuple[str, ...]] = {"method": recipe.method}
    asked |= {"uniform": "yes"} if recipe.uniform else {}
    return asked | ({"target": tuple(map(str, recipe.targets))} if recipe.targets else {})


def calibrating(given: tuple[type, ...], last: Calibrate) -> Pipeline:
    """Return the pipeline that chooses and repairs what is given."""
    passes = inspecting(given).passes
    return Pipeline((*passes, last), given=given)


def _reached(site: Site) -> bool:
    return site.kind in (*FFN, "attention", "experts") or site.of_values


def weak_choice(method: str) -> Note:
    """Return the note that a choice looks at weights alone."""
    reason = f"chosen by {method} without calibration data: the weak choice; give calibration= for a better one"
    return Note(where="method", reason=reason)


def _with(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a model that shares its tensors but for these."""
    copied = share(model) if tensors else model
    put(copied, tensors)
    return copied


def put(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model other tensors, under each of their names."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    made: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        old = named[name]
        made[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({leaf: made[id(own)] for leaf, own in table.items() if id(own) in made})
