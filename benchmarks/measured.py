"""The summary of results that the README shows: ``python -m benchmarks.measured`` writes it anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.readme import README, written

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
Lines = Iterator[tuple[str, str]]


def compile_time(result: Any) -> Lines:
    """Say how long narrowing takes."""
    for case, what in (
        ("bert_base", "narrow and verify BERT-base"),
        ("llama_7b_meta", "trace and plan a Llama-2-7B shape"),
    ):
        own = result["results"][case]
        yield what, f"{own['wall_seconds']:.1f} s, peak {own['peak_gib']:.1f} GiB"


def latency(result: Any) -> Lines:
    """Say how much faster narrowed models are, a row at a time; larger batches are in the results."""
    for point in result["forward"]["points"]:
        if point["variant"] != "eager" or point["batch"] != 1:
            continue
        macs = point["macs"]
        ratios = {sample["name"]: sample["ratio"] for sample in point["timing"]["samples"]}
        speeds = ", ".join(f"{name.replace(',', '')} {_speed(own)}" for name, own in ratios.items() if name != "dense")
        yield (
            (
                f"BERT-base, batch {point['batch']}, length {point['length']}: times faster (ideal by MACs "
                f"{macs['dense'] / macs['module']:.2f})"
            ),
            speeds,
        )
    for own in (result["generation"] or {"generation": []})["generation"]:
        for what in ("prefill", "decode"):
            dense, slim = _rate(own[what]["dense"]), _rate(own[what]["slim"])
            yield f"Llama, {what}, tokens a second", f"{dense} dense, {slim} narrowed"


def _speed(ratio: Any) -> str:
    if not ratio["low"] or ratio["high"] is None:
        return "not resolved"
    return f"{1 / ratio['value']:.2f} [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]"


def _rate(rate: Any) -> str:
    return "not resolved" if rate["value"] is None else f"{rate['value']:,.0f}"


def memory(result: Any) -> Lines:
    """Say how much memory a forward takes."""
    rows = {(row["form"], row["batch"], row["length"]): row for row in result["rows"]}
    dense, small = rows["dense", 8, 512], rows["narrowed", 8, 512]
    yield "BERT-base on disk, MB", f"{dense['file_bytes'] / 1e6:.0f} dense, {small['file_bytes'] / 1e6:.0f} narrowed"
    yield (
        ("BERT-base, load and run batch 8, length 512: peak GiB"),
        f"{dense['peak_gib']:.2f} dense, {small['peak_gib']:.2f} narrowed",
    )


def repeatability(result: Any) -> Lines:
    """Say how often intervals hold."""
    runs = len(result["rows"])
    yield (
        "a model against itself: the interval of the ratio contains 1 and is within ±2 %",
        f"{result['both']} of {runs}",
    )


def overhead(result: Any) -> Lines:
    """Say what pruning adds to a step of training."""
    said = ", ".join(
        f"{row['score']} {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in result["rows"]
    )
    yield "a step of training with the callback, times as long", said


SAID: dict[str, Callable[[Any], Lines]] = {
    "compile_time": compile_time,
    "latency": latency,
    "memory": memory,
    "repeatability": repeatability,
    "overhead": overhead,
}


def summary(folder: Path = RESULTS) -> str:
    """Return a table of what the results in a folder say."""
    lines = ["| with half of the FFN and half of the heads | measured | more |", "| --- | --- | --- |"]
    for name, said in SAID.items():
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        more = f"[{name.replace('_', ' ')}](benchmarks/results/{name}.md), {record['date']}"
        lines += [f"| {what} | {figure} | {more} |" for what, figure in said(record["result"])]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the README."""
    README.write_text(written(README.read_text(encoding="utf-8"), summary(), BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
