"""Run the zoo: ``python -m benchmarks.zoo [--cases FILE] [--only NAME] [--jobs N] [--json OUT]``.

Every case runs in a process of its own with a time limit. A table goes to stdout and, when nothing was left out, to
``benchmarks/results/zoo.md``, its totals to the README; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path

from tqdm import tqdm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))  # a third of the time went into pages given back to
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(256 << 20))  # the system by one forward and taken by the next

from benchmarks.environment import write_result
from benchmarks.readme import README, written
from benchmarks.zoo.cases import CASES, read_cases
from benchmarks.zoo.check import Row
from benchmarks.zoo.pool import LIMIT, run_all
from benchmarks.zoo.table import BEGIN, END, figure, markdown, summary, totals
from fxslim.errors import InputError


def main() -> None:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description="Run the compiler over a file of tiny models."
    )
    parser.add_argument("--cases", type=Path, default=CASES, help="a file with one case a line")
    parser.add_argument(
        "--only", action="append", help="a family or a class; may be given several times, or with commas"
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)), help="processes at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a case may take")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error("--jobs: at least one")
    if given.json and not given.json.absolute().parent.is_dir():  # hours later is too late to find out
        parser.error(f"--json: {given.json.parent} is no folder")
    try:
        cases = read_cases(given.cases)
    except InputError as error:
        parser.error(str(error))
    if given.only:
        wanted = {name for names in given.only for name in names.split(",")}
        cases = [case for case in cases if wanted & {case.name, case.model, str(case)}]
        if not cases:
            parser.error(f"no case is called {', '.join(sorted(wanted))}")
    rows: list[Row] = []
    with tqdm(total=len(cases), unit="case", file=sys.stderr) as bar:
        for row in run_all(cases, jobs=given.jobs, limit=given.limit):
            rows.append(row)
            bar.update()
            if row.failure():
                bar.write(f"{row.name}:{row.model}: {row.failure()}", file=sys.stderr)
    rows.sort(key=lambda row: (row.name, row.model))
    if given.json:
        given.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n", encoding="utf-8")
    text = markdown(rows)
    print(text)
    if given.cases == CASES and not given.only:
        write_result("zoo", payload=totals(rows), markdown=text, figure=figure(totals(rows)))
        readme = README.read_text(encoding="utf-8")
        README.write_text(written(readme, summary(rows), BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
