"""What people read: tables in notebooks, plots, the page a report is saved as, and what debugging prints."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import InputError

from architectures import ARCHITECTURES

pytest.importorskip("matplotlib", reason="plots need matplotlib: fxslim[draw]")
pytest.importorskip("pygraphviz", reason="the page's graph needs pygraphviz: fxslim[draw]")

from fxslim.draw import plots


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(self.up(x).relu()) + x
        return found


class Strange(nn.Module):
    """A feed-forward block whose name is markup."""

    NAME = "<b onclick=alert(1)>"

    def __init__(self) -> None:
        super().__init__()
        self.add_module(self.NAME, Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self, self.NAME)(x)
        return found


@pytest.fixture(scope="module")
def found() -> fxslim.Inspection:
    torch.manual_seed(0)
    return fxslim.inspect(Strange().eval(), torch.randn(3, 6))


@pytest.fixture(scope="module")
def calibrated() -> fxslim.Report:
    model = ARCHITECTURES["bert"].build(torch.float32)
    batches = [dict(ARCHITECTURES["bert"].inputs(4, 9))]
    target = fxslim.params(0.9)
    report = fxslim.slim(model, calibration=batches, target=target).fxslim.report  # type: ignore[union-attr]
    assert isinstance(report, fxslim.Report)
    return report


class Tags(HTMLParser):
    """Collects tags and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "td":
            self.cells.append(data)


def test_notebooks_show_tables_and_names_stay_text(found: fxslim.Inspection) -> None:
    plan = fxslim.plan(found, ffn=0.5)
    report = fxslim.slim(found, plan=plan).fxslim.report  # type: ignore[union-attr]
    for shown, words in ((found, ["ffn", "8"]), (plan, ["ffn", "4", "8", "50%"]), (report, ["parameters", "MACs"])):
        html = Tags(shown._repr_html_())  # type: ignore[union-attr]
        assert set(words) <= set(html.cells), html.cells
        assert not {"b", "script"} & set(html.tags)
        assert words[0] != "ffn" or f"{Strange.NAME}:ffn" in html.cells
    assert Strange.NAME in str(found)


def test_plans_print_what_is_kept(found: fxslim.Inspection) -> None:
    lines = str(fxslim.plan(found, ffn=0.25)).splitlines()
    assert lines[0] == "narrowed: 1" and lines[2].split() == ["site", "kind", "kept", "of"]
    assert lines[-1].split()[-4:] == ["ffn", "6", "8", "75%"]


def test_plots_hold_what_the_plan_says(calibrated: fxslim.Report) -> None:
    axes = plots.kept(calibrated).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    by_kind: dict[str, list[float]] = {}
    for part in calibrated.plan:
        by_kind.setdefault(part.site.kind, []).append(len(part.keep) / part.site.units)
    assert lines == by_kind and min(min(ratios) for ratios in by_kind.values()) < 1
    assert plots.kept(calibrated.plan).axes[0].get_title(loc="left") == axes.get_title(loc="left")
    lines = plots.damage(calibrated).axes[0].get_lines()
    points = [y for line in lines if line.get_marker() == "o" for y in line.get_ydata()]
    assert sorted(points) == sorted(fit.damage for fit in calibrated.fits)
    curves = [line for line in lines if line.get_marker() == "None"]
    assert len(curves) == len(calibrated.fits)
    for fit, line in zip(calibrated.fits, curves, strict=True):
        assert np.allclose(np.stack([line.get_xdata() * fit.units, line.get_ydata()], 1), np.array(fit.curve))
        kept, costs = zip(*fit.curve, strict=True)
        assert kept[0] == fit.units and costs[0] == 0.0
        assert np.interp(-fit.kept, -np.array(kept), costs) == pytest.approx(fit.damage, rel=0.3)
    sliced, repaired = plots.repair(calibrated).axes[0].get_lines()
    assert list(sliced.get_ydata()) == [fit.plain for fit in calibrated.fits]
    assert list(repaired.get_ydata()) == [fit.error for fit in calibrated.fits]


def test_scores_are_magnitudes_of_units(found: fxslim.Inspection) -> None:
    block = getattr(found.analysis.model, Strange.NAME)  # type: ignore[union-attr]
    norms = torch.cat([block.up.weight, block.up.bias[:, None], block.down.weight.T], dim=1).detach().norm(dim=1)
    line = plots.scores(found).axes[0].get_lines()[0]
    assert float(line.get_ydata()[0]) == pytest.approx(float(norms.quantile(0.5) / norms.max()), rel=1e-5)


def test_values_stand_against_budgets() -> None:
    figure = plots.against_budget({"obs": [(0.75, 82.2), (0.5, 81.9)]}, what="Spearman", dense=82.0)
    first, dense = figure.axes[0].get_lines()
    assert list(first.get_xdata()) == [0.5, 0.75] and list(first.get_ydata()) == [81.9, 82.2]
    assert set(dense.get_ydata()) == {82.0}


def test_plots_say_what_is_missing(found: fxslim.Inspection) -> None:
    report = fxslim.slim(found, ffn=0.5).fxslim.report  # type: ignore[union-attr]
    assert isinstance(report, fxslim.Report)
    with pytest.raises(InputError, match="holds no damage: it is measured where calibration= comes with a target="):
        plots.damage(report)
    with pytest.raises(InputError, match="holds no repair: what is left is fitted where calibration= is given"):
        plots.repair(report)
    with torch.device("meta"):
        empty = Strange().eval()
    with pytest.raises(InputError, match="weights on meta have no magnitudes"):
        plots.scores(fxslim.inspect(empty, torch.randn(3, 6, device="meta")))


def test_a_report_is_saved_as_one_page(calibrated: fxslim.Report, tmp_path: Path) -> None:
    calibrated.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Tags(text)
    assert page.tags.count("svg") == 4  # what is kept, damage, repair, sites
    assert f"{calibrated.parameters_after:,}" in page.cells and torch.__version__ in page.cells
    for heading in ("Summary", "Plots", "Sites and measurements", "Site graph", "Seconds", "Environment"):
        assert f"<h2>{heading}</h2>" in text
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match=r"a report is saved as .html, not as 'report.pdf'"):
        calibrated.save(tmp_path / "report.pdf")


def test_debugging_says_what_passes_did(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 6)
    monkeypatch.setenv("FXSLIM_DEBUG", "timing")
    fxslim.inspect(model, x)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and [line.split()[1] for line in lines] == ["Trace", "Annotate", "Find", "Name", "Order"]
    assert all(line.endswith(" s") and float(line.split()[2]) >= 0 for line in lines)
    monkeypatch.setenv("FXSLIM_DEBUG", "graph, labels")
    fxslim.compile(model, x, ffn=0.5)
    said = capsys.readouterr()
    assert "relu: 3x8 = aten.relu.default" in said.err  # the traced graph
    assert "+++ after" in said.err and "fxslim: NarrowGraph" in said.err  # what rewriting changed
    assert "0.weight.0 (8): 1-8" in said.err and "[8 units]" in said.err
    monkeypatch.setenv("FXSLIM_DEBUG", "graph,lables")
    with pytest.raises(InputError, match="FXSLIM_DEBUG: unknown lables; it takes graph, labels, timing"):
        fxslim.inspect(model, x)


def test_why_names_the_deepest_near_miss() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.down(self.up(x).cumsum(-1))
            return found

    model = nn.Sequential()
    model.add_module("mlp", Doubled())
    why = fxslim.inspect(model.eval(), torch.randn(3, 6)).why("mlp.down")
    assert "ffn at mlp.down: expected" in why and "found aten.cumsum" in why
