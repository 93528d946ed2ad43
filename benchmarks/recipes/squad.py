"""Questions in the format of SQuAD v1.1: reading, features for a model, answers from its logits, F1 and exact match."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BEST = 20
"""Starts and ends that are tried."""
LONGEST = 30
"""Tokens of an answer."""


@dataclass(frozen=True)
class Question:
    """A question about a paragraph.

    Attributes:
        question: what is asked.
        context: the paragraph.
        answers: right answers; the first one is learnt.
        start: where the first one starts in the paragraph, in characters.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    start: int


def read(path: Path) -> list[list[Question]]:
    """Read a file, or the one in a folder's ``xquad``; a list of questions for every paragraph."""
    place = path / "xquad" / "xquad.en.json" if path.is_dir() else path
    found = json.loads(place.read_text(encoding="utf-8"))["data"]
    return [
        [_question(asked["question"], paragraph["context"], [(a["text"], a["answer_start"]) for a in asked["answers"]])
         for asked in paragraph["qas"]]
        for article in found for paragraph in article["paragraphs"]
    ]  # fmt: skip


def split(paragraphs: Sequence[list[Question]], test: float, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Return questions to train on and to test on, of different paragraphs.

    Args:
        paragraphs: questions by paragraph.
        test: part of the paragraphs to test on.
        seed: of the order.
    """
    order = random.Random(seed).sample(paragraphs, len(paragraphs))
    count = max(round(test * len(order)), 1)
    return [q for own in order[count:] for q in own], [q for own in order[:count] for q in own]


def from_hub(name: str) -> tuple[list[Question], list[Question]]:
    """Load the training and the validation questions of a data set by its name on the hub; needs ``datasets``."""
    sets = hub(name)
    parts = []
    for part in ("train", "validation"):
        rows = [(r["question"], r["context"], r["answers"]) for r in sets[part]]
        parts.append([_question(q, c, list(zip(a["text"], a["answer_start"], strict=True))) for q, c, a in rows])
    return parts[0], parts[1]


def hub(name: str, *more: str) -> Any:
    """Load a data set by its name on the hub.

    Raises:
        SystemExit: the package ``datasets`` is not installed, or nothing exists under that name.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise SystemExit(f"{name!r} is no path, and data from the hub needs 'pip install datasets'.") from error
    try:
        return load_dataset(name, *more)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name!r} is no path, and could not be loaded from the hub: {error}") from error


def _question(question: str, context: str, answers: Sequence[tuple[str, int]]) -> Question:
    return Question(question.strip(), context, tuple(text for text, _ in answers), answers[0][1])


def features(tokenizer: Any, questions: Sequence[Question], length: int, stride: int) -> list[dict[str, Any]]:
    """Cut questions with their paragraphs into windows of at most ``length`` tokens.

    Returns:
        For every window ``input_ids``, ``attention_mask``, ``start_positions`` and ``end_positions`` (0, the first
        token, where the answer is elsewhere), ``row`` (the question) and ``offsets``: characters of the paragraph for
        each of its tokens, None for others.
    """
    made = tokenizer(
        [q.question for q in questions], [q.context for q in questions], truncation="only_second", max_length=length,
        stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    found = []
    for window, row in enumerate(made["overflow_to_sample_mapping"]):
        parts = made.sequence_ids(window)
        offsets = [o if part == 1 else None for o, part in zip(made["offset_mapping"][window], parts, strict=True)]
        first, last = _tokens(offsets, questions[row])
        found.append({"input_ids": made["input_ids"][window], "attention_mask": made["attention_mask"][window],
                      "start_positions": first, "end_positions": last, "row": row, "offsets": offsets})  # fmt: skip
    return found


def _tokens(offsets: Sequence[tuple[int, int] | None], question: Question) -> tuple[int, int]:
    """Return the first and the last token of the answer; 0 and 0 where it is not in the window."""
    start, end = question.start, question.start + len(question.answers[0])
    inside = [i for i, o in enumerate(offsets) if o is not None and o[0] < end and o[1] > start]
    context = [o for o in offsets if o is not None]
    if not inside or context[0][0] > start or context[-1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def collate(tokenizer: Any, windows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad windows to one length.  (B, S), positions (B,)"""
    batch = tokenizer.pad([{k: w[k] for k in ("input_ids", "attention_mask")} for w in windows], return_tensors="pt")
    positions = {k: torch.tensor([w[k] for w in windows]) for k in ("start_positions", "end_positions")}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **positions}


def best(start: Tensor, end: Tensor, offsets: Sequence[tuple[int, int] | None]) -> tuple[float, tuple[int, int]]:
    """Return the best answer of a window: its score, and its first and last character.  (S,), (S,)"""
    tried = [(-float("inf"), (0, 0))]
    usable = torch.tensor([o is not None for o in offsets])
    first, last = (v[: len(offsets)].masked_fill(~usable, -torch.inf) for v in (start, end))
    count = min(BEST, int(usable.sum()))
    for i in first.topk(count).indices.tolist():
        for j in last.topk(count).indices.tolist():
            a, b = offsets[i], offsets[j]
            if a is not None and b is not None and i <= j < i + LONGEST:
                tried.append((float(first[i] + last[j]), (a[0], b[1])))
    return max(tried)


def answers(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], length: int, stride: int, batch: int = 32
) -> list[str]:
    """Return a model's answer to every question: the best over all windows of its paragraph."""
    windows = sorted(features(tokenizer, questions, length, stride), key=lambda window: len(window["input_ids"]))
    found: list[tuple[float, str]] = [(-float("inf"), "")] * len(questions)
    model.eval()
    for place in range(0, len(windows), batch):
        own = windows[place : place + batch]
        inputs = collate(tokenizer, own)
        with torch.inference_mode():
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        for window, start, end in zip(own, output.start_logits.float(), output.end_logits.float(), strict=True):
            score, (first, last) = best(start, end, window["offsets"])
            row = window["row"]
            if score > found[row][0]:
                found[row] = score, questions[row].context[first:last]
    return [text for _, text in found]


def normal(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without punctuation, articles and double spaces."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def f1(answer: str, right: str) -> float:
    """Return the harmonic mean of precision and recall of words, from 0 to 1."""
    mine, theirs = normal(answer).split(), normal(right).split()
    if not mine or not theirs:
        return float(mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))


def scored(made: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Return exact match and F1, in per cent: of each answer against the right one that it is nearest to."""
    pairs = list(zip(made, questions, strict=True))
    exact = [max(normal(answer) == normal(right) for right in q.answers) for answer, q in pairs]
    near = [max(f1(answer, right) for right in q.answers) for answer, q in pairs]
    return {"exact": 100 * sum(exact) / len(pairs), "f1": 100 * sum(near) / len(pairs)}
