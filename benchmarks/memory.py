"""How much memory models need while they run, and how much on disk.

``python -m benchmarks.memory`` loads and runs BERT-base, dense and with half of the FFN and half of the heads, in
processes of their own. Peaks are of resident memory above what imports took; and the bytes of tensors are counted that
one forward holds beyond the weights. It writes ``benchmarks/results/memory.{json,md,png}``. Peaks of narrowing are in
``compile_time`` and ``calibration``, those of loading alone in ``loading``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.processes import fresh, measured
from fxslim.tables import Table

SIZES = ((1, 128), (8, 512))
FORMS = ("dense", "narrowed")


def save(folder: Path) -> None:
    """Write both forms below a folder."""
    import torch
    from transformers import BertConfig, BertModel

    import fxslim

    torch.manual_seed(0)
    dense = BertModel(BertConfig()).eval()
    dense.save_pretrained(folder / "dense")
    fxslim.save_pretrained(fxslim.slim(dense, ffn=0.5, heads=0.5), folder / "narrowed")


def case(folder: Path, batch: int, length: int) -> dict[str, Any]:
    """Load a form in this process and run it once, then once more while its tensors are counted."""
    import torch
    from transformers import BertModel

    import fxslim.hf
    from fxslim.harness.memory import peak_bytes

    load = fxslim.from_pretrained if folder.name == "narrowed" else BertModel.from_pretrained
    ids = torch.arange(batch * length).reshape(batch, length) % 1000 + 1000
    before = measured(lambda: None)["peak_gib"]

    def run() -> Any:
        model = load(folder)
        with torch.inference_mode():
            model(input_ids=ids)
        return model

    peak = measured(run)["peak_gib"] - before
    model = load(folder)
    with torch.inference_mode():
        tensors = peak_bytes(lambda: model(input_ids=ids), torch.device("cpu"))
    return {"form": folder.name, "batch": batch, "length": length, "tensor_bytes": tensors, "peak_gib": round(peak, 3),
            "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}  # fmt: skip


def main() -> None:
    """Run every form at every size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--case", help="FOLDER,BATCH,LENGTH: run one in this process and print JSON")
    given = parser.parse_args()
    if given.case:
        folder, batch, length = given.case.rsplit(",", 2)
        print(json.dumps(case(Path(folder), int(batch), int(length))))
        return
    with tempfile.TemporaryDirectory() as work:
        save(Path(work))
        rows = [fresh("benchmarks.memory", f"{work}/{form},{b},{s}") for b, s in SIZES for form in FORMS]
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Write the table and a plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['form']}\n{row['batch']} x {row['length']}" for row in rows]
    axes.bar(names, [row["tensor_bytes"] / 1e6 for row in rows])
    axes.set_ylabel("MB of tensors in one forward")
    table = Table(("form", "batch#", "length#", "file MB#", "load and forward, peak GiB#", "tensors of a forward MB#"),
                  [(r["form"], r["batch"], r["length"], f"{r['file_bytes'] / 1e6:.1f}", f"{r['peak_gib']:.2f}",
                    f"{r['tensor_bytes'] / 1e6:.1f}") for r in rows])  # fmt: skip
    text = ["# Memory", "BERT-base, dense and with half of the FFN and half of the heads, float32.", table.markdown()]
    write_result("memory", payload={"rows": rows}, markdown="\n\n".join(text), figure=figure)
    print(table)


if __name__ == "__main__":
    main()
