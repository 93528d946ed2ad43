"""The benchmark of pruning while training: its losses, batches, teacher, tables, and a row on a tiny model."""

from __future__ import annotations

import argparse
import copy
import csv
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

import fxslim
from benchmarks import overhead, training, tuning
from benchmarks.training_rows import DENSE, FURTHER, GROUPS, Row, Setting, report
from benchmarks.tuning import Pair, Phrases, Remembered, Sentences, cosent, rounds, train

from agreement import difference

WORDS = "a the cat dog bird good bad fine dull sat ran flew .".split()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write small files in the formats of both tasks, and a small model in the place of the packaged one."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tuning, "packaged", lambda: tmp_path / "model")
    for folder in ("sst2", "stsb"):
        (tmp_path / folder).mkdir()
    for split, count in (("train", 30), ("dev", 9), ("test", 7)):
        pairs = [(f"the {WORDS[2 + i % 3]} ran", "a dog sat " + "." * (i % 4), str(i % 6)) for i in range(count)]
        with (tmp_path / "stsb" / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(pairs)
        rows = [f"{i % 2}\ta {('bad', 'good')[i % 2]} {WORDS[2 + i % 3]} {'.' * (i % 5)}" for i in range(count)]
        head = [] if split == "test" else ["label\tsentence"]
        (tmp_path / "sst2" / f"{split}.tsv").write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    return tmp_path


def test_the_loss_of_pairs_counts_every_pair_in_the_wrong_order() -> None:
    cosines, scores = torch.tensor([0.9, 0.1, 0.5]), torch.tensor([1.0, 2.0, 2.0])
    expected = math.log(1 + math.exp(20 * (0.9 - 0.1)) + math.exp(20 * (0.9 - 0.5)))
    assert float(cosent(cosines, scores)) == pytest.approx(expected)
    assert float(cosent(cosines, torch.ones(3))) == 0
    none = torch.full((2,), torch.nan)
    assert float(cosent(torch.cat([cosines, none + 1]).nan_to_num(0.3), torch.cat([scores, none]))) == pytest.approx(
        expected
    )


def test_sentences_without_a_score_are_added(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MORE", 2)
    monkeypatch.setattr(tuning, "NEAR", 3)
    task = Sentences(data)
    lines = [f"1\ta {word} dog sat {word}" for word in WORDS[:-1]]
    (data / "sst2" / "train.tsv").write_text("\n".join(["label\tsentence", *lines]), encoding="utf-8")
    foreign = {tuple(task.tokenizer(line[2:])["input_ids"]) for line in lines}
    own = {tuple(ids) for ids in task.ids}
    others = [tuple(ids) for ids in task.others]
    assert foreign <= {*others}
    assert len(others) == len(foreign) + 2 * len(own)
    assert [*map(len, others)] == sorted(map(len, others))
    first, last = task.tokenizer.cls_token_id, task.tokenizer.sep_token_id
    assert all((ids[0], ids[-1]) == (first, last) and not {first, last} & {*ids[1:-1]} for ids in others)
    assert {len(ids) for ids in others} <= {len(ids) for ids in foreign | own}
    assert {*others} - foreign - own
    batch = task.batch([0, 3])
    found = task.more(batch, random.Random(0))
    assert found["labels"][:2].tolist() == batch["labels"].tolist()
    assert found["labels"][2:].isnan().tolist() == [True, True]
    assert found["input_ids"].shape[:2] == (4, 2)
    pairs = {(others[i], others[i + 1]) for i in range(0, len(others), 2)}
    for both, mask in zip(found["input_ids"][2:], found["attention_mask"][2:].bool(), strict=True):
        assert tuple(tuple(ids[real].tolist()) for ids, real in zip(both, mask, strict=True)) in pairs
    width = batch["input_ids"].shape[-1]
    assert torch.equal(found["input_ids"][:2, :, :width], batch["input_ids"])


def test_near_words_are_those_of_the_largest_cosines(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "NEAR", 4)
    task = Sentences(data)
    model: Any = task.model()
    table = model.encoder.get_input_embeddings().weight.detach().double()
    found = task._near([2, 5, 9])
    assert found.keys() == {5, 9}  # 2 is [CLS]
    for token, near in found.items():
        cosines = {i: float(torch.cosine_similarity(table[token], table[i], dim=0)) for i in range(5, len(table))}
        assert near == sorted(cosines.keys() - {token}, key=lambda i: -cosines[i])[:4]


def test_a_teacher_remembers_hidden_states(data: Path) -> None:
    task = Sentences(data)
    model = task.model()
    teacher = Remembered(copy.deepcopy(model))
    for rows in ([0, 1, 2, 3], [3, 2, 9]):
        batch = {k: v for k, v in task.batch(rows).items() if k != "labels"}
        with torch.no_grad():
            want, got = (own(**batch, output_hidden_states=True) for own in (model, teacher))
        real = batch["attention_mask"].bool()
        assert len(want["hidden_states"]) == len(got["hidden_states"]) == 3
        for mine, theirs in zip(want["hidden_states"], got["hidden_states"], strict=True):
            assert torch.allclose(mine[real], theirs[real].float(), atol=2e-3 * float(mine.abs().max()))
        assert torch.allclose(want["logits"], got["logits"], atol=1e-5)


def test_a_round_holds_every_row_once_with_lengths_together() -> None:
    lengths = [i * 7 % 40 for i in range(120)]
    made = rounds(lengths, 10, 3)
    first, second = ([next(made) for _ in range(12)] for _ in range(2))
    for one in (first, second):
        assert sorted(i for batch in one for i in batch) == list(range(120))
        assert max(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in one) <= 4
    assert first != second
    assert next(rounds(lengths, 10, 3)) == first[0]


@pytest.mark.parametrize("kind", [Phrases, Sentences])
def test_a_teacher_is_asked_once_about_a_row(data: Path, kind: Any) -> None:
    task = kind(data)
    model = task.model()
    teacher = Remembered(copy.deepcopy(model))
    calls = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    rows = list(range(0, 30, 3))
    for own in (rows, rows[::-1], rows[:4]):
        batch = {k: v for k, v in task.batch(own).items() if k != "labels"}
        with torch.no_grad():
            assert difference(teacher(**batch), {"logits": model(**batch)["logits"]}) < 1e-6
    assert len(calls) == 1


def test_scores_are_those_of_plain_models(data: Path) -> None:
    task = Phrases(data)
    assert task.labels.tolist() == [i % 2 for i in range(30)]
    model: Any = task.model()
    right = 0
    for i in range(7):
        ids = task.tokenizer([f"a {('bad', 'good')[i % 2]} {WORDS[2 + i % 3]} {'.' * (i % 5)}"], return_tensors="pt")
        with torch.no_grad():
            right += int(model(**ids).logits.argmax()) == i % 2
    assert task.scores(model)["test"] == pytest.approx(100 * right / 7)
    pairs = Sentences(data)
    encoder: Any = pairs.model()
    own = []
    for a, b, _ in pairs.held["dev"]:
        with torch.no_grad():
            first, second = (encoder.encoder(**pairs.tokenizer([t], return_tensors="pt")).last_hidden_state.mean(1)
                             for t in (a, b))  # fmt: skip
        own.append(float(torch.cosine_similarity(first, second)))
    from scipy.stats import spearmanr

    expected = spearmanr(own, [float(score) for _, _, score in pairs.held["dev"]]).statistic * 100
    assert pairs.scores(encoder)["dev"] == pytest.approx(expected, abs=1e-6)


def test_a_pair_learns_embeddings_by_their_squared_distance(data: Path) -> None:
    task = Sentences(data)
    model: Any = task.model()
    batch = task.batch([0, 1, 2])
    other: Any = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        mine, theirs = model(**batch), other(**batch)
    from fxslim.training.distill import loss_from

    found = loss_from(mine, theirs, batch, fxslim.Distillation())
    apart = [model.embed(batch["input_ids"][:, k], batch["attention_mask"][:, k])
             - other.embed(batch["input_ids"][:, k], batch["attention_mask"][:, k]) for k in (0, 1)]  # fmt: skip
    expected = float(torch.cat(apart).detach().square().sum(-1).mean())
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_training_lowers_the_loss_and_prunes_exactly(data: Path) -> None:
    task = Sentences(data)
    model: Any = task.model()
    before = float(model(**task.batch(range(30)))["loss"].detach())
    config = fxslim.PruningConfig(ffn=0.5, heads=0.25, start=0.1, end=0.6, every=2, distill=True)
    teacher = Remembered(copy.deepcopy(model))
    train(model, task, 60, batch=6, rate=3e-3, pruning={"config": config, "example_inputs": task.example(),
                                                        "teacher": teacher})  # fmt: skip
    small: Any = fxslim.slim(model, task.example())
    assert {(p.site.kind, len(p.keep)) for p in small.fxslim.plan} == {("ffn", 10), ("attention", 3)}
    assert isinstance(small, Pair)
    assert float(small(**task.batch(range(30)))["loss"].detach()) < before


def test_pairs_are_repaired_on_the_way(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SMALL", {"stsb": (16, 1.0)})
    monkeypatch.setattr(training, "BATCH", {"stsb": 4})
    given = argparse.Namespace(data=data, models=None, sst2_model=None, epochs=1.0, seeds=1, rows=None)
    bench = training.Bench(Sentences(data), Sentences(data, 16), given)
    row = bench.row("options", Setting("repaired", {"ffn": 0.5, "heads": 0.5}, repair=True, updates=1), 0)
    assert row.parameters < 1
    assert set(row.scores) == {"dev", "test"}


def test_pairs_go_on_narrowed_once_masks_have_reached_their_target(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH", {"stsb": 4})
    monkeypatch.setattr(training, "SOON", {"stsb": 0.2})
    given = argparse.Namespace(data=data, models=None, epochs=2.0)
    bench = training.Bench(Sentences(data), Sentences(data), given)
    seen: list[tuple[int, ...]] = []
    learnt = Pair.forward

    def forward(self: Pair, *args: Any, **kwargs: Any) -> Any:
        if self.training and "labels" in kwargs:
            seen.append(tuple(self.encoder.encoder.layer[0].intermediate.dense.weight.shape))
        return learnt(self, *args, **kwargs)

    monkeypatch.setattr(Pair, "forward", forward)
    row = bench.row("headline", Setting("half", {"ffn": 0.5, "heads": 0.5, "distill": True}), 0)
    assert (row.steps, seen.count((20, 16)), seen.count((10, 16))) == (15, 3, 12)  # the target stands at 0.2
    assert row.macs < 1
    assert row.parameters < 1


def test_every_kind_of_row_is_measured(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SMALL", {"sst2": (16, 1.0), "stsb": (16, 1.0)})
    monkeypatch.setattr(training, "BATCH", {"sst2": 4, "stsb": 4})
    given = argparse.Namespace(data=data, models=data / "kept", sst2_model=None, epochs=2.0, seeds=1, rows=None)
    rows: list[Row] = []
    bench = training.Bench(Phrases(data), Phrases(data, 16), given)
    again = training.Bench(Phrases(data), Phrases(data, 16), given)
    first, second = bench.dense.state_dict(), again.dense.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    budget = {"ffn": 0.5, "heads": 0.5}
    wanted = {"headline": [Setting(DENSE), Setting(FURTHER), Setting("half", {**budget, "distill": True})],
              "options": [Setting("repaired", budget, repair=True, updates=2)]}  # fmt: skip
    for group, settings in wanted.items():
        rows += [bench.row(group, setting, 0) for setting in settings]
    dense, further, half, repaired = rows
    assert [row.steps for row in rows] == [0, 15, 15, 4]  # two rounds of 30 rows; one of 16
    assert dense.scores == bench.task.scores(bench.dense)
    assert (further.macs, further.parameters) == (1, 1)
    model: Any = BertForSequenceClassification.from_pretrained(data / "kept" / "sst2")
    small: Any = fxslim.slim(model, **budget)
    ratio = small.fxslim.report.parameters_after / small.fxslim.report.parameters_before
    assert half.parameters == repaired.parameters == ratio
    assert half.macs < 1


def test_tables_say_what_holds() -> None:
    def row(name: str, test: float, seed: int = 0, group: str = "headline") -> Row:
        return Row("STS-B", group, name, seed, 100, {"dev": 80.0, "test": test}, 0.5, 0.75, 60.0)

    rows = [row(DENSE, 86.0), row(FURTHER, 86.5), row("ffn 0.5, heads 0.5", 85.4), row("ffn 0.5, heads 0.5", 85.8, 1),
            row("ffn 0.8, heads 0.6", 84.9), row("taylor", 84.0, group="scores")]  # fmt: skip
    text = report(rows, training.TASKS)
    half = "| ffn 0.5, heads 0.5 | 80.00 (80.00 to 80.00) | 85.60 (85.40 to 85.80) | +0.00 | -0.40 | 50.0% | 75.0% |"
    assert half in text
    assert "* ffn 0.5, heads 0.5: -0.40 points to dense on test, at least -0.5 asked: holds; +0.00 on dev." in text
    assert (
        "* ffn 0.8, heads 0.6: -1.10 points to dense on test, at least -1 asked: does not hold; +0.00 on dev." in text
    )
    assert "| taylor | 80.00 | 84.00 | +0.00 | -2.00 | 50.0% | 75.0% |" in text
    assert sum("asked" in line for line in text) == 2


def test_groups_cover_every_score_and_schedule() -> None:
    from fxslim.training.schedule import SCHEDULES
    from fxslim.training.scores import SCORES

    assert {s.config["score"] for s in GROUPS["scores"] if s.config} == set(SCORES)
    assert {s.config["schedule"] for s in GROUPS["schedules"] if s.config} == set(SCHEDULES)
    kinds = {(bool(s.asked(512)["distill"]), s.repair, s.asked(512)["every"]) for s in GROUPS["options"]}
    assert kinds == {(d, r, 32) for d in (False, True) for r in (False, True)}
    for settings in GROUPS.values():
        for setting in settings:
            if setting.config is not None:
                fxslim.PruningConfig(**setting.asked(512))


def test_overhead_trains_and_masks_one_side(data: Path) -> None:
    task = Phrases(data)
    config = fxslim.PruningConfig(ffn=0.5, heads=0.5, start=0, end=20, every=10)
    side = overhead.Side(task.model(), config, 20, bf16=False)
    order = rounds(task.lengths, 5, 0)
    for _ in range(2):
        assert side.turn([task.batch(next(order)) for _ in range(10)]) > 0
    assert side.callback is not None and side.callback.pruner is not None and side.callback.pruner.units is not None
    assert side.callback.pruner.units.sparsity() == {"ffn": 0.5, "heads": 0.5}
    found = overhead.measure(task.model(), task, {"ffn": 0.5}, 6, 5, bf16=True)
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["plain"] > 0
