"""What int8 makes of a narrowed model: ONNX Runtime's dynamic quantisation of the exported all-MiniLM-L6-v2.

``python -m benchmarks.int8`` exports the packaged model, dense and with half of the FFN and a quarter of the heads
taken out, quantises both, times all four in ONNX Runtime in turns in one process, and writes
``benchmarks/results/int8.{json,md}``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import Environment, write_result
from fxslim import timer

LENGTH = 128
FORMS = ("dense fp32", "slim fp32", "dense int8", "slim int8")


def main() -> None:
    """Export, quantise, time and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each batch size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = exported(Path(folder))
        sessions = {name: session(path) for name, path in files.items()}
        timings = {batch: latency(sessions, batch, options.seconds) for batch in options.batches}
        megabytes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
        cosines = to_slim(sessions)
    report(timings, megabytes, cosines)


def exported(folder: Path) -> dict[str, Path]:
    """Write four ONNX files, and return them by name."""
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModel

    import fxslim
    from fxslim.demo import FFN, HEADS, model_folder

    dense = AutoModel.from_pretrained(model_folder(), dtype=torch.float32).eval()
    models = {"dense": dense, "slim": fxslim.slim(dense, ffn=FFN, heads=HEADS)}
    files = {}
    for name, model in models.items():
        fxslim.export(model, folder / name, to="onnx")
        files[f"{name} fp32"] = folder / name / "model.onnx"
        files[f"{name} int8"] = folder / name / "int8.onnx"
        quantize_dynamic(files[f"{name} fp32"], files[f"{name} int8"])
    return {form: files[form] for form in FORMS}


def session(path: Path) -> Any:
    """Open a file on the CPU with as many threads as torch takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def latency(sessions: Mapping[str, Any], batch: int, seconds: float) -> timer.Timing:
    """Time all models on one batch, in turns."""
    ids = (torch.arange(batch * LENGTH).reshape(batch, LENGTH) % 1000 + 1000).numpy()
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1}
    calls = {name: partial(own.run, None, inputs) for name, own in sessions.items()}
    return timer.compare(calls, max_seconds=seconds, target_ci=0.01, device="cpu")


def to_slim(sessions: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return mean and smallest cosine of sentence embeddings to those of the narrowed model in float32."""
    from transformers import AutoTokenizer

    from fxslim.demo import SENTENCES, model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"][..., None]  # (B, S, 1)

    def embedded(own: Any) -> Tensor:
        hidden = torch.from_numpy(own.run(["last_hidden_state"], inputs)[0])  # (B, S, D)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    reference = embedded(sessions["slim fp32"])
    cosines = {name: (embedded(own) * reference).sum(-1) for name, own in sessions.items()}
    return {name: (float(own.mean()), float(own.min())) for name, own in cosines.items()}


def report(
    timings: Mapping[int, timer.Timing], megabytes: Mapping[str, float], cosines: Mapping[str, tuple[float, float]]
) -> None:
    """Write the tables."""
    rows = []
    for batch, timing in timings.items():
        for sample in timing.samples:
            speedup = sample.speedup
            rows.append(
                f"| {batch} | {sample.name} | {sample.time.value * 1e3:.1f} "
                f"| {speedup.value:.2f} [{speedup.low:.2f}, {speedup.high:.2f}] |"
            )
    lines = [
        "# Narrowed, then int8",
        "",
        "all-MiniLM-L6-v2 and the same with half of the FFN and a quarter of the heads taken out (by magnitude, no",
        "repair), exported to ONNX; int8 is `onnxruntime.quantization.quantize_dynamic`. All in ONNX Runtime on the",
        f"CPU, sequence {LENGTH}, in turns in one process, medians, 95 % intervals of the paired ratio.",
        "",
        "| batch | model | ms | times faster than dense fp32 |",
        "|---|---|---|---|",
        *rows,
        "",
        "| model | MB | cosine to slim fp32, mean | smallest |",
        "|---|---|---|---|",
        *(f"| {name} | {megabytes[name]:.1f} | {mean:.4f} | {least:.4f} |" for name, (mean, least) in cosines.items()),
    ]
    payload = {
        "environment": Environment.collect().to_json(),
        "results": [
            {"batch": batch, "length": LENGTH, "timing": timing.to_json()} for batch, timing in timings.items()
        ],
        "megabytes": dict(megabytes),
        "cosine_to_slim_fp32": {name: {"mean": mean, "least": least} for name, (mean, least) in cosines.items()},
    }
    write_result("int8", payload=payload, markdown="\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
