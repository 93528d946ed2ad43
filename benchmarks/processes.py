"""Cases that are measured in processes of their own, so that peaks of memory do not mix."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measured(call: Callable[[], Any]) -> dict[str, float]:
    """Return seconds and the peak of this process's memory in GiB."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_gib": round(_peak_kib() / 2**20, 3),
    }


def _peak_kib() -> int:
    """Return the peak of this process's resident memory; `getrusage` would count the parent's from before ``exec``."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tried(
    module: str, case: str, *, python: str = sys.executable, seconds: float = 900.0
) -> tuple[dict[str, Any], str]:
    """Run what may fail, crash or hang, in a process of its own; ``python`` may be that of another environment.

    Returns the last JSON that it printed, empty if there is none, and how it failed, empty if it did not.
    """
    command = [python, "-m", module, "--case", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {}, f"no end after {seconds:.0f} s"
    rows = [line for line in done.stdout.splitlines() if line.startswith("{") and line.endswith("}")]
    found: dict[str, Any] = json.loads(rows[-1]) if rows else {}
    if done.returncode < 0:
        return found, f"killed by {signal.Signals(-done.returncode).name}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)] or lines
    return found, "" if done.returncode == 0 else (said or [f"exit status {done.returncode}"])[-1]


def fresh(module: str, case: str) -> dict[str, Any]:
    """Run ``python -m module --case case`` and return the JSON of its last line."""
    done = subprocess.run([sys.executable, "-m", module, "--case", case], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
