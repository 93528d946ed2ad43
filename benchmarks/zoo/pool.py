"""Run cases in processes of their own, each with a time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.zoo.cases import Case
from benchmarks.zoo.check import Row, run

LIMIT = 60.0
"""Seconds that a case may take on one core."""


def run_all(cases: Sequence[Case], *, jobs: int, limit: float = LIMIT) -> Iterator[Row]:
    """Yield a row a case as they end, ``jobs`` at a time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo.check", "transformers", "torch.export", "torch._dynamo"])
    waiting, running = list(reversed(cases)), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop()))
            first = min(one.started for one in running) + limit
            wait([one.answer for one in running], timeout=max(0.1, first - time.monotonic()))
            for one in list(running):
                row = _ended(one, limit)
                if row is not None:
                    running.remove(one)
                    yield row
    finally:
        for one in running:
            one.process.kill()


@dataclass(frozen=True)
class _Running:
    case: Case
    process: Any
    answer: Connection
    started: float


def _start(context: Any, case: Case) -> _Running:
    answer, ours = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(case, ours), daemon=True)
    process.start()
    ours.close()
    return _Running(case, process, answer, time.monotonic())


def _ended(one: _Running, limit: float) -> Row | None:
    """Return a case's row if it ended, died, or ran out of time."""
    spent = time.monotonic() - one.started
    if one.answer.poll():
        try:
            row = Row.from_json(one.answer.recv())
        except EOFError:
            one.process.join()
            row = Row(one.case.name, one.case.model, error=f"the process died ({one.process.exitcode})", seconds=spent)
        one.process.join()
        return row
    if spent < limit:
        return None
    one.process.kill()
    one.process.join()
    return Row(one.case.name, one.case.model, error=f"took more than {limit:g} s", seconds=spent)


def _work(case: Case, answer: Connection) -> None:
    """Run a case in this process, quietly, and send the row back."""
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    answer.send(run(case).to_json())
