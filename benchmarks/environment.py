"""Describe the machine that a benchmark ran on, and keep results together with that description."""

from __future__ import annotations

import io
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxslim.folder import write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Environment:
    """Hold what run times depend on; nothing that identifies the machine or its user.

    Attributes:
        cpu: Model name of the processor.
        cores: Logical cores this process may use.
        threads: Threads torch uses within an op.
        memory_gib: Main memory; 0 where it cannot be told.
        accelerator: Name of the accelerator, or None.
        system: Operating system and machine type.
        python: Version of Python.
        torch: Version of torch.
        transformers: Version of transformers, or None if it is not installed.

    """

    cpu: str
    cores: int
    threads: int
    memory_gib: float
    accelerator: str | None
    system: str
    python: str
    torch: str
    transformers: str | None

    @classmethod
    def collect(cls) -> Environment:
        """Describe the machine this runs on, now."""
        return cls(
            cpu=_cpu(),
            cores=_cores(),
            threads=torch.get_num_threads(),
            memory_gib=round(_memory_bytes() / 2**30, 1),
            accelerator=_accelerator(),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=_version("transformers"),
        )

    def __str__(self) -> str:
        """Return one line of text."""
        parts = [f"{self.cpu}, {self.cores} cores, {self.threads} threads, {self.memory_gib:g} GiB, {self.system}"]
        parts += [self.accelerator] if self.accelerator else []
        parts.append(f"Python {self.python}, torch {self.torch}, transformers {self.transformers or '-'}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def write_result(
    name: str, *, payload: Mapping[str, Any], markdown: str, figure: Figure | None = None, folder: Path = RESULTS
) -> tuple[Path, Path]:
    """Write ``name.json`` and ``name.md`` (payload or text, date, environment), and a plot as ``name.png``.

    A reader sees the old file or the new one, never half of one, and nothing is written if the payload is not plain
    data. Returns the first two paths.

    Raises ``ValueError`` if the name is not made of lower-case letters, digits, ``-`` and ``_``, or if the payload
    holds NaN or an infinity; ``TypeError`` if it holds anything that JSON does not know.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"{name!r} is no name for a result: use lower-case letters, digits, '-' and '_'")
    environment, date = Environment.collect(), datetime.now(timezone.utc).strftime("%Y-%m-%d")
    record = {"name": name, "date": date, "environment": environment.to_json(), "result": dict(payload)}
    data = json.dumps(record, indent=2, allow_nan=False) + "\n"
    text = f"{markdown.strip()}\n\n_{date}. {environment}._\n"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.json", folder / f"{name}.md"
    contents: dict[Path, str | bytes] = dict(zip(paths, (data, text), strict=True))
    if figure is not None:
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
        contents[folder / f"{name}.png"] = out.getvalue()
    write_files(contents)
    return paths


def _cpu() -> str:
    """Return the processor's model name."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", listing.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Return how many logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    """Return the size of main memory, or 0."""
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys():
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _accelerator() -> str | None:
    """Return the name of the accelerator that torch would use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


def _version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
