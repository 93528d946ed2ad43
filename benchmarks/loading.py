"""How much memory and time loading a narrowed checkpoint takes, beside what transformers takes for the same folder.

``python -m benchmarks.loading`` narrows a decoder with random weights to half of its feed-forward channels, saves it,
and loads it in processes of their own, by ``fxslim.from_pretrained`` and by the class's own ``from_pretrained`` (the
config says these sizes). Peaks are of resident memory, mapped files included, above what the process had before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result

CHILD = """
import json, sys, time
import torch, transformers, fxslim
from fxslim import hf

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

folder, how, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
kind = hf.model_class(transformers.AutoConfig.from_pretrained(folder))
load = fxslim.from_pretrained if how == "fxslim" else kind.from_pretrained
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before, begun = memory("VmRSS"), time.perf_counter()
model = load(folder, **options)
seconds = time.perf_counter() - begun
with torch.no_grad():
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.double().sum() if tensor.numel() < 1e6 else tensor.sum()  # what is mapped counts once it is read
size = sum(t.numel() * t.element_size() for t in {id(p): p for p in model.parameters()}.values())
print(json.dumps({"bytes": size, "peak": memory("VmHWM") - before, "seconds": round(seconds, 3)}))
"""


def measured(folder: Path, how: str = "fxslim", **options: Any) -> dict[str, Any]:
    """Load a folder in a process of its own.

    Args:
        folder: a narrowed checkpoint.
        how: ``fxslim``, or ``transformers`` for the class's own ``from_pretrained``.
        options: what to pass on.

    Returns:
        Bytes of the model's parameters, the peak of memory above what there was before, and seconds.
    """
    call = [sys.executable, "-c", CHILD, str(folder), how, json.dumps(options)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def narrowed(folder: Path) -> Path:
    """Save a narrowed decoder of about 380 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fxslim

    config = LlamaConfig(vocab_size=16000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                         num_attention_heads=12, tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    return fxslim.save_pretrained(fxslim.slim(LlamaForCausalLM(config).eval(), ffn=0.5), folder, max_shard_size="100MB")


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory() as place:
        folder = narrowed(Path(place) / "small")
        ways: list[tuple[str, dict[str, Any]]] = [
            ("fxslim", {}), ("transformers", {}), ("fxslim", {"dtype": "bfloat16"}), ("fxslim", {"device_map": "cpu"})
        ]  # fmt: skip
        rows = [{"how": how, **options, **measured(folder, how, **options)} for how, options in ways]
    lines = [
        "# Loading a narrowed checkpoint",
        "",
        "A Llama shape with random weights and half of its feed-forward channels, in shards of 100 MB. Peak: resident",
        "memory above what the process had before, mapped files included, as a multiple of the parameters' bytes.",
        "",
        "| loaded by | with | model, MB | peak / model | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        given = ", ".join(f"{name}={row[name]}" for name in ("dtype", "device_map") if name in row)
        lines.append(f"| {row['how']} | {given} | {row['bytes'] / 1e6:.0f} | {row['peak'] / row['bytes']:.3f} | "
                     f"{row['seconds']:.2f} |")  # fmt: skip
    write_result("loading", payload={"rows": rows}, markdown="\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
