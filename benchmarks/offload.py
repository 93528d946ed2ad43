"""A model that accelerate has put on disk is planned on calibration data: peak memory, beside the same in memory.

``python -m benchmarks.offload`` writes a decoder with random weights (float32) into a temporary folder and plans it,
in processes of their own: loaded, with all weights on disk, and from the checkpoint's files. Then the checkpoint is
narrowed and repaired. It prints a table, says whether the plans are the same, and deletes everything else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.processes import fresh, measured

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
         "num_key_value_heads": 12, "vocab_size": 2000, "max_position_embeddings": 512}  # fmt: skip
ASKED: dict[str, Any] = {"ffn": 0.5, "heads": 0.5, "method": "wanda"}
BATCHES, ROWS, LENGTH = 4, 4, 32
WAYS = {
    "imports": "nothing but imports",
    "loaded": "`fxslim.plan`, loaded",
    "offloaded": "`fxslim.plan`, offloaded to disk by accelerate",
    "files": "`fxslim.plan_checkpoint`",
    "repaired": "`fxslim.slim_checkpoint`, planned, repaired and narrowed",
}


def case(work: Path, what: str) -> dict[str, Any]:
    """Do one thing in this process."""
    import torch
    from transformers import LlamaForCausalLM

    import fxslim.checkpoint.slim

    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(3, SHAPE["vocab_size"], (ROWS, LENGTH), generator=generator) for _ in range(BATCHES)]

    def plan() -> str:
        if what == "files":
            return fxslim.plan_checkpoint(work / "dense", calibration=data, **ASKED).to_json()
        where = {"device_map": {"": "disk"}, "offload_folder": work / "offloaded"} if what == "offloaded" else {}
        model = LlamaForCausalLM.from_pretrained(work / "dense", **where)
        return fxslim.plan(model, calibration=data, **ASKED).to_json()

    made: list[str] = []
    if what == "imports":
        found = measured(lambda: None)
    elif what == "repaired":
        found = measured(lambda: fxslim.slim_checkpoint(work / "dense", work / "small", calibration=data, **ASKED))
    else:
        found = measured(lambda: made.append(plan()))
    return {"what": what, "plan": json.loads(made[0])["sites"] if made else None, **found}


def main() -> None:
    """Make the checkpoint, and plan it every way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__)
    parser.add_argument("--case", metavar="FOLDER,WHAT", help="do one thing in this process and print JSON")
    parser.add_argument("--only", choices=list(WAYS), action="append", help="measure this way alone")
    given = parser.parse_args()
    if given.case:
        folder, _, what = given.case.rpartition(",")
        print(json.dumps(case(Path(folder), what)))
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as name:
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(Path(name, "dense"))
        total = sum(path.stat().st_size for path in Path(name, "dense").glob("*.safetensors"))
        print(f"{total / 2**30:.2f} GiB of weights, {BATCHES * ROWS * LENGTH} tokens, {ASKED}\n")
        print("| | peak GiB of the process | wall s | CPU s |\n| --- | --- | --- | --- |", flush=True)
        rows = []
        for what in given.only or WAYS:
            rows.append(fresh("benchmarks.offload", f"{name},{what}"))
            numbers = " | ".join(f"{rows[-1][key]:.2f}" for key in ("peak_gib", "wall_seconds", "cpu_seconds"))
            print(f"| {WAYS[what]} | {numbers} |", flush=True)
    plans = [row["plan"] for row in rows if row["plan"] is not None]
    print(f"\n{len(plans)} plans, {'all the same' if all(plan == plans[0] for plan in plans) else 'not the same'}.")


if __name__ == "__main__":
    main()
