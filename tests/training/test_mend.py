"""Repair at every update: what is left is what `slim` would have made of the same choice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import InputError

from agreement import difference, outputs
from everywhere import ENTRIES


def model_of(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    architecture = ENTRIES[name]
    model = architecture.build(attn="sdpa")
    return model, [architecture.inputs(batch=8, length=10, seed=seed) for seed in range(10)]


def masked(model: nn.Module, calibration: Any = None) -> fxslim.Pruner:
    config = fxslim.PruningConfig(ffn=0.5, heads=0.5, score="magnitude", start=1, end=1)
    pruner = fxslim.Pruner(model, config, calibration=calibration)
    pruner.before_step()
    pruner.after_step()
    return pruner


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_an_update_repairs_as_slim_does(name: str) -> None:
    model, batches = model_of(name)
    expected: Any = fxslim.slim(model, plan=fxslim.plan(model, ffn=0.5, heads=0.5), calibration=batches[:8])
    plain, _ = model_of(name)
    masked(plain).finish()
    mended, _ = model_of(name)
    pruner = masked(mended, batches[:8])
    pruner.finish()
    small = fxslim.slim(mended)
    assert difference(outputs(expected, batches[8]), outputs(small, batches[8])) < 1e-6
    dense = outputs(model, batches[8])
    lost = {how: difference(dense, outputs(one, batches[8])) for how, one in (("plain", plain), ("mended", mended))}
    assert lost["mended"] < lost["plain"]


def test_several_updates_repair_what_each_of_them_masks() -> None:
    """What was masked before stays so, and is not repaired again."""
    model, batches = model_of("bert")
    config = fxslim.PruningConfig(ffn=0.5, score="magnitude", schedule="linear", start=0, end=4, every=2)
    pruner = fxslim.Pruner(model, config, calibration=batches[:4])
    assert pruner.units is not None
    kept: list[dict[str, Tensor]] = []
    for _ in range(5):
        pruner.before_step()
        pruner.after_step()
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(kept)]
    assert changed == [True, False, True, False]  # after 2 and after 4 steps
    pruner.finish()
    assert {len(part.keep) / part.site.units for part in fxslim.plan(model)} == {0.5}


def test_calibration_data_is_checked() -> None:
    model, _ = model_of("bert")
    with pytest.raises(InputError, match="no batch"):
        masked(model, [])
    with pytest.raises(InputError, match="does nothing where weights alone"):
        fxslim.Pruner(model, fxslim.PruningConfig(weights=0.5, start=1, end=1), calibration=[])
