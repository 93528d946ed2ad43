"""A ``Trainer`` goes on with a narrowed model, and resumes from its checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import fxslim

from architectures import ARCHITECTURES, VOCAB


def trainer_of(model: Any, folder: Path, **given: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(4, VOCAB, (7,), generator=generator), "labels": i % 2} for i in range(16)]
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4, **given}
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **options)
    return Trainer(model=model, args=arguments, train_dataset=data)


def test_a_narrowed_model_is_trained_on_and_resumes(tmp_path: Path) -> None:
    dense = ARCHITECTURES["bert_classify"].build(torch.float32)
    small: Any = fxslim.slim(dense, ffn=0.5, heads=0.25)
    begun = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    whole = trainer_of(copy.deepcopy(small), tmp_path)
    whole.train()
    trained = whole.model.state_dict()
    assert any(not torch.equal(trained[name], tensor) for name, tensor in begun.items())
    assert {name: tensor.shape for name, tensor in trained.items()} == {n: t.shape for n, t in begun.items()}
    resumed = trainer_of(copy.deepcopy(small), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    loaded: Any = fxslim.from_pretrained(tmp_path / "checkpoint-4")
    assert loaded.fxslim.plan == small.fxslim.plan
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
