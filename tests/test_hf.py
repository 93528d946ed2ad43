"""Narrowed models on disk: what is saved loads back as what it was, or is refused."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, PreTrainedModel

import fxslim
from fxslim import hf
from fxslim.cli.loading import load
from fxslim.cli.options import Dtype
from fxslim.errors import InputError, PlanError, UnsupportedModelError, VerifyError
from fxslim.hf import save

from architectures import ARCHITECTURES
from hard import HARD

REQUEST: dict[str, Any] = {"ffn": 0.5, "heads": 0.25}


@functools.cache
def narrowed(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a narrowed model, which no test changes."""
    return fxslim.slim(ARCHITECTURES[name].build(dtype, "sdpa"), **REQUEST)


def assert_same(small: PreTrainedModel, loaded: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Compare class, tensors, ties and outputs, bit for bit."""
    assert type(loaded) is type(small)
    theirs, ours = dict(loaded.named_parameters()), dict(small.named_parameters())
    assert theirs.keys() == ours.keys()  # tied weights appear once
    theirs, ours = theirs | dict(loaded.named_buffers()), ours | dict(small.named_buffers())
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert theirs[name].device == tensor.device, name
        assert torch.equal(theirs[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], small(**inputs)[0])


@pytest.mark.parametrize("name", ["bert_mlm", "gpt2", "llama_gqa", "phi3_gqa", "bart", "vit_classify"])
def test_a_saved_model_loads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    small = narrowed(name)
    fxslim.save_pretrained(small, tmp_path / "small")
    loaded = fxslim.from_pretrained(tmp_path / "small")
    assert_same(small, loaded, ARCHITECTURES[name].inputs(dtype=torch.float32))
    assert loaded.fxslim.plan == small.fxslim.plan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    small = narrowed("bert_classify", dtype)
    fxslim.save_pretrained(small, tmp_path / "small")
    assert_same(small, fxslim.from_pretrained(tmp_path / "small"), ARCHITECTURES["bert_classify"].inputs())


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    small = narrowed("gpt2")
    fxslim.save_pretrained(small, tmp_path / "small")
    assert "lm_head.weight" not in load_file(tmp_path / "small" / "model.safetensors")
    loaded: Any = fxslim.from_pretrained(tmp_path / "small")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_saving_leaves_every_module_in_its_mode(tmp_path: Path) -> None:
    small = narrowed("bert_classify").train()
    small.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in small.named_modules()}
    fxslim.save_pretrained(small, tmp_path / "small")
    assert {name: module.training for name, module in small.named_modules()} == modes


def test_a_loaded_model_generates_the_same_tokens(tmp_path: Path) -> None:
    small = narrowed("llama_gqa")
    fxslim.save_pretrained(small, tmp_path / "small")
    loaded: Any = fxslim.from_pretrained(tmp_path / "small")
    prompt = ARCHITECTURES["llama_gqa"].inputs(batch=1)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**prompt, **options), small.generate(**prompt, **options))


def test_arguments_of_transformers_are_passed_on(tmp_path: Path) -> None:
    fxslim.save_pretrained(narrowed("bert_mlm"), tmp_path / "small")
    loaded = fxslim.from_pretrained(tmp_path / "small", dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"


def test_a_loaded_model_can_be_saved_again(tmp_path: Path) -> None:
    small = narrowed("gpt2")
    fxslim.save_pretrained(small, tmp_path / "one")
    fxslim.save_pretrained(fxslim.from_pretrained(tmp_path / "one"), tmp_path / "two")
    assert_same(small, fxslim.from_pretrained(tmp_path / "two"), ARCHITECTURES["gpt2"].inputs())


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    small = narrowed("bert_mlm")
    fxslim.save_pretrained(small, tmp_path / "small")
    (tmp_path / "small" / "model.safetensors").unlink()
    small.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    assert_same(small, fxslim.from_pretrained(tmp_path / "small"), ARCHITECTURES["bert_mlm"].inputs())


def test_tokenizer_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "spiece.model", "preprocessor_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    for name in ("pytorch_model.bin", "config.json", "training_args.bin"):
        (source / name).write_text("not this")
    fxslim.save_pretrained(narrowed("bert_mlm"), tmp_path / "small", tokenizer_from=source)
    assert (tmp_path / "small" / "spiece.model").read_text() == "spiece.model"
    written = {path.name for path in (tmp_path / "small").iterdir()}
    assert written == {
        "tokenizer.json",
        "vocab.txt",
        "spiece.model",
        "preprocessor_config.json",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "README.md",
        hf.PLAN_FILE,
    }


def test_a_failure_in_the_middle_leaves_the_old_folder_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "small"
    fxslim.save_pretrained(narrowed("bert_mlm"), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = narrowed("gpt2")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(save, "check_saved", fail)
    with pytest.raises(OSError, match="disk full"):
        fxslim.save_pretrained(other, folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_what_was_written_wrongly_is_never_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = narrowed("bert_mlm")
    written = PreTrainedModel.save_pretrained

    def corrupt(self: PreTrainedModel, folder: Path) -> None:
        written(self, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["bert.encoder.layer.1.output.dense.weight"][0, 0] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", corrupt)
    with pytest.raises(VerifyError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight"):
        fxslim.save_pretrained(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    small = narrowed("bert_mlm")
    fxslim.save_pretrained(small, tmp_path / "small")
    with pytest.raises(InputError, match="exists already"):
        fxslim.save_pretrained(small, tmp_path / "small")
    fxslim.save_pretrained(small, tmp_path / "small", force=True)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes what fxslim\.slim returns.*not BertForMaskedLM without a plan"):
        fxslim.save_pretrained(ARCHITECTURES["bert_mlm"].build(), tmp_path / "small")


def test_a_model_that_is_not_of_transformers_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    small = fxslim.slim(model, torch.randn(2, 4), ffn=0.5)
    with pytest.raises(InputError, match=r"not Sequential; save the state_dict and the plan's to_json\(\)"):
        fxslim.save_pretrained(small, tmp_path / "small")


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    ARCHITECTURES["bert_mlm"].build().save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"holds no fxslim_plan\.json"):
        fxslim.from_pretrained(tmp_path / "dense")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for read in (fxslim.from_pretrained, hf.load_dense, hf.skeleton):
        with pytest.raises(InputError, match=r"there is no folder .*nothing-here"):
            read(tmp_path / "nothing-here")


def test_a_hub_name_that_cannot_be_fetched_is_refused() -> None:
    with pytest.raises(InputError, match="nobody/nothing cannot be read as a model"):
        hf.load_dense("nobody/nothing")
    with pytest.raises(InputError, match="nobody/nothing"):
        fxslim.from_pretrained("nobody/nothing")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a model"):
        hf.load_dense(tmp_path)


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    fxslim.save_pretrained(narrowed("bert_mlm"), tmp_path / "bert")
    fxslim.save_pretrained(narrowed("gpt2"), tmp_path / "gpt2")
    (tmp_path / "bert" / hf.PLAN_FILE).write_bytes((tmp_path / "gpt2" / hf.PLAN_FILE).read_bytes())
    with pytest.raises(PlanError):
        fxslim.from_pretrained(tmp_path / "bert")


def test_weights_that_do_not_fit_the_plan_are_refused(tmp_path: Path) -> None:
    fxslim.save_pretrained(narrowed("bert_mlm"), tmp_path / "small")
    ARCHITECTURES["bert_mlm"].build(torch.float32).save_pretrained(tmp_path / "dense")
    weights = (tmp_path / "dense" / "model.safetensors").read_bytes()
    (tmp_path / "small" / "model.safetensors").write_bytes(weights)
    with pytest.raises(PlanError, match=r"the weights in .*small do not fit its plan"):
        fxslim.from_pretrained(tmp_path / "small")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    fxslim.save_pretrained(narrowed("bert_mlm"), tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"missing or unknown \['bert\.embeddings\.word_embeddings\.weight'"):
        fxslim.from_pretrained(tmp_path / "small")


def test_the_class_is_the_one_that_the_config_names(tmp_path: Path) -> None:
    ARCHITECTURES["bert_classify"].build().save_pretrained(tmp_path / "dense")
    assert type(hf.load_dense(tmp_path / "dense")).__name__ == "BertForSequenceClassification"
    assert hf.load_dense(tmp_path / "dense", dtype="bfloat16").dtype == torch.bfloat16
    skeleton = hf.skeleton(tmp_path / "dense")
    assert type(skeleton).__name__ == "BertForSequenceClassification"
    assert {tensor.device.type for tensor in skeleton.parameters()} == {"meta"}
    assert hf.model_class(BertConfig()).__name__ == "BertModel"


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"asks for BertForMindReading, which transformers .* not have"):
        hf.model_class(BertConfig(architectures=["BertForMindReading"]))


def test_a_narrowed_folder_is_no_dense_model(tmp_path: Path) -> None:
    fxslim.save_pretrained(narrowed("bert_mlm"), tmp_path / "small")
    with pytest.raises(InputError, match=r"small is narrowed already; load it with fxslim\.from_pretrained"):
        hf.load_dense(tmp_path / "small")


def test_a_plan_in_the_config_alone_is_found(tmp_path: Path) -> None:
    small = narrowed("bert_mlm")
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"small is narrowed already; load it with fxslim\.from_pretrained"):
        hf.dense_config(tmp_path / "small")
    assert load(str(tmp_path / "small"), Dtype.auto).fxslim.plan == small.fxslim.plan


def test_the_plan_is_written_as_json(tmp_path: Path) -> None:
    small = narrowed("bert_mlm")
    fxslim.save_pretrained(small, tmp_path / "small")
    text = (tmp_path / "small" / hf.PLAN_FILE).read_text()
    assert json.loads(text)
    assert fxslim.Plan.from_json(text) == small.fxslim.plan


def test_what_the_class_keeps_in_float32_is_saved_and_loaded_in_float32(tmp_path: Path) -> None:
    """T5 in half precision has ``wo`` in float32, and so has what ``from_pretrained`` makes of it."""
    dense: Any = HARD["t5"].build(torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    dense = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.float16).eval()
    assert dense.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    small: Any = fxslim.slim(dense, ffn=0.5, heads=0.5)
    folder = fxslim.save_pretrained(small, tmp_path / "small")
    again = fxslim.from_pretrained(folder)
    expected, found = small.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert {own.dtype for own in found.values()} == {torch.float16, torch.float32}
    for name, own in expected.items():
        assert found[name].dtype == own.dtype and torch.equal(found[name], own), name
    inputs = HARD["t5"].inputs()
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, again(**inputs).logits)


def test_a_cast_model_is_saved_though_its_class_keeps_parts_in_float32(tmp_path: Path) -> None:
    small: Any = fxslim.slim(HARD["t5"].build(torch.float32), ffn=0.5).half()
    assert {own.dtype for own in small.parameters()} == {torch.float16}
    again = fxslim.from_pretrained(fxslim.save_pretrained(small, tmp_path / "small"), dtype=torch.float16)
    found = again.state_dict()
    assert all(torch.equal(found[name].to(own.dtype), own) for name, own in small.state_dict().items())


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    """Refusal: ``from_pretrained`` reads norms in the model's dtype, so nothing would load back as it was."""
    mixed: Any = fxslim.slim(ARCHITECTURES["bert_classify"].build(torch.float32), ffn=0.5).bfloat16()
    for name, parameter in mixed.named_parameters():
        if "LayerNorm" in name:
            parameter.data = parameter.data.float() + 1e-4
    folder = tmp_path / "mixed"
    with pytest.raises(InputError, match=r"^the model mixes torch\.bfloat16, torch\.float32, which from_pretrained"):
        fxslim.save_pretrained(mixed, folder)
    assert not folder.exists()
    fxslim.save_pretrained(mixed.float(), folder)
    assert folder.is_dir()


def test_every_module_of_a_sentence_encoder_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, copy = tmp_path / "outer" / "source", tmp_path / "copy"
    for name in ("2_Dense/model.safetensors", "2_Dense/deep/x.bin", "other/weights.bin", "../secret/key"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    paths = ["", "2_Dense", "../secret", str(tmp_path / "outer" / "secret"), "*", 3, None]
    (source / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    copy.mkdir()
    hf.copy_beside(source, copy)
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()) == [
        "2_Dense/deep/x.bin", "2_Dense/model.safetensors", "modules.json"
    ]  # fmt: skip
    assert not (tmp_path / "secret").exists()


def test_loading_info_is_refused_with_a_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not take output_loading_info=: weights that are missing or unknown"):
        fxslim.from_pretrained(tmp_path, output_loading_info=True)


def test_weights_that_are_elsewhere_are_not_saved(tmp_path: Path) -> None:
    small = copy.deepcopy(narrowed("bert_mlm")).to("meta")
    with pytest.raises(InputError, match=r"weights are on meta.*slim_checkpoint"):
        fxslim.save_pretrained(small, tmp_path / "small")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["/gone/away", "gone/far/away", "gone away"])
def test_a_tokenizer_that_is_nowhere_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = narrowed("bert_mlm")
    monkeypatch.setattr(type(small), "save_pretrained", None)
    with pytest.raises(InputError, match="gone"):
        fxslim.save_pretrained(small, tmp_path / "small", tokenizer_from=name)
    assert not any(tmp_path.iterdir())
