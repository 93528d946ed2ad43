"""Plans are data: they survive JSON, and a malformed one is refused with the place of the fault."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fxslim.edit import AttentionEdit, AttributeEdit, ConfigEdit, GatherEdit, MultiheadEdit
from fxslim.errors import PlanError
from fxslim.passes.narrow import narrowed_copy
from fxslim.plan import Fingerprint, Note, Plan
from fxslim.site import Block, Site, SitePlan, Slice, blocks_of

FREE = Site(
    name="mlp:ffn",
    kind="ffn",
    module="mlp",
    units=4,
    slices=(
        Slice(tensor="mlp.up.weight", dim=0, size=4, role="out", blocks=blocks_of(np.arange(4))),
        Slice(tensor="mlp.down.weight", dim=1, size=4, role="in", blocks=blocks_of(np.arange(4)), hook="mlp.down"),
    ),
    roles={"up": ("mlp.up.weight",), "down": ("mlp.down.weight",)},
)
GROUPED = Site(
    name="attn:attention",
    kind="attention",
    module="attn",
    units=4,
    groups=(0, 0, 1, 1),
    slices=(
        Slice(tensor="attn.q.weight", dim=0, size=8, role="out", blocks=blocks_of(np.repeat(np.arange(4), 2))),
        Slice(tensor="attn.k.weight", dim=0, size=4, role="out", blocks=blocks_of(np.repeat(np.arange(2), 2)),
              groups=(0, 0, 1, 1)),
        Slice(tensor="attn.o.weight", dim=1, size=8, role="in", blocks=blocks_of(np.repeat(np.arange(4), 2))),
    ),
)  # fmt: skip
PLAN = Plan(
    fxslim="0.1.0",
    torch="2.13.0",
    transformers="5.23.0",
    fingerprint=Fingerprint(model_class="Toy", digest="0" * 64),
    sites=(SitePlan(site=FREE, keep=(0, 3)), SitePlan(site=GROUPED, keep=(1, 2))),
    edits=(
        AttributeEdit(module="attn", name="num_heads", old=4, new=2),
        ConfigEdit(module="attn", name="num_attention_heads", old=4, new=2),
    ),
    zeroed=("mlp:ffn",),
    requested={"ffn": 0.5, "skip": ("a.*", "b"), "round_to": 8},
    notes=(Note(where="attn", reason="because"),),
)


def test_a_plan_survives_json() -> None:
    for text in (PLAN.to_json(), PLAN.to_json(indent=2), PLAN.to_json().encode(), json.loads(PLAN.to_json())):
        assert Plan.from_json(text) == PLAN
    assert Plan.from_json(PLAN.to_json()).to_json() == PLAN.to_json()


def test_a_compact_copy_survives_too() -> None:
    """As it travels under ``config.fxslim``: without what is None."""
    assert Plan.from_json(PLAN.model_dump(mode="json", exclude_none=True)) == PLAN


def test_plans_never_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.weights_changed = True  # type: ignore[misc]


def test_rows_follow_units_and_groups() -> None:
    rows = {key: np.flatnonzero(gone).tolist() for key, gone in PLAN.removed_rows().items()}
    assert rows == {
        ("mlp.up.weight", 0): [1, 2],
        ("mlp.down.weight", 1): [1, 2],
        ("attn.q.weight", 0): [0, 1, 6, 7],
        ("attn.k.weight", 0): [],  # one query head of each group stays
        ("attn.o.weight", 1): [0, 1, 6, 7],
    }
    whole = PLAN.model_copy(update={"sites": (SitePlan(site=GROUPED, keep=(2, 3)),)})
    assert np.flatnonzero(whole.removed_rows()["attn.k.weight", 0]).tolist() == [0, 1]


def test_two_slices_of_a_tensor_add_up_and_must_agree_on_its_size() -> None:
    other = FREE.model_copy(update={"name": "other"})
    both = PLAN.model_copy(update={"sites": (SitePlan(site=FREE, keep=(0, 1, 3)), SitePlan(site=other, keep=(0, 2)))})
    assert np.flatnonzero(both.removed_rows()["mlp.up.weight", 0]).tolist() == [1, 2, 3]
    longer = Slice(tensor="mlp.up.weight", dim=0, size=5, role="out", blocks=blocks_of(np.arange(4)))
    wrong = PLAN.model_copy(
        update={"sites": (*both.sites, SitePlan(site=FREE.model_copy(update={"slices": (longer,)}), keep=(0,)))}
    )
    with pytest.raises(PlanError, match=r"two slices of mlp\.up\.weight disagree about its size"):
        wrong.removed_rows()


OWNERS = st.lists(st.integers(-1, 5), min_size=1, max_size=24)


@given(OWNERS)
def test_blocks_and_owners_are_inverse(owners: list[int]) -> None:
    blocks = blocks_of(np.array(owners))
    piece = Slice(tensor="t", dim=0, size=len(owners), role="in", blocks=blocks)
    assert piece.owners().tolist() == owners


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_even_rows_are_one_block(count: int, width: int, gap: int, start: int) -> None:
    """Whatever the number of heads: a fused projection stays a few numbers."""
    owners = [-1] * start
    for owner in range(count):
        owners += [owner] * width + [-1] * gap
    (block,) = blocks_of(np.array(owners))
    assert (block.first, block.count, block.start, block.width) == (0, count, start, width)
    assert block.step == (width + gap if count > 1 else 0)


def test_no_rows_no_blocks() -> None:
    assert blocks_of(np.full(5, -1)) == ()
    assert blocks_of(np.zeros(0, dtype=np.int64)) == ()


def _broken(*path: Any, value: Any) -> dict[str, Any]:
    """Return the plan as a dict with one value replaced."""
    data = copy.deepcopy(json.loads(PLAN.to_json()))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    made: dict[str, Any] = data
    return made


MALFORMED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "out of range": (("sites", 0, "keep"), [0, 4], "keep must be ascending unit numbers below 4"),
    "negative": (("sites", 0, "keep"), [-1, 2], r"sites\.0\.keep\.0 Input should be greater than or equal to 0"),
    "repeated": (("sites", 0, "keep"), [1, 1], "keep must be ascending unit numbers below 4"),
    "not in order": (("sites", 0, "keep"), [2, 1], "keep must be ascending unit numbers below 4"),
    "nothing kept": (("sites", 0, "keep"), [], "at least one unit stays"),
    "no number": (("sites", 0, "keep"), ["one"], r"sites\.0\.keep\.0 Input should be a valid integer"),
    "uneven groups": (("sites", 1, "keep"), [0, 1, 2], "every group that stays must keep the same number of units"),
    "wrong schema": (("schema_version",), 2, "schema_version Input should be 1"),
    "unknown field": (("colour",), "red", "colour Extra inputs are not permitted"),
    "unknown kind": (("sites", 0, "site", "kind"), "mystery", r"sites\.0\.site\.kind Input should be"),
    "too few groups": (("sites", 1, "site", "groups"), [0, 1], "groups names 2 units, the site has 4"),
    "slice groups": (("sites", 1, "site", "slices", 1, "groups"), [0], "slice attn.k.weight groups 1 units"),
    "block outside": (("sites", 0, "site", "slices", 0, "size"), 3, "lies outside the tensor or the units"),
    "owner outside": (("sites", 0, "site", "slices", 0, "blocks", 0, "first"), 1, "outside the tensor or the units"),
    "one unit": (("sites", 0, "site", "units"), 1, "Input should be greater than or equal to 2"),
    "a path": (("sites", 0, "site", "slices", 0, "tensor"), "../../etc/passwd", "String should match pattern"),
    "unknown edit": (("edits", 0, "edit"), "shell", "Input tag 'shell' found using 'edit' does not match"),
    "no fingerprint": (("fingerprint",), None, "fingerprint Input should be"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_plans_are_refused_with_the_place(case: str) -> None:
    path, value, message = MALFORMED[case]
    with pytest.raises(PlanError, match=f"^not a valid fxslim plan: .*{message}"):
        Plan.from_json(_broken(*path, value=value))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"plan"', "{}", b"\xff", "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str | bytes) -> None:
    with pytest.raises(PlanError, match=r"^not a valid fxslim plan: "):
        Plan.from_json(text)


@pytest.mark.parametrize("field", ["units", "size"])
def test_huge_numbers_are_refused_before_anything_is_made_of_them(field: str) -> None:
    path = ("sites", 0, "site", "units") if field == "units" else ("sites", 0, "site", "slices", 0, "size")
    with pytest.raises(PlanError, match="Input should be less than or equal to"):
        Plan.from_json(_broken(*path, value=1 << 50))


def test_a_plan_prints_its_sites_and_notes() -> None:
    lines = str(PLAN).splitlines()
    assert lines[0] == "narrowed: 2" and lines[2].split() == ["site", "kind", "kept", "of"]
    assert lines[4].split() == ["mlp:ffn", "ffn", "2", "4", "50%"]
    assert lines[5].split() == ["attn:attention", "attention", "2", "4", "50%"]
    assert lines[-1] == "note: attn: because"
    assert str(PLAN.model_copy(update={"sites": ()})) == "nothing to take out\nnote: attn: because"


def test_sites_know_their_groups_and_modules() -> None:
    assert (FREE.group_count, GROUPED.group_count) == (4, 2)
    assert FREE.modules() == ("mlp.up", "mlp.down")
    assert [part.site.name for part in PLAN] == ["mlp:ffn", "attn:attention"]
    assert PLAN.sites[0].gone.tolist() == [False, True, True, False]


def test_blocks_say_who_owns_what() -> None:
    blocks = (Block(first=1, count=2, start=1, step=3, width=2),)
    piece = Slice(tensor="t", dim=0, size=7, role="out", blocks=blocks)
    assert piece.owners().tolist() == [-1, 1, 1, -1, 2, 2, -1]
    assert piece.removed(np.array([True, False, True])).tolist() == [False] * 4 + [True, True, False]


# One plan after another ---------------------------------------------------------------------------------------------


def _plan(*parts: SitePlan, **fields: Any) -> Plan:
    return Plan(fxslim="0", torch="0", fingerprint=PLAN.fingerprint, sites=parts, **fields)


def _free(name: str, units: int, **tensors: tuple[int, int, list[int]]) -> Site:
    """Return a site; tensors are given as dimension, size and owner of every row (-1: none)."""
    slices = tuple(
        Slice(tensor=tensor, dim=dim, size=size, role="in" if dim else "out", blocks=blocks_of(np.array(owners)))
        for tensor, (dim, size, owners) in tensors.items()
    )
    return Site(name=name, kind="generic", module="", units=units, slices=slices)


def _rows(plan: Plan) -> dict[tuple[str, int], list[int]]:
    return {key: np.flatnonzero(gone).tolist() for key, gone in plan.removed_rows().items()}


def test_the_same_site_twice() -> None:
    """The second keep counts among the units that were left."""
    first = _plan(SitePlan(site=_free("a", 6, up=(0, 6, list(range(6)))), keep=(0, 2, 3, 5)), requested={"ffn": 0.3})
    second = _plan(SitePlan(site=_free("a", 4, up=(0, 4, list(range(4)))), keep=(1, 3)), requested={"heads": 0.5})
    both = first.then(second)
    assert [(part.site.units, part.keep) for part in both] == [(6, (2, 5))]
    assert _rows(both) == {("up", 0): [0, 1, 3, 4]}
    assert both.requested == {"ffn": 0.3, "heads": 0.5}
    assert Plan.from_json(both.to_json()) == both


def test_different_sites_and_tensors() -> None:
    first = _plan(SitePlan(site=_free("a", 3, up=(0, 3, [0, 1, 2])), keep=(0, 2)))
    second = _plan(SitePlan(site=_free("b", 2, other=(1, 4, [0, 0, 1, 1])), keep=(1,)))
    both = first.then(second)
    assert _rows(both) == {("up", 0): [1], ("other", 1): [0, 1]}
    assert [part.site.name for part in both] == ["a", "b"]
    assert _rows(second.then(first)) == _rows(both)


def test_sites_that_share_a_fused_tensor_count_its_rows_before() -> None:
    """Rows that the second plan sees as 0 to 3 were 1, 3, 4, 5 of the tensor before the first."""
    first = _plan(SitePlan(site=_free("a", 3, qkv=(0, 6, [0, 1, 2, -1, -1, -1])), keep=(1,)))
    assert _rows(first) == {("qkv", 0): [0, 2]}
    second = _plan(SitePlan(site=_free("b", 3, qkv=(0, 4, [-1, 0, 1, 2])), keep=(0, 2)))
    both = first.then(second)
    assert _rows(both) == {("qkv", 0): [0, 2, 4]}
    assert [part.site.slices[0].size for part in both] == [6, 6]


def test_three_in_a_row_are_associative() -> None:
    one = _plan(SitePlan(site=_free("a", 6, up=(0, 8, [-1, *range(6), -1])), keep=(0, 1, 3, 5)))
    two = _plan(SitePlan(site=_free("b", 2, up=(0, 6, [0, -1, -1, -1, -1, 1])), keep=(1,)))
    three = _plan(SitePlan(site=_free("a", 4, up=(0, 5, [0, 1, 2, 3, -1])), keep=(0, 3)))
    left, right = one.then(two).then(three), one.then(two.then(three))
    assert _rows(left) == {("up", 0): [0, 2, 3, 4, 5]}
    assert _rows(left) == _rows(right)


def test_edits_chain() -> None:
    def edits(*pairs: tuple[str, int, int]) -> Plan:
        return _plan(edits=tuple(AttributeEdit(module="m", name=name, old=old, new=new) for name, old, new in pairs))

    both = edits(("heads", 8, 6), ("size", 64, 48)).then(edits(("heads", 6, 3), ("groups", 2, 1)))
    assert [(edit.name, edit.old, edit.new) for edit in both.edits] == [
        ("heads", 8, 3), ("size", 64, 48), ("groups", 2, 1)
    ]  # fmt: skip
    other = _plan(edits=(ConfigEdit(module="m", name="heads", old=8, new=4),))
    assert len(edits(("heads", 8, 4)).then(other).edits) == 2  # a config is another place


@pytest.mark.parametrize("kind", [AttentionEdit, partial(GatherEdit, name="bias", axis=1, rank=4), MultiheadEdit])
def test_gathers_are_composed(kind: Any) -> None:
    first = _plan(edits=(kind(module="m", size=6, keep=(0, 2, 3, 5)),))
    second = _plan(edits=(kind(module="m", size=4, keep=(1, 3)), kind(module="n", size=4, keep=(0,))))
    both = first.then(second)
    assert [(edit.module, edit.size, edit.keep) for edit in both.edits] == [("m", 6, (2, 5)), ("n", 4, (0,))]
    assert Plan.from_json(both.to_json()) == both


def test_what_stays_in_place_is_composed_apart() -> None:
    """A site with zero columns keeps its size: its units, and the other plan's, count on their own."""
    site, left = _free("a", 4, down=(1, 4, [0, 1, 2, 3])), _free("a", 3, down=(1, 3, [0, 1, 2]))
    cut, zero = _plan(SitePlan(site=site, keep=(0, 1, 3))), _plan(SitePlan(site=site, keep=(0, 1)), zeroed=("a",))
    then_zeroed = cut.then(_plan(SitePlan(site=left, keep=(0, 2)), zeroed=("a",)))
    assert [(part.site.name, part.gone.tolist()) for part in then_zeroed] == [
        ("a", [False, False, True, False]),
        ("a+2", [False, True, False]),
    ]
    assert then_zeroed.zeroed == ("a+2",)
    assert _rows(then_zeroed) == {("down", 1): [1, 2]}  # masks and zeros: row 1 is the second plan's
    then_cut = zero.then(_plan(SitePlan(site=site, keep=(0, 1, 2))))
    assert [(part.site.name, part.keep) for part in then_cut] == [("a", (0, 1)), ("a+2", (0, 1, 2))]
    assert then_cut.zeroed == ("a",)
    model = torch.nn.Module()
    model.register_buffer("down", torch.arange(1.0, 5.0).repeat(2, 1))
    for plan, expected in ((then_zeroed, [1.0, 0.0, 4.0]), (then_cut, [1.0, 2.0, 0.0])):
        assert narrowed_copy(model, plan).down[0].tolist() == expected


def test_notes_and_repairs_add_up() -> None:
    first = _plan(notes=(Note(where="a", reason="b"),), weights_changed=True)
    both = first.then(_plan(notes=(Note(where="c", reason="d"),)))
    assert [note.where for note in both.notes] == ["a", "c"]
    assert both.weights_changed
    assert first.then(_plan()).fingerprint == first.fingerprint
