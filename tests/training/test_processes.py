"""Several processes, accumulated gradients, half precision, compiled models: the same masks as one plain loop."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fxslim

ASKED: dict[str, Any] = {"ffn": 0.6, "heads": 0.5, "start": 1, "end": 6, "every": 2}
WEIGHTS = fxslim.WeightMasks(fraction=0.5, kinds=("Linear",))
STEPS = 8


def build(dtype: torch.dtype = torch.float64) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_attention_heads=4, intermediate_size=20, num_hidden_layers=2, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).to(dtype)


def rows(count: int = 8 * STEPS) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 50, (count, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.sum() % 2} for row in ids]


def batches(size: int, *, rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
    own = rows()
    every = [own[i : i + size] for i in range(0, len(own), size)][rank::world]
    return [{name: torch.stack([row[name] for row in batch]) for name in batch[0]} for batch in every]


def loop(
    model: nn.Module, given: list[dict[str, Tensor]], *, accumulate: int = 1, run: nn.Module | None = None, **asked: Any
) -> dict[str, list[bool]]:
    """Train in a plain loop and return the masks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    running = model if run is None else run
    config = fxslim.PruningConfig(**{**ASKED, **asked})
    pruner = fxslim.Pruner(running, config, optimizer=optimizer)
    model.train()
    for i, batch in enumerate(given):
        (running(**batch).loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            pruner.before_step()
            optimizer.step()
            pruner.after_step()
            optimizer.zero_grad()
    pruner.finish()
    return masks(pruner)


def masks(pruner: fxslim.Pruner) -> dict[str, list[bool]]:
    found = {} if pruner.units is None else {own.site.name: own.gone.tolist() for own in pruner.units.sites}
    layers = [] if pruner.weights is None else pruner.weights.layers
    return found | {own.layer.path: own.gone.flatten().tolist() for own in layers}


def trained(folder: str, size: int) -> dict[str, list[bool]]:
    """Train in a Trainer and return the masks."""
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=size, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-3,
    )  # fmt: skip
    callback = fxslim.PruningCallback(fxslim.PruningConfig(**ASKED))
    Trainer(model=build(), args=arguments, train_dataset=rows(), callbacks=[callback]).train()  # type: ignore[arg-type]
    assert callback.pruner is not None
    return masks(callback.pruner)


def _worker(rank: int, port: int, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    own = batches(4, rank=rank, world=2)
    model = build()
    found = loop(model, own, run=nn.parallel.DistributedDataParallel(model), weights=WEIGHTS)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    queue.put((rank, found, state, trained(folder, 4)))
    torch.distributed.destroy_process_group()


def test_two_processes_mask_what_one_masks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, port, str(tmp_path / "two"), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join(60)
    model = build()
    expected = loop(model, batches(8), weights=WEIGHTS)
    one = trained(str(tmp_path / "one"), 8)
    assert sum(expected["bert.encoder.layer.0:ffn"]) == 12
    for _, own, state, by_trainer in found:
        assert own == expected
        assert by_trainer == one
        for name, value in model.state_dict().items():
            assert torch.allclose(torch.from_numpy(state[name]), value, rtol=1e-6, atol=1e-9), name


def test_accumulated_gradients_say_what_whole_batches_say() -> None:
    expected = loop(build(), batches(8))
    assert loop(build(), batches(4), accumulate=2) == expected


def test_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    running, wrapped = accelerator.prepare(model, optimizer)
    pruner = fxslim.Pruner(running, fxslim.PruningConfig(**ASKED), optimizer=wrapped)
    model.train()
    for batch in batches(4):
        with accelerator.accumulate(running):
            accelerator.backward(running(**batch).loss)
            if accelerator.sync_gradients:
                pruner.before_step()
            wrapped.step()
            if accelerator.sync_gradients:
                pruner.after_step()
            wrapped.zero_grad()
    pruner.finish()
    assert masks(pruner) == loop(build(), batches(8))


NEEDS_CC = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=[NEEDS_CC, pytest.mark.slow])]
)
def test_compiled_models_see_the_masks(backend: str) -> None:
    """Also where the model ran compiled before there were masks."""
    expected = loop(build(), batches(8))
    model = build()
    compiled: Any = torch.compile(model, backend=backend)
    compiled(**batches(8)[0]).loss.backward()
    model.zero_grad()
    assert loop(model, batches(8), run=compiled) == expected
    model = build()
    model.compile(backend=backend)
    model(**batches(8)[0]).loss.backward()
    model.zero_grad()
    assert loop(model, batches(8)) == expected
    model.eval()
    assert torch.allclose(model(**batches(8)[0]).logits, build_like(model)(**batches(8)[0]).logits, rtol=0, atol=1e-12)
    torch._dynamo.reset()


def build_like(model: nn.Module) -> nn.Module:
    made = build().eval()
    made.load_state_dict(model.state_dict())
    return made


def test_compiled_gradients_of_masked_columns_are_zero() -> None:
    model = build()
    compiled: Any = torch.compile(model, backend="aot_eager")
    config = fxslim.PruningConfig(**{**ASKED, "start": 1, "end": 1}, score="magnitude")
    pruner = fxslim.Pruner(compiled, config)
    model.train()
    for batch in batches(8)[:3]:
        model.zero_grad()
        compiled(**batch).loss.backward()
        pruner.before_step()
        pruner.after_step()
    assert pruner.units is not None
    gone = next(own.gone for own in pruner.units.sites if own.site.name == "bert.encoder.layer.0:ffn")
    gradient = model.bert.encoder.layer[0].output.dense.weight.grad
    assert gone.sum() == 12
    assert gradient[:, gone].count_nonzero() == 0
    assert gradient[:, ~gone].count_nonzero() > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Under autocast, and with weights in half precision: exact counts, exact zeros."""
    model = build(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = loop(model, batches(8))
    assert {name: sum(gone) for name, gone in found.items()} == {
        f"bert.encoder.layer.{i}{rest}": count
        for i in range(2)
        for rest, count in ((":ffn", 12), (".attention:attention", 2))
    }
    assert {len(part.keep) for part in fxslim.plan(model.eval())} == {8, 2}


def test_scaled_losses_choose_the_same() -> None:
    """Gradients are unscaled before scores are read; a step with infinite ones says nothing."""
    expected = loop(build(torch.float32), batches(8))
    model = build(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pruner = fxslim.Pruner(model, fxslim.PruningConfig(**ASKED), optimizer=optimizer)
    model.train()
    for batch in batches(8):
        scaler.scale(model(**batch).loss).backward()
        scaler.unscale_(optimizer)
        pruner.before_step()
        scaler.step(optimizer)
        scaler.update()
        pruner.after_step()
        optimizer.zero_grad()
    pruner.finish()
    assert masks(pruner) == expected
