"""What users call: inspect, plan, slim, compile, masked, verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from fxslim.errors import InputError, RequestError, VerifyError
from fxslim.inputs import bind
from fxslim.passes import pipelines as lines
from fxslim.passes.choose import Request, select
from fxslim.passes.emit import CompiledModule
from fxslim.passes.mask import masked as _masked
from fxslim.passes.narrow import replay
from fxslim.passes.paths import paths
from fxslim.passes.prepare import settle
from fxslim.passes.regional import is_regional
from fxslim.passes.sites import Sites
from fxslim.passes.verify import compare, refer
from fxslim.pipeline import Facts, Observer, Pass, Pipeline
from fxslim.plan import Note, Plan
from fxslim.program import Program
from fxslim.regions import region_notes
from fxslim.report import Inspection, Record, Report, Verification

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
    facts = _run(lines.inspecting(), [_subject(model, example_inputs)], observer)
    sites, program = facts.get(Sites), facts.get(Program)
    request = Request(include=_globs(include), skip=_globs(skip))
    chosen = select(sites.sites, request)[0] if request.include or request.skip else list(sites.sites)
    names = [site.name for site in chosen]
    return Inspection(
        sites=tuple(chosen),
        pinned=sites.pinned,
        notes=(*region_notes(program), *(Note(where="trace", reason=note) for note in program.notes)),
        feeds=sites.feeds.subgraph(names),
        explain=sites.naming.why,
    )


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ffn: float = 0.0,
    heads: float = 0.0,
    kv_groups: float = 0.0,
    experts: float = 0.0,
    value: float = 0.0,
    round_to: int = 1,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    observer: Observer | None = None,
) -> Plan:
    """Choose what to take out, by the magnitude of everything that a unit owns; exact zeros go first.

    Without a request the plan takes out only what does nothing: units whose columns in every consumer are zero, and
    units whose value is the same for every input, where the consumers' biases can take it up.

    Args:
        model: see `inspect`.
        example_inputs: see `inspect`.
        ffn: fraction of the channels of every feed-forward site.
        heads: fraction of the query heads of every attention site, equally many per key/value group.
        kv_groups: fraction of whole key/value groups.
        experts: fraction of the experts that every router selects from, equally many per routing group.
        value: fraction of the value channels that all heads of an attention share, and of those of every attention
            whose heads do not go, equally many per head.
        round_to: round the kept number of rows in each consumer up to a multiple.
        include: globs over module paths: only there; task heads only where included.
        skip: globs over module paths: not there.
        observer: called after every pass.

    Raises:
        RequestError: a fraction is out of range, or a glob matches nothing.
        InputError: a weight holds NaN; otherwise as `inspect`.
    """
    request = _request(ffn, heads, kv_groups, experts, value, round_to, include, skip)
    return _run(lines.choosing(request), [_subject(model, example_inputs)], observer).get(Plan)


def slim(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    ffn: float = 0.0,
    heads: float = 0.0,
    kv_groups: float = 0.0,
    experts: float = 0.0,
    value: float = 0.0,
    round_to: int = 1,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    inplace: bool = False,
    progress: bool = False,
    observer: Observer | None = None,
) -> nn.Module:
    """Return the model's own class with narrowed weights, verified against the masked model.

    Args:
        model: see `inspect`. It is not changed unless ``inplace``, and in no case when anything fails.
        example_inputs: see `inspect`.
        plan: what to take out; instead of a request.
        ffn: see `plan`, as all other requests.
        heads: see `plan`.
        kv_groups: see `plan`.
        experts: see `plan`.
        value: see `plan`.
        round_to: see `plan`.
        include: see `plan`.
        skip: see `plan`.
        inplace: narrow the model itself and return it.
        progress: show a progress bar over the passes.
        observer: called after every pass.

    Returns:
        A module whose ``.fxslim`` holds the plan (with the edits that were found) and the report.

    Raises:
        VerifyError: masked and narrowed differ; otherwise as `plan`, and PlanError for a plan of another model.
    """
    request = _request(ffn, heads, kv_groups, experts, value, round_to, include, skip)
    lossless = plan is None and request.lossless
    quick, thorough = (lines.slim_passes(thorough=t, lossless=lossless) for t in (False, True))
    try:
        small, record = _narrow(model, example_inputs, plan, request, quick, progress, observer)
    except VerifyError:
        small, record = _narrow(model, example_inputs, plan, request, thorough, progress, observer)
    if inplace:
        settle(model)
        small = replay(model, record.plan)
    earlier = getattr(model, "fxslim", None)
    if isinstance(earlier, Record):  # narrowed before: say what was done to the dense model
        record = dataclasses.replace(record, plan=earlier.plan.then(record.plan))
    config = getattr(small, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        config.fxslim = record.plan.model_dump(mode="json", exclude_none=True)
    small.fxslim = record  # type: ignore[assignment]
    return small


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    ffn: float = 0.0,
    heads: float = 0.0,
    kv_groups: float = 0.0,
    experts: float = 0.0,
    value: float = 0.0,
    round_to: int = 1,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    narrow: bool = True,
    progress: bool = False,
    observer: Observer | None = None,
) -> nn.Module:
    """Return a narrowed ``torch.fx.GraphModule``, called like the model, with the same (cache-free) outputs.

    Without a plan and without a request, what does nothing is taken out and nothing else: see `plan`. A model that
    cannot be traced as a whole gives a copy of itself with a narrowed graph in the place of each region that can be.

    Args:
        model: see `inspect`. It is not changed.
        example_inputs: see `inspect`.
        plan: what to take out; instead of a request.
        ffn: see `plan`, as all other requests.
        heads: see `plan`.
        kv_groups: see `plan`.
        experts: see `plan`.
        value: see `plan`.
        round_to: see `plan`.
        include: see `plan`.
        skip: see `plan`.
        narrow: False to insert masks and take nothing out.
        progress: show a progress bar over the passes.
        observer: called after every pass.

    Returns:
        A GraphModule (or a module with graphs inside) whose ``.fxslim`` holds the plan and the report; for inference.

    Raises:
        VerifyError: masked and narrowed differ; otherwise as `slim`.
    """
    request = _request(ffn, heads, kv_groups, experts, value, round_to, include, skip)
    last = lines.compile_passes(narrow=narrow, lossless=plan is None and request.lossless)
    graph, record = _narrow(model, example_inputs, plan, request, last, progress, observer)
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
        VerifyError: they differ by more than the tolerance of their dtype.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan= takes a fxslim Plan, not {type(plan).__name__}.")
    what = _subject(model, example_inputs)
    candidates = bind(what.model, example_inputs)
    filled = lines.MASKS if example_inputs is None else frozenset()
    graph = isinstance(small, CompiledModule) or is_regional(small)
    ways = paths(what.model, candidates[0], filled=filled, given=candidates[0], train=not graph)
    if graph:
        ways = lines.graph_paths(ways)
    return compare(what.model, small, plan, refer(what.model, plan, ways))


def _narrow(
    model: nn.Module,
    example_inputs: Any,
    plan: Plan | None,
    request: Request,
    last: tuple[Pass, ...],
    progress: bool,
    observer: Observer | None,
) -> tuple[nn.Module, Record]:
    if plan is not None:
        if not isinstance(plan, Plan):
            raise InputError(f"plan= takes a fxslim Plan, not {type(plan).__name__}.")
        if request.asked():
            raise InputError(f"give either plan= or a request, not both: {sorted(request.asked())} came with a plan.")
    seconds: dict[str, float] = {}
    failed: VerifyError | None = None
    regional = False

    def clock(before: Facts, step: Pass, after: Facts, spent: float) -> None:
        nonlocal regional
        seconds[type(step).__name__] = round(spent, 4)
        regional = regional or (isinstance(step, lines.Trace) and bool(after.get(Program).regions))

    for open_axes in OPEN_AXES if lines.makes_graph(last) else OPEN_AXES[:1]:
        pipeline = lines.narrowing(request, given_plan=plan is not None, last=last, open_axes=open_axes)
        given = [_subject(model, example_inputs), *([plan] if plan is not None else [])]
        try:
            facts = _run(pipeline, given, observer, clock, progress=progress)
        except VerifyError as error:  # loops over rows or pieces are traced for one number of them
            failed = failed or error
            if regional:
                break
            continue
        report = dataclasses.replace(facts.get(Report), seconds=seconds)
        if failed is not None:
            reason = f"traced with sizes fixed: with open ones, other sizes could not be verified ({failed.where})"
            report = dataclasses.replace(report, notes=(*report.notes, Note(where="graph form", reason=reason)))
        return facts.get(lines.Narrowed).module, Record(facts.get(Plan), report)
    assert failed is not None
    raise failed


def _run(
    pipeline: Pipeline, given: list[Any], observer: Observer | None, *others: Observer, progress: bool = False
) -> Facts:
    observers = (*others, *([observer] if observer is not None else []))
    with torch.random.fork_rng(), _bar(pipeline, visible=progress) as advance:
        return pipeline.run(*given, observers=(*observers, advance))


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


def _subject(model: nn.Module, example_inputs: Any) -> lines.Subject:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(example_inputs, Plan):
        raise InputError("a plan was given in the place of example_inputs; pass it as plan=.")
    return lines.subject(model, example_inputs)


def _request(
    ffn: float,
    heads: float,
    kv_groups: float,
    experts: float,
    value: float,
    round_to: int,
    include: str | Iterable[str] | None,
    skip: str | Iterable[str] | None,
) -> Request:
    return Request(ffn=ffn, heads=heads, kv_groups=kv_groups, experts=experts, value=value, round_to=round_to,
                   include=_globs(include), skip=_globs(skip))  # fmt: skip


def _globs(given: str | Iterable[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    globs = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not all(isinstance(glob, str) for glob in globs):
        raise RequestError(f"include= and skip= take globs over module paths, not {given!r}.")
    return globs
