"""The passes from a plan and its cut to a narrowed model that is verified, in both forms, and its report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from fxslim.count import macs, parameters
from fxslim.dtypes import Following, follow
from fxslim.edit import SpreadEdit
from fxslim.errors import NarrowError, UnsupportedModelError, VerifyError
from fxslim.labels import Value
from fxslim.passes.annotate import Labels
from fxslim.passes.cut import Cut
from fxslim.passes.edits import find_edits, to_watch
from fxslim.passes.emit import emit
from fxslim.passes.masking import is_apart
from fxslim.passes.narrow import narrowed_copy
from fxslim.passes.paths import Path, paths
from fxslim.passes.planning import Subject, cut_of
from fxslim.passes.regional import emit_regions, is_regional, leads_as_traced
from fxslim.passes.rewrite import example_macs_graph, insert_masks, rewrite
from fxslim.passes.routing import is_routed
from fxslim.passes.rules.walk import fixed
from fxslim.passes.sites import Sites
from fxslim.passes.vary import Vary, further, unseen, varied
from fxslim.passes.verify import Reference, compare, refer
from fxslim.passes.watch import Watch, watching
from fxslim.pipeline import Facts
from fxslim.plan import Note, Plan
from fxslim.program import Program
from fxslim.regions import region_notes
from fxslim.report import Report, Verification
from fxslim.site import SitePlan


@dataclass(frozen=True)
class Narrowed:
    """A narrowed model, in module or graph form."""

    module: nn.Module


@dataclass(frozen=True)
class References:
    """What the masked model returns, what was seen of its modules while it ran, and what it could not be run along."""

    references: tuple[Reference, ...]
    watches: Mapping[str, Watch]
    skipped: tuple[Note, ...] = ()


NOT_SHOWN = "the model takes no other sizes of those that were tried, so that none can be verified"


@dataclass(frozen=True)
class Show:
    """Look for inputs in other sizes before the work begins. Ensures: what a graph leaves open can be verified."""

    requires: ClassVar[tuple[type, ...]] = (Subject, Program)
    ensures: ClassVar[tuple[type, ...]] = ()

    def run(self, facts: Facts) -> Facts:
        """Look."""
        program, model = facts.get(Program), facts.get(Subject).model
        if any(p.device.type == "meta" for p in model.parameters()):
            return facts
        for vary in varied(program):
            try:
                Path(vary.name, further(program, vary)).run(model)
            except Exception:  # noqa: BLE001 - a model may refuse other inputs for reasons of its own
                continue
            if unseen(program, vary):
                raise VerifyError("output", float("inf"), 0.0, NOT_SHOWN)
            break
        return facts


@dataclass(frozen=True)
class Refer:
    """Run the masked dense model. Ensures: results on inputs that were not used for tracing, in other sizes.

    Attributes:
        graph: run only what a graph can run, and watch nothing.
        thorough: watch every module that holds sites, not one of each look.
        lossless: compare the masked model with the dense one as well: nothing that is taken out may matter.
    """

    graph: bool = False
    thorough: bool = False
    lossless: bool = False

    requires: ClassVar[tuple[type, ...]] = (Subject, Program, Plan)
    ensures: ClassVar[tuple[type, ...]] = (References,)

    def run(self, facts: Facts) -> Facts:
        """Run."""
        program, model, plan = facts.get(Program), facts.get(Subject).model, facts.get(Plan)
        if any(p.device.type == "meta" for p in model.parameters()):
            raise UnsupportedModelError(
                "the weights are on meta: fxslim.inspect and fxslim.plan work without weights, narrowing needs them."
            )
        modules = () if self.graph else to_watch(model, plan, thorough=self.thorough)
        made = None
        every = varied(program)
        for vary in every:
            try:
                ways = self._ways(program, model, vary)
                made = self._refer(model, plan, modules, ways)
                break
            except Exception:  # a model may refuse other inputs for reasons of its own
                if vary is every[-1]:
                    raise
        assert made is not None
        if self.graph and unseen(program, vary):
            raise VerifyError("output", float("inf"), 0.0, NOT_SHOWN)
        if not made.references:
            raise UnsupportedModelError(
                "no call leads through the parts of this model that were traced (they keep state of their own, or are "
                "given what changes), so that a graph cannot be verified; use fxslim.slim, which keeps the model's own "
                "forward."
            )
        if self.lossless and plan.sites:
            folds = any(part.folds for part in plan)  # what is constant on one path may not be on another
            compare(model, model, plan, made.references if folds else made.references[:1])
        return facts.adding(made)

    def _refer(self, model: nn.Module, plan: Plan, modules: tuple[str, ...], ways: tuple[Path, ...]) -> References:
        watches = {path: Watch() for path in modules}
        skipped: list[Note] = []
        made = refer(model, plan, ways, around=lambda way: watching(model, watches, way), skipped=skipped)
        return References(made, watches, tuple(skipped))

    def _ways(self, program: Program, model: nn.Module, vary: Vary) -> tuple[Path, ...]:
        """Return the paths to run; those that a graph cannot take are left out."""
        again = further(program, vary)
        other = further(program, dataclasses.replace(vary, batch=vary.one, length=None), seed=2)
        if not vary.integers:  # one of many that are tried
            Path(vary.name, again).run(model)
        ways = (
            *paths(model, again, filled=program.call.filled, given=program.call.example, train=not self.graph),
            Path(vary.name, other),
        )
        if program.regions:  # other values may lead past them
            ways = (*ways, Path("as traced", dict(program.call.example)))
        if not self.graph:
            return ways
        ways = graph_paths(ways)
        if not program.regions:
            return ways
        return tuple(way for way in ways if leads_as_traced(model, program, way))


STUCK = "no edit of the module's integers expresses this; its units stay in place, with zero columns"
SPREAD = (
    "no integer of the module says its width: its linears are narrowed, and zeros stand between them in the old places"
)


LEFT = "narrowed, it would not compute the same on every path; its units stay in place, with zero columns"


@dataclass(frozen=True)
class NarrowModule:
    """Narrow the user's own class. Ensures: a copy; what no edit can express stays in place, zeroed and noted."""

    requires: ClassVar[tuple[type, ...]] = (Subject, Labels, Sites, Plan, References)
    ensures: ClassVar[tuple[type, ...]] = (Plan, Narrowed)

    def run(self, facts: Facts) -> Facts:
        """Narrow."""
        plan = facts.get(Plan)
        if not (plan.edits or plan.spread or plan.zeroed):
            plan = edited(facts)
        return facts.adding(plan, Narrowed(narrowed_copy(facts.get(Subject).model, plan)))


def edited(facts: Facts, left: frozenset[str] = frozenset(), apart: frozenset[str] = frozenset()) -> Plan:
    """Return the plan with the edits that it needs; sites that are left, and those without edits, stay in place."""
    plan = facts.get(Plan).model_copy(update={"edits": (), "spread": (), "zeroed": ()})
    sizes = {p.site.name: _sizes(facts.get(Labels), facts.get(Sites), p) for p in plan}
    found = find_edits(facts.get(Subject).model, plan, sizes, facts.get(References).watches, left=left, linears=apart)
    _refuse_experts(plan, found.stuck)
    reasons = dict.fromkeys(found.stuck, STUCK) | dict.fromkeys(found.spread, SPREAD) | dict.fromkeys(left, LEFT)
    notes = tuple(note for note in plan.notes if note.reason not in (STUCK, SPREAD, LEFT))
    notes = (*notes, *(Note(where=name, reason=reason) for name, reason in reasons.items()))
    return plan.model_copy(update={"edits": found.edits, "spread": found.spread, "zeroed": found.stuck, "notes": notes})


def _refuse_experts(plan: Plan, stuck: tuple[str, ...]) -> None:
    """Raise NarrowError for experts that no edit takes out: zeros do not keep them from being selected."""
    for part in plan.sites:
        if part.site.name in stuck and is_routed(part):
            raise NarrowError(
                f"no edit of the module's integers expresses fewer experts at {part.site.name}, and they cannot stay "
                f"in place; leave them with skip={part.site.name!r}, or use fxslim.compile."
            )


def _sizes(labels: Labels, sites: Sites, part: SitePlan) -> Mapping[int, frozenset[int]]:
    """Return every axis size that a site changes: old -> new."""
    cut = cut_of(labels, sites, (part,))
    changed: dict[int, set[int]] = {}

    def add(old: int, new: int) -> None:
        if old != new:
            changed.setdefault(old, set()).add(new)

    for node, value in labels.values.items():
        if isinstance(value, Value) and cut.touches(value):
            for axis, (old, new) in enumerate(zip(value.shape, cut.shape(value), strict=True)):
                if fixed(node, axis):
                    add(old, new)
    site, kept = part.site, len(part.left)
    add(site.units, kept)
    if site.groups is not None:
        groups = len(set(np.asarray(site.groups)[list(part.left)].tolist()))
        add(site.group_count, groups)
        add(site.units // site.group_count, kept // groups)
    return {old: frozenset(new) for old, new in changed.items()}


@dataclass(frozen=True)
class Follow:
    """Find out which dtypes in the graph are the model's. Ensures: a cast graph means what a cast model means."""

    requires: ClassVar[tuple[type, ...]] = (Subject, Program)
    ensures: ClassVar[tuple[type, ...]] = (Program, Following)

    def run(self, facts: Facts) -> Facts:
        """Follow."""
        return facts.adding(*follow(facts.get(Subject).model, facts.get(Program)))


@dataclass(frozen=True)
class NarrowGraph:
    """Rewrite the graph and emit it. Ensures: a GraphModule with the model's names and signature.

    Of a model that is traced in regions: a copy of the module itself, with a graph in the place of each region.
    """

    narrow: bool = True

    requires: ClassVar[tuple[type, ...]] = (Subject, Program, Labels, Sites, Plan, Cut, Following)
    ensures: ClassVar[tuple[type, ...]] = (Narrowed,)

    def run(self, facts: Facts) -> Facts:
        """Narrow, or insert masks."""
        program, labels, parts = facts.get(Program), facts.get(Labels), facts.get(Plan).sites
        if self.narrow:
            made = rewrite(program, facts.get(Cut), parts)
        else:
            made = insert_masks(program, labels, cut_of(labels, facts.get(Sites), parts, masks=True), parts)
        if program.regions:
            plan = facts.get(Plan).model_copy(update={"zeroed": ()})
            if not self.narrow:
                left = tuple(part for part in parts if is_apart(part))
                plan = plan.model_copy(update={"sites": left, "zeroed": tuple(part.site.name for part in left)})
            return facts.adding(Narrowed(emit_regions(facts.get(Subject).model, program, made, plan)))
        name = type(facts.get(Subject).original).__name__
        following = facts.get(Following)
        return facts.adding(Narrowed(emit(program, made.graph, made.tensors, name=name, following=following)))


@dataclass(frozen=True)
class Verify:
    """Compare masked and narrowed. Ensures: they agree along every path, or VerifyError.

    Attributes:
        retreat: whether a site of a module at which they disagree is narrowed in its linears alone, then left in place.
    """

    retreat: bool = False

    requires: ClassVar[tuple[type, ...]] = (Subject, Plan, Narrowed, References)
    ensures: ClassVar[tuple[type, ...]] = (Verification,)

    def run(self, facts: Facts) -> Facts:
        """Compare."""
        references, model = facts.get(References).references, facts.get(Subject).model
        plan, small = facts.get(Plan), facts.get(Narrowed).module
        left, apart = frozenset[str](), frozenset[str]()
        while True:
            try:
                return facts.adding(plan, Narrowed(small), compare(model, small, plan, references))
            except VerifyError as error:
                sites = {part.site.name for part in plan} - {*plan.zeroed}
                if not self.retreat or error.site not in sites:
                    raise
                spread = error.site in plan.spread
                left, apart = (left | {error.site}, apart) if spread else (left, apart | {error.site})
                plan = edited(facts, left, apart - left)
                small = narrowed_copy(model, plan)


def graph_paths(ways: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the paths that a graph can run: one forward in eval mode, with the attention that was traced."""
    return tuple(p for p in ways if not (p.generate or p.fused or p.training) and p.attention is None)


@dataclass(frozen=True)
class Account:
    """Count what was saved. Ensures: a report."""

    requires: ClassVar[tuple[type, ...]] = (Subject, Program, Cut, Plan, References, Narrowed, Verification)
    ensures: ClassVar[tuple[type, ...]] = (Report,)

    def _after(self, facts: Facts) -> int:
        """Return what the narrowed model multiplies: all of what stays in place, and all between spread linears."""
        program, plan = facts.get(Program), facts.get(Plan)
        if not (plan.zeroed or plan.spread):
            return macs(example_macs_graph(program, facts.get(Cut))).total
        whole = tuple(part for part in plan if part.site.name not in (*plan.zeroed, *plan.spread))
        counted = macs(example_macs_graph(program, cut_of(facts.get(Labels), facts.get(Sites), whole)))
        left: dict[str, float] = {}
        for edit in plan.edits:
            if isinstance(edit, SpreadEdit):
                weight = f"{edit.module}.weight"
                left[weight] = left.get(weight, 1.0) * len(edit.keep) / edit.size
        total = 0.0
        for node in program.graph.nodes:
            weights = [program.tensor_name(argument) for argument in node.all_input_nodes]
            share = math.prod(left.get(name, 1.0) for name in weights if name is not None)
            total += counted.by_node.get(node.name, 0) * share
        return round(total)

    def run(self, facts: Facts) -> Facts:
        """Count."""
        program, plan = facts.get(Program), facts.get(Plan)
        before = macs(program.graph)
        notes = [*region_notes(program), *(Note(where="graph", reason=note) for note in program.notes)]
        if is_regional(facts.get(Narrowed).module):
            reason = "the model's own module, with a graph in the place of each region's forward; for inference"
            notes.insert(0, Note(where="graph form", reason=reason))
        notes.extend(facts.get(References).skipped)
        if before.uncounted:
            notes.append(Note(where="MACs", reason=f"not counted: {', '.join(before.uncounted)}"))
        return facts.adding(
            Report(
                parameters_before=parameters(facts.get(Subject).model),
                parameters_after=parameters(facts.get(Narrowed).module),
                macs_before=before.total,
                macs_after=self._after(facts),
                plan=plan,
                verification=facts.get(Verification),
                not_done=plan.notes,
                notes=tuple(notes),
            )
        )
