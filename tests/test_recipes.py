"""The recipes end to end on tiny models, and how answers to questions are made and scored."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertModel, BertTokenizerFast

from benchmarks.recipes import classify_magnitude, common, qa_auto, qa_ffn, qa_heads, squad
from benchmarks.recipes.__main__ import RECIPES, table
from fxslim.inc import auto_slim

from agreement import difference, outputs

WORDS = "the a cat dog bird sat ran flew on under over mat roof tree who what where did it is was red . ? in".split()
CHANNELS, HEADS, LAYERS = 64, 4, 2


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=CHANNELS, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


def paragraphs(path: Path, count: int = 6) -> str:
    made = []
    for i in range(count):
        animal, place = WORDS[2 + i % 3], WORDS[11 + i % 2]
        context = f"the {animal} sat on the {place} . it was red ."
        asked = [
            ("who sat on it ?", animal),
            ("where did it sit ?", f"the {place}"),
            ("what was red ?", "the " + animal),
        ]
        qas = [{"id": f"{i}-{k}", "question": q, "answers": [{"text": a, "answer_start": context.index(a)}]}
               for k, (q, a) in enumerate(asked)]  # fmt: skip
        made.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"data": [{"paragraphs": made}]}), encoding="utf-8")
    return str(path)


def given(tmp_path: Path, model: str, **more: Any) -> list[str]:
    own = {"data": paragraphs(tmp_path / "data.json"), "model_name_or_path": model, "num_train_epochs": 4,
           "per_device_train_batch_size": 3, "max_seq_length": 24, "doc_stride": 4, **more}  # fmt: skip
    return [word for name, value in own.items() for word in (f"--{name}", str(value))]


def kept(figures: dict[str, Any], kind: str) -> list[list[int]]:
    return [sizes for name, sizes in figures["kept"].items() if name.endswith(kind)]


class Watched:
    """Keeps the masked model that a recipe narrows, and what came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recipe: Any) -> None:
        self.masked: Any = None
        self.small: Any = None
        monkeypatch.setattr(recipe, "model_slim", self)

    def __call__(self, model: Any, **asked: Any) -> Any:
        self.masked = copy.deepcopy(model)
        self.small = auto_slim.model_slim(model, **asked)
        return self.small


def check_narrowed(watched: Watched, figures: dict[str, Any]) -> None:
    """The narrowed model computes what the masked one does, and is as large as it is said to be."""
    batch = {"input_ids": torch.randint(5, 28, (3, 11), generator=torch.Generator().manual_seed(0))}
    masked, small = watched.masked.double().eval(), copy.deepcopy(watched.small).double().eval()
    assert difference(outputs(masked, batch), outputs(small, batch)) < 1e-6
    count = [sum(p.numel() for p in one.parameters()) for one in (small, masked)]
    assert figures["parameters"] == count[0] / count[1] < 1


def test_channels_of_a_model_for_questions(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, qa_ffn)
    figures = qa_ffn.main(given(tmp_path, model, ffn2_sparsity=0.5, dense=tmp_path / "dense", json=tmp_path / "f.json"))
    assert kept(figures, "ffn") == [[CHANNELS // 2, CHANNELS]] * LAYERS
    assert not kept(figures, "attention")
    assert (figures["trained_on"], figures["tested_on"]) == (15, 3)
    assert json.loads((tmp_path / "f.json").read_text()) == figures
    check_narrowed(watched, figures)
    dense = BertForQuestionAnswering.from_pretrained(tmp_path / "dense")  # as it was scored, before pruning
    questions = squad.split(squad.read(tmp_path / "data.json"), 0.2)[1]
    tokenizer = BertTokenizerFast.from_pretrained(model)
    assert squad.scored(squad.answers(dense, tokenizer, questions, 24, 4), questions) == figures["dense"]
    assert all(0 <= figures[key][name] <= 100 for key in ("dense", "pruned") for name in ("exact", "f1"))


def test_heads_of_a_model_for_questions(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, qa_heads)
    figures = qa_heads.main(given(tmp_path, model, mha_sparsity=0.5, distill_loss_weight=0.0))
    assert kept(figures, "attention") == [[HEADS // 2, HEADS]] * LAYERS
    assert not kept(figures, "ffn")
    check_narrowed(watched, figures)


def test_both_at_once_with_a_teacher(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, qa_auto)
    figures = qa_auto.main(given(tmp_path, model, ffn2_sparsity=0.5, mha_sparsity=0.25))
    assert kept(figures, "ffn") == [[CHANNELS // 2, CHANNELS]] * LAYERS
    assert kept(figures, "attention") == [[HEADS * 3 // 4, HEADS]] * LAYERS
    check_narrowed(watched, figures)
    lines = table([figures])
    assert len(lines) == 3
    assert f"{figures['parameters']:.1%}" in lines[2]


@pytest.mark.parametrize("pattern", ["1x1", "channelx1"])
def test_magnitude_pruning_of_a_classifier(tmp_path: Path, model: str, pattern: str) -> None:
    (tmp_path / "sst2").mkdir()
    for name, count in (("train", 24), ("dev", 8)):
        rows = [f"{i % 2}\tthe {WORDS[2 + i % 3]} {('sat', 'ran')[i % 2]}" for i in range(count)]
        (tmp_path / "sst2" / f"{name}.tsv").write_text("\n".join(["label\tsentence", *rows]), encoding="utf-8")
    figures = classify_magnitude.main(
        ["--data", str(tmp_path), "--model_name_or_path", model, "--num_train_epochs", "3", "--target_sparsity", "0.5",
         "--per_device_train_batch_size", "4", "--max_train_samples", "16", "--pattern", pattern,
         "--learning_rate", "1e-3"]
    )  # fmt: skip
    assert (figures["trained_on"], figures["tested_on"]) == (16, 8)
    assert figures["masked"]["weights"] == pytest.approx(0.5, abs=1e-3)
    assert figures["dense"]["accuracy"] in [100 * i / 8 for i in range(9)]
    assert ("parameters" in figures) <= (pattern == "channelx1")


def test_a_teacher_takes_the_place_of_the_answers(tmp_path: Path, model: str) -> None:
    """The loss against one from two plain models, by hand."""
    asked = common.qa_options("x", None).parse_args(given(tmp_path, model, distill_loss_weight=3.0))
    task = common.Questions(asked)
    student, teacher = (BertForQuestionAnswering.from_pretrained(model).eval() for _ in range(2))
    batch = squad.collate(task.tokenizer, task.windows[:3])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trainer = task.trainer(student, teacher)
    student.config.hidden_dropout_prob = student.config.attention_probs_dropout_prob = 0.0
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    student.train()
    for module in student.bert.encoder.layer:
        module.attention.self.dropout.p = 0.0
    loss = trainer.compute_loss(student, batch).item()
    expected = 0.0
    with torch.no_grad():
        mine, theirs = student.eval()(**inputs), teacher(**inputs)
    for name in ("start_logits", "end_logits"):
        p, q = ((v[name] / 2).softmax(-1) for v in (theirs, mine))
        expected += float((p * (p.log() - q.log())).sum(-1).mean() * 4) * 3 / 2
    assert expected > 0
    assert loss == pytest.approx(expected, rel=1e-4)
    plain = trainer.compute_loss(student, batch).item()  # in evaluation the model's own counts
    assert plain == pytest.approx(student(**batch).loss.item())


def test_words_are_compared_as_squad_does() -> None:
    assert squad.normal("The  Cat, an Owl!") == "cat owl"
    assert squad.f1("the cat sat", "cat") == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert squad.f1("cat cat dog", "cat dog dog") == pytest.approx(2 / 3)  # two words in common, of three and three
    assert squad.f1("bird", "cat") == 0
    assert (squad.f1("the", "a"), squad.f1("the", "cat")) == (1, 0)
    asked = [squad.Question("?", "", ("a cat", "the grey cat"), 0), squad.Question("?", "", ("dog",), 0)]
    assert squad.scored(["grey cat", "a big dog"], asked) == {"exact": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 2)}


def test_windows_hold_the_answer_or_point_at_the_first_token(model: str) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(model)
    context = "the cat sat on the mat . the dog ran under the red roof ."
    question = squad.Question("what ran ?", context, ("the dog",), context.index("the dog"))
    windows = squad.features(tokenizer, [question], 14, 3)
    assert len(windows) > 2
    held = 0
    for window in windows:
        first, last = window["start_positions"], window["end_positions"]
        if (first, last) == (0, 0):
            assert window["offsets"][0] is None
            continue
        held += 1
        assert context[window["offsets"][first][0] : window["offsets"][last][1]] == "the dog"
        assert tokenizer.decode(window["input_ids"][first : last + 1]) == "the dog"
    assert 0 < held < len(windows)


def test_the_best_answer_is_in_the_paragraph_and_the_right_way_round() -> None:
    offsets = [None, None, (0, 3), (4, 7), (8, 11)]
    start, end = torch.tensor([9.0, 9.0, 1.0, 3.0, 0.0, 99.0]), torch.tensor([9.0, 9.0, 5.0, 1.0, 2.0, 99.0])
    assert squad.best(start, end, offsets) == (6.0, (0, 3))  # 1 + 5; 3 + 5 would end before it starts


def test_paragraphs_are_split_whole_and_the_same_way_each_time(tmp_path: Path) -> None:
    found = squad.read(Path(paragraphs(tmp_path / "data.json", 10)))
    train, test = squad.split(found, 0.2)
    assert (len(train), len(test)) == (24, 6)
    assert squad.split(found, 0.2) == (train, test)
    assert sorted(q.context for q in train + test) == sorted(q.context for own in found for q in own)


def test_data_of_the_hub_is_what_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of SQuAD and SST-2 as they are on the hub, served by a package of that name."""
    own = [q for paragraph in squad.read(Path(paragraphs(tmp_path / "data.json", 3))) for q in paragraph]
    answers = [{"text": list(q.answers), "answer_start": [q.start] * len(q.answers)} for q in own]
    rows = [
        {"question": f" {q.question}", "context": q.context, "answers": a} for q, a in zip(own, answers, strict=True)
    ]
    sentences = [{"sentence": "fine", "label": 1}, {"sentence": "dull", "label": 0}]
    served = {("squad",): {"train": rows, "validation": rows[:2]},
              ("glue", "sst2"): {"train": sentences, "validation": sentences[:1]}}  # fmt: skip
    package = types.SimpleNamespace(load_dataset=lambda *name: served[name])
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert squad.from_hub("squad") == (own, own[:2])
    assert classify_magnitude.phrases("glue") == [[(1, "fine"), (0, "dull")], [(1, "fine")]]


def test_every_command_of_the_page_says_what_a_recipe_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class TakenError(Exception):
        pass

    def taken(given: Any) -> None:
        raise TakenError

    page = (Path(__file__).parent.parent / "MIGRATING.md").read_text(encoding="utf-8")
    lines = [line.split()[2:] for line in page.splitlines() if line.startswith("python -m benchmarks.recipes.")]
    assert [words[0].rpartition(".")[2] for words in lines] == [*RECIPES]
    for words, recipe in zip(lines, RECIPES.values(), strict=True):
        monkeypatch.setattr(recipe, "Questions" if hasattr(recipe, "Questions") else "phrases", taken)
        with pytest.raises(TakenError):
            recipe.main(words[1:])


def test_data_of_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"pip install datasets"):
        squad.from_hub("squad")
