"""Run the short forms of the benchmarks, and rebuild the summary in the README: ``python -m benchmarks``.

The long forms are commands of their own: ``python -m benchmarks.NAME --help``.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks import measured

SHORT: tuple[tuple[str, ...], ...] = (
    ("compile_time", "--runs", "1"),
    ("latency", "--seconds", "10"),
    ("memory",),
    ("repeatability", "--runs", "5"),
)
ON_GPU: tuple[tuple[str, ...], ...] = (("latency", "--seconds", "10", "--device", "cuda"),)


def main() -> None:
    """Run one after the other."""
    for name, *options in (*SHORT, *(ON_GPU if torch.cuda.is_available() else ())):
        print(f"benchmarks.{name} {' '.join(options)}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)
    measured.main()


if __name__ == "__main__":
    main()
