"""The command line: what it prints where, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
from fxslim.cli.options import Method, as_target
from fxslim.passes.methods import METHODS

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
        ("compile", "model", "-o", "out", "--method", "guess"),
        ("inspect",),
        ("prune", "model"),
        ("plan", "model", "--max-tokens", "0"),
        ("slim-checkpoint", "model"),
        ("verify", "model"),
        ("export", "model", "-o", "out"),
        ("export", "model", "-o", "out", "--to", "tflite"),
        ("bench", "model", "--batch", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_quiet_prints_nothing_on_stderr(folder: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "fxslim.cli", "inspect", str(folder), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""


COMMANDS = ("inspect", "plan", "compile", "slim-checkpoint", "verify", "export", "bench", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"fxslim {command}" in result.stdout.split("Example")[1]


def test_version() -> None:
    assert run("--version").stdout == f"fxslim {fxslim.__version__}\n"


def test_plain_transformers_loads_what_the_config_can_say(folder: Path, tmp_path: Path) -> None:
    run("compile", folder, "--ffn", 0.5, "-o", tmp_path / "small")
    plain = AutoModel.from_pretrained(tmp_path / "small")
    assert plain.encoder.layer[1].intermediate.dense.weight.shape == (24, 32)


def test_plain_transformers_says_that_the_sizes_differ(folder: Path, tmp_path: Path) -> None:
    run("compile", folder, "--heads", 0.5, "-o", tmp_path / "small")
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


SENTENCES = "a man plays guitar\na guitar plays a man\nman plays a\n\nguitar a man a man plays a guitar\n"


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with half of its channels and a quarter of its heads."""
    out = tmp_path_factory.mktemp("narrowed") / "small"
    fxslim.save_pretrained(fxslim.slim(dense_of(folder), ffn=0.5, heads=0.25), out, tokenizer_from=folder)
    return out


@pytest.fixture(scope="module")
def repaired(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with what is left fitted to sentences."""
    place = tmp_path_factory.mktemp("repaired")
    (place / "text.txt").write_text(SENTENCES)
    text = ("--calibration", place / "text.txt")
    result = run("compile", folder, *text, "--ffn", 0.5, "--method", "wanda", "-o", place / "small", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"]["tokens"] == 4 + 5 + 3 + 8
    return place / "small"


def dense_of(folder: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(folder)


def refused(result: Any, text: str) -> None:
    """Check that a command ended with one line that says why, and without a traceback."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("fxslim: ")
    assert text in last


def test_plan_writes_what_python_plans(folder: Path, tmp_path: Path) -> None:
    result = run("plan", folder, "--ffn", 0.5, "--heads", 0.25, "-o", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'plan.json'}" in result.stdout
    plan = fxslim.Plan.from_json((tmp_path / "plan.json").read_bytes())
    assert plan == fxslim.plan(dense_of(folder), ffn=0.5, heads=0.25)
    assert run("plan", folder, "--ffn", 0.5, "--heads", 0.25, "--json").stdout == (tmp_path / "plan.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_compile_follows_a_plan(folder: Path, tmp_path: Path) -> None:
    own = fxslim.plan(dense_of(folder), ffn=0.25, include="*layer.1*")
    (tmp_path / "plan.json").write_text(own.to_json())
    assert run("compile", folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "small").exit_code == 0
    made: Any = fxslim.from_pretrained(tmp_path / "small")
    assert [layer.intermediate.dense.out_features for layer in made.bert.encoder.layer] == [48, 36]
    assert made.fxslim.plan.sites == own.sites


def test_text_is_tokenized_as_the_model_does_it(folder: Path, tmp_path: Path) -> None:
    from fxslim.cli.texts import batches

    (tmp_path / "text.txt").write_text(SENTENCES)
    (batch,) = batches(str(folder), tmp_path / "text.txt", dense_of(folder).config)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 0, 0, 0, 0], [4, 7, 6, 4, 5, 0, 0, 0],
                                           [5, 6, 4, 0, 0, 0, 0, 0], [7, 4, 5, 4, 5, 6, 4, 7]]  # fmt: skip
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 3, 8]


def test_a_plan_by_text_within_a_target(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(SENTENCES)
    text = ("--calibration", tmp_path / "text.txt", "--max-tokens", 12, "--seed", 3)
    result = run("plan", folder, *text, "--target", "params=0.8", "--uniform", "--json")
    assert result.exit_code == 0, result.output
    plan = fxslim.Plan.from_json(result.stdout)
    kept = {part.site.kind: len(part.keep) for part in plan}
    assert plan.sites and {(part.site.kind, len(part.keep)) for part in plan} == set(kept.items())
    dense = dense_of(folder)
    made: Any = fxslim.slim(dense, plan=plan)
    assert fxslim.count.parameters(made) <= 0.8 * fxslim.count.parameters(dense)


def test_verify_compares_with_the_masked_model(folder: Path, small: Path) -> None:
    result = run("verify", folder, small, "--json")
    assert result.exit_code == 0, result.output
    differences = json.loads(result.stdout)["differences"]
    assert len(differences) > 1
    assert all(d["max_abs"] <= d["tolerance"] and d["scale"] > 0 for d in differences)
    assert "largest difference" in run("verify", folder, small).stdout


def test_verify_fails_on_weights_that_are_not_the_dense_model_s(folder: Path, small: Path, tmp_path: Path) -> None:
    other = dense_of(folder)
    with torch.no_grad():
        other.classifier.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    refused(run("verify", tmp_path / "other", small, "--json"), "masked and narrowed models disagree")


def test_verify_says_why_a_repaired_model_cannot_be_compared(folder: Path, repaired: Path) -> None:
    result = run("verify", folder, repaired)
    refused(result, "was repaired")
    assert f"fxslim bench {repaired} {folder}" in result.stderr


def test_export_writes_what_the_narrowed_model_computes(small: Path, tmp_path: Path) -> None:
    result = run("export", small, "--to", "pt2", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["inputs"]["input_ids"] == ["batch", "sequence"] and data["outputs"] == ["logits"]
    assert data["differences"] and all(d["max_abs"] <= d["tolerance"] for d in data["differences"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    given = dict(tokenizer(["a man plays guitar a man"] * 3, return_tensors="pt", return_token_type_ids=False))
    whole = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        assert torch.allclose(whole(**given)["logits"], fxslim.from_pretrained(small)(**given).logits, atol=1e-6)


def test_bench_times_both_models(folder: Path, small: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    options = ("--batch", 2, "--length", 5, "--seconds", 0.2, "--threads", 1)
    files = [tmp_path / f"bench{ending}" for ending in (".json", ".md", ".png")]
    try:
        result = run("bench", small, folder, *options, "--json", *(part for file in files for part in ("-o", file)))
        alone = run("bench", small, *options, "--length", 7)
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    (point,) = data["points"]
    assert (point["batch"], point["length"], point["variant"]) == (2, 5, "eager")
    dense, narrowed = dense_of(folder), fxslim.from_pretrained(small)
    found = {name: size["parameters"] for name, size in data["sizes"].items()}
    assert found == {"dense": dense.num_parameters(), "narrowed": narrowed.num_parameters()}
    ids = torch.ones(2, 5, dtype=torch.int64)
    assert point["macs"]["narrowed"] == fxslim.count.macs_of(narrowed, input_ids=ids) < point["macs"]["dense"]
    assert [sample["name"] for sample in point["timing"]["samples"]] == ["dense", "narrowed"]
    assert point["timing"]["threads"] == 1
    assert json.loads(files[0].read_text()) == {key: own for key, own in data.items() if key != "models"}
    assert "| eager |" in files[1].read_text() and files[2].read_bytes().startswith(b"\x89PNG")
    assert alone.exit_code == 0 and "the dense model that it was made of is not among those" in alone.stdout
    lengths = [line.split()[2] for line in alone.stdout.splitlines() if line.split()[:1] == ["eager"]]
    assert lengths == ["5", "7"]


def test_bench_refuses_a_name_before_it_measures(small: Path, tmp_path: Path) -> None:
    result = run("bench", small, "-o", tmp_path / "bench.xlsx", "--seconds", 1000)
    assert result.exit_code == 1 and "is saved as .json, .md" in result.stderr


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_a_folder_that_is_not_there(command: str, tmp_path: Path) -> None:
    more = {"verify": [tmp_path / "missing"], "export": ["--to", "pt2"]}.get(command, [])
    out = ["-o", tmp_path / "out"] if command in ("plan", "compile", "slim-checkpoint", "export") else []
    refused(run(command, tmp_path / "missing", *more, *out), f"there is no folder {tmp_path / 'missing'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "not a valid fxslim plan"),
        (b"\xff\xfe garbage", "not a valid fxslim plan"),
        (b"[" * 100_000, "not a valid fxslim plan"),
        (b'{"sites": 3}', "not a valid fxslim plan"),
        (None, "plan.json cannot be read: No such file"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "slim-checkpoint"])
def test_a_plan_that_is_none(command: str, content: bytes | None, text: str, folder: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    refused(run(command, folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out"), text)
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = BertForSequenceClassification(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                     intermediate_size=24, vocab_size=8))  # fmt: skip
    (tmp_path / "plan.json").write_text(fxslim.plan(other, ffn=0.5).to_json())
    refused(run("compile", folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out"), "plan")
    (tmp_path / "repaired.json").write_text(
        fxslim.plan(dense_of(folder), ffn=0.5).model_copy(update={"weights_changed": True}).to_json()
    )
    refused(run("compile", folder, "--plan", tmp_path / "repaired.json", "-o", tmp_path / "out"), "weights")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--target", "flops=0.5"), "--target flops=0.5: give macs=0.5"),
        (("--target", "macs=half"), "'half' is no number"),
        (("--target", "macs=2"), "number between 0 and 1"),
        (("--target", "memory=big"), "400MB"),
        (("--target", "macs=0.5", "--ffn", 0.5), "not both"),
        (("--calibration", "missing.txt", "--ffn", 0.5), "cannot read the text in missing.txt"),
        (("--max-tokens", 5, "--ffn", 0.5), "does nothing without calibration"),
        (("--method", "wanda", "--ffn", 0.5), "calibration"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "compile"])
def test_a_request_that_means_nothing(
    command: str, options: tuple[object, ...], text: str, folder: Path, tmp_path: Path
) -> None:
    refused(run(command, folder, *options, "-o", tmp_path / "out"), text)
    assert list(tmp_path.iterdir()) == []


def test_text_that_says_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a man\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(run("plan", folder, "--ffn", 0.5, "--calibration", tmp_path / "one.txt"), "two sequences at least")
    refused(run("plan", folder, "--ffn", 0.5, "--calibration", tmp_path / "bytes.txt"), "cannot read the text")
    bare = tmp_path / "bare"
    dense_of(folder).save_pretrained(bare)
    (tmp_path / "two.txt").write_text("a man\na guitar\n")
    result = run("plan", bare, "--ffn", 0.5, "--calibration", tmp_path / "two.txt")
    refused(result, f"the tokenizer of {bare} knows no word of")  # transformers makes an empty one


def test_nothing_is_replaced_unasked(folder: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    refused(run("plan", folder, "--ffn", 0.5, "-o", tmp_path / "plan.json"), "exists already")
    assert (tmp_path / "plan.json").read_text() == "mine"
    assert run("plan", folder, "--ffn", 0.5, "-o", tmp_path / "plan.json", "--force", "--json").exit_code == 0
    assert fxslim.Plan.from_json((tmp_path / "plan.json").read_bytes()).sites
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(run("export", small, "--to", "pt2", "-o", tmp_path / "out"), "exists already")
    refused(run("export", small, "--to", "pt2", "-o", tmp_path / "out", "--force"), "is no checkpoint")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written(folder: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "out"  # refused to everybody, root included
    said = f"{tmp_path / 'file'} is no folder that can be written to"
    refused(run("plan", folder, "--ffn", 0.5, "-o", below), said)
    refused(run("plan", folder, "--ffn", 0.5, "-o", tmp_path), "is a folder; choose a file")
    refused(run("compile", folder, "--ffn", 0.5, "-o", below), said)
    refused(run("export", small, "--to", "pt2", "-o", below), said)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_is_exit_code_130_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """Stopped while it writes: the draft is there, and goes."""
    out = tmp_path / "small"
    slow = (
        "import signal, time, transformers\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell runs behind itself
        "def save(self, folder, **options): (folder / 'half').write_text(''); time.sleep(600)\n"
        "transformers.PreTrainedModel.save_pretrained = save\n"
        "from fxslim.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", slow, "compile", str(folder), "--ffn", "0.5", "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".small.*/half")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.strip().splitlines()[-1] == "fxslim: interrupted; what was there is as it was"
    assert list(tmp_path.iterdir()) == []


def test_completion_knows_the_commands() -> None:
    environment = os.environ | {"_FXSLIM_COMPLETE": "complete_bash", "COMP_WORDS": "fxslim sl", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from fxslim.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["slim-checkpoint"]
    assert "--install-completion" in run("--help").stdout


def test_targets_are_those_of_python() -> None:
    assert as_target("macs=0.5") == fxslim.macs(0.5)
    assert as_target("params=0.25") == fxslim.params(0.25)
    assert as_target("memory=1.5GiB") == fxslim.memory("1.5GiB")
    assert as_target("speedup=2") == fxslim.speedup(2.0)


def test_every_method_can_be_asked_for() -> None:
    assert {method.value for method in Method} == set(METHODS)


def test_slim_checkpoint_passes_on_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fxslim, "slim_checkpoint", lambda *given, **options: calls.append((*given, options)))
    plan = fxslim.plan(dense_of(folder), ffn=0.5)
    (tmp_path / "plan.json").write_text(plan.to_json())
    out = tmp_path / "out"
    result = run("slim-checkpoint", folder, "--plan", tmp_path / "plan.json", "-o", out, "--force", "--quiet", "--json")
    assert json.loads(result.stdout)["output"] == str(out)
    assert run("slim-checkpoint", folder, "--ffn", 0.5, "--skip", "*layer.0*", "-o", out).exit_code == 0
    assert calls == [
        (str(folder), out, plan, {"progress": False, "force": True}),
        (str(folder), out, None, {"progress": True, "force": False, "ffn": 0.5, "skip": ["*layer.0*"]}),
    ]
