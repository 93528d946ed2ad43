"""What users call: inspect, plan, slim, compile, masked, verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from fxslim.analysis import Analysis, state_of
from fxslim.asked import Asked, Wanted, globs, wanted
from fxslim.calibration import Calibration
from fxslim.debug import debugging
from fxslim.errors import InputError, PlanError, RequestError, UnsupportedModelError, VerifyError
from fxslim.express import express
from fxslim.inputs import bind
from fxslim.lazy import Lazy, Spilled
from fxslim.offloaded import Offloaded, is_offloaded, skeleton
from fxslim.overlay import own_config
from fxslim.passes import pipelines as lines
from fxslim.passes import vary
from fxslim.passes.calibrate import Calibrate, Repaired, calibrating, put, weak_choice
from fxslim.passes.choose import Request, select
from fxslim.passes.emit import CompiledModule
from fxslim.passes.mask import masked as _masked
from fxslim.passes.narrow import changed_weights, replay, say_sizes
from fxslim.passes.narrowing import Narrowed, graph_paths
from fxslim.passes.paths import paths
from fxslim.passes.planning import MASKS, Subject, subject
from fxslim.passes.prepare import computed, settle, weights_digest
from fxslim.passes.regional import is_regional
from fxslim.passes.sites import Sites
from fxslim.passes.verify import compare, refer
from fxslim.pipeline import Facts, Observer, Pass, Pipeline
from fxslim.plan import Note, Plan
from fxslim.program import Program
from fxslim.regions import region_notes
from fxslim.report import Inspection, Record, Report, Verification
from fxslim.sharing import rebound, untouched_on_failure

Model = nn.Module | Inspection
"""What stands for a model: itself, or what `inspect` said of it, which is not traced again."""

OPEN_AXES = (None, 1, 0)
"""How many leading axes of the inputs a graph is tried with: all, the batch, none."""

__all__ = ["Inspection", "Report", "compile", "inspect", "masked", "plan", "slim", "verify"]


def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    observer: Observer | None = None,
) -> Inspection:
    """Find what can be narrowed in a model, and say why the rest cannot.

    Args:
        model: any module that ``torch.export`` can trace, on any device, ``meta`` included. It is not changed.
        example_inputs: a dict of keyword inputs, a tuple of positional ones, or one tensor; batch at least 2, length
            at least 3. Not needed for models of transformers.
        include: globs over module paths: only sites there.
        skip: globs over module paths: no sites there.
        observer: called after every pass.

    Raises:
        InputError: inputs are missing or do not fit.
        TraceError: the model cannot be traced.
        UnsupportedModelError: the model is quantized or has nothing to narrow.
        RequestError: a glob matches nothing.
    """
    facts = _run(lines.inspecting(), Facts().adding(_subject(model, example_inputs)), observer)
    sites, program = facts.get(Sites), facts.get(Program)
    request = Request(include=globs(include), skip=globs(skip))
    chosen = select(sites.sites, request)[0] if request.include or request.skip else list(sites.sites)
    names = [site.name for site in chosen]
    return Inspection(
        sites=tuple(chosen),
        pinned=sites.pinned,
        notes=(*region_notes(program), *(Note(where="trace", reason=note) for note in program.notes)),
        feeds=sites.feeds.subgraph(names),
        explain=sites.naming.why,
        analysis=Analysis(model, example_inputs, facts, state_of(model, example_inputs)),
    )


def plan(
    model: Model,
    example_inputs: Any = None,
    *,
    progress: bool = False,
    observer: Observer | None = None,
    **asked: Unpack[Asked],
) -> Plan:
    """Choose what to take out: by what calibration data shows, or by the magnitude of everything that a unit owns.

    Without a request the plan takes out only what does nothing: units whose columns in every consumer are zero, and
    units whose value is the same for every input, where the consumers' biases can take it up. A plan holds no weights:
    to repair what is left, give it to `slim` together with the calibration data.

    Args:
        model: see `inspect`; of one that accelerate has offloaded, a few tensors are read at a time. Or what `inspect`
            returned, in the place of model and inputs, so that a model that has not changed since is not traced again.
        example_inputs: see `inspect`.
        progress: show a progress bar.
        observer: called after every pass.
        **asked: fractions or a target, and how to choose: see `fxslim.asked.Asked`.

    Raises:
        RequestError: a fraction is out of range, a glob matches nothing, a budget cannot be reached, or keywords
            contradict each other.
        InputError: a weight holds NaN; otherwise as `inspect`.
    """
    want = wanted(asked)
    if is_offloaded(_module(model)):
        own = _module(model)
        return planned(
            skeleton(own), partial(Offloaded, own), want, example_inputs, observer=observer, progress=progress
        )
    data = want.read(_module(model))
    known = _known(model, example_inputs, data)
    if want.recipe is not None:
        return _calibrated(known, want, data, observer, progress=progress)[1]
    return _run(lines.choosing(want.request, tuple(known.known)), known, observer, progress=progress).get(Plan)


def slim(
    model: Model,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    inplace: bool = False,
    progress: bool = False,
    observer: Observer | None = None,
    **asked: Unpack[Asked],
) -> nn.Module:
    """Return the model's own class with narrowed weights, verified against the masked model.

    Args:
        model: see `plan`. It is not changed unless ``inplace``, and in no case when anything fails.
        example_inputs: see `inspect`.
        plan: what to take out; instead of a request. With ``calibration=`` what is left is repaired.
        inplace: narrow the model itself and return it.
        progress: show a progress bar over the passes.
        observer: called after every pass.
        **asked: fractions or a target, and how to choose: see `fxslim.asked.Asked`.

    Returns:
        A module whose ``.fxslim`` holds the plan (with the edits that were found) and the report.

    Raises:
        VerifyError: masked and narrowed differ; otherwise as `plan`, and PlanError for a plan of another model.
    """
    want = wanted(asked, planned=plan is not None)
    _check(plan, want)
    plain = plan is None and want.recipe is None
    lossless, weak = plain and want.request.lossless, plain and not want.request.lossless
    data = want.read(_module(model))
    known = _known(model, example_inputs, data)
    if isinstance(_module(model), CompiledModule):
        raise InputError("slim narrows a model's own class, and this is a compiled graph: compile takes graphs, too.")
    clock = _Clock()
    known = _run(lines.inspecting(tuple(known.known)), known, observer, clock, progress=progress)
    dense = known.get(Subject).original
    repaired: Repaired | None = None
    if want.recipe is not None:
        build = lines.slim_passes(thorough=True)
        known, plan, repaired = _calibrated(known, want, data, observer, plan=plan, last=build, progress=progress)
    quick, thorough = (lines.slim_passes(thorough=t, lossless=lossless) for t in (False, True))
    try:
        small, record = _narrow(known, plan, want.request, quick, progress, observer, clock)
    except VerifyError:
        try:
            small, record = _narrow(known, plan, want.request, thorough, progress, observer, clock)
        except VerifyError:
            if not isinstance(model, Inspection) or model.analysis is None or want.recipe is not None:
                raise
            given = model.analysis  # the model may have changed in a way that an Inspection cannot see
            return slim(given.model, given.example_inputs, plan=plan, inplace=inplace, progress=progress,
                        observer=observer, **asked)  # fmt: skip
    record = _expressed(small, record, known.get(Program).call.example)
    if inplace:
        with untouched_on_failure(dense):
            settle(dense)
            put(dense, {} if repaired is None else repaired.tensors)
            own_config(dense)
            small = replay(dense, record.plan)
    record = _recorded(record, repaired, weak=weak)
    earlier = getattr(dense, "fxslim", None)
    if isinstance(earlier, Record):  # narrowed before: say what was done to the dense model
        record = dataclasses.replace(record, plan=earlier.plan.then(record.plan))
    config = getattr(small, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        config.fxslim = record.plan.model_dump(mode="json", exclude_none=True)
    small.fxslim = dataclasses.replace(record, weights=weights_digest(small))  # type: ignore[assignment]
    return small


def compile(
    model: Model,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    narrow: bool = True,
    progress: bool = False,
    observer: Observer | None = None,
    **asked: Unpack[Asked],
) -> nn.Module:
    """Return a narrowed ``torch.fx.GraphModule``, called like the model, with the same (cache-free) outputs.

    Without a plan and without a request, what does nothing is taken out and nothing else: see `plan`. A model that
    cannot be traced as a whole gives a copy of itself with a narrowed graph in the place of each region that can be.

    Args:
        model: see `plan`. It is not changed.
        example_inputs: see `inspect`.
        plan: what to take out; instead of a request. With ``calibration=`` what is left is repaired.
        narrow: False to insert masks and take nothing out.
        progress: show a progress bar over the passes.
        observer: called after every pass.
        **asked: fractions or a target, and how to choose: see `fxslim.asked.Asked`.

    Returns:
        A GraphModule (or a module with graphs inside) whose ``.fxslim`` holds the plan, in terms of the model that was
        given, and the report; for inference.

    Raises:
        VerifyError: masked and narrowed differ; otherwise as `slim`.
    """
    want = wanted(asked, planned=plan is not None)
    _check(plan, want)
    plain = plan is None and want.recipe is None
    lossless, weak = plain and want.request.lossless, plain and not want.request.lossless
    last = lines.compile_passes(narrow=narrow, lossless=lossless)
    data = want.read(_module(model))
    known, clock = _known(model, example_inputs, data), _Clock()
    repaired: Repaired | None = None
    if want.recipe is not None:
        known, plan, repaired = _calibrated(known, want, data, observer, plan=plan, last=last, progress=progress)
    graph, record = _narrow(known, plan, want.request, last, progress, observer, clock)
    record = _recorded(record, repaired, weak=weak)
    if isinstance(graph, CompiledModule):
        graph.meta["fxslim"] = record
    else:
        graph.fxslim = record  # type: ignore[assignment]
    return graph


def masked(model: nn.Module, plan: Plan) -> AbstractContextManager[nn.Module]:
    """Make a plan's masks active on the dense model while the context is open: the reference for everything.

    Raises:
        PlanError: the plan does not fit the model.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"masked(model, plan) takes a fxslim Plan, not {type(plan).__name__}.")
    return _masked(model, plan)


def verify(model: nn.Module, small: nn.Module, *, plan: Plan, example_inputs: Any = None) -> Verification:
    """Compare the masked dense model with a narrowed one along every path that the model offers.

    Args:
        model: the dense model.
        small: what `slim` or `compile` returned.
        plan: what was taken out.
        example_inputs: see `inspect`.

    Returns:
        The measured differences.

    Raises:
        VerifyError: they differ by more than the tolerance of their dtype; it says which weights have changed since.
        PlanError: the plan repaired weights.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan= takes a fxslim Plan, not {type(plan).__name__}.")
    if plan.weights_changed:
        raise PlanError("the plan repaired weights: nothing but its own report says how masked and narrowed compare.")
    what = _subject(model, example_inputs)
    candidates = bind(what.model, example_inputs)
    filled = MASKS if example_inputs is None else frozenset()
    graph = isinstance(small, CompiledModule) or is_regional(small)
    ways = paths(what.model, candidates[0], filled=filled, given=candidates[0], train=not graph)
    if graph:
        ways = graph_paths(ways)
    try:
        return compare(what.model, small, plan, refer(what.model, plan, ways))
    except VerifyError as error:
        changed = changed_weights(what.model, small, plan)
        raise VerifyError(error.site, error.max_abs, error.tolerance, error.where, changed=changed) from error


def _module(model: Model) -> nn.Module:
    """Return the module that is meant."""
    if isinstance(model, Inspection):
        if model.analysis is None:
            raise InputError("this Inspection was not made by fxslim.inspect; give the model itself.")
        return model.analysis.model
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    return model


def _known(model: Model, example_inputs: Any, data: Calibration | None = None) -> Facts:
    """Return what is known about a model: all that `inspect` found out, where it still holds.

    Without example inputs, a batch of the calibration data is traced.
    """
    if not isinstance(model, Inspection):
        if example_inputs is None and data is not None:
            example_inputs = dict(data.example)
        return Facts().adding(_subject(model, example_inputs))
    if example_inputs is not None:
        raise InputError("an Inspection stands for its model and its example inputs; give no others with it.")
    kept = model.analysis
    assert kept is not None  # see _module
    what = _subject(kept.model, kept.example_inputs)
    if data is not None and not data.example.keys() <= kept.facts.get(Program).call.example.keys():
        return Facts().adding(_subject(kept.model, dict(data.example)))  # batches hold what was not traced
    if not kept.holds():
        return Facts().adding(what)
    return kept.facts.adding(what, rebound(kept.facts.get(Program), what.model))


def planned(
    skeleton: nn.Module,
    reading: Callable[[Program], Lazy],
    want: Wanted,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    repaired: MutableMapping[str, torch.Tensor] | None = None,
    observer: Observer | None = None,
    progress: bool = False,
) -> Plan:
    """Choose what to take out of a model whose weights are read when they are used, and repair what is left.

    Args:
        skeleton: the model, with tensors of which nobody knows the numbers.
        reading: returns the numbers of a program's tensors.
        want: what was asked.
        example_inputs: see `inspect`.
        plan: a plan that is repaired as it is.
        repaired: where repaired tensors are put; by default, into files that are gone at the end.
        observer: called after every pass.
        progress: show a progress bar.

    Raises:
        RequestError: a target is about time; otherwise as `plan`.
    """
    if computed(skeleton):
        raise UnsupportedModelError("masks or parametrizations compute weights that are not there: settle them first.")
    if want.recipe is not None and any(target.resource == "time" for target in want.recipe.targets):
        raise RequestError("a speed-up is measured on whole models, and this one is not in memory: give fxslim.macs().")
    data = want.read(skeleton)
    known = _run(lines.inspecting(), _known(skeleton, example_inputs, data), observer)
    program = known.get(Program)
    weights = reading(program)
    if want.recipe is None:
        known = known.adding(dataclasses.replace(program, tensors=weights))
        return _run(lines.choosing(want.request, tuple(known.known)), known, observer, progress=progress).get(Plan)
    with TemporaryDirectory() as folder:
        changed = Spilled(Path(folder)) if repaired is None else repaired
        last = Calibrate(want.request, want.recipe, data, plan, progress=progress, weights=weights, changed=changed)
        return _run(calibrating(tuple(known.known), last), known, observer).get(Plan)


def _check(plan: Plan | None, want: Wanted) -> None:
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan= takes a fxslim Plan, not {type(plan).__name__}.")
    if plan is not None and (want.request.asked() or (want.recipe is not None and want.recipe.targets)):
        given = sorted({*want.request.asked(), *(["target"] if want.recipe and want.recipe.targets else [])})
        raise InputError(f"give either plan= or a request, not both: {given} came with a plan.")


def _calibrated(
    known: Facts,
    want: Wanted,
    data: Calibration | None,
    observer: Observer | None,
    *,
    plan: Plan | None = None,
    last: tuple[Pass, ...] = (),
    progress: bool = False,
) -> tuple[Facts, Plan, Repaired]:
    """Choose on calibration data, and repair.

    Args:
        known: what is known of the model.
        want: what was asked.
        data: calibration data.
        observer: called after every pass.
        plan: a plan that is repaired as it is.
        last: the passes that narrow, for models that are timed.
        progress: whether to show a progress bar.

    Returns:
        What is known of the repaired model, the plan, and what was repaired.
    """
    what = known.get(Subject)
    assert want.recipe is not None

    def build(chosen: Plan) -> nn.Module:
        return _narrow(known, chosen, Request(), last, False, None, _Clock())[0]

    last_pass = Calibrate(want.request, want.recipe, data, plan, build if last else None, progress)
    pipeline = calibrating(tuple(known.known), last_pass)
    facts = _run(pipeline, known, observer)
    made, repaired = facts.get(Plan), facts.get(Repaired)
    after = dataclasses.replace(what, original=repaired.model, model=repaired.model)
    kept = {kind: fact for kind, fact in facts.known.items() if kind not in (Plan, Repaired)}
    facts = Facts(kept).adding(after, rebound(facts.get(Program), repaired.model))
    return facts, made, repaired


def _expressed(small: nn.Module, record: Record, inputs: Mapping[str, Any]) -> Record:
    """Say a narrowed model's sizes in its config where that can, so that it loads without fxslim."""
    found = express(small, record.plan, inputs)
    if found is None:
        return record
    fields, plain = found
    plan = record.plan.model_copy(update={"config": fields})
    say_sizes(small, plan)
    return Record(plan, record.report and dataclasses.replace(record.report, plan=plan, plain=plain))


def _recorded(record: Record, repaired: Repaired | None, *, weak: bool) -> Record:
    """Say in a record what was repaired, or that nothing but magnitudes was looked at."""
    if weak and record.report is not None:
        report = dataclasses.replace(record.report, notes=(*record.report.notes, weak_choice("magnitude")))
        return Record(record.plan, report)
    if repaired is None or record.report is None:
        return record
    plan = record.plan.model_copy(update={"weights_changed": bool(repaired.tensors)})
    report = dataclasses.replace(
        record.report, plan=plan, fits=repaired.fits, tokens=repaired.tokens, reached=repaired.reached
    )
    return Record(plan, report)


@dataclasses.dataclass
class _Clock:
    """Observes how long the passes take, and what was traced."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    program: Program | None = None

    def __call__(self, before: Facts, step: Pass, after: Facts, spent: float) -> None:
        self.seconds[type(step).__name__] = round(spent, 4)
        self.program = after.get(Program)


def _narrow(
    known: Facts,
    plan: Plan | None,
    request: Request,
    last: tuple[Pass, ...],
    progress: bool,
    observer: Observer | None,
    clock: _Clock,
) -> tuple[nn.Module, Record]:
    failed: VerifyError | None = None
    bare = Facts().adding(known.get(Subject))
    attempts: list[tuple[int | None, Facts]] = [(None, known)]
    if lines.makes_graph(last):  # what was known may not hold any more, for reasons that an Inspection cannot see
        attempts += [(None, bare)] * (Program in known.known) + [(axes, bare) for axes in OPEN_AXES[1:]]
    for open_axes, given in attempts:
        if open_axes and clock.program is not None and max(vary.open_axes(clock.program), default=0) < open_axes:
            continue  # the trace that failed left no more open
        facts = given if plan is None else given.adding(plan)
        clock.program = facts.find(Program)
        pipeline = lines.narrowing(request, tuple(facts.known), last=last, open_axes=open_axes)
        try:
            facts = _run(pipeline, facts, observer, clock, progress=progress)
        except VerifyError as error:  # loops over rows or pieces are traced for one number of them
            failed = failed or error
            if clock.program is not None and clock.program.regions:
                break
            continue
        report = dataclasses.replace(facts.get(Report), seconds=clock.seconds)
        if failed is not None and open_axes is not None:
            reason = f"traced with sizes fixed: with open ones, other sizes could not be verified ({failed.where})"
            report = dataclasses.replace(report, notes=(*report.notes, Note(where="graph form", reason=reason)))
        return facts.get(Narrowed).module, Record(facts.get(Plan), report)
    assert failed is not None
    raise failed


def _run(
    pipeline: Pipeline, given: Facts, observer: Observer | None, *others: Observer, progress: bool = False
) -> Facts:
    observers = (*others, *debugging(), *([observer] if observer is not None else []))
    with torch.random.fork_rng(), _bar(pipeline, visible=progress) as advance:
        return pipeline.run(*given.known.values(), observers=(*observers, advance))


@contextmanager
def _bar(pipeline: Pipeline, *, visible: bool) -> Iterator[Observer]:
    if not visible:
        yield lambda before, step, after, seconds: None
        return
    from tqdm import tqdm

    with tqdm(total=len(pipeline.passes), desc="fxslim", leave=False) as bar:

        def advance(before: Facts, step: Pass, after: Facts, seconds: float) -> None:
            bar.set_postfix_str(type(step).__name__)
            bar.update()

        yield advance


def _subject(model: nn.Module, example_inputs: Any) -> Subject:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(example_inputs, Plan):
        raise InputError("a plan was given in the place of example_inputs; pass it as plan=.")
    return subject(model, example_inputs)
