"""What goes wrong with files: nothing is half written, and what cannot be read is said in a line."""

from __future__ import annotations

import ast
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import modeling_utils

import fxslim
from fxslim.errors import FxslimError, InputError, PlanError, StorageError, UnsupportedModelError
from fxslim.hf import load, save
from fxslim.plan import Plan

from architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
BERT = ARCHITECTURES["bert_classify"]


@pytest.fixture(scope="module")
def small() -> Any:
    return fxslim.slim(BERT.build(torch.float32, "sdpa"), ffn=0.5, heads=0.25)


@pytest.fixture(scope="module")
def saved(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fxslim.save_pretrained(small, tmp_path_factory.mktemp("saved") / "small", max_shard_size="20KB")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of a saved folder, to be spoiled."""
    copied = tmp_path / "small"
    copied.mkdir()
    for path in saved.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**BERT.inputs()).logits
    return found


# Writing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_old_folder(
    small: Any, folder: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)

    def full(tensors: dict[str, Any], path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(StorageError, match=r"small cannot be written: .*No space left"):
        fxslim.save_pretrained(small, folder, force=True)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_a_folder_that_cannot_be_written_to(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StorageError, match="Permission denied"):
        fxslim.save_pretrained(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_writer_that_another_overtakes_leaves_one_whole_folder(
    small: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in one thread: transformers patches a class of its own while it loads."""
    other: Any = fxslim.slim(BERT.build(torch.float32, "sdpa"), ffn=0.25)
    check, seen = save.check_saved, []

    def overtaken(model: Any, staging: Path) -> None:
        check(model, staging)
        if model is small:
            fxslim.save_pretrained(other, folder, force=True)
            seen.append(logits(fxslim.from_pretrained(folder)))

    monkeypatch.setattr(save, "check_saved", overtaken)
    fxslim.save_pretrained(small, folder, force=True)
    assert torch.equal(seen[0], logits(other))
    assert torch.equal(logits(fxslim.from_pretrained(folder)), logits(small))
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_a_model_with_shards(small: Any, saved: Path) -> None:
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(fxslim.from_pretrained(saved)), logits(small))


# Reading ------------------------------------------------------------------------------------------------------------


def test_a_missing_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(StorageError, match=r"cannot be read: .*model-00002-of"):
        fxslim.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 5, 5000])
def test_a_shard_that_was_cut_short(folder: Path, length: int) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StorageError, match="missing or cut short"):
        fxslim.from_pretrained(folder)


def test_a_download_that_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("Connection reset while fetching fxslim_plan.json")

    monkeypatch.setattr(load, "cached_file", broken)
    with pytest.raises(FxslimError, match=r"cannot fetch someone/small: Connection reset"):
        fxslim.from_pretrained("someone/small")


def test_another_plan_in_the_config_is_refused(folder: Path) -> None:
    plan = Plan.from_json((folder / "fxslim_plan.json").read_bytes())
    (folder / "fxslim_plan.json").write_text(plan.model_copy(update={"sites": plan.sites[:1]}).to_json())
    with pytest.raises(PlanError, match="holds two plans"):
        fxslim.from_pretrained(folder)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "load the model, then quantize it"),
        ({"ignore_mismatched_sizes": True}, "the plan says every size"),
        ({"state_dict": {}}, "weights are read from the folder"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(saved: Path, given: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        fxslim.from_pretrained(saved, **given)


def test_what_was_quantized_afterwards_is_refused(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "hqq"},', 1))
    with pytest.raises(UnsupportedModelError, match="was quantized after it was narrowed"):
        fxslim.from_pretrained(folder)


def test_a_repaired_model_is_never_made_of_dense_weights(tmp_path: Path) -> None:
    dense = BERT.build(torch.float32, "sdpa")
    batches = [BERT.inputs(4, 9, seed) for seed in range(3)]
    small: Any = fxslim.slim(dense, calibration=batches, ffn=0.5)
    assert small.fxslim.plan.weights_changed
    folder = fxslim.save_pretrained(small, tmp_path / "small")
    assert torch.equal(logits(fxslim.from_pretrained(folder)), logits(small))
    dense.save_pretrained(tmp_path / "dense")
    (folder / "model.safetensors").write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    with pytest.raises(PlanError, match="The plan repaired weights: those of the dense model cannot stand in"):
        fxslim.from_pretrained(folder)
    with pytest.raises(PlanError, match="repaired"):
        fxslim.slim(dense, plan=small.fxslim.plan)


# The ways in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}},
        {"low_cpu_mem_usage": True, "torch_dtype": torch.float32},
    ],
    ids=["cpu", "auto", "disk", "low memory"],
)
def test_the_ways_in_of_transformers(small: Any, saved: Path, given: dict[str, Any], tmp_path: Path) -> None:
    where = {"offload_folder": tmp_path} if isinstance(given.get("device_map"), dict) else {}
    loaded = fxslim.from_pretrained(saved, **given, **where)
    assert torch.equal(logits(loaded), logits(small))
    if where:
        assert loaded.bert.encoder.layer[0].output.dense.weight.device.type == "meta"  # it is on disk


def test_a_subfolder(small: Any, folder: Path) -> None:
    assert torch.equal(logits(fxslim.from_pretrained(folder.parent, subfolder="small")), logits(small))


def test_its_own_save_pretrained_is_enough(small: Any, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    assert not (tmp_path / "fxslim_plan.json").exists()
    loaded: Any = fxslim.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(small))
    assert loaded.fxslim.plan == small.fxslim.plan


CODE = """
from transformers import BertModel

class OwnBert(BertModel):
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None):
        found = super().forward(input_ids, attention_mask, token_type_ids)
        found.last_hidden_state = found.last_hidden_state * 2
        return found
"""


def test_code_of_its_own_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    dense = ARCHITECTURES["bert"].build(torch.float32, "sdpa")
    dense.config.auto_map = {"AutoModel": "modeling_own.OwnBert"}
    dense.save_pretrained(tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"OwnBert"'))
    (tmp_path / "dense" / "modeling_own.py").write_text(CODE)
    own = AutoModel.from_pretrained(tmp_path / "dense", trust_remote_code=True).eval()
    assert type(own).__name__ == "OwnBert"
    small: Any = fxslim.slim(own, heads=0.25)
    folder = fxslim.save_pretrained(small, tmp_path / "small")
    with pytest.raises(UnsupportedModelError, match="pass trust_remote_code=True if you trust it"):
        fxslim.from_pretrained(folder)
    loaded = fxslim.from_pretrained(folder, trust_remote_code=True)
    inputs = BERT.inputs()
    assert torch.equal(loaded(**inputs).last_hidden_state, small(**inputs).last_hidden_state)


# The hub ------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_what_is_saved(small: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    pushed: dict[str, bytes] = {}

    def create(self: Any, repo_id: str, **given: Any) -> Any:
        calls.append((repo_id, given))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload(self: Any, *, repo_id: str, folder_path: Path, **given: Any) -> str:
        calls.append((repo_id, given))
        pushed.update(contents(folder_path))
        return "done"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert fxslim.push_to_hub(small, "tiny", private=True, max_shard_size="20KB") == "done"
    assert calls == [
        ("tiny", {"private": True, "exist_ok": True}),
        ("me/tiny", {"commit_message": "Upload a model narrowed by fxslim", "create_pr": False}),
    ]
    assert pushed == contents(saved)


def test_a_hub_that_refuses(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(StorageError, match="cannot upload to me/tiny: 401 Unauthorized"):
        fxslim.push_to_hub(small, "me/tiny")
    assert issubclass(HfHubHTTPError, OSError)
    with pytest.raises(InputError, match="takes what"):
        fxslim.push_to_hub(BERT.build(), "me/tiny")


# Nothing is pickled ---------------------------------------------------------------------------------------------------


def test_nothing_is_pickled() -> None:
    forbidden = {("torch", "save"), ("torch", "load")}
    for path in (*(ROOT / "fxslim").rglob("*.py"), *(ROOT / "passes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in forbidden, f"{path}:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & {name.split(".")[0] for name in names}
