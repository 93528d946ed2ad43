"""Narrowed models in other runtimes: what the files compute, at sizes that were not traced, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.cli.export import To
from fxslim.errors import ExportError, InputError, TraceError
from fxslim.export import FORMATS, format, onnx
from fxslim.passes.inference import prepack
from fxslim.passes.inference.optimized import through_inductor

from agreement import plain_kernels, random_keep, random_plan, same_state, state
from architectures import ARCHITECTURES
from hard import HARD

CASES = {**ARCHITECTURES, **HARD}
NAMES = ("bert_classify", "gpt2", "llama_gqa", "t5", "t5_encoder", "vit_classify")
RELATIVE = 1e-4
"""Largest difference to torch, relative to the output's scale: other kernels round otherwise."""


@lru_cache(maxsize=2)
def narrowed(name: str) -> tuple[nn.Module, fxslim.Plan, dict[str, nn.Module]]:
    """Return a dense model, a plan with other sizes in every layer, and both forms."""
    model = CASES[name].build(torch.float32, "sdpa")
    found = fxslim.inspect(model)
    generator = np.random.default_rng(1)
    alternating = {site.kind: cycle((0.2, 0.5)) for site in found.sites}
    parts = tuple(random_keep(site, next(alternating[site.kind]), generator) for site in found.sites)
    plan = random_plan(model, found.sites).model_copy(update={"sites": parts})
    assert len({len(part.keep) for part in parts if part.site.kind.endswith("ffn")}) > 1
    return model, plan, {"small": fxslim.slim(found, plan=plan), "graph": fxslim.compile(found, plan=plan)}


def masked(model: nn.Module, plan: fxslim.Plan, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the dense model returns under the plan's masks: the reference, which no export has touched."""
    cache = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with plain_kernels(), torch.no_grad(), fxslim.masked(model, plan):
        result = model(**inputs, **cache)
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


def check(expected: Mapping[str, Tensor], found: Mapping[str, np.ndarray]) -> None:
    assert set(expected) == set(found)
    for name, want in expected.items():
        assert want.shape == found[name].shape, name
        scale = float(want.abs().max())
        assert scale > 1e-3, f"{name} is zero: nothing would show"
        assert np.abs(want.numpy() - found[name]).max() <= RELATIVE * scale, name


def sizes(name: str) -> list[dict[str, Tensor]]:
    """Return inputs of three sizes, none of which is traced."""
    return [CASES[name].inputs(*size, seed=7, dtype=torch.float32) for size in ((3, 9), (1, 5), (4, 12))]


def in_onnxruntime(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["small", "graph"])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_computes_what_the_masked_model_computes(name: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, plan, forms = narrowed(name)
    made = fxslim.export(forms[form], tmp_path / "out", to="onnx")
    assert made.differences and not made.notes
    assert len(made.differences) == 3  # as traced, more and longer, a batch of one
    for inputs in sizes(name):
        check(masked(model, plan, inputs), in_onnxruntime(tmp_path / "out" / "model.onnx", inputs))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["small", "graph"])
@pytest.mark.parametrize("name", NAMES)
def test_openvino_computes_what_the_masked_model_computes(name: str, form: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, plan, forms = narrowed(name)
    fxslim.export(forms[form], tmp_path / "out", to="openvino")
    core = openvino.Core()
    compiled = core.compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for inputs in sizes(name):
        found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
        check(masked(model, plan, inputs), {port.get_any_name(): value for port, value in found.items()})


LOAD = """
import sys, torch
whole = torch.export.load(sys.argv[1] + "/model.pt2").module()
for inputs, expected in torch.load(sys.argv[2], weights_only=True):
    found = whole(**inputs)
    assert list(found) == list(expected), (list(found), list(expected))
    for name, want in expected.items():
        assert found[name].shape == want.shape
        assert (found[name] - want).abs().max() <= 1e-5 * want.abs().max() > 0, name
assert not {"transformers", "fxslim"} & set(sys.modules)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pt2_is_the_same_in_another_process_without_fxslim_and_transformers(name: str, tmp_path: Path) -> None:
    model, plan, forms = narrowed(name)
    torch.save([(inputs, masked(model, plan, inputs)) for inputs in sizes(name)], tmp_path / "expected.pt")
    for form, own in forms.items():
        made = fxslim.export(own, tmp_path / form, to="pt2")
        assert {difference.max_abs for difference in made.differences} <= {0.0, made.differences[0].max_abs}
        command = [sys.executable, "-c", LOAD, str(tmp_path / form), str(tmp_path / "expected.pt")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == "the same\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_classify", "llama_gqa"])
def test_an_optimized_graph_is_written_as_any_other(name: str, tmp_path: Path) -> None:
    model, plan, forms = narrowed(name)
    fast = fxslim.optimize(forms["graph"])
    expected = [(inputs, masked(model, plan, inputs)) for inputs in sizes(name)]
    torch.save(expected, tmp_path / "expected.pt")
    assert len(fxslim.export(fast, tmp_path / "pt2", to="pt2").differences) == 3
    command = [sys.executable, "-c", LOAD, str(tmp_path / "pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr
    pytest.importorskip("onnxscript")
    assert len(fxslim.export(fast, tmp_path / "onnx", to="onnx").differences) == 3
    for inputs, want in expected:
        check(want, in_onnxruntime(tmp_path / "onnx" / "model.onnx", inputs))


def test_what_is_made_for_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = small_module()
    fast = through_inductor(fxslim.optimize(fxslim.compile(model, rows, ffn=0.5)))
    with pytest.raises(TraceError, match=r"Export the graph itself, or what fxslim\.optimize returns without inductor"):
        fxslim.export(fast, tmp_path / "out", to="pt2", example_inputs=rows)
    if torch.float32 not in prepack.dtypes():
        return
    monkeypatch.setattr(prepack, "SMALL", 0)
    packed = fxslim.optimize(fxslim.compile(model, rows, ffn=0.5), prepack=True)
    with pytest.raises(TraceError, match=r"prepacked weights are for this machine.*without.*prepack=True"):
        fxslim.export(packed, tmp_path / "out", to="pt2", example_inputs=rows)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_says_what_it_holds_and_the_model_is_left_alone(tmp_path: Path) -> None:
    small = narrowed("bert_classify")[2]["small"]
    before = state(small)
    made = fxslim.export(small, tmp_path / "out", to="pt2")
    assert same_state(before, state(small))
    assert small.training is False and "forward" not in vars(small)
    assert made.inputs == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    assert made.outputs == ("logits",)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.pt2", "config.json", "fxslim_plan.json"}
    assert json.loads(json.dumps(made.to_dict()))["files"] == ["model.pt2"]
    assert "largest difference" in str(made)


def test_sizes_can_be_fixed(tmp_path: Path) -> None:
    made = fxslim.export(narrowed("bert_classify")[2]["small"], tmp_path / "out", to="pt2", dynamic=False)
    assert made.inputs == {"input_ids": (2, 7), "attention_mask": (2, 7)}
    assert len(made.differences) == 1


def test_any_module_with_its_own_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    graph: Any = fxslim.compile(model, torch.randn(3, 8), ffn=0.5)
    made = fxslim.export(graph, tmp_path / "out", to="pt2")
    assert made.outputs == ("output",)
    assert made.inputs == {"input": ("batch", 8)}
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    rows = torch.randn(5, 8)
    assert torch.allclose(loaded(input=rows)["output"], graph(rows), atol=1e-6)


def test_large_weights_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx, "INLINE_BYTES", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    rows = torch.randn(3, 64)
    made = fxslim.export(model, tmp_path / "out", to="onnx", example_inputs=rows)
    assert made.files == ("model.onnx", "model.onnx.data")
    whole, data = (tmp_path / "out" / name for name in made.files)
    assert whole.stat().st_size < 64 * 256 * 4 < data.stat().st_size
    found = in_onnxruntime(whole, {"input": rows})
    check({"output": model(rows).detach()}, found)


def small_module() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(3, 8)


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FORMATS["pt2"]

    def wrong(*given: Any) -> Any:
        run = whole.load(*given)
        assert not isinstance(run, str)
        return lambda inputs: {name: tensor * 1.001 for name, tensor in run(inputs).items()}

    broken = {**FORMATS, "pt2": replace(whole, load=wrong)}
    monkeypatch.setattr(sys.modules["fxslim.export"], "FORMATS", broken)
    model, rows = small_module()
    with pytest.raises(ExportError, match=r"computes something else: output on input 3x8 differs by .* allowed is"):
        fxslim.export(model, tmp_path / "out", to="pt2", example_inputs=rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("no such operation"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(whole: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(sys.modules["fxslim.export"], "FORMATS", {"pt2": replace(FORMATS["pt2"], write=fail)})
    model, rows = small_module()
    with pytest.raises(type(error)):
        fxslim.export(model, tmp_path / "out", to="pt2", example_inputs=rows)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_runtime_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    model, rows = small_module()
    made = fxslim.export(model, tmp_path / "out", to="onnx", example_inputs=rows)
    assert made.differences == ()
    assert made.notes == ("not compared with the model: onnxruntime is not installed",)


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "find_spec", lambda name: None)
    model, rows = small_module()
    with pytest.raises(InputError, match=r"onnx, onnxscript not installed: pip install 'fxslim\[export\]'"):
        fxslim.export(model, tmp_path / "out", to="onnx", example_inputs=rows)


def test_what_is_refused(tmp_path: Path) -> None:
    model, rows = small_module()
    with pytest.raises(InputError, match="to='tflite' is none of onnx, pt2, openvino"):
        fxslim.export(model, tmp_path / "out", to="tflite", example_inputs=rows)
    with pytest.raises(InputError, match=r"out\.onnx names a file; name a folder, model\.onnx is written into it"):
        fxslim.export(model, tmp_path / "out.onnx", to="onnx", example_inputs=rows)
    with pytest.raises(InputError, match="give example_inputs"):
        fxslim.export(model, tmp_path / "out", to="pt2")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        fxslim.export(model, tmp_path / "taken", to="pt2", example_inputs=rows)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


class Branching(nn.Module):
    """A model that torch.export does not take as a whole; its feed-forward part it does."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = small_module()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x) if x.sum() > 0 else -self.ffn(x)


def test_a_model_of_several_graphs_is_refused(tmp_path: Path) -> None:
    rows = torch.ones(3, 8)
    graph = fxslim.compile(Branching().eval(), rows, ffn=0.5)
    with pytest.raises(TraceError, match="traced in regions"):
        fxslim.export(graph, tmp_path / "out", to="pt2", example_inputs=rows)
    small = fxslim.slim(Branching().eval(), rows, ffn=0.5)
    with pytest.raises(TraceError, match="cannot be traced as a whole"):
        fxslim.export(small, tmp_path / "out", to="pt2", example_inputs=rows)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_offers_every_format() -> None:
    assert {to.value for to in To} == set(FORMATS)
