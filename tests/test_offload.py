"""Models that accelerate has offloaded are planned as the same models in memory are, a few tensors at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fxslim
from fxslim.errors import RequestError, UnsupportedModelError
from fxslim.lazy import KEPT, Lazy, Spilled, saved_by_name
from fxslim.offloaded import Offloaded
from fxslim.sharing import offloading

pytest.importorskip("accelerate")

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True),
    "bert": BertConfig(**SIZES, num_hidden_layers=2),
}
KINDS: dict[str, type[PreTrainedModel]] = {"llama": LlamaForCausalLM, "bert": BertModel}


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return [{"input_ids": torch.randint(3, 60, (4, 10)), "attention_mask": mask} for _ in range(4)]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """Return a model in memory, and the same one on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    dense = KINDS[request.param](CONFIGS[request.param]).eval()
    dense.save_pretrained(folder / "dense")
    loaded = KINDS[request.param].from_pretrained(
        folder / "dense", device_map={"": "disk"}, offload_folder=folder / "offloaded"
    )
    assert all(parameter.is_meta for parameter in loaded.parameters())
    return dense, loaded


@pytest.mark.parametrize(
    "asked",
    [
        {"ffn": 0.5, "heads": 0.5},
        {"target": fxslim.params(0.85)},
        {"ffn": 0.5, "heads": 0.5, "method": "wanda", "repair": False},
        {"ffn": 0.5, "method": "taylor", "repair": "bias"},
    ],
    ids=["fractions", "params", "wanda", "taylor"],
)
def test_a_calibrated_plan_is_that_of_the_model_in_memory(pair: tuple[nn.Module, nn.Module], asked: Any) -> None:
    dense, loaded = pair
    plan = fxslim.plan(loaded, calibration=batches(), **asked)
    assert plan == fxslim.plan(dense, calibration=batches(), **asked)
    assert plan.sites


def test_without_data_too(pair: tuple[nn.Module, nn.Module]) -> None:
    dense, loaded = pair
    assert fxslim.plan(loaded, ffn=0.5, heads=0.5) == fxslim.plan(dense, ffn=0.5, heads=0.5)


def test_it_has_run_before(tmp_path: Path) -> None:
    """accelerate unties the weights of what has run."""
    dense = KINDS["llama"](CONFIGS["llama"]).eval()
    dense.save_pretrained(tmp_path / "dense")
    where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers": "disk", "model.norm": "disk"}
    loaded = KINDS["llama"].from_pretrained(
        tmp_path / "dense", device_map=where | {"model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    before = loaded(**batches()[0]).logits
    assert fxslim.plan(loaded, ffn=0.5) == fxslim.plan(dense, ffn=0.5)
    assert torch.equal(loaded(**batches()[0]).logits, before)
    assert all(parameter.is_meta for parameter in loaded.model.layers.parameters())


class Counted(Offloaded):
    """Offloaded tensors, counted for as long as anybody holds their memory."""

    seen: ClassVar[list[StorageWeakRef]] = []
    most: ClassVar[int] = 0

    def read(self, name: str) -> torch.Tensor:
        own = super().read(name)
        if own is self._program.tensors[name]:
            return own  # a buffer, which is there all the time
        Counted.seen = [ref for ref in (*Counted.seen, StorageWeakRef(own.untyped_storage())) if not ref.expired()]
        Counted.most = max(Counted.most, len(Counted.seen))
        return own


@pytest.mark.parametrize("method", ["obs", "taylor"])
def test_only_a_few_tensors_are_there_at_a_time(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither runs forward nor gradients hold the model."""
    config = LlamaConfig(**SIZES, num_hidden_layers=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    tensors = len(list(loaded.parameters()))
    monkeypatch.setattr("fxslim.api.Offloaded", Counted)
    monkeypatch.setattr(Counted, "most", 0)
    assert fxslim.plan(loaded, calibration=batches()[:2], ffn=0.5, heads=0.5, method=method).sites
    assert tensors == 39
    assert KEPT <= Counted.most <= KEPT + 2


def test_gradients_of_what_is_read_again() -> None:
    """Weights are saved by name, views of them too, and everything else as it is."""

    class Halved(Lazy):
        reads = 0

        def read(self, name: str) -> torch.Tensor:
            self.reads += 1
            return {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3, 5), "c": torch.full((5,), 2.0)}[name]

    def run(tensors: Any, x: torch.Tensor) -> torch.Tensor:
        with saved_by_name(tensors):
            return ((torch.tanh(x @ tensors["a"].T) @ tensors["b"]) * tensors["c"][1:4].sum()).square().sum()

    lazy = Halved(["a", "b", "c"], kept=1)
    first, second = (torch.linspace(-1, 1, 8).reshape(2, 4).requires_grad_() for _ in range(2))
    run(lazy, first).backward()
    run({name: lazy.read(name) for name in lazy}, second).backward()
    assert lazy.reads == 3 + 2 + 3  # forward, a and b again on the way back, and the dict's
    assert first.grad is not None and torch.equal(first.grad, second.grad)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    spilled = Spilled(tmp_path)
    spilled["a.weight"] = torch.arange(4.0).reshape(2, 2).T
    assert torch.equal(spilled["a.weight"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    spilled["a.weight"] = torch.ones(2)
    assert torch.equal(spilled["a.weight"], torch.ones(2)) and len(list(tmp_path.iterdir())) == 1
    assert "b" not in spilled and "a.weight" in spilled
    del spilled["a.weight"]
    assert not spilled and not list(tmp_path.iterdir())


def test_a_speed_up_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(RequestError, match=r"measured on whole models.*fxslim\.macs"):
        fxslim.plan(pair[1], calibration=batches(), target=fxslim.speedup(1.5))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("execution_device", torch.device("cuda", 0), r"runs on cuda.*device_map=\{'': 'disk'\}"),
        ("offload", False, "weight is on meta, and no hook of accelerate"),
    ],
)
def test_weights_elsewhere_or_nowhere_are_refused(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch, name: str, value: Any, said: str
) -> None:
    hook = next(hook for module in pair[1].modules() if isinstance(module, nn.Linear) for hook in offloading(module))
    monkeypatch.setattr(hook, name, value)
    with pytest.raises(UnsupportedModelError, match=said):
        fxslim.plan(pair[1], ffn=0.5)


def test_computed_weights_are_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    layer = next(module for module in pair[1].modules() if isinstance(module, nn.Linear))
    torch.nn.utils.prune.identity(layer, "weight")
    try:
        with pytest.raises(UnsupportedModelError, match="masks or parametrizations compute weights"):
            fxslim.plan(pair[1], ffn=0.5)
    finally:
        torch.nn.utils.prune.remove(layer, "weight")


def test_a_narrowed_checkpoint_is_the_repaired_model(tmp_path: Path) -> None:
    dense = KINDS["llama"](CONFIGS["llama"]).eval()
    dense.save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"calibration": batches(), "ffn": 0.5, "heads": 0.5}
    expected = fxslim.slim(dense, **asked)
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "small", **asked)
    small: Any = fxslim.from_pretrained(tmp_path / "small")
    assert small.fxslim.plan.weights_changed
    assert small.fxslim.plan.sites == expected.fxslim.plan.sites
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    plan = fxslim.plan_checkpoint(tmp_path / "dense", **asked)
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "other", plan, calibration=batches())
    other = fxslim.from_pretrained(tmp_path / "other").state_dict()
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    assert not any(path.name.startswith(".") for path in (*tmp_path.iterdir(), *(tmp_path / "small").iterdir()))
