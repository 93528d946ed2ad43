"""The passes in order: what fxslim does, as a table of contents."""

from __future__ import annotations

from fxslim.passes.choose import Request
from fxslim.passes.narrowing import Account, Follow, NarrowGraph, NarrowModule, Refer, Show, Verify
from fxslim.passes.planning import Annotate, Choose, Find, Name, Order, Pad, Reread, Subject, Take, Trace
from fxslim.pipeline import Pass, Pipeline
from fxslim.plan import Plan

INSPECT: tuple[Pass, ...] = (Trace(), Annotate(), Find(), Name(), Order())
CHECK_PLAN: tuple[Pass, ...] = (Reread(), Pad(), Take())


def slim_passes(*, thorough: bool = False, lossless: bool = False) -> tuple[Pass, ...]:
    """Return the passes that narrow a module; thorough ones are for modules that look alike and need other edits."""
    return (Refer(thorough=thorough, lossless=lossless), NarrowModule(), Verify(retreat=thorough), Account())


def compile_passes(*, narrow: bool = True, lossless: bool = False) -> tuple[Pass, ...]:
    """Return the passes that make a graph of a cut."""
    return (Refer(graph=True, lossless=lossless), NarrowGraph(narrow=narrow), Verify(), Account())


def makes_graph(last: tuple[Pass, ...]) -> bool:
    """Tell whether these passes make the graph form."""
    return any(isinstance(step, NarrowGraph) for step in last)


Kinds = tuple[type, ...]


def _unknown(passes: tuple[Pass, ...], given: Kinds) -> tuple[Pass, ...]:
    """Return the passes that find out more than what is given."""
    return tuple(step for step in passes if not set(step.ensures) <= set(given))


def choosing(request: Request, given: Kinds = (Subject,)) -> Pipeline:
    """Return the pipeline that makes a plan of what is given."""
    return Pipeline((*_unknown(INSPECT, given), Choose(request)), given=given)


def inspecting(given: Kinds = (Subject,)) -> Pipeline:
    """Return the pipeline that finds sites."""
    return Pipeline(_unknown(INSPECT, given), given=given)


def narrowing(request: Request, given: Kinds, *, last: tuple[Pass, ...], open_axes: int | None = None) -> Pipeline:
    """Return the pipeline that narrows a model by a request, or by a plan that is given."""
    choice = CHECK_PLAN if Plan in given else (Choose(request), Take())
    if makes_graph(last):  # what follows the model's dtype changes the graph, so that it is labelled afterwards
        trace = _unknown((Trace(open_axes),), given)
        return Pipeline((*trace, Show(), Follow(), *INSPECT[1:], *choice, *last), given=given)
    return Pipeline((*_unknown(INSPECT, given), *choice, *last), given=given)
