"""A checkpoint of 13 GB is planned and narrowed without being loaded: peak memory, seconds, and speed against copying.

``python -m benchmarks.checkpoint`` writes a checkpoint of Llama-2-7B's shape (bfloat16, random weights) into a
temporary folder, plans it, finds and verifies the edits, narrows it, and copies it (files, with fsync) in turns; each
in a process of its own. It writes ``benchmarks/results/checkpoint.{json,md}``, and deletes everything
else. It takes 35 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.processes import fresh, measured

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
SHARD = 2 << 30
"""Largest file of the dense checkpoint, in bytes."""
ROUNDS = 2
ASKED = {"ffn": 0.5, "heads": 0.25}


def make(folder: Path) -> int:
    """Write the dense checkpoint; return its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fxslim.checkpoint.files import INDEX, Stored, header_of

    config = LlamaConfig(**SHAPE, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1 << 24) + 4099, generator=generator).mul_(0.02).to(torch.bfloat16)
    shards: list[list[Stored]] = [[]]
    for name, tensor in model.state_dict().items():
        stored = Stored(Path(), name, "BF16", tuple(tensor.shape))
        if sum(one.bytes for one in shards[-1]) + stored.bytes > SHARD:
            shards.append([])
        shards[-1].append(stored)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as opened:
            opened.write(header_of(tuple(tensors), {"format": "pt"}))
            for stored in tensors:
                weight_map[stored.name] = file
                for first in range(0, stored.bytes // 2, 1 << 24):
                    count = min(stored.bytes // 2 - first, 1 << 24)
                    shift = hash((stored.shape, first)) % 4099
                    part = torch.ones(count, dtype=torch.bfloat16) if "norm" in stored.name else noise[shift:][:count]
                    opened.write(memoryview(part.contiguous().view(torch.uint8).numpy()))
            opened.flush()
            os.fsync(opened.fileno())
    total = sum(stored.bytes for tensors in shards for stored in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return total


def case(work: Path, what: str) -> dict[str, Any]:
    """Do one thing in this process."""
    import fxslim.checkpoint.slim
    from fxslim import Plan
    from fxslim.hf import PLAN_FILE

    dense, plan, small = work / "dense", work / "plan.json", work / "small"
    before = measured(lambda: None)["peak_gib"]
    if what == "plan":
        found = measured(lambda: plan.write_text(fxslim.plan_checkpoint(dense, **ASKED).to_json()))
    elif what == "edits":
        found = measured(lambda: fxslim.slim_checkpoint(dense, small, Plan.from_file(plan)))
        shutil.copyfile(small / PLAN_FILE, work / "edited.json")
    elif what == "narrow":
        found = measured(lambda: fxslim.slim_checkpoint(dense, small, Plan.from_file(work / "edited.json"), force=True))
    else:
        found = measured(lambda: copy(dense, work / "copy"))
        shutil.rmtree(work / "copy")
    return {"what": what, "imports_gib": before, **found}


def copy(source: Path, target: Path) -> None:
    """Copy a folder to disk."""
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as read, (target / path.name).open("wb") as written:
            shutil.copyfileobj(read, written, 1 << 25)
            written.flush()
            os.fsync(written.fileno())


def main() -> None:
    """Make the checkpoint and do everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--case", metavar="FOLDER,WHAT", help="do one thing in this process and print JSON")
    parser.add_argument("--folder", type=Path, help="make the temporary folder here")
    given = parser.parse_args()
    if given.case:
        folder, _, what = given.case.rpartition(",")
        print(json.dumps(case(Path(folder), what)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        work = Path(name)
        (work / "dense").mkdir()
        total = make(work / "dense")
        rows = [fresh("benchmarks.checkpoint", f"{work},{what}") for what in ("plan", "edits")]
        rows += [fresh("benchmarks.checkpoint", f"{work},{what}") for _ in range(ROUNDS) for what in ("copy", "narrow")]
        small = sum(path.stat().st_size for path in (work / "small").glob("*.safetensors"))
    report(total, small, rows)


WORDS = {
    "plan": "plan, from weights alone",
    "edits": "find and verify the edits on one layer, and narrow",
    "narrow": "narrow, with edits",
    "copy": "copy",
}


def report(total: int, small: int, rows: list[dict[str, Any]]) -> None:
    """Write and print the table."""
    seconds = {what: statistics.median(row["wall_seconds"] for row in rows if row["what"] == what) for what in WORDS}
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2
    ratio = seconds["copy"] / seconds["narrow"]
    lines = [
        "# A checkpoint that is never loaded",
        "",
        f"Llama-2-7B's shape in bfloat16, {total / 1e9:.1f} GB; ffn=0.5, heads=0.25 leave {small / 1e9:.1f}.",
        f"The largest tensor has {largest / 2**30:.2f} GiB.",
        "",
        "| | wall s | CPU s | peak GiB of the process | of which imports |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {WORDS[row['what']]} | {row['wall_seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_gib']:.2f} | "
          f"{row['imports_gib']:.2f} |" for row in rows),
        "",
        f"Narrowing reads {total / 1e9 / seconds['narrow']:.2f} GB a second, copying reads",
        f"{total / 1e9 / seconds['copy']:.2f}: narrowing has {100 * ratio:.0f} % of its speed.",
    ]  # fmt: skip
    payload = {"bytes": total, "bytes_after": small, "largest_tensor": largest, "speed": round(ratio, 3), "rows": rows}
    write_result("checkpoint", payload=payload, markdown="\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
