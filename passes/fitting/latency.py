"""How long a model takes after a cut, measured on this machine: a table for sites of each shape, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fxslim.passes.fitting.processes import agreed
from fxslim.site import SitePlan
from fxslim.timer import Estimate, compare

POINTS = (0.25, 0.5, 0.75, 1.0)
"""Parts of a curve's steps at which the table is measured; between them it is linear."""
TABLE_SECONDS = 40.0
MEASURE_SECONDS = 180.0
INTERVAL = 0.01
"""Half-width of the interval of a measured ratio."""

Build = Callable[[tuple[SitePlan, ...]], nn.Module]


@dataclass(frozen=True)
class Shape:
    """Sites that take the same time: what they are called in the table, and what their curve is.

    Attributes:
        name: kind, units, groups and widths.
        groups: whether whole groups go.
        steps: how many steps there are.
        sites: names of the sites.
    """

    name: str
    groups: bool
    steps: int
    sites: tuple[str, ...]


@dataclass
class Latency:
    """Measures a model after cuts.

    Attributes:
        dense: the dense model.
        build: makes the narrowed model, as it will be returned.
        sketch: makes a narrowed model that only takes the same time.
        inputs: what the models are called with.
        key: what the times depend on, besides the machine: the model's fingerprint.
    """

    dense: nn.Module
    build: Build
    sketch: Build
    inputs: Mapping[str, Any]
    key: str
    known: dict[tuple[tuple[str, int], ...], Estimate] = field(default_factory=dict)

    def share(self, parts: Sequence[SitePlan]) -> float:
        """Return the narrowed model's time, relative to the dense one's; interleaved, warm, medians."""
        return self.estimate(parts).value

    def estimate(self, parts: Sequence[SitePlan]) -> Estimate:
        """Return the same with its interval; sizes that were timed before are not timed again."""
        name = tuple((part.site.name, len(part.keep)) for part in parts)
        if not name:
            return Estimate(1.0, 1.0, 1.0)
        if name not in self.known:

            def time() -> tuple[float, float, float]:
                own = self._ratios({"small": self.build(tuple(parts))}, MEASURE_SECONDS)["small"]
                return own.value, own.low, own.high

            self.known[name] = Estimate(*agreed(time, 3))
        return self.known[name]

    def table(
        self, shapes: Sequence[Shape], parts_of: Callable[[Shape, int], tuple[SitePlan, ...]]
    ) -> dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]]:
        """Return what one site of each shape saves, as a part of the dense time, by the steps that it takes.

        All sites of a shape are narrowed together, so that what is measured stands out, and share the saving.

        Args:
            shapes: the shapes.
            parts_of: site plans that take all sites of a shape so many steps.
        """
        wanted = {
            (shape.name, shape.groups): sorted({max(1, round(p * shape.steps)) for p in POINTS}) for shape in shapes
        }
        path = self._path((wanted, [shape.sites for shape in shapes]))
        cuts = {f"{shape.name} {int(shape.groups)} {steps}": (shape, steps) for shape in shapes
                for steps in wanted[shape.name, shape.groups]}  # fmt: skip

        def times() -> list[float]:
            known = _read(path, cuts)
            if known is None:
                models = {name: self.sketch(parts_of(*cut)) for name, cut in cuts.items()}
                known = {name: one.value for name, one in self._ratios(models, TABLE_SECONDS, sketched=True).items()}
                _write(path, known)
            return [known[name] for name in cuts]

        ratios = dict(zip(cuts, agreed(times, len(cuts)), strict=True))
        found = {}
        for shape in shapes:
            steps = wanted[shape.name, shape.groups]
            saved = [max(1 - ratios[f"{shape.name} {int(shape.groups)} {n}"], 0.0) / len(shape.sites) for n in steps]
            rising = np.maximum.accumulate(np.array([0.0, *saved]))  # fewer channels never take longer: that is noise
            found[shape.name, shape.groups] = (np.array([0, *steps], dtype=float), rising)
        return found

    def _ratios(
        self, models: Mapping[str, nn.Module], seconds: float, *, sketched: bool = False
    ) -> dict[str, Estimate]:
        dense = self.sketch(()) if sketched else self.dense
        training = dense.training
        dense.eval()

        def run(model: nn.Module) -> Callable[[], object]:
            def call() -> object:
                with torch.inference_mode():
                    return model(**self.inputs)

            return call

        device = next((p.device for p in self.dense.parameters()), torch.device("cpu"))
        functions = {"dense": run(dense), **{name: run(model.eval()) for name, model in models.items()}}
        timing = compare(functions, max_seconds=seconds, target_ci=INTERVAL, device=device)
        dense.train(training)
        return {name: timing[name].ratio for name in models}

    def _path(self, wanted: object) -> Path:
        """Return where a table is kept: by machine, versions, model, sizes and points."""
        shapes = {name: (tuple(v.shape), str(v.dtype), str(v.device)) for name, v in self.inputs.items()
                  if isinstance(v, torch.Tensor)}  # fmt: skip
        dtypes = sorted({str(p.dtype) for p in self.dense.parameters()})
        places = {p.device for p in self.dense.parameters()}
        chips = sorted(torch.cuda.get_device_name(place) for place in places if place.type == "cuda")
        what = (platform.node(), platform.machine(), os.cpu_count(), torch.get_num_threads(), torch.__version__, chips,
                dtypes, self.key, shapes, str(wanted))  # fmt: skip
        name = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:32]
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return root / "fxslim" / "latency" / f"{name}.json"


def _read(path: Path, names: Iterable[str]) -> dict[str, float] | None:
    """Return a table that was kept; None where there is none, or another one than was written."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(read, dict) and read.keys() == set(names)
    return read if whole and all(isinstance(v, float) and 0 < v < 100 for v in read.values()) else None


def _write(path: Path, ratios: Mapping[str, float]) -> None:
    """Keep a table; that it cannot be kept is no reason to fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(dict(ratios), file)
        Path(file.name).replace(path)
    except OSError:
        return
