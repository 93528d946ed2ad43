"""Keywords, keys and defaults of the old configs; what means nothing is refused, and nothing leaks."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fxslim.errors import RequestError
from fxslim.inc import (
    PruningCallbacks,
    WeightPruningConfig,
    model_slim,
    parse_auto_slim_config,
    prepare_compression,
    prepare_pruning,
)
from fxslim.inc.translate import Finder, native, updates
from fxslim.training.config import PruningConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear1, self.linear2, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.linear2(self.linear1(x).relu()))
        return out


def translated(**keys: Any) -> PruningConfig:
    (wish,) = WeightPruningConfig(**{"end_step": 10, **keys}).wishes()
    config, _ = native(wish, Finder(Net()))
    assert config is not None
    return config


def test_keywords_and_defaults_are_the_old_ones() -> None:
    defaults = {name: one.default for name, one in inspect.signature(WeightPruningConfig).parameters.items()}
    assert defaults.pop("kwargs") is inspect.Parameter.empty
    assert defaults == {
        "pruning_configs": [{}], "target_sparsity": 0.9, "pruning_type": "snip_momentum", "pattern": "4x1",
        "op_names": [], "excluded_op_names": [], "start_step": 0, "end_step": 0, "pruning_scope": "global",
        "pruning_frequency": 1, "min_sparsity_ratio_per_op": 0.0, "max_sparsity_ratio_per_op": 0.98,
        "sparsity_decay_type": "exp", "pruning_op_types": ["Conv", "Linear"], "low_memory_usage": False,
    }  # fmt: skip
    given = [(name, one.default) for name, one in inspect.signature(parse_auto_slim_config).parameters.items()]
    assert given[1:4] == [("dataloader", None), ("ffn2_sparsity", 0.0), ("mha_sparsity", 0.0)]
    given = [(name, one.default) for name, one in inspect.signature(model_slim).parameters.items()]
    assert given[1:] == [("dataloader", None), ("round_multiplier", 32)]
    names = list(inspect.signature(prepare_pruning).parameters)
    assert names[:5] == ["model", "config", "optimizer", "dataloader", "loss_func"]
    assert list(inspect.signature(prepare_compression).parameters)[:2] == ["model", "confs"]


def test_importing_is_light_and_changes_nothing_of_torch() -> None:
    code = "import fxslim.inc, sys; print(sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_defaults_are_translated() -> None:
    config = translated()
    assert config.masks is not None
    assert (config.masks.fraction, config.masks.pattern, config.masks.reduce) == (0.9, "4x1", "mean")
    assert (config.schedule, config.score, config.scope, config.limits) == ("exp", "snip_momentum", "global", (0, 0.98))
    assert config.include == ("linear1", "linear2")  # the last linear is a task's head


def test_keys_of_a_pruner_win_over_keywords_and_nothing_given_is_changed() -> None:
    pruners = [{"op_names": ["linear1"], "pattern": "1x1", "target_sparsity": None}, {"end_step": 6}]
    before = copy.deepcopy(pruners)
    conf = WeightPruningConfig(pruners, target_sparsity=0.5, end_step=10, pruning_scope="local")
    first, second = conf.wishes()
    assert (first.names, first.pattern, first.fraction, first.end, first.scope) == (
        ("linear1",), "1x1", 0.5, 10, "local",
    )  # fmt: skip
    assert (second.names, second.pattern, second.end) == ((), "4x1", 6)
    prepare_compression(Net(), conf).callbacks.release()
    assert pruners == before
    assert [dict(own) for own in conf.pruning_configs] == before


def test_one_configs_exclusions_do_not_leak_into_later_ones() -> None:
    """The old tool appended the task's head to a default that all configs shared."""
    prepare_compression(Net(), WeightPruningConfig(end_step=4)).callbacks.release()
    later = WeightPruningConfig()
    assert later.weight_compression["excluded_op_names"] == []
    later.weight_compression["excluded_op_names"].append("linear1")
    later.pruning_configs[0]["pattern"] = "1x1"
    assert WeightPruningConfig().weight_compression["excluded_op_names"] == []
    assert WeightPruningConfig().pruning_configs == [{}]
    assert inspect.signature(WeightPruningConfig).parameters["excluded_op_names"].default == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_sparsty": 0.5}, "'target_sparsty' is no key. Did you mean target_sparsity"),
        ({"pruning_configs": [{"patern": "1x1"}]}, r"pruning_configs\[0\]: 'patern' is no key. Did you mean pattern"),
        ({"pruning_configs": [{}, {"op_name": ["x"]}]}, r"pruning_configs\[1\]: .* Did you mean op_names"),
        ({"parameters": {"reg_coef": 1.0}}, "'reg_coef' is no key of parameters. Did you mean reg_coeff"),
        ({"pruning_type": "snip_momentun"}, "Did you mean snip_momentum"),
        ({"pruning_type": "pattern_lock_progressive"}, "is none of"),
        ({"sparsity_decay_type": "cubic"}, "Did you mean cube"),
        ({"pruning_scope": "globl"}, "Did you mean global"),
        ({"pruning_op_types": ["Linaer"]}, "Did you mean Linear"),
        ({"criterion_reduce_type": "avg"}, "is none of mean, sum, max"),
        ({"reg_type": "lasso"}, "Did you mean group_lasso"),
        ({"reg_type": "group_lasso", "end_step": 5}, "needs its strength"),
        ({"pattern": "4:2"}, "N from 1 up to"),
        ({"pattern": "4"}, "or 'mha'"),
        ({"pattern": "2:4", "target_sparsity": 0.8}, "masks 0.5 of every layer"),
        ({"pattern": "2:4", "max_sparsity_ratio_per_op": 0.4, "end_step": 3}, "masks 0.5 of every layer"),
        ({"target_sparsity": 1.0}, "target_sparsity=1.0"),
        ({"target_sparsity": "0.5"}, "target_sparsity='0.5'"),
        ({"start_step": 5, "end_step": 4}, "comes before"),
        ({"end_step": 4.0}, "whole number"),
        ({"pruning_frequency": 0}, "at least 1"),
        ({"op_names": "linear1"}, "list of texts"),
        ({"op_names": ["("]}, "no regular expression"),
        ({"min_sparsity_ratio_per_op": 0.95, "end_step": 5}, "more than goes in all"),
        ({"resume_from_pruned_checkpoint": True, "end_step": 5}, "pattern_lock"),
        ({"low_memory_usage": 1, "end_step": 5}, "True or False"),
        ({"pruning_type": "pattern_lock", "pattern": "mha"}, "pattern_lock' has no meaning"),
        ({"criterion_reduce_type": "max", "pattern": "mha"}, "criterion_reduce_type has no meaning"),
        ({"criterion_reduce_type": "max", "pruning_type": "pattern_lock"}, "criterion_reduce_type has no meaning"),
        ({"criterion_reduce_type": "sum", "pruning_type": "block_mask"}, "criterion_reduce_type has no meaning"),
        ({"reg_type": "group_lasso", "reg_coeff": 0.1, "pattern": "mha"}, "group_lasso' has no meaning"),
        ({"reg_type": "group_lasso", "reg_coeff": 0.1, "pruning_type": "wanda"}, "group_lasso' has no meaning"),
        ({"pruning_configs": []}, "has no pruner"),
        ({"pruning_configs": {}}, "a list with a dict"),
        ({"pruning_configs": 0.9}, "a list with a dict"),
        ({"pruning_configs": [0.9]}, "holds 0.9"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        WeightPruningConfig(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'snip_momentum' reads gradients, and end_step=0"),
        ({"pruning_type": "group_lasso", "reg_coeff": 0.1}, "end_step=0: say when"),
    ],
)
def test_a_target_that_comes_before_everything_is_refused(given: dict[str, Any], message: str) -> None:
    """It is an assertion of the old tool as well, when pruning is prepared."""
    with pytest.raises(RequestError, match=message):
        prepare_pruning(Net(), WeightPruningConfig(**given))


def test_positional_misuse_is_caught() -> None:
    """The old tool took the sparsity for a dataloader."""
    model, conf = Net(), WeightPruningConfig(end_step=4)
    with pytest.raises(RequestError, match=r"dataloader=0.5 is no iterable.*ffn2_sparsity= and mha_sparsity= by name"):
        parse_auto_slim_config(model, 0.5, 0.5)
    with pytest.raises(RequestError, match=r"round_multiplier= by name"):
        model_slim(model, 16)
    with pytest.raises(RequestError, match=r"the model comes first, and this is a WeightPruningConfig"):
        prepare_pruning(conf, model)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"the model comes first"):
        prepare_compression(conf, model)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"that is none; say dataloader= by name"):
        prepare_pruning(model, conf, [torch.zeros(2, 8)])
    with pytest.raises(RequestError, match=r"takes a fxslim.inc.WeightPruningConfig, not dict"):
        prepare_pruning(model, {"pattern": "4x1"})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"a list with a dict for each pruner"):
        WeightPruningConfig(0.9)  # type: ignore[arg-type]


def test_unknown_keys_of_calls_are_refused() -> None:
    with pytest.raises(RequestError, match=r"'pruning_scop' is no key. Did you mean pruning_scope"):
        parse_auto_slim_config(Net(), ffn2_sparsity=0.5, pruning_scop="local")
    with pytest.raises(RequestError, match=r"Did you mean optimizer="):
        prepare_compression(Net(), WeightPruningConfig(end_step=4), optimiser=None)
    with pytest.raises(RequestError, match=r"one WeightPruningConfig"):
        prepare_compression(Net(), [WeightPruningConfig(end_step=4)] * 2)
    with pytest.raises(RequestError, match=r"'pytorch' alone"):
        prepare_pruning(Net(), WeightPruningConfig(end_step=4), framework="keras")
    conf = WeightPruningConfig(end_step=4)
    conf.weight_compression["end_stp"] = 5  # as scripts did it
    with pytest.raises(RequestError, match=r"Did you mean end_step"):
        PruningCallbacks(conf, Net())


def test_layers_are_named_by_regular_expressions_or_by_themselves() -> None:
    assert translated(op_names=["linear"]).include == ("linear1", "linear2")
    assert translated(op_names=["near2$"]).include == ("linear2",)
    assert translated(op_names=["linear1"], excluded_op_names=["2"]).include == ("linear1",)
    assert translated(excluded_op_names=["linear1"]).include == ("linear2",)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    (wish,) = WeightPruningConfig(op_names=["1"], end_step=3).wishes()
    config, _ = native(wish, Finder(model))
    assert config is not None and config.include == ("1",)  # not 10 and 11, as a search would have it
    with pytest.raises(RequestError, match=r"leave no layer of the model: layers are linear1, linear2, head"):
        translated(op_names=["fc"])
    with pytest.raises(RequestError, match=r"leave no layer"):
        translated(pruning_op_types=["Conv"])


def test_updates_come_when_they_did() -> None:
    """After start, start + every, …: the last whole number of them before the end, at which the target is reached."""
    (wish,) = WeightPruningConfig(start_step=2, end_step=12, pruning_frequency=4).wishes()
    line = updates(wish)
    assert [step for step in range(1, 20) if line.due(step)] == [2, 6, 10]
    assert [line.time(step) for step in (2, 6, 10)] == [0.0, 0.5, 1.0]
    (wish,) = WeightPruningConfig(start_step=3, end_step=3).wishes()
    assert [step for step in range(1, 9) if updates(wish).due(step)] == [3] and updates(wish).time(3) == 1


def test_patterns_types_and_options_are_translated() -> None:
    config = translated(pattern="2:4")
    assert config.masks is not None and config.masks.fraction == 0.5
    config = translated(pattern="tile_pattern_1x1", target_sparsity=0.5)
    assert config.masks is not None and config.masks.pattern == "1x1"
    config = translated(pruning_type="pattern_lock", pattern="2:4")
    assert config.masks is not None and config.masks.lock
    config = translated(pruning_type="snip_progressive")
    assert config.masks is not None and config.masks.portions == 4 and config.score == "snip"
    config = translated(reg_type="group_lasso", parameters={"reg_coeff": 0.2})
    assert config.masks is not None and config.masks.lasso == 0.2 and config.score == "snip_momentum"
    config = translated(criterion_type="gradient", criterion_reduce_type="max")
    assert config.masks is not None and config.score == "gradient" and config.masks.reduce == "max"
    config = translated(target_sparsity=0.99)
    assert config.masks is not None and config.masks.fraction == 0.98  # no layer loses more
