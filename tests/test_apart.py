"""Models whose weights are elsewhere (offloaded, or sharded over processes) are refused, with the way round.

Offloaded ones can be planned: see test_offload.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from transformers import BertConfig, BertModel

import fxslim
from fxslim.errors import UnsupportedModelError

CONFIG = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "inspect": fxslim.inspect,
    "plan": lambda model: fxslim.plan(model, ffn=0.5),
    "slim": lambda model: fxslim.slim(model, ffn=0.5),
    "compile": lambda model: fxslim.compile(model, ffn=0.5),
    "calibrated": lambda model: fxslim.slim(model, ffn=0.5, calibration=[torch.randint(3, 60, (4, 8))]),
}


@pytest.mark.parametrize("call", [call for call in CALLS if call != "plan"])
def test_an_offloaded_model_is_refused_with_the_way_round(call: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    BertModel(CONFIG).save_pretrained(tmp_path / "dense")
    where = {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}
    model = BertModel.from_pretrained(tmp_path / "dense", device_map=where, offload_folder=tmp_path / "offloaded")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    with pytest.raises(UnsupportedModelError, match=r"is offloaded by accelerate.*fxslim\.slim_checkpoint"):
        CALLS[call](model)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("call", CALLS)
def test_a_sharded_model_is_refused_with_the_way_round(call: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = BertModel(CONFIG)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModelError, match=r"is stored as DTensor .*shard the result.*slim_checkpoint"):
        CALLS[call](model)
