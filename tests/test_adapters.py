"""Adapters of peft: on a narrowed model, and under it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fxslim
from fxslim.errors import InputError, UnsupportedModelError

from architectures import ARCHITECTURES

peft = pytest.importorskip("peft")
BERT = ARCHITECTURES["bert_classify"]
LORA = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)


@pytest.fixture
def small() -> Any:
    return fxslim.slim(BERT.build(torch.float32, "sdpa"), ffn=0.5, heads=0.25)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**BERT.inputs()).logits
    return found


def test_adapters_train_on_a_narrowed_model_and_load_on_it_again(small: Any, tmp_path: Path) -> None:
    fxslim.save_pretrained(small, tmp_path / "small")
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    model = peft.get_peft_model(small, LORA)
    first = logits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(10):
        loss = model.eval()(**BERT.inputs(), labels=torch.tensor([0, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert not torch.equal(trained, first)
    base = dict(model.get_base_model().named_parameters())
    narrowed = {name: base.get(name.replace(".weight", ".base_layer.weight"), base.get(name)) for name in before}
    assert all(torch.equal(narrowed[name], tensor) for name, tensor in before.items() if narrowed[name] is not None)
    model.save_pretrained(tmp_path / "adapters")
    loaded = peft.PeftModel.from_pretrained(fxslim.from_pretrained(tmp_path / "small"), tmp_path / "adapters")
    assert torch.equal(logits(loaded), trained)
    merged = loaded.merge_and_unload()
    fxslim.save_pretrained(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(fxslim.from_pretrained(tmp_path / "merged")), trained, rtol=1e-5, atol=1e-5)


def test_a_model_with_adapters_is_narrowed_after_merging() -> None:
    model = peft.get_peft_model(BERT.build(torch.float32, "sdpa"), LORA)
    for subject in (model, model.get_base_model()):
        with pytest.raises(UnsupportedModelError, match=r"has an adapter of peft.*merge_and_unload\(\)"):
            fxslim.slim(subject, BERT.inputs(), ffn=0.5)
    adapted = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-5, atol=1e-5)
    small: Any = fxslim.slim(merged, ffn=0.5)
    with fxslim.masked(merged, small.fxslim.plan):
        expected = logits(merged)
    torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_adapters_is_not_saved_as_a_whole(small: Any, tmp_path: Path) -> None:
    adapted = copy.deepcopy(small)
    adapted.add_adapter(LORA)
    with pytest.raises(InputError, match=r"has adapters of peft: merge them first"):
        fxslim.save_pretrained(adapted, tmp_path / "small")
    with pytest.raises(InputError, match="not PeftModel"):
        fxslim.save_pretrained(peft.get_peft_model(small, LORA), tmp_path / "small")
    assert not list(tmp_path.iterdir())
