"""The pipelines: a table of contents that is in order, observed, and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch

import fxslim
from fxslim.errors import OrderError, PlanError, RequestError
from fxslim.passes import pipelines as lines
from fxslim.passes.choose import Request
from fxslim.passes.planning import Subject
from fxslim.pipeline import Facts, Pass, Pipeline
from fxslim.plan import Plan
from fxslim.program import Program
from fxslim.text import program_lines

from stacks import Attend, Feed, Stack

STACK = Stack((Feed(hidden=6), Attend(2, 2, 2)))


def _names(pipeline: Pipeline) -> list[str]:
    return [type(step).__name__ for step in pipeline.passes]


def test_the_table_of_contents() -> None:
    inspect = ["Trace", "Annotate", "Find", "Name", "Order"]
    assert _names(lines.inspecting()) == inspect
    assert _names(lines.choosing(Request())) == [*inspect, "Choose"]
    slim = lines.narrowing(Request(ffn=0.5), (Subject,), last=lines.slim_passes())
    assert _names(slim) == [*inspect, "Choose", "Take", "Refer", "NarrowModule", "Verify", "Account"]
    given = lines.narrowing(Request(), (Subject, Plan), last=lines.compile_passes())
    last = ["Reread", "Pad", "Take", "Refer", "NarrowGraph", "Verify", "Account"]
    assert _names(given) == ["Trace", "Show", "Follow", *inspect[1:], *last]


def test_every_pass_may_stand_only_behind_what_it_needs() -> None:
    with pytest.raises(OrderError, match=r"^Annotate needs Program, which no pass before it provides\.$"):
        Pipeline(lines.INSPECT[1:], given=(Subject,))
    with pytest.raises(OrderError, match="Refer needs Plan"):
        Pipeline((*lines.INSPECT, *lines.slim_passes()), given=(Subject,))


def test_observers_see_the_graph_before_and_after() -> None:
    model, x = STACK.build(), STACK.inputs()
    seen: list[tuple[str, int]] = []

    def observer(before: Facts, step: Pass, after: Facts, seconds: float) -> None:
        program = after.find(Program)
        seen.append((type(step).__name__, len(program_lines(program)) if program else 0))
        assert set(before.known) <= set(after.known)
        assert seconds >= 0

    small = fxslim.slim(model, x, ffn=0.5, observer=observer)
    assert [name for name, _ in seen] == list(small.fxslim.report.seconds)
    assert len({count for _, count in seen}) == 1  # nobody edits the traced program


def test_passes_ensure_what_they_promise() -> None:
    model, x = STACK.build(), STACK.inputs()

    def observer(before: Facts, step: Pass, after: Facts, seconds: float) -> None:
        assert set(step.requires) <= set(before.known)
        assert set(step.ensures) <= set(after.known)

    for way in (fxslim.slim, fxslim.compile):
        way(model, x, ffn=0.5, heads=0.5, observer=observer)
    fxslim.compile(model, x, plan=fxslim.plan(model, x, heads=0.5), observer=observer)


def test_a_plan_and_a_request_give_the_same() -> None:
    model, x = STACK.build(), STACK.inputs()
    plan = fxslim.plan(model, x, ffn=0.5, heads=0.5)
    asked, planned = fxslim.slim(model, x, ffn=0.5, heads=0.5), fxslim.slim(model, x, plan=plan)
    for name, tensor in asked.state_dict().items():
        assert torch.equal(tensor, planned.state_dict()[name])
    again = fxslim.slim(model, x, plan=planned.fxslim.plan)  # with its edits
    assert again.fxslim.plan == planned.fxslim.plan
    assert plan.requested == {"ffn": 0.5, "heads": 0.5}


def _changed(plan: Plan, **update: object) -> Plan:
    part = plan.sites[0]
    return plan.model_copy(update={"sites": (part.model_copy(update={"site": part.site.model_copy(update=update)}),)})


def test_plans_that_contradict_the_graph_are_refused() -> None:
    model, x = STACK.build(), STACK.inputs()
    plan = fxslim.plan(model, x, ffn=0.5)
    for wrong in (_changed(plan, name="nowhere:ffn"), _changed(plan, slices=plan.sites[0].site.slices[1:])):
        with pytest.raises(PlanError, match="is not what this model's graph says it is; make the plan anew"):
            fxslim.slim(model, x, plan=wrong)
    with pytest.raises(PlanError, match="the plan repaired weights, so it cannot be applied to the dense model again"):
        fxslim.compile(model, x, plan=plan.model_copy(update={"weights_changed": True}))


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model, x = STACK.build(), STACK.inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RequestError, match="asks for every unit"):
        fxslim.slim(model, x, ffn=1.0, inplace=True)

    def stop(before: Facts, step: Pass, after: Facts, seconds: float) -> None:
        if type(step).__name__ == "NarrowModule":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fxslim.slim(model, x, ffn=0.5, inplace=True, observer=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert fxslim.slim(model, x, ffn=0.5, inplace=True) is model
    assert model.layers[0].down.in_features == 3
