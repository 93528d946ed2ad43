"""Make a picture of a model, of what was found in it, of what is planned for it, or of what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from typing import Any

import networkx as nx
from torch import fx, nn

from fxslim.api import inspect
from fxslim.draw.flow import Flow
from fxslim.draw.operations import plain_ops, traced_ops
from fxslim.draw.picture import INPUT, OUTPUT, Box, Feed, Group, Op, Picture, Rows, Stay, Total, runs
from fxslim.errors import InputError
from fxslim.passes.annotate import Labels
from fxslim.passes.cut import Cut
from fxslim.passes.pipelines import CHECK_PLAN
from fxslim.passes.sites import Sites
from fxslim.pipeline import Pipeline
from fxslim.plan import Note, Plan
from fxslim.program import Program
from fxslim.report import Inspection, Record, Report
from fxslim.site import Site, SitePlan

UNITS = {"attention": "heads", "experts": "experts"}
"""Kind of a site -> what its units are called; channels elsewhere."""


def picture_of(x: Any, *, after: Any = None, example_inputs: Any = None) -> Picture:
    """Return the picture of something.

    Args:
        x: a model, an Inspection, a Plan, a Report, a model that was narrowed, a graph; or a picture.
        after: what became of the model ``x`` (or what ``x`` says of one): a Plan, a Report, a narrowed model.
        example_inputs: see `fxslim.inspect`, where ``x`` is a model.

    Raises:
        InputError: ``x`` is nothing that can be drawn, or the arguments do not go together.
        PlanError: the plan is not one for this model.
    """
    done = None if after is None else _done(after)
    if after is not None and done is None:
        raise InputError(f"after= takes a Plan, a Report or a narrowed model, not {type(after).__name__}.")
    own = _done(x)
    if own is not None or isinstance(x, Picture | fx.GraphModule):
        if done is not None or example_inputs is not None:
            raise InputError(f"after= and example_inputs= go with a dense model or an Inspection, not with {_name(x)}.")
        if isinstance(x, Picture):
            return x
        return _of_graph(x, own) if isinstance(x, fx.GraphModule) else _of_plan(own)
    if isinstance(x, nn.Module):
        x, example_inputs = inspect(x, example_inputs), None
    if not isinstance(x, Inspection):
        raise InputError(
            f"cannot draw {_name(x)}; give a model, or what fxslim.inspect, plan, slim or compile returned."
        )
    if example_inputs is not None:
        raise InputError("an Inspection stands for its model and its example inputs; give no others with it.")
    return _of_inspection(x, done)


def _name(x: Any) -> str:
    return f"a {type(x).__name__}"


def _done(x: Any) -> Record | None:
    """Return what was done to a model, where something says so."""
    if isinstance(x, Plan):
        return Record(x)
    if isinstance(x, Report):
        return Record(x.plan, x)
    if isinstance(x, Record):
        return x
    meta = getattr(x, "meta", {}) if isinstance(x, fx.GraphModule) else {}
    record = meta.get("fxslim") or (vars(x).get("fxslim") if isinstance(x, nn.Module) else None)
    return record if isinstance(record, Record) else None


def _of_inspection(found: Inspection, done: Record | None) -> Picture:
    """Draw what was found, and what is left of it."""
    plan = None if done is None else done.plan
    shared: dict[str, Any] = {
        "stays": tuple(_stays(found.pinned, plan)),
        "notes": tuple(Stay(note.where, note.reason) for note in found.notes),
        "totals": tuple(_totals(done)),
        "narrowed": plan is not None,
    }
    if found.analysis is None:
        boxes = tuple(_boxes(found.sites, done))
        return Picture("model", boxes, _feeds(found.feeds, {}), **shared)
    facts = found.analysis.facts
    cut = _cut(facts, plan) if plan is not None else None
    program, labels, sites = facts.get(Program), facts.get(Labels), facts.get(Sites)
    flow = Flow(labels, sites)
    ops = traced_ops(program, labels, sites, flow, cut)
    boxes = tuple(_boxes(found.sites, done, ops))
    return Picture(
        title=type(found.analysis.model).__name__,
        sites=boxes,
        feeds=_feeds(found.feeds, _carried(boxes, ops, flow.groups)),
        groups=tuple(_met(flow.groups, ops)),
        modules=_modules(program.graph),
        ops=ops,
        **shared,
    )


def _of_plan(done: Record | None) -> Picture:
    """Draw a plan by itself: the sites that it narrows, in order."""
    assert done is not None
    plan = done.plan
    boxes = tuple(_boxes([part.site for part in plan], done))
    order = [INPUT, *(box.name for box in boxes), OUTPUT]
    feeds = tuple(Feed(one, other, certain=False) for one, other in pairwise(order))
    return Picture(
        title=plan.fingerprint.model_class,
        sites=boxes,
        feeds=feeds if boxes else (),
        groups=tuple(Group(box.name, "site", box.units) for box in boxes),
        stays=tuple(_stays((), plan)),
        notes=(Stay("edges", "a plan by itself does not say what feeds what: sites follow in the order of execution"),),
        totals=tuple(_totals(done)),
        narrowed=True,
    )


def _of_graph(module: fx.GraphModule, done: Record | None) -> Picture:
    """Draw a graph: its operations, and the sites of the plan that made it."""
    ops = plain_ops(module, None if done is None else done.plan)
    drawn = Picture(type(module).__name__) if done is None else _of_plan(done)
    sites = tuple(_boxes([part.site for part in done.plan], done, ops, inside=True)) if done is not None else ()
    note = Stay("graph", "a graph by itself has no labels: a site's operations are those of its module")
    notes = (*drawn.notes, note)
    return replace(drawn, ops=ops, sites=sites, modules=_modules(module.graph), notes=notes)


def _cut(facts: Any, plan: Plan) -> Cut:
    """Return what a plan leaves of a model's labels; repaired weights do not matter for that."""
    plan = plan.model_copy(update={"weights_changed": False})
    known = facts.adding(plan)
    return Pipeline(CHECK_PLAN, given=tuple(known.known)).run(*known.known.values()).get(Cut)


def _boxes(
    sites: Iterable[Site], done: Record | None, ops: tuple[Op, ...] = (), *, inside: bool = False
) -> Iterator[Box]:
    """Yield sites with what is kept of them.

    Args:
        sites: the sites.
        done: what was done to them.
        ops: the graph's operations.
        inside: whether a site's operations are all those of its module, for graphs without labels.
    """
    parts = {part.site.name: part for part in done.plan} if done is not None else {}
    fits = {fit.site: fit for fit in done.report.fits} if done is not None and done.report is not None else {}
    for site in sites:
        part = parts.get(site.name) or SitePlan(site=site, keep=tuple(range(site.units)))
        damage = fits[site.name].damage if site.name in fits else float("nan")
        tensors = {piece.tensor for piece in site.slices}
        own = (
            number
            for number, op in enumerate(ops)
            if site.name in op.groups or tensors & set(op.tensors) or (inside and _within(op.module, site.module))
        )
        yield Box(
            name=site.name,
            kind=site.kind,
            module=site.module,
            unit=UNITS.get(site.kind, "channels"),
            units=site.units,
            kept=len(part.keep),
            keep=tuple(runs(part.keep)),
            groups=0 if site.groups is None else site.group_count,
            roles=tuple(site.roles.items()),
            rows=tuple(_rows(part)),
            ops=tuple(own),
            note=_form(site, done),
            damage=damage if isfinite(damage) else None,
        )


def _within(module: str, outer: str) -> bool:
    return not outer or module == outer or module.startswith(f"{outer}.")


def _rows(part: SitePlan) -> Iterator[Rows]:
    for piece in part.site.slices:
        gone = int(piece.removed(part.taken).sum())
        yield Rows(piece.tensor, piece.dim, piece.rows, piece.rows - gone, piece.role)


def _form(site: Site, done: Record | None) -> str:
    """Say what is special about a site."""
    notes = ["a task head: left alone unless included"] if site.task_head else []
    if done is not None and site.name in done.plan.spread:
        notes.append("narrowed in its linears alone; zeros stand between them in the module form")
    if done is not None and site.name in done.plan.zeroed:
        notes.append("stays in place with zero columns in the module form")
    return "; ".join(notes)


def _stays(pinned: Iterable[Note], plan: Plan | None) -> Iterator[Stay]:
    for note in pinned:
        yield Stay(note.where, note.reason)
    for note in plan.notes if plan is not None else ():
        yield Stay(note.where, f"not done: {note.reason}")


def _totals(done: Record | None) -> Iterator[Total]:
    report = None if done is None else done.report
    if report is not None:
        yield Total("parameters", report.parameters_before, report.parameters_after)
        yield Total("MACs", report.macs_before, report.macs_after)


def _feeds(graph: nx.DiGraph, carried: Mapping[tuple[str, str], str]) -> tuple[Feed, ...]:
    """Return what feeds what, from where the model begins to where it ends."""
    edges = [(INPUT, name) for name in graph if not graph.in_degree(name)]
    edges += [*graph.edges, *((name, OUTPUT) for name in graph if not graph.out_degree(name))]
    return tuple(Feed(one, other, carried.get((one, other), "")) for one, other in edges)


def _carried(boxes: Iterable[Box], ops: tuple[Op, ...], groups: Iterable[Group]) -> dict[tuple[str, str], str]:
    """Return which stream leads from one site to another: one that the first adds to and the second reads."""
    streams = {group.id for group in groups if group.kind == "stream"}
    read: dict[str, set[str]] = {INPUT: set(streams)}
    written: dict[str, set[str]] = {OUTPUT: set(streams)}
    for box in boxes:
        own = [ops[number] for number in box.ops]
        tensors = {rows.tensor: rows.role for rows in box.rows}
        makers = [op for op in own if any(tensors.get(name) == "out" for name in op.tensors)]
        users = [op for op in own if any(tensors.get(name) == "in" for name in op.tensors)]
        read[box.name] = streams.intersection(*[{g for op in makers for i in op.inputs for g in ops[i].groups}])
        written[box.name] = streams.intersection(*[{g for op in users for g in op.groups}])
    found: dict[tuple[str, str], str] = {}
    for source in (*read, INPUT):
        for target in (*written, OUTPUT):
            shared = written.get(source, streams) & read.get(target, streams)
            if shared:
                found[source, target] = min(shared)
    return found


def _met(groups: Iterable[Group], ops: tuple[Op, ...]) -> Iterator[Group]:
    """Yield the groups that something carries."""
    met = {name for op in ops for name in op.groups}
    yield from (group for group in groups if group.id in met)


def _modules(graph: fx.Graph) -> tuple[tuple[str, str], ...]:
    """Return path and class of every module that a graph's operations came from."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
            if path != name:  # export's own entries name no module
                found.setdefault(path, name.rpartition(".")[2])
    return tuple(found.items())
