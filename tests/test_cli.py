"""The command line: what it prints where, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner

import fxslim
from fxslim.cli import app

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "plays", "guitar")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT classifier with a word-level tokenizer, as transformers writes them."""
    path = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(path)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_prints_a_table(folder: Path) -> None:
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "bert.encoder.layer.1" in result.stdout
    assert "attention" in result.stdout


def test_inspect_as_json(folder: Path) -> None:
    result = run("inspect", folder, "--json")
    data = json.loads(result.stdout)
    assert data["class"] == "BertForSequenceClassification"
    assert [(site["kind"], site["units"]) for site in data["sites"]].count(("attention", 4)) == 2
    assert [(site["kind"], site["units"]) for site in data["sites"]].count(("ffn", 48)) == 2


def test_inspect_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert run("inspect", tmp_path, "--json").stdout.replace(str(tmp_path), "") == run(
        "inspect", folder, "--json"
    ).stdout.replace(str(folder), "")


def test_compile_writes_a_narrowed_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = run("compile", folder, "--ffn", 0.5, "--heads", 0.25, "-o", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.stdout
    small: Any = fxslim.from_pretrained(out)
    assert type(small) is BertForSequenceClassification
    assert small.bert.encoder.layer[0].intermediate.dense.weight.shape == (24, 32)
    assert small.bert.encoder.layer[0].attention.self.query.weight.shape == (24, 32)
    tokens = PreTrainedTokenizerFast.from_pretrained(out)("a man plays guitar", return_tensors="pt")
    assert small(tokens["input_ids"]).logits.shape == (1, 2)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "fxslim_plan.json", "tokenizer.json"} <= names


def test_compile_as_json_prints_nothing_else(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fxslim.cli",
        "compile",
        str(folder),
        "--ffn",
        "0.5",
        "-o",
        str(tmp_path / "s"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    data = json.loads(done.stdout)
    assert data["class"] == "BertForSequenceClassification"
    assert data["report"]["parameters_after"] < data["report"]["parameters_before"]


def test_compile_takes_every_request(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    options = ("--ffn", 0.5, "--round-to", 16, "--skip", "*layer.0*", "--include", "*encoder*", "--dtype", "bfloat16")
    result = run("compile", folder, *options, "-o", out, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    small: Any = fxslim.from_pretrained(out)
    assert small.dtype == torch.bfloat16
    widths = [layer.intermediate.dense.out_features for layer in small.bert.encoder.layer]
    assert widths == [48, 32]


def test_compile_without_a_request_takes_out_what_is_zero(folder: Path, tmp_path: Path) -> None:
    dense: Any = BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        dense.bert.encoder.layer[0].output.dense.weight[:, :10] = 0
    dense.save_pretrained(tmp_path / "masked")
    assert run("compile", tmp_path / "masked", "-o", tmp_path / "small").exit_code == 0
    small: Any = fxslim.from_pretrained(tmp_path / "small")
    assert [layer.intermediate.dense.out_features for layer in small.bert.encoder.layer] == [38, 48]


def test_compile_refuses_an_existing_folder_unless_forced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run("compile", folder, "--ffn", 0.5, "-o", out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused = run("compile", folder, "--ffn", 0.25, "-o", out)
    assert refused.exit_code == 1
    assert "exists already" in refused.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("compile", folder, "--ffn", 0.25, "-o", out, "--force").exit_code == 0
    assert fxslim.from_pretrained(out).bert.encoder.layer[0].intermediate.dense.out_features == 36


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--ffn", 1.0), "asks for every unit"),
        (("--skip", "nothing.like.this"), "nothing.like.this"),
    ],
)
def test_what_fxslim_refuses_is_one_line_and_exit_code_1(
    folder: Path, tmp_path: Path, arguments: tuple[object, ...], text: str
) -> None:
    result = run("compile", folder, "--heads", 0.25, *arguments, "-o", tmp_path / "small", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("fxslim: ")
    assert text in last
    assert not (tmp_path / "small").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "missing")
    assert result.exit_code == 1
    assert f"there is no folder {tmp_path / 'missing'}" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile", "model"),
        ("compile", "model", "-o", "out", "--ffn", "1.5"),
        ("compile", "model", "-o", "out", "--dtype", "int8"),
        ("compile", "model", "-o", "out", "--round-to", "0"),
        ("inspect",),
        ("prune", "model"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_quiet_prints_nothing_on_stderr(folder: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "fxslim.cli", "inspect", str(folder), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["inspect", "compile", "demo"])
def test_help_shows_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"fxslim {command}" in result.stdout.split("Example")[1]


def test_version() -> None:
    assert run("--version").stdout == f"fxslim {fxslim.__version__}\n"


def test_plain_transformers_says_that_the_sizes_differ(folder: Path, tmp_path: Path) -> None:
    run("compile", folder, "--ffn", 0.5, "-o", tmp_path / "small")
    with pytest.raises(RuntimeError, match="size"):
        AutoModel.from_pretrained(tmp_path / "small")


def test_every_request_reaches_the_model(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """No option that does nothing: what is typed is what `slim` is asked for."""
    asked: dict[str, Any] = {}

    def slim(model: Any, **request: Any) -> Any:
        asked.update(request)
        raise fxslim.errors.RequestError("enough")

    monkeypatch.setattr(fxslim, "slim", slim)
    given = {"ffn": 0.5, "heads": 0.25, "kv-groups": 0.125, "experts": 0.75, "value": 0.375, "round-to": 8}
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert run("compile", folder, *options, "-o", tmp_path / "out").exit_code == 1
    assert {name.replace("-", "_"): value for name, value in given.items()}.items() <= asked.items()
