"""What can be asked for, and what every wrong word or number says."""

from __future__ import annotations

from typing import Any

import pytest

import fxslim
from fxslim.errors import InputError, RequestError
from fxslim.training.config import PruningConfig
from fxslim.training.patterns import pattern_of


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "say what is to go"),
        ({"ffn": 0.5, "exclude": "a"}, r"no exclude=\. Did you mean skip="),
        ({"ffn": 0.5, "pruning_frequency": 9}, r"no pruning_frequency=\. Did you mean every="),
        ({"ffnn": 0.5}, r"no ffnn=\. Did you mean ffn="),
        ({"ffn": 1.0}, "at least one has to stay"),
        ({"ffn": -0.1}, "fraction to remove"),
        ({"ffn": 0.5, "schedule": "cubik"}, "Did you mean cubic"),
        ({"ffn": 0.5, "score": "fischer"}, "Did you mean fisher"),
        ({"ffn": 0.5, "scope": "globall"}, "Did you mean global"),
        ({"ffn": 0.5, "start": 1.5}, "start=1.5"),
        ({"ffn": 0.5, "end": True}, "end=True"),
        ({"ffn": 0.5, "every": 0}, "every=0"),
        ({"ffn": 0.5, "round_to": 0}, "round_to=0"),
        ({"ffn": 0.5, "decay": 1.0}, "decay=1.0"),
        ({"ffn": 0.5, "score": "snip", "decay": 0.5}, "no memory"),
        ({"ffn": 0.5, "limits": (0.1, 0.9)}, "scope='global'"),
        ({"ffn": 0.5, "scope": "global", "limits": (0.9, 0.1)}, "limits="),
        ({"kv_groups": 0.5, "scope": "global"}, "kv_groups"),
        ({"weights": fxslim.WeightMasks(fraction=0.5, reduce="max")}, "a sum in itself"),
        ({"weights": "most"}, "weights='most'"),
        ({"ffn": 0.5, "distill": 2.0}, "distill=2.0"),
        ({"ffn": 0.5, "include": 5}, "globs"),
    ],
)
def test_wrong_configs(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        fxslim.PruningConfig(**asked)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "say how much"),
        ({"fraction": 1.0}, "fraction=1.0"),
        ({"fraction": 0.5, "pattern": "4:4"}, "from 1 up to M - 1"),
        ({"fraction": 0.8, "pattern": "2:4"}, "masks 0.5 of the weights, not 0.8"),
        ({"fraction": 0.5, "pattern": "4x"}, "pattern='4x'"),
        ({"fraction": 0.5, "pattern": "channelx2"}, "channelx1"),
        ({"fraction": 0.5, "pattern": "0x4"}, "at least one"),
        ({"fraction": 0.5, "lock": True}, "leave fraction= out"),
        ({"lock": True, "lasso": 0.1, "portions": 2}, "leave lasso=, portions= out"),
        ({"lock": True, "reduce": "max"}, "leave reduce= out"),
        ({"fraction": 0.5, "kinds": ("Linea",)}, "Did you mean Linear"),
        ({"fraction": 0.5, "lasso": -1.0}, "lasso="),
        ({"fraction": 0.5, "portions": 0}, "portions=0"),
        ({"fraction": 0.5, "reduce": "men"}, "Did you mean mean"),
        ({"fracton": 0.5}, "Did you mean fraction="),
    ],
)
def test_wrong_weight_masks(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        fxslim.WeightMasks(**asked)


@pytest.mark.parametrize("asked", [{"temperature": 0}, {"logits": 0.0}, {"hidden": -1.0}, {"task": float("inf")}])
def test_wrong_distillation(asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        fxslim.Distillation(**asked)


def test_short_forms() -> None:
    config = fxslim.PruningConfig(weights=0.8, distill=True, include="a.*", skip=["b", "c"])
    assert config.weights == fxslim.WeightMasks(fraction=0.8)
    assert config.distill == fxslim.Distillation()
    assert (config.include, config.skip) == (("a.*",), ("b", "c"))
    assert fxslim.WeightMasks(pattern="1:4").fraction == 0.25
    assert pattern_of("channelx1").block((6, 8)) == (6, 1)
    assert pattern_of("1xchannel").block((6, 8)) == (1, 8)


def test_configs_are_data() -> None:
    config = fxslim.PruningConfig(
        ffn=0.5,
        scope="global",
        limits=(0.1, 0.9),
        weights=fxslim.WeightMasks(pattern="2:4"),
        distill=True,
    )
    assert PruningConfig.from_dict(config.to_dict()) == config


def test_wrong_types_in_the_place_of_a_config() -> None:
    with pytest.raises(InputError, match="PruningConfig, not dict"):
        fxslim.Pruner(object(), {"ffn": 0.5})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="PruningConfig, not dict"):
        fxslim.PruningCallback({"ffn": 0.5})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"torch\.nn\.Module, not|torch\.nn\.Module, got"):
        fxslim.Pruner(object(), fxslim.PruningConfig(ffn=0.5))  # type: ignore[arg-type]
