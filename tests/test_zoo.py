"""A fixed, quick part of the zoo, and the harness that runs all of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo import check, pool, table
from benchmarks.zoo.__main__ import main
from benchmarks.zoo.cases import CASES, Case, inputs_of, outputs, read_cases, variants
from benchmarks.zoo.check import Form, Row, distance, run
from benchmarks.zoo.disturb import Oracle

from battery import quiet

QUICK = """
AlignTextModel CLIPTextModel ClvpForCausalLM CpmAntForCausalLM DecisionTransformerModel DistilBertModel
GPT2LMHeadModel LlamaForCausalLM MLCDVisionModel MPNetForSequenceClassification MT5EncoderModel Ministral3Model
MistralModel MobileNetV1Model ModernBertDecoderModel MoshiModel MptModel MraModel MvpForCausalLM NemotronModel
NystromformerModel Olmo2Model OpenAIGPTModel Owlv2VisionModel PatchTSMixerModel PixioModel ResNetModel RoFormerModel
RobertaForCausalLM SeedOssForCausalLM Siglip2TextModel SplinterModel StableLmModel T5EncoderModel TextNetBackbone
UMT5EncoderModel ViTModel VideoMAEModel VitPoseBackbone XCLIPTextModel XGLMForCausalLM XLMRobertaXLForMaskedLM
XLMWithLMHeadModel YolosModel
"""
"""Classes, one of each family, that take a few seconds each."""

KNOWN: dict[str, str] = {}
"""Class -> why it does not pass today."""


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def case_of(model: str) -> Case:
    return next(case for case in read_cases() if case.model == model)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=KNOWN[name])] if name in KNOWN else [])
        for name in QUICK.split()
    ],
)
def test_a_case_passes_in_both_forms(model: str) -> None:
    row = run(case_of(model))
    assert row.failure() == ""
    assert row.passes("slim") and row.passes("compile")
    assert (row.slim.compared[0], row.compile.compared[0]) == ("as traced", "as traced")
    assert row.slim.narrowed == row.compile.narrowed == row.found
    assert sum(row.sites.values()) > 0


# The oracle ---------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A feed-forward with a residual, a shared value projection, and a 1x1 convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)
        self.wide, self.narrow = nn.Conv1d(4, 5, 1), nn.Conv1d(5, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.down(self.up(x).relu()))
        return x + self.narrow(self.wide(x.mT).tanh()).mT


def test_the_oracle_tells_hidden_channels_from_the_residual_stream() -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    oracle = Oracle(model, {"x": torch.randn(2, 3, 4, dtype=torch.float64)})
    found = {path: oracle.probe(path) for path in oracle.called}
    assert {path: probe.prunable for path, probe in found.items()} == {
        "up": True, "down": False, "wide": True, "narrow": False,
    }  # fmt: skip
    assert (found["up"].consumer, found["up"].columns) == ("down", (0,))
    assert (found["wide"].consumer, found["wide"].columns) == ("narrow", (0,))


def test_a_channel_that_escapes_is_not_prunable() -> None:
    class Escapes(Small):
        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.up(x).relu()
            return self.down(hidden), hidden.sum()

    torch.manual_seed(0)
    oracle = Oracle(Escapes().double().eval(), {"x": torch.randn(2, 3, 4, dtype=torch.float64)})
    assert not oracle.probe("up").prunable


# What counts as passed ----------------------------------------------------------------------------------------------


def passed() -> Row:
    return Row("a", "A", slim=Form("exact"), compile=Form("exact"), survives="yes")


def test_a_row_passes_only_if_everything_holds() -> None:
    assert passed().passes("slim") and passed().passes("compile") and passed().failure() == ""
    for broken in (
        replace(passed(), error="took more than 60 s"),
        replace(passed(), silent=["x"]),
        replace(passed(), unexplained=["x -> 1 inputs of y"]),
    ):
        assert not broken.passes("slim") and not broken.passes("compile") and broken.failure()
    for broken in (replace(passed(), generates="differs: x"), replace(passed(), survives="shapes differ")):
        assert not broken.passes("slim") and broken.passes("compile") and broken.failure()
    stays = replace(passed(), slim=Form("in place", "2 of 4 sites"))
    assert not stays.passes("slim") and stays.passes("slim", in_place=True) and stays.passes("compile")
    for outcome in ("wrong", "nothing", "refused", "crash", "not run"):
        assert not replace(passed(), slim=Form(outcome)).passes("slim", in_place=True)


def test_the_plot_shows_parts_of_what_was_counted() -> None:
    pytest.importorskip("matplotlib")
    counted = {"cases": 4, "prunable": 10, "narrowed": {"slim": 3, "compile": 4},
               "narrowed or in place": {"slim": 4, "compile": 2}, "smaller": {"slim": 9, "compile": 5}}  # fmt: skip
    (axes,) = table.figure(counted).axes
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[75, 100, 90], [100, 50, 50]]


def test_distance_sees_shapes_numbers_and_infinities() -> None:
    a = torch.tensor([1.0, float("inf"), 4.0])
    assert distance(a, a.clone()) == 0
    assert distance(a, torch.tensor([1.0, float("inf"), 3.0])) == 0.25
    assert distance(a, torch.tensor([1.0, 2.0, 4.0])) == float("inf")
    assert distance(a, a[:2]) == float("inf")
    assert distance(a, a.double()) == float("inf")
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")


def test_a_wrong_model_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness compares by itself: it must not trust what the narrowed model says."""
    slim = check.fxslim.slim

    def off(*args: Any, **kwargs: Any) -> Any:
        small = slim(*args, **kwargs)
        with torch.no_grad():
            next(p for name, p in small.named_parameters() if name.endswith("mlp.c_proj.weight")).mul_(1.01)
        return small

    monkeypatch.setattr(check.fxslim, "slim", off)
    row = run(case_of("GPT2Model"))
    assert row.slim.outcome == "wrong" and "differs by" in row.slim.reason
    assert row.compile.outcome == "exact"


def test_outputs_that_are_nan_in_float64_are_compared_in_float32() -> None:
    """NaN equals NaN: whatever a narrowed model computed there would be called right."""
    assert check.is_void(torch.full((2,), float("nan"))) and not check.is_void(torch.tensor([1.0, float("nan")]))
    case = case_of("ProphetNetDecoder")
    row = Row(case.name, case.model)
    model, inputs, tolerance = check._dense(case, row)
    assert (row.dtype, tolerance) == ("float32", check.FLOAT32)
    assert not any(check.is_void(value) for value in outputs(model, inputs).values())


def test_weights_and_plans_are_drawn_until_outputs_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last ReLU that returns zeros alone says nothing: no model is called right for it, and none wrong."""
    case = case_of("GPT2Model")
    build, silent = check.build, 2

    def relu(case: Case, dtype: torch.dtype, seed: int = 0) -> Any:
        model = build(case, dtype, seed)
        with torch.no_grad():
            model.ln_f.weight.zero_()
            model.ln_f.bias.fill_(-1.0)
            if seed >= silent:
                model.ln_f.weight.add_(1)
        return model

    monkeypatch.setattr(check, "build", relu)
    row = run(case)
    assert row.seed == silent and row.failure() == ""
    assert row.slim.outputs == row.compile.outputs == ("['last_hidden_state']",)
    monkeypatch.setattr(check, "SEEDS", silent)
    row = run(case)
    assert (row.slim.outcome, row.compile.outcome) == ("nothing", "nothing")
    assert table.totals([row])["nothing"] == 1 and table.totals([row])["wrong"] == 0


# Cases and processes ------------------------------------------------------------------------------------------------


def test_every_case_can_be_read() -> None:
    cases = read_cases()
    assert len(cases) == len({str(case) for case in cases}) == 332
    inputs = inputs_of(case_of("BertModel") if "BertModel" in {c.model for c in cases} else cases[0], torch.float64)
    names = [name for name, _ in variants(inputs)]
    assert names[:3] == ["as traced", "other values", "other batch"]


def test_outputs_are_drawn_alike() -> None:
    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3)

    x = {"x": torch.zeros(3)}
    assert torch.equal(*(outputs(Draws(), x)[""] for _ in range(2)))


def test_cases_run_in_processes_with_a_limit(tmp_path: Path) -> None:
    case = case_of("GPT2Model")
    broken = replace(case, model="NoSuchModel")
    start = time.monotonic()
    rows = {row.model: row for row in pool.run_all([broken, case], jobs=2, limit=0.2)}
    assert time.monotonic() - start < 60
    assert "took more than 0.2 s" in rows["GPT2Model"].error
    assert "GPT2Model" in table.markdown(list(rows.values()))


def test_the_command_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    few = tmp_path / "few.jsonl"
    line = next(line for line in CASES.read_text(encoding="utf-8").splitlines() if '"GPT2Model"' in line)
    few.write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["zoo", "--cases", str(few), "--jobs", "1", "--json", str(tmp_path / "out.json")])
    main()
    (row,) = [Row.from_json(data) for data in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))]
    assert row.passes("slim") and row.passes("compile")
    assert "| gpt2 | GPT2Model | 2 attention, 2 ffn | 4/4 | last_hidden_state | exact" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["zoo", "--cases", str(few), "--only", "nothing"])
    with pytest.raises(SystemExit):
        main()
    assert "no case is called nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (None, [], "cannot read the cases"),
        ('{"name": "x", bad\n', [], "cases.jsonl:1 is no case: JSONDecodeError"),
        ('\n{"name": "x", "class": "y"}\n', [], "cases.jsonl:2 is no case: KeyError: 'config_class'"),
        ("", ["--jobs", "0"], "--jobs: at least one"),
        ("", ["--json", "nowhere/out.json"], "nowhere is no folder"),
    ],
)
def test_the_command_says_what_it_cannot_read(
    text: str | None, options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cases = tmp_path / "cases.jsonl"
    if text is not None:
        cases.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["zoo", "--cases", str(cases), *options])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err
