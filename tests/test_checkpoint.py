"""Checkpoints that are never loaded: planned like the loaded model, and narrowed like it, bit for bit."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import fxslim
from fxslim import hf, outofcore
from fxslim.checkpoint import shards as writing
from fxslim.checkpoint import slim as slimming
from fxslim.checkpoint.files import INDEX, WEIGHTS, Stored
from fxslim.checkpoint.layers import alike
from fxslim.errors import InputError, PlanError, RequestError
from fxslim.harness.memory import _Living
from fxslim.mapped import is_mapped
from fxslim.outofcore import OutOfCore
from fxslim.plan import Plan

from agreement import difference, outputs
from architectures import ARCHITECTURES
from hard import HARD

REQUEST: dict[str, Any] = {"ffn": 0.5, "heads": 0.5}
SMALL = LlamaConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=32, tie_word_embeddings=False,
)  # fmt: skip


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(SMALL).eval()


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def built(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a model and inputs for it."""
    if name == "mixtral":
        return mixtral(), {"input_ids": torch.randint(3, 64, (2, 7))}
    entry: Any = (HARD if name in HARD else ARCHITECTURES)[name]
    return entry.build(torch.float32, "eager"), entry.inputs(3, 7)


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize(
    "name",
    [
        *("bert_classify", "gpt2", "llama_gqa", "mistral", "qwen2", "qwen3", "gemma3", "opt", "phi3_gqa", "t5", "bart"),
        *("bloom", "falcon_new", "mixtral"),
    ],
)
def test_a_checkpoint_becomes_what_the_loaded_model_becomes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outofcore, "LARGE", 256)  # almost every tensor is in a file, and read in several blocks
    monkeypatch.setattr(outofcore, "BLOCK", 512)
    model, inputs = built(name)
    model.save_pretrained(tmp_path / "dense")
    request = REQUEST | ({"experts": 0.25} if name == "mixtral" else {})
    dense = hf.load_dense(tmp_path / "dense").eval()
    plan = fxslim.plan_checkpoint(tmp_path / "dense", **request)
    assert plan == fxslim.plan(dense, **request)
    assert plan.sites
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "small", plan)
    fxslim.save_pretrained(fxslim.slim(dense, plan=plan), tmp_path / "memory")
    assert_same_tensors(load_file(tmp_path / "small" / WEIGHTS), load_file(tmp_path / "memory" / WEIGHTS))
    loaded, other = fxslim.from_pretrained(tmp_path / "small"), fxslim.from_pretrained(tmp_path / "memory")
    assert sorted(map(str, loaded.fxslim.plan.edits)) == sorted(map(str, other.fxslim.plan.edits))
    with fxslim.masked(dense, plan):
        expected = outputs(dense, inputs)
    names = [key for key in expected if "logits" in key]
    found = outputs(loaded.eval(), inputs)
    assert difference({key: expected[key] for key in names}, {key: found[key] for key in names}) < 1e-4
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted(
        path.name for path in (tmp_path / "memory").iterdir()
    )
    made, other_card = ((tmp_path / place / "README.md").read_text(encoding="utf-8") for place in ("small", "memory"))
    tables = [[line for line in text.splitlines() if line.startswith("| `")] for text in (made, other_card)]
    assert tables[0] == tables[1] != []


def test_one_layer_of_every_kind_is_loaded(tmp_path: Path) -> None:
    model = llama()
    plan = fxslim.plan(model, **REQUEST)
    assert alike(model, plan) == {f"model.layers.{i}": "model.layers.0" for i in (1, 2)}
    other = plan.model_copy(update={"sites": tuple(p for p in plan.sites if "layers.1.mlp" not in p.site.name)})
    assert alike(model, other) == {"model.layers.2": "model.layers.0"}
    model.model.layers[2].mlp.act_fn = torch.nn.Tanh()
    assert alike(model, plan) == {"model.layers.1": "model.layers.0"}


class InMemory(_Living):
    """Adds up the tensors that live in memory: no fake ones, and none that are in files."""

    def _add(self, tensor: torch.Tensor) -> None:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and not is_mapped(tensor):
            super()._add(tensor)


def test_a_plan_is_tried_in_less_memory_than_the_largest_tensor_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outofcore, "LARGE", 1 << 16)  # or what is small in a large model adds up
    monkeypatch.setattr(outofcore, "BLOCK", 1 << 21)
    config = LlamaConfig(
        vocab_size=40_000, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=1024, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    plan = fxslim.plan(model, **REQUEST)
    living = InMemory()

    class Counted(OutOfCore):
        def __enter__(self) -> Any:
            living.__enter__()
            return super().__enter__()

        def __exit__(self, *raised: Any) -> None:
            super().__exit__(*raised)
            living.__exit__(*raised)

    monkeypatch.setattr(slimming, "OutOfCore", Counted)
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "small", plan)
    largest = model.lm_head.weight.nbytes
    assert largest > 20_000_000
    assert 0 < living.peak < largest
    assert Plan.from_file(tmp_path / "small" / hf.PLAN_FILE).tried


def test_a_plan_that_knows_its_modules_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = built("llama_gqa")
    model.save_pretrained(tmp_path / "dense")
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "one", ffn=0.5)
    plan = Plan.from_file(tmp_path / "one" / hf.PLAN_FILE)
    assert plan.tried

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a layer was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "other", plan)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "other"))
    assert_same_tensors(one, other)


def test_constants_are_folded_into_biases(tmp_path: Path) -> None:
    model, _ = built("bert_classify")
    for layer in model.bert.encoder.layer:
        with torch.no_grad():
            layer.intermediate.dense.weight[[1, 5]] = 0
    model.save_pretrained(tmp_path / "dense")
    dense = hf.load_dense(tmp_path / "dense")
    plan = fxslim.plan_checkpoint(tmp_path / "dense")
    assert [fold.rows for part in plan for fold in part.folds] == [(1, 5)] * 2
    assert plan == fxslim.plan(dense)
    fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "small")
    small = fxslim.slim(dense)
    assert_same_tensors(fxslim.from_pretrained(tmp_path / "small").state_dict(), small.state_dict())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dense checkpoint in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "dense"
    llama().save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def edited(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Return a plan with its edits, and what the narrowed model holds."""
    small = fxslim.slim(hf.load_dense(sharded), **REQUEST)
    return small.fxslim.plan, small.state_dict()


def test_pieces_of_tensors_make_the_whole(
    sharded: Path, edited: tuple[Plan, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, most = Stored.read, []

    def note(self: Stored, first: int = 0, last: int | None = None) -> torch.Tensor:
        tensor = read(self, first, last)
        most.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(writing, "PIECE", 200)
    monkeypatch.setattr(Stored, "read", note)
    fxslim.slim_checkpoint(sharded, tmp_path / "small", edited[0])
    assert max(most) <= 200
    assert_same_tensors(fxslim.from_pretrained(tmp_path / "small").state_dict(), edited[1])


def test_a_killed_run_goes_on_where_it_was(
    sharded: Path, edited: tuple[Plan, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, expected = edited
    files = len(list(sharded.glob("*.safetensors")))
    child = os.fork()
    if child == 0:
        note = writing._note

        def kill(folder: Path, done: dict[str, str]) -> None:
            note(folder, done)
            if len(done) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        writing._note = kill  # type: ignore[assignment]
        fxslim.slim_checkpoint(sharded, tmp_path / "small", plan)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (tmp_path / "small").exists()
    (staging,) = tmp_path.iterdir()
    done = sorted(staging.glob("*.safetensors"))
    assert len(done) == 3
    raw = bytearray(done[1].read_bytes())
    raw[-1] ^= 1
    done[1].write_bytes(raw)  # what is not what was written is written again
    write, written = writing._write, []
    monkeypatch.setattr(writing, "_write", lambda path, *rest: written.append(path.stem) or write(path, *rest))
    fxslim.slim_checkpoint(sharded, tmp_path / "small", plan)
    assert len(written) == files - 2
    assert done[1].stem in written
    assert_same_tensors(fxslim.from_pretrained(tmp_path / "small").state_dict(), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    index = json.loads((tmp_path / "small" / INDEX).read_text())
    assert index["weight_map"].keys() == expected.keys()


def test_a_full_disk_leaves_what_was_there(
    sharded: Path, edited: tuple[Plan, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    fxslim.slim_checkpoint(sharded, tmp_path / "small", edited[0])
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    other = edited[0].model_copy(update={"requested": {}})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(InputError, match=r"small cannot be written: File too large"):
            fxslim.slim_checkpoint(sharded, tmp_path / "small", other, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before
    with pytest.raises(InputError, match="exists already"):
        fxslim.slim_checkpoint(sharded, tmp_path / "small", edited[0])


def _copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _missing(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def _short(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def _unnamed(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = "model.norm.weight"
    file = folder / index["weight_map"].pop(name)
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    (folder / INDEX).write_text(json.dumps(index))


def _other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))


def _no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()


FAULTS = {
    "missing": (_missing, "lacks model-.*safetensors"),
    "short": (_short, "was cut short"),
    "unnamed": (_unnamed, r"the checkpoint lacks model\.norm\.weight of LlamaForCausalLM"),
    "shape": (_other_shape, "config.json and weights do not belong together"),
    "no weights": (_no_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_whole_is_refused_and_nothing_is_written(fault: str, sharded: Path, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(_copied(sharded, tmp_path / "dense"))
    with pytest.raises(InputError, match=message):
        fxslim.slim_checkpoint(tmp_path / "dense", tmp_path / "small", **REQUEST)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_plans_that_do_not_belong_are_refused(
    sharded: Path, edited: tuple[Plan, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    plan = edited[0]
    repaired = plan.model_copy(update={"weights_changed": True})
    with pytest.raises(PlanError, match="the plan repaired weights"):
        fxslim.slim_checkpoint(sharded, tmp_path / "small", repaired)
    other = plan.model_copy(update={"fingerprint": plan.fingerprint.model_copy(update={"digest": "0"})})
    with pytest.raises(PlanError, match="the plan was made for another model"):
        fxslim.slim_checkpoint(sharded, tmp_path / "small", other)
    with pytest.raises(InputError, match="not both"):
        fxslim.slim_checkpoint(sharded, tmp_path / "small", plan, ffn=0.5)
    with pytest.raises(InputError, match="there is no folder"):
        fxslim.plan_checkpoint(tmp_path / "nowhere", ffn=0.5)
    with pytest.raises(RequestError, match="give calibration="):
        fxslim.plan_checkpoint(sharded, method="obs")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_refused(sharded: Path, tmp_path: Path) -> None:
    folder = _copied(sharded, tmp_path / "dense")
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / index["weight_map"][name])
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / index["weight_map"][name])
    with pytest.raises(InputError, match=rf"{name} holds NaN"):
        fxslim.plan_checkpoint(folder, ffn=0.5)
