"""The benchmark harness: what it counts, what it refuses, what it prints. Nothing here asserts a speed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
)

import fxslim
from benchmarks import latency
from fxslim.errors import InputError, VerifyError
from fxslim.harness.generation import rate
from fxslim.harness.memory import peak_bytes
from fxslim.harness.sizes import resized
from fxslim.timer import estimate_median

QUICK: dict[str, Any] = {"max_seconds": 0.05}
D, F, LAYERS = 16, 24, 2


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4,
                        intermediate_size=F, max_position_embeddings=32)  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def slim(bert: BertModel) -> Any:
    return fxslim.slim(bert, ffn=0.5, heads=0.5)


def test_inputs_are_repeated_and_cut() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    given = {"input_ids": ids, "mask": ids > 0, "scale": torch.tensor(2.0), "pixels": torch.ones(2, 4, 3)}
    made = resized(given, batch=3, length=5)
    assert made["input_ids"].tolist() == [[1, 2, 3, 1, 2], [4, 5, 6, 4, 5], [1, 2, 3, 1, 2]]
    assert made["mask"].shape == (3, 5)
    assert made["pixels"].shape == (3, 4, 3)
    assert made["scale"] is given["scale"]
    with pytest.raises(InputError, match="none of these is a matrix"):
        resized({"x": torch.ones(2, 3)}, length=4)
    with pytest.raises(InputError, match="these do not"):
        resized({"x": torch.ones(2, 3), "y": torch.ones(3, 3)}, batch=4)


def test_a_peak_is_what_lives_at_once() -> None:
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1  # 4000 bytes
            z = y.double()  # 8000, with y
            del y
            return z.float().view(10, 100)  # 4000, with z

    module, x = Steps(), torch.zeros(1000)
    assert peak_bytes(lambda: module(x), torch.device("cpu")) == 12000


def test_what_is_counted(bert: BertModel, slim: Any, tmp_path: Path) -> None:
    found = fxslim.benchmark({"dense": bert, "slim": slim}, batches=[1, 3], lengths=[4], **QUICK)
    assert [(point.batch, point.length, point.variant) for point in found.points] == [(1, 4, "eager"), (3, 4, "eager")]
    for point in found.points:
        tokens = point.batch * 4
        full, half = (
            LAYERS * tokens * (4 * D * width + 2 * D * hidden + 2 * 4 * width)
            for width, hidden in ((D, F), (D // 2, F // 2))
        )
        assert point.macs == {"dense": full, "slim": half}
        assert point.peak["slim"] < point.peak["dense"]
        assert {sample.name for sample in point.timing.samples} == {"dense", "slim"}
    for name, model in (("dense", bert), ("slim", slim)):
        tensors = {key: value.contiguous() for key, value in model.named_parameters()}
        save_file(tensors, tmp_path / "own.safetensors")
        size = (tmp_path / "own.safetensors").stat().st_size
        head = int.from_bytes((tmp_path / "own.safetensors").read_bytes()[:8], "little")
        assert found.sizes[name].bytes == size - head - 8
        assert found.sizes[name].parameters == sum(p.numel() for p in model.parameters())
    assert found.notes == ()
    assert not slim.training


def test_the_graph_is_compared_as_well(bert: BertModel, slim: Any) -> None:
    graph = fxslim.compile(bert, plan=slim.fxslim.plan)
    found = fxslim.benchmark({"slim": slim, "graph": graph}, batches=[2], **QUICK)
    assert found.points[0].macs["slim"] == found.points[0].macs["graph"]
    assert found.notes == ("slim: the dense model that it was made of is not among those compared",)


@pytest.mark.parametrize("among", ["dense", "graph"])
def test_models_that_should_agree_and_do_not_are_refused(bert: BertModel, slim: Any, among: str) -> None:
    wrong: Any = fxslim.slim(bert, plan=slim.fxslim.plan)
    with torch.no_grad():
        wrong.encoder.layer[1].output.dense.bias[0] += 0.1  # of all alike, a norm would see nothing
    other = bert if among == "dense" else fxslim.compile(bert, plan=slim.fxslim.plan)
    models = {"first": other, "second": wrong}
    with pytest.raises(VerifyError, match="check=False"):
        fxslim.benchmark(models, **QUICK)
    assert fxslim.benchmark(models, check=False, **QUICK).points


def test_what_edits_integers_is_compared_as_well() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=F)  # fmt: skip
    dense = LlamaModel(config).eval()
    small: Any = fxslim.slim(dense, heads=0.5)
    assert small.fxslim.plan.edits
    graph = fxslim.compile(dense, plan=small.fxslim.plan)
    assert fxslim.benchmark({"dense": dense, "slim": small, "graph": graph}, **QUICK).notes == ()
    with torch.no_grad():
        small.layers[1].self_attn.o_proj.weight += 0.1
    with pytest.raises(VerifyError, match="slim and graph"):
        fxslim.benchmark({"slim": small, "graph": graph}, **QUICK)
    with pytest.raises(VerifyError, match="graph and slim"):
        fxslim.benchmark({"graph": graph, "slim": small}, **QUICK)


def test_a_repaired_model_is_compared_with_nothing(bert: BertModel) -> None:
    data = [{"input_ids": torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    small = fxslim.slim(bert, calibration=data, ffn=0.5)
    found = fxslim.benchmark({"dense": bert, "slim": small}, **QUICK)
    assert found.notes == ("slim: its weights were repaired, so that no dense model computes the same",)


def test_half_precision_is_a_copy(bert: BertModel, slim: Any) -> None:
    seen: set[torch.dtype] = set()
    hook = slim.encoder.layer[0].output.dense.register_forward_hook(lambda *given: seen.add(given[2].dtype))
    found = fxslim.benchmark({"dense": bert, "slim": slim}, variants=["eager", "bf16"], **QUICK)
    hook.remove()
    assert seen == {torch.float32, torch.bfloat16}
    eager, half = (point.peak["slim"] for point in found.points)
    assert eager is not None and half is not None and half < eager
    assert [point.variant for point in found.points] == ["eager", "bf16"]
    assert {p.dtype for p in bert.parameters()} == {torch.float32}
    assert found.dtype == {"dense": "float32", "slim": "float32"}


def test_reading_and_writing_are_told_apart() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=D, n_layer=1, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    found = fxslim.benchmark({"dense": model}, batches=[2], lengths=[5], generate=3, max_seconds=0.5)
    (made,) = found.generation
    assert (made.batch, made.prompt, made.tokens) == (2, 5, 3)
    one, four = (made.timing[f"dense {new}"].seconds for new in (1, 4))
    per_second, read = estimate_median(one).inverse(), made.prefill["dense"]
    expected = (2 * 5 * per_second.value, 2 * 5 * per_second.low, 2 * 5 * per_second.high)
    assert (read.value, read.low, read.high) == pytest.approx(expected, rel=1e-12)
    assert made.decode["dense"] == rate(four, one, 2 * 3, made.timing.confidence)
    with pytest.raises(InputError, match="generate="):
        fxslim.benchmark({"dense": nn.Linear(2, 2)}, torch.ones(2, 2), generate=3, **QUICK)


def test_what_is_smaller_than_the_noise_is_not_resolved() -> None:
    one, three = (1.0, 1.3, 1.0, 1.2), (1.1, 1.2, 0.9, 1.1)
    assert math.isnan(rate(three, one, 2, 0.95).value)
    shorter, longer = [1.0] * 9, [1.0 + 0.1 * i for i in range(1, 10)]
    found, differences = rate(longer, shorter, 3, 0.95), estimate_median([b - a for a, b in zip(shorter, longer)])  # noqa: B905
    assert found.value == pytest.approx(3 / differences.value)
    assert (found.low, found.high) == pytest.approx((3 / differences.high, 3 / differences.low))


def test_a_cache_is_used_whatever_the_config_says() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=D, n_layer=1, n_head=4, vocab_size=50, n_positions=32, use_cache=False, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    read: list[int] = []
    model.transformer.h[0].register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    model.generation_config.use_cache = False
    fxslim.benchmark({"dense": model}, lengths=[5], generate=2, check=False, **QUICK)
    assert (5, 1, 1) in {tuple(read[i : i + 3]) for i in range(len(read) - 2)}
    assert set(read) == {1, 5}  # without a cache, a whole prompt and what was written so far: 6 and 7


def test_tables_say_the_same_everywhere(bert: BertModel, slim: Any, tmp_path: Path) -> None:
    found = fxslim.benchmark({"dense": bert, "slim": slim}, batches=[1], lengths=[4], max_seconds=1e-6)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["sizes"]["slim"]["parameters"] == found.sizes["slim"].parameters
    text = found.to_markdown()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| eager")
    ]  # the table of points
    assert [row[3] for row in rows] == ["dense", "slim"]
    assert [row[8] for row in rows] == [f"{found.points[0].macs[name]:,}" for name in ("dense", "slim")]
    for ending, start in ((".json", b"{"), (".md", b"| model"), (".html", b"<!doctype"), (".svg", b"<?xml")):
        assert found.save(tmp_path / f"b{ending}").read_bytes().startswith(start)
    with pytest.raises(InputError, match="is saved as"):
        found.save(tmp_path / "b.xlsx")
    assert "times faster" in str(found)
    assert "time was up" in str(found)  # after one round


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"baseline": "other"}, "baseline='other' is not among"),
        ({"batches": [0]}, r"batches=0"),
        ({"lengths": [2.5]}, r"lengths=2.5"),
        ({"variants": "fp8"}, "is none of eager"),
        ({"variants": "cuda-graph"}, "needs models on CUDA"),
        ({"generate": -1}, "generate=-1"),
    ],
)
def test_what_makes_no_sense_is_refused(bert: BertModel, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fxslim.benchmark({"dense": bert}, **asked)


def test_modes_are_left_as_they_were(bert: BertModel) -> None:
    model = copy.deepcopy(bert).train()
    model.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    fxslim.benchmark({"dense": model}, **QUICK)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_models_without_weights_and_inputs_that_change_are_refused(bert: BertModel) -> None:
    with pytest.raises(InputError, match="on one device, with weights"):
        fxslim.benchmark({"dense": copy.deepcopy(bert).to("meta")}, **QUICK)
    given = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "past_key_values": DynamicCache()}
    with pytest.raises(InputError, match="a DynamicCache may change"):
        fxslim.benchmark({"dense": bert}, given, **QUICK)


def test_inputs_need_not_share_a_batch(bert: BertModel) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.sum() + y.sum()

    given = {"x": torch.ones(2, 3), "y": torch.ones(3, 3)}
    assert fxslim.benchmark({"sum": Sum()}, given, **QUICK).points[0].batch is None
    rows = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "position_ids": torch.arange(5)[None]}
    assert fxslim.benchmark({"dense": bert}, rows, **QUICK).points[0].batch == 2


def test_the_first_inputs_that_a_model_runs_on_are_taken() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=D, d_kv=4, d_ff=F, num_layers=1, num_heads=4, decoder_start_token_id=0)
    assert fxslim.benchmark({"dense": T5Model(config)}, **QUICK).points


def test_what_nobody_compared_is_said(bert: BertModel) -> None:
    found = fxslim.benchmark({"dense": bert, "other": copy.deepcopy(bert)}, **QUICK)
    assert found.notes == ("other: fxslim made it of none of these; what it computes is its own",)


def test_variants_that_cannot_be_had_are_noted(bert: BertModel, slim: Any) -> None:
    plan = slim.fxslim.plan.model_copy(update={"edits": (), "zeroed": ()})
    fast = fxslim.optimize(fxslim.compile(bert, plan=plan))
    found = fxslim.benchmark({"dense": bert, "fast": fast}, variants=["eager", "bf16"], **QUICK)
    assert [sorted(point.macs) for point in found.points] == [["dense", "fast"], ["dense"]]
    assert any(note.startswith("fast, bf16:") for note in found.notes)


def test_no_models_are_refused() -> None:
    with pytest.raises(InputError, match="takes a dict"):
        fxslim.benchmark({})


def test_the_grid_of_latency_times_prepacked_forms_at_few_rows(
    bert: BertModel, slim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "FEW", 4)
    ids = torch.arange(3, 7)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models = {"dense": bert, "module": slim, "prepacked": copy.deepcopy(slim)}
    found = latency.over([(2, 4), (1, 4)], models, inputs, {**QUICK, "variants": ["eager"]})
    assert [(p.batch, p.length, [s.name for s in p.timing.samples]) for p in found.points] == [
        (2, 4, ["dense", "module"]),
        (1, 4, ["dense", "module", "prepacked"]),
    ]
    assert list(found.sizes) == list(models)
    (axes,) = found.plot().axes
    assert [len(bars) for bars in axes.containers if hasattr(bars, "patches")] == [2, 1]
