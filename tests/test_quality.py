"""The quality benchmark: its tables, orders and plots from made-up rows, and the language task in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import language, quality
from benchmarks.language import LENGTH, Language
from benchmarks.peers import at_budget
from benchmarks.summary import DENSE, ORDERS, TASKS, Row, curves, divergence, orders, orders_table, plot, report, table

TEXT = "The quick brown fox jumps over the lazy dog <unk> . \n" * 40


def row(method: str, budget: float, score: float, seed: int = 0, task: str = "STS-B", far: float = 0.0) -> Row:
    return Row(task, method, budget, seed, score, far, budget, 2.0)


ROWS = [
    row(DENSE, 1.0, 82.0),
    row("wanda", 0.5, 70.0),
    row("wanda", 0.5, 74.0, seed=1),
    row("magnitude", 0.5, 71.0),
    row("obs", 0.75, 81.5),
    row("obs", 0.5, 80.0),
    row("obs", 0.5, 90.0, seed=1),
    row("obs, uniform", 0.75, 81.25),
    row("obs, uniform", 0.5, 79.0),
    row("obs, no swaps", 0.5, 80.0),
]


def test_a_table_holds_means_and_deviations_of_methods_by_budgets() -> None:
    assert table("STS-B, score", ["random", "wanda", "obs"], ROWS, lambda r: r.score, 2) == [
        "| STS-B, score | 75% of MACs | 50% of MACs |",
        "| --- | --- | --- |",
        "| wanda |  | 72.00 ± 2.00 |",
        "| obs | 81.50 | 85.00 ± 5.00 |",
    ]


def test_the_data_of_a_plot_are_means_and_deviations_without_the_dense_row() -> None:
    made = curves(ROWS)
    assert DENSE not in made
    assert made["wanda"] == {0.5: (72.0, 2.0)}
    assert made["obs"] == {0.75: (81.5, None), 0.5: (85.0, 5.0)}


def compared(rows: list[Row], name: str, worse: str, budget: float, lower: bool = False) -> Any:
    found, _ = orders(rows, lambda r: r.score, lower)
    [own] = [c for c in found if (c.order.name, c.order.worse, c.budget) == (name, worse, budget)]
    return own


def test_an_order_compares_the_seeds_that_both_rows_have() -> None:
    own = compared(ROWS, "a", "magnitude", 0.5)
    assert (own.seeds, own.worse, own.better, own.gain, own.holds) == (1, 71.0, 70.0, -1.0, False)
    own = compared(ROWS, "e", "obs, uniform", 0.5)
    assert (own.seeds, own.worse, own.better, own.gain, own.holds) == (1, 79.0, 80.0, 1.0, True)


def test_an_order_without_shared_seeds_is_not_measured() -> None:
    own = compared(ROWS, "b", "fisher, mask tuning", 0.5)
    assert (own.seeds, own.worse, own.better, own.gain, own.holds) == (0, None, None, None, None)


def test_equal_means_hold_only_for_at_least_as_good() -> None:
    assert compared(ROWS, "f", "obs, no swaps", 0.5).holds
    same = [row("obs", 0.5, 80.0), row("obs, dense inputs", 0.5, 80.0)]
    assert not compared(same, "d", "obs, dense inputs", 0.5).holds


def test_lower_scores_turn_every_order_around() -> None:
    own = compared(ROWS, "e", "obs, uniform", 0.5, lower=True)
    assert (own.gain, own.holds) == (-1.0, False)


@pytest.mark.parametrize(("far", "holds"), [(5.0, True), (1.0, False)])
def test_a_gain_widens_where_more_is_removed(far: float, holds: bool) -> None:
    rows = [row("obs", budget, 80.0) for budget in (0.5, 0.4, 0.33)]
    rows += [row("fisher, mask tuning", budget, 80.0 - gain) for budget, gain in ((0.5, 1.0), (0.4, 3.0), (0.33, far))]
    _, wider = orders(rows, lambda r: r.score, lower=False)
    assert [(w.order.name, w.low, w.high, w.holds) for w in wider if w.order.name == "b"] == [("b", 2.0, far, holds)]
    _, wider = orders(ROWS, lambda r: r.score, lower=False)
    assert [(w.order.name, w.low, w.high, w.holds) for w in wider] == [
        ("b", None, None, None), ("e", 0.25, 1.0, True), ("e", None, None, None)
    ]  # fmt: skip


def test_the_table_of_orders_says_what_holds_and_what_was_not_measured() -> None:
    lines = orders_table("STS-B", ROWS, lambda r: r.score, lower=False, digits=1)
    assert lines[0] == "| STS-B | 75% of MACs | 50% of MACs |"
    assert "| (a) magnitude < wanda | not measured | 71.0, 70.0: does not hold |" in lines
    assert "| (e) obs, uniform < obs | 81.2, 81.5: holds | 79.0, 80.0: holds |" in lines
    assert "| (f) obs, no swaps <= obs | not measured | 80.0, 80.0: holds |" in lines
    assert "(b) fisher, mask tuning < obs: gain with more than 60% removed against less not measured." in lines
    assert "(e) obs, uniform < obs: mean gain with 40% removed and more 1.0, with less 0.2: larger, holds." in lines


def test_orders_name_rows_that_are_measured() -> None:
    assert {name for order in ORDERS for name in (order.worse, order.better)} <= quality.ROWS.keys()


def test_a_report_says_which_way_is_better_and_is_plain_data() -> None:
    rows = [
        *ROWS,
        row("obs", 0.5, 6.0, task="WikiText-2", far=0.25),
        row("wanda", 0.5, 9.0, task="WikiText-2", far=0.5),
    ]
    text, data = report(rows, list(quality.ROWS))
    assert any(line.startswith("| STS-B, Spearman x 100, higher is better (dense 82.00) |") for line in text)
    assert any(line.startswith("| WikiText-2, perplexity per byte, lower is better |") for line in text)
    assert not any("SST-2" in line for line in text)
    assert len(json.loads(json.dumps(data))["rows"]) == len(rows)
    assert divergence(rows[-1]) == 0.5


def test_results_are_written_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "rows.json"
    kept.write_text(json.dumps([vars(r) for r in ROWS]))
    monkeypatch.setattr(quality, "write", lambda rows: written.append(list(rows)))
    monkeypatch.setattr("sys.argv", ["quality", "--only-tables", "--rows", str(kept)])
    written: list[list[Row]] = []
    quality.main()
    assert written == [ROWS]


def test_without_matplotlib_tables_are_written_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    quality.write(ROWS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.json", "quality.md"]
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("matplotlib is not installed")


def test_a_plot_for_every_task_that_has_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [*ROWS, row("obs", 0.5, 6.0, task="WikiText-2")]
    written = plot(rows, list(quality.METHODS), tmp_path)
    assert [path.name for path in written] == ["quality-stsb.png", "quality-wikitext.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = object.__new__(quality.Similarity)
    monkeypatch.setattr(at_budget, "find_spec", lambda name: None)
    assert at_budget.missing().startswith("Torch-Pruning")  # type: ignore[union-attr]
    assert quality.wanted(task, [0.5], ["obs", at_budget.TORCH_PRUNING], 0) == [(DENSE, 1.0), ("obs", 0.5)]
    monkeypatch.setattr(at_budget, "find_spec", lambda name: "found")
    assert at_budget.missing() is None
    assert quality.wanted(task, [0.5], ["obs", at_budget.TORCH_PRUNING], 0)[1:] == [
        ("obs", 0.5),
        (at_budget.TORCH_PRUNING, 0.5),
    ]
    assert quality.wanted(task, [0.5], ["obs", at_budget.TORCH_PRUNING], 1) == [("obs", 0.5)]


def test_a_peer_prunes_channels_and_heads_within_the_budget() -> None:
    pytest.importorskip("torch_pruning")
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, vocab_size=50)
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    model = BertModel(config).eval()
    small, macs = at_budget.torch_pruning(model, inputs, 0.6)
    assert 0.57 < macs <= 0.6
    assert small(**inputs).last_hidden_state.shape == (2, 12, 32)
    own: Any = small.encoder
    assert all(layer.intermediate.dense.out_features < 64 for layer in own.layer)
    assert all(layer.attention.self.query.out_features in (8, 16, 24) for layer in own.layer)


def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch, keep: Path | None = None) -> Language:
    """Return the language task on a repeated sentence, with a model of two narrow layers."""
    (folder / "wikitext2").mkdir(exist_ok=True)
    (folder / "wikitext2" / "valid.txt").write_text(TEXT)
    (folder / "wikitext2" / "test.txt").write_text(TEXT.upper())
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(language, "SHAPE", {**language.SHAPE, **shape})
    return Language(folder, keep, steps=3)


def test_language_calibrates_on_sequences_of_the_training_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny(tmp_path, monkeypatch)
    monkeypatch.setattr(language, "SEQUENCES", 12)
    monkeypatch.setattr(language, "BATCH", 8)
    batches = task.calibration(0)
    assert [b["input_ids"].shape for b in batches] == [(8, LENGTH), (4, LENGTH)]
    for ids in torch.cat([b["input_ids"] for b in batches]):
        assert bytes(ids.tolist()).decode() in TEXT
    again, other = task.calibration(0), task.calibration(1)
    assert torch.equal(batches[0]["input_ids"], again[0]["input_ids"])
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])


def test_perplexity_and_divergence_are_those_of_a_direct_computation_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny(tmp_path, monkeypatch)
    other: Any = type(task.model)(task.model.config).eval()
    perplexity, far = task.score(other)
    assert task.score(task.model)[1] == 0.0
    surprise, kl, count = 0.0, 0.0, 0
    own, dense = other.double(), task.model.double()
    for ids in torch.cat(task.inputs):
        with torch.no_grad():
            p, q = (m(input_ids=ids[None]).logits[0].softmax(-1) for m in (dense, own))
        for place in range(LENGTH - 1):
            surprise -= math.log(q[place, ids[place + 1]])
            kl += float((p[place] * (p[place] / q[place]).log()).sum())
            count += 1
    assert count == len(torch.cat(task.inputs)) * (LENGTH - 1)
    assert perplexity == pytest.approx(math.exp(surprise / count), rel=1e-5)
    assert far == pytest.approx(kl / count, rel=1e-3)


def test_the_language_model_is_kept_and_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny(tmp_path, monkeypatch, tmp_path / "kept")
    monkeypatch.setattr(language, "train", lambda *_: pytest.fail("trained again"))
    second = tiny(tmp_path, monkeypatch, tmp_path / "kept")
    assert second.score(second.model) == first.score(first.model)


def test_the_language_task_goes_through_a_pruning_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny(tmp_path, monkeypatch)
    made = quality.measure(task, "wanda, refit", 0.7, 0)
    assert (made.task, made.method) == ("WikiText-2", "wanda, refit")
    assert 0.3 < made.macs <= 0.7
    assert made.score > 1.0 and made.divergence > 0.0


def test_what_tables_say_of_the_data_is_what_is_drawn() -> None:
    said = {task.key: task.data for task in TASKS}
    assert said["stsb"].startswith(f"{quality.SENTENCES} ") and said["sst2"].startswith(f"{quality.SENTENCES} ")
    assert said["wikitext"] == f"{language.SEQUENCES} sequences of {LENGTH} bytes"


def test_the_budgets_of_the_language_task_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny(tmp_path, monkeypatch)
    assert quality.wanted(task, None, ["obs"], 1) == [("obs", 0.8), ("obs", 0.65), ("obs", 0.5)]
    assert {task.key for task in TASKS} == {"stsb", "sst2", "wikitext"}
