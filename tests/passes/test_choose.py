"""Choosing: zeros first, then the lowest norms, the same number in every group; and what cannot be asked for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from fxslim.errors import InputError, RequestError
from fxslim.passes.choose import Choice, Request, choose, part_of, select
from fxslim.site import Site, Slice, blocks_of


def _site(name: str, units: int, width: int = 1, groups: tuple[int, ...] | None = None, head: bool = False) -> Site:
    """A site whose unit ``u`` owns ``width`` rows of an ``up`` and columns of a ``down``."""
    blocks = blocks_of(np.repeat(np.arange(units), width))
    size = units * width
    module, kind = name.split(":")
    slices = (
        Slice(tensor=f"{module}.up.weight", dim=0, size=size, role="out", blocks=blocks),
        Slice(tensor=f"{module}.down.weight", dim=1, size=size, role="in", blocks=blocks),
    )
    return Site(name=name, kind=kind, module=module, units=units, groups=groups, slices=slices,  # type: ignore[arg-type]
                task_head=head)  # fmt: skip


def _tensors(site: Site, norms: list[float]) -> dict[str, Tensor]:
    """Weights under which unit ``u`` has norm ``norms[u]``, split evenly over up and down."""
    width = site.slices[0].size // site.units
    rows = torch.tensor(norms, dtype=torch.float64).repeat_interleave(width)[:, None] / (2 * width) ** 0.5
    return {f"{site.module}.up.weight": rows.clone(), f"{site.module}.down.weight": rows.T.clone()}


def _gone(choice: Choice) -> dict[str, list[int]]:
    return {part.site.name: np.flatnonzero(part.gone).tolist() for part in choice.sites}


FFN = _site("mlp:ffn", 6)
HEADS = _site("attn:attention", 4, 2)
GROUPED = _site("attn:attention", 6, 2, (0, 0, 0, 1, 1, 1))


def _chosen(site: Site, norms: list[float], **asked: object) -> dict[str, list[int]]:
    return _gone(choose([site], _tensors(site, norms), Request(**asked)))  # type: ignore[arg-type]


def test_the_lowest_norms_go() -> None:
    assert _chosen(FFN, [3, 1, 2, 6, 5, 4], ffn=0.5) == {"mlp:ffn": [0, 1, 2]}
    assert _chosen(HEADS, [3, 1, 2, 4], heads=0.25) == {"attn:attention": [1]}


def test_norms_count_every_slice() -> None:
    tensors = {
        "mlp.up.weight": torch.tensor([[9.0], [1], [1], [1], [1], [1]]),
        "mlp.down.weight": torch.full((1, 6), 2.0),
    }
    tensors["mlp.down.weight"][0, 3] = 1.0
    assert _gone(choose([FFN], tensors, Request(ffn=0.2))) == {"mlp:ffn": [3]}


def test_fractions_round_down_but_not_below_what_was_meant() -> None:
    ten = _site("mlp:ffn", 10)
    assert len(_chosen(ten, list(range(1, 11)), ffn=0.7)["mlp:ffn"]) == 7
    assert len(_chosen(ten, list(range(1, 11)), ffn=0.69)["mlp:ffn"]) == 6
    assert len(_chosen(ten, list(range(1, 11)), ffn=0.999)["mlp:ffn"]) == 9


def test_equal_norms_go_from_the_end() -> None:
    assert _chosen(FFN, [1] * 6, ffn=0.5) == {"mlp:ffn": [3, 4, 5]}


def test_exact_zeros_go_first_whatever_their_producers_hold() -> None:
    tensors = _tensors(FFN, [1, 2, 3, 4, 5, 6])
    tensors["mlp.down.weight"][:, 5] = 0
    tensors["mlp.up.weight"][5] = 1000
    assert _gone(choose([FFN], tensors, Request(ffn=0.2))) == {"mlp:ffn": [5]}
    assert _gone(choose([FFN], tensors, Request())) == {"mlp:ffn": [5]}


def test_zero_producers_alone_are_not_taken_losslessly() -> None:
    """act(0) may not be 0."""
    tensors = _tensors(FFN, [1, 2, 3, 4, 5, 6])
    tensors["mlp.up.weight"][2] = 0
    assert _gone(choose([FFN], tensors, Request())) == {}


def test_a_unit_of_several_columns_is_zero_only_if_all_are() -> None:
    tensors = _tensors(HEADS, [1, 2, 3, 4])
    tensors["attn.down.weight"][:, [0, 2, 3]] = 0
    assert _gone(choose([HEADS], tensors, Request())) == {"attn:attention": [1]}


def test_every_group_loses_as_many_heads() -> None:
    assert _chosen(GROUPED, [1, 2, 3, 9, 8, 7], heads=0.34) == {"attn:attention": [0, 5]}


def test_whole_groups_go_by_their_norm() -> None:
    assert _chosen(GROUPED, [5, 5, 5, 1, 1, 7], kv_groups=0.5) == {"attn:attention": [3, 4, 5]}
    both = _chosen(GROUPED, [4, 5, 6, 1, 1, 1], kv_groups=0.5, heads=0.34)
    assert both == {"attn:attention": [0, 3, 4, 5]}


def test_zero_heads_that_the_groups_forbid_stay_and_are_reported() -> None:
    tensors = _tensors(GROUPED, [1, 2, 3, 4, 5, 6])
    tensors["attn.down.weight"][:, [0, 1, 2, 3, 6, 7]] = 0  # heads 0 and 1 of the first group, head 3 of the second
    choice = choose([GROUPED], tensors, Request())
    assert _gone(choice) == {"attn:attention": [0, 3]}
    assert [note.reason for note in choice.notes] == ["1 zero heads stay: every group keeps the same number of heads"]


def test_a_group_of_zeros_goes_whole() -> None:
    tensors = _tensors(GROUPED, [1, 2, 3, 4, 5, 6])
    tensors["attn.down.weight"][:, 6:] = 0
    assert _gone(choose([GROUPED], tensors, Request())) == {"attn:attention": [3, 4, 5]}


def test_one_unit_stays_of_a_site_of_zeros() -> None:
    tensors = _tensors(FFN, [0] * 6)
    choice = choose([FFN], tensors, Request())
    assert _gone(choice) == {"mlp:ffn": [1, 2, 3, 4, 5]}
    assert "every unit is zero; one has to stay" in [note.reason for note in choice.notes]


@pytest.mark.parametrize(("multiple", "kept"), [(1, 3), (2, 4), (3, 3), (4, 4), (5, 5), (16, 6)])
def test_the_kept_number_is_rounded_up(multiple: int, kept: int) -> None:
    gone = _chosen(FFN, [1, 2, 3, 4, 5, 6], ffn=0.5, round_to=multiple).get("mlp:ffn", [])
    assert gone == list(range(6 - kept))


def test_rounding_counts_rows_and_keeps_groups_even() -> None:
    gone = _chosen(GROUPED, [1, 2, 3, 4, 5, 6], heads=0.67, round_to=8)  # 2 heads, 4 rows -> 4 heads, 8 rows
    assert gone == {"attn:attention": [0, 3]}


def test_requests_reach_only_their_kind() -> None:
    tensors = _tensors(FFN, [1] * 6) | _tensors(HEADS, [1] * 4)
    assert set(_gone(choose([FFN, HEADS], tensors, Request(ffn=0.5)))) == {"mlp:ffn"}
    assert set(_gone(choose([FFN, HEADS], tensors, Request(heads=0.5)))) == {"attn:attention"}


def test_what_is_less_than_one_unit_is_reported() -> None:
    notes = choose([FFN, HEADS], _tensors(FFN, [1] * 6) | _tensors(HEADS, [1] * 4), Request(ffn=0.1, heads=0.1)).notes
    assert {note.where: note.reason for note in notes} == {
        "mlp:ffn": "ffn=0.1 of 6 channels is less than one",
        "attn:attention": "heads=0.1 is less than one head of 4 heads",
    }


def test_what_is_not_there_is_reported() -> None:
    notes = choose([HEADS], _tensors(HEADS, [1] * 4), Request(ffn=0.5)).notes
    assert [(note.where, note.reason.split(";")[0]) for note in notes] == [("ffn", "no feed-forward site was found")]


def test_kinds_are_left_out_by_the_names_of_their_sites() -> None:
    tensors = _tensors(FFN, [1] * 6) | _tensors(HEADS, [1] * 4)
    found = choose([FFN, HEADS], tensors, Request(ffn=0.5, heads=0.5, skip=("*:ffn",)))
    assert set(_gone(found)) == {"attn:attention"}
    assert [note.reason.split(";")[0] for note in found.notes] == [
        "no feed-forward site was found among what include= and skip= leave"
    ]


TWO = (_site("blocks.0.mlp:ffn", 4), _site("blocks.1.mlp:ffn", 4), _site("head:ffn", 4, head=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["blocks.0.mlp:ffn", "blocks.1.mlp:ffn"]),
        ({"skip": ("blocks.0*",)}, ["blocks.1.mlp:ffn"]),
        ({"skip": ("blocks.1",)}, ["blocks.0.mlp:ffn"]),
        ({"include": ("blocks.1.mlp",)}, ["blocks.1.mlp:ffn"]),
        ({"include": ("blocks.*", "head"), "skip": ("blocks.0.mlp",)}, ["blocks.1.mlp:ffn", "head:ffn"]),
        ({"include": ("head.down",)}, ["head:ffn"]),
    ],
)
def test_globs_select_sites(options: Mapping[str, tuple[str, ...]], expected: list[str]) -> None:
    selected, _ = select(TWO, Request(ffn=0.5, **options))  # type: ignore[arg-type]
    assert [site.name for site in selected] == expected


def test_a_task_head_is_left_alone_and_said_so() -> None:
    _, notes = select(TWO, Request(ffn=0.5))
    assert [note.where for note in notes] == ["head:ffn"]
    assert "left alone unless included" in notes[0].reason


@pytest.mark.parametrize("option", ["include", "skip"])
def test_a_glob_that_matches_nothing_is_refused(option: str) -> None:
    with pytest.raises(RequestError, match=rf"^{option}='nowhere\.\*' matches no module with a site; sites are in "):
        select(TWO, Request(ffn=0.5, **{option: ("nowhere.*",)}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ffn", "heads", "kv_groups"])
def test_fractions_out_of_range_are_refused(name: str) -> None:
    for value in (-0.1, 1.5, float("nan"), "half", True, None):
        with pytest.raises(RequestError, match=rf"^{name}=.*: give the fraction to remove, a number from 0 up to 1\.$"):
            Request(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=f"^{name}=1 asks for every unit; at least one has to stay"):
        Request(**{name: 1})  # type: ignore[arg-type]


def test_other_requests_are_refused() -> None:
    for multiple in (0, -8, 1.5, True):
        with pytest.raises(RequestError, match=r"^round_to=.*: give a whole number of at least 1\.$"):
            Request(round_to=multiple)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^experts=-0.1: give the fraction to remove"):
        Request(experts=-0.1)


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
def test_broken_weights_are_refused(value: float, name: str) -> None:
    tensors = _tensors(FFN, [1] * 6)
    tensors["mlp.up.weight"][3] = value
    with pytest.raises(InputError, match=rf"^mlp\.up\.weight holds {name}; repair the checkpoint before narrowing it"):
        choose([FFN], tensors, Request(ffn=0.5))


def test_weights_on_meta_are_chosen_by_number() -> None:
    tensors = {name: tensor.to("meta") for name, tensor in _tensors(FFN, [1] * 6).items()}
    choice = choose([FFN], tensors, Request(ffn=0.5))
    assert _gone(choice) == {"mlp:ffn": [3, 4, 5]}
    assert "weights are on meta" in choice.notes[0].reason
    assert _gone(choose([FFN], tensors, Request())) == {}


def test_requests_say_what_was_asked() -> None:
    assert Request(ffn=0.5, round_to=8, skip=("a",)).asked() == {"ffn": 0.5, "skip": ("a",), "round_to": 8}
    assert Request().lossless
    assert not Request(heads=0.1).lossless


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.29, 10**8, 29 * 10**6),
        (0.999, 1000, 999),
        (1 / 3, 3, 1),
        (1 / 3, 3 * 10**7, 10**7),
        (0.5, 7, 3),
        (0.0, 5, 0),
    ],
)
def test_fractions_are_rounded_down_and_not_further(fraction: float, count: int, expected: int) -> None:
    assert part_of(fraction, count) == expected
