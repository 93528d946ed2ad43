"""Which rows the training benchmark has, and what is written of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fxslim.training.schedule import SCHEDULES
from fxslim.training.scores import SCORES

DENSE = "dense, fine-tuned"
"""The row of the model that every other one starts from."""
FURTHER = "dense, trained on"
"""The same training without pruning, so that what more steps give is not taken for what pruning gives."""
START, END = 0.05, 0.55
EVERY = 10
FEW = 8
"""Updates where each is followed by a repair, and in the rows that are compared with it."""
HARD, HALF = {"ffn": 0.8, "heads": 0.6}, {"ffn": 0.5, "heads": 0.5}
BOUNDS = {
    ("SST-2", "ffn 0.5, heads 0.5"): 0.5,
    ("SST-2", "ffn 0.8, heads 0.6"): 1.5,
    ("STS-B", "ffn 0.5, heads 0.5"): 0.5,
    ("STS-B", "ffn 0.8, heads 0.6"): 1.0,
}
"""(task, headline row) -> points below dense that it may be."""


@dataclass(frozen=True)
class Setting:
    """One way to prune.

    Attributes:
        name: the row's name.
        config: keywords of `fxslim.PruningConfig`; None for none.
        repair: whether weights are fitted at every update.
        updates: how many updates there are; None for one every `EVERY` steps.
    """

    name: str
    config: Mapping[str, Any] | None = None
    repair: bool = False
    updates: int | None = None

    def asked(self, steps: int) -> dict[str, Any]:
        """Return the keywords of `fxslim.PruningConfig` for a training of so many steps."""
        assert self.config is not None
        found = {"start": START, "end": END, **self.config}
        span = (found["end"] - found["start"]) * steps
        every = EVERY if self.updates is None else max(round(span / self.updates), 1)
        return {**found, "every": every}


@dataclass(frozen=True)
class Row:
    """One measurement of a narrowed model.

    Attributes:
        task: name of the task.
        group: which rows it is compared with.
        name: name of the setting.
        seed: of the training.
        steps: optimizer steps after the dense model's.
        scores: split -> score.
        macs: part of the dense model's that is left.
        parameters: part of the dense model's that is left.
        seconds: of training and narrowing.
    """

    task: str
    group: str
    name: str
    seed: int
    steps: int
    scores: dict[str, float]
    macs: float
    parameters: float
    seconds: float


def _config(**asked: Any) -> dict[str, Any]:
    return {**HARD, "score": "fisher", "distill": True, **asked}


def _budget(asked: Mapping[str, float]) -> Setting:
    return Setting(f"ffn {asked['ffn']:g}, heads {asked['heads']:g}", _config(**asked))


GROUPS: Mapping[str, tuple[Setting, ...]] = {
    "headline": (Setting(DENSE), Setting(FURTHER), _budget(HALF), _budget(HARD)),
    "scores": (Setting(FURTHER), *(Setting(name, _config(score=name)) for name in SCORES)),
    "schedules": tuple(Setting(name, _config(schedule=name)) for name in SCHEDULES),
    "options": tuple(
        Setting(
            f"{'with' if distill else 'without'} distillation, {'with' if repair else 'without'} repair",
            _config(distill=distill),
            repair,
            FEW,
        )
        for distill in (False, True)
        for repair in (False, True)
    ),
}

ABOUT: Mapping[str, str] = {
    "scores": f"Cubic schedule, with distillation, without repair, updates every {EVERY} steps.",
    "schedules": f"Fisher scores, with distillation, without repair, updates every {EVERY} steps.",
    "options": f"Fisher scores, cubic schedule, {FEW} updates.",
}
"""What the pruned rows of a group have in common."""


def report(rows: Sequence[Row], tasks: Mapping[str, Any]) -> list[str]:
    """Return the text of all rows: a table for every task and group."""
    text = ["# Quality after pruning while training", ""]
    text += ["all-MiniLM-L6-v2, fine-tuned, then pruned while it trains on, narrowed, and scored as it is emitted."]
    text += ["Differences are to the fine-tuned dense model. A score is of one seed unless a range says otherwise;"]
    text += ["on the dev set of SST-2 (872 phrases) its standard error is about a point.", ""]
    for task in tasks.values():
        for group in GROUPS:
            own = [row for row in rows if row.task == task.name and row.group == group]
            if own:
                dense = next((r for r in rows if r.task == task.name and r.name == DENSE), None)
                text += [*table(task, group, own, dense), ""]
    return text


def table(task: Any, group: str, rows: Sequence[Row], dense: Row | None) -> list[str]:
    """Lay the rows of one task and group out; several seeds become their mean, with the range."""
    steps = max(row.steps for row in rows)
    about = f"{task.unit}; {steps} steps; {task.headline} is the one that counts. {ABOUT.get(group, '')}".strip()
    lines = [f"## {task.name}, {group}", "", about, ""]
    heads = [f"{split}, difference" for split in task.splits]
    lines += [f"| {group} | " + " | ".join(task.splits) + " | " + " | ".join(heads) + " | MACs | parameters |"]
    lines += ["| --- |" + " --- |" * (2 * len(task.splits) + 2)]
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        cells = [_cell([row.scores[split] for row in own]) for split in task.splits]
        for split in task.splits:
            apart = None if dense is None else fmean(row.scores[split] for row in own) - dense.scores[split]
            cells.append("" if apart is None or name == DENSE else f"{apart:+.2f}")
        cells += [f"{fmean(row.macs for row in own):.1%}", f"{fmean(row.parameters for row in own):.1%}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, *verdicts(task, group, rows, dense)]


def verdicts(task: Any, group: str, rows: Sequence[Row], dense: Row | None) -> list[str]:
    """Say of the headline rows whether they stay within their bounds."""
    found = []
    for (name, row), bound in BOUNDS.items():
        own = [r for r in rows if r.name == row]
        if group == "headline" and name == task.name and own and dense is not None:
            apart = {split: fmean(r.scores[split] for r in own) - dense.scores[split] for split in task.splits}
            main = apart.pop(task.headline)
            others = "".join(f"; {value:+.2f} on {split}" for split, value in apart.items())
            found.append(f"* {row}: {main:+.2f} points to dense on {task.headline}, at least {-bound:g} asked: "
                         f"{'holds' if main >= -bound else 'does not hold'}{others}.")  # fmt: skip
    return ["", *found] if found else []


def _cell(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"
