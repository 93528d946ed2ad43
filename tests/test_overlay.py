"""Overlays: some fields of a config answered differently for one module, everything else shared."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, Phi3Config

from fxslim.overlay import overlay


def test_fields_are_replaced_and_the_rest_delegates() -> None:
    config = SimpleNamespace(heads=4, width=32)
    view = overlay(config, {"heads": 2})
    assert (view.heads, view.width) == (2, 32)
    assert config.heads == 4


def test_later_changes_of_the_shared_config_show_through() -> None:
    config = SimpleNamespace(heads=4, width=32)
    view = overlay(config, {"heads": 2})
    config.width, config.heads = 16, 8
    assert (view.width, view.heads) == (16, 2)


def test_writing_reaches_the_shared_config() -> None:
    config = SimpleNamespace(mode="eager")
    view = overlay(config, {"heads": 2})
    view.mode = "sdpa"
    assert config.mode == "sdpa"
    assert view.mode == "sdpa"


def test_overlays_of_overlays_are_one() -> None:
    config = SimpleNamespace(heads=4, groups=2, width=32)
    twice = overlay(overlay(config, {"heads": 2, "groups": 2}), {"groups": 1})
    assert (twice.heads, twice.groups, twice.width) == (2, 1, 32)
    assert (config.heads, config.groups) == (4, 2)
    config.width = 1
    assert twice.width == 1


def test_missing_fields_are_missing() -> None:
    with pytest.raises(AttributeError, match="depth"):
        overlay(SimpleNamespace(heads=4), {"heads": 2}).depth  # noqa: B018


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
def test_copies_keep_the_fields(clone: object) -> None:
    config = Phi3Config(num_attention_heads=4)
    view = clone(overlay(config, {"num_attention_heads": 2}))  # type: ignore[operator]
    assert view.num_attention_heads == 2
    assert view.hidden_size == config.hidden_size
    view.hidden_size = 5
    assert config.hidden_size != 5


def test_a_deep_copy_shares_its_config_with_what_was_copied_along() -> None:
    config = Phi3Config(num_attention_heads=4)
    holders = {"whole": config, "part": overlay(config, {"num_attention_heads": 2})}
    copied = copy.deepcopy(holders)
    copied["whole"].hidden_size = 7
    assert copied["part"].hidden_size == 7
    assert config.hidden_size != 7


def test_a_real_config_keeps_its_class_and_methods() -> None:
    config = Phi3Config(num_attention_heads=4, num_key_value_heads=2)
    view = overlay(config, {"num_attention_heads": 2})
    assert isinstance(view, Phi3Config)
    assert view.to_dict()["num_key_value_heads"] == 2


def test_other_names_of_a_field_are_not_replaced() -> None:
    config = GPT2Config(n_head=4)
    view = overlay(config, {"num_attention_heads": 2})
    assert (view.num_attention_heads, view.n_head, view.hidden_size) == (2, 4, config.n_embd)
    view.num_attention_heads = 8
    assert (view.num_attention_heads, config.n_head) == (2, 8)
    view.hidden_size = 6
    assert config.n_embd == 6


def test_a_new_instance_of_its_class_does_not_write_into_the_shared_config() -> None:
    config = Phi3Config(num_attention_heads=4)
    type(overlay(config, {"num_attention_heads": 2}))(num_attention_heads=16)
    assert config.num_attention_heads == 4


def test_what_has_no_dict_is_delegated_to() -> None:
    class Slotted:
        __slots__ = ("heads", "width")

    config = Slotted()
    config.heads, config.width = 4, 32
    view = overlay(config, {"heads": 2})
    assert (view.heads, view.width) == (2, 32)
    view.width = 16
    assert (config.width, view.width) == (16, 16)


def test_compilers_see_an_ordinary_object() -> None:
    view = overlay(Phi3Config(num_attention_heads=4, hidden_size=32), {"num_attention_heads": 2})
    compiled = torch.compile(lambda x: x * view.num_attention_heads + view.hidden_size, backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 34


def test_an_overlay_pickles() -> None:
    config = Phi3Config(num_attention_heads=4)
    again = pickle.loads(pickle.dumps(overlay(config, {"num_attention_heads": 2})))
    assert (again.num_attention_heads, again.hidden_size) == (2, config.hidden_size)
