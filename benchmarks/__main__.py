"""Run every benchmark: ``python -m benchmarks``."""

from __future__ import annotations

import subprocess
import sys

for name in ("compile_time", "latency"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
