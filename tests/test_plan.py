"""Plans are data: they survive JSON, and a malformed one is refused with the place of the fault."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fxslim.errors import PlanError
from fxslim.plan import (
    AttributeEdit,
    Block,
    ConfigEdit,
    Fingerprint,
    Note,
    Plan,
    Site,
    SitePlan,
    Slice,
    blocks_of,
)

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
    assert lines[1].split() == ["mlp:ffn", "ffn", "2", "/", "4"]
    assert lines[2].split() == ["attn:attention", "attention", "2", "/", "4"]
    assert lines[3] == "note: attn: because"
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
