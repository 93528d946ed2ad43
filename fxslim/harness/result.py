"""What a benchmark found: tables, plain data, Markdown, a plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fxslim.errors import InputError
from fxslim.folder import write_files
from fxslim.tables import Shown, Table
from fxslim.timer import Estimate, Timing

MEGABYTE = 1e6
PLOTS = (".png", ".svg", ".pdf")
POINT = ("variant", "batch#", "length#", "model", "ms#", "interval#", "times faster#", "interval#", "MACs#", "peak MB#")


@dataclass(frozen=True)
class Size:
    """What a model weighs.

    Attributes:
        parameters: distinct parameters.
        bytes: of all tensors that are saved: the size of its safetensors file but for the header.
    """

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Point:
    """One variant at one size of the inputs.

    Attributes:
        variant: how the models were run; see `fxslim.harness.variants`.
        batch: rows; None where inputs share none.
        length: tokens in a row; None where inputs have none.
        macs: model -> multiply-accumulates of one forward.
        peak: model -> bytes of tensors that one forward holds at a time beyond the weights; None where that is not
            seen (generated code on a CPU, CUDA graphs).
        timing: times and ratios to the baseline.
    """

    variant: str
    batch: int | None
    length: int | None
    macs: Mapping[str, int]
    peak: Mapping[str, int | None]
    timing: Timing


@dataclass(frozen=True)
class Generation:
    """Tokens a second.

    Attributes:
        batch: rows.
        prompt: tokens in a row before.
        tokens: new tokens after the first.
        prefill: model -> tokens of the prompt a second.
        decode: model -> new tokens a second, over all rows.
        timing: what was timed: ``NAME 1`` and ``NAME N`` new tokens.
        left_out: models that cannot generate.
    """

    batch: int
    prompt: int
    tokens: int
    prefill: Mapping[str, Estimate]
    decode: Mapping[str, Estimate]
    timing: Timing
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark(Shown):
    """Models against one another, interleaved in one process.

    Attributes:
        baseline: name of the model that ratios refer to.
        dtype: model -> dtype of its parameters.
        sizes: model -> what it weighs.
        points: variants at sizes.
        generation: tokens a second, one for each size of the inputs; empty where it was not asked for.
        notes: what was not compared, and why.
    """

    baseline: str
    dtype: Mapping[str, str]
    sizes: Mapping[str, Size]
    points: tuple[Point, ...]
    generation: tuple[Generation, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def converged(self) -> bool:
        """Tell whether every ratio's interval became as narrow as was asked."""
        timings = [*(point.timing for point in self.points), *(own.timing for own in self.generation)]
        return all(timing.converged for timing in timings)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "baseline": self.baseline,
            "dtype": dict(self.dtype),
            "sizes": {name: asdict(size) for name, size in self.sizes.items()},
            "points": [
                {"variant": p.variant, "batch": p.batch, "length": p.length, "macs": dict(p.macs),
                 "peak": dict(p.peak), "timing": p.timing.to_json()}
                for p in self.points
            ],
            "generation": [
                {"batch": g.batch, "prompt": g.prompt, "tokens": g.tokens,
                 "prefill": {name: rate.to_json() for name, rate in g.prefill.items()},
                 "decode": {name: rate.to_json() for name, rate in g.decode.items()},
                 "converged": g.timing.converged, "rounds": g.timing.rounds}
                for g in self.generation
            ],
            "notes": list(self.notes),
        }  # fmt: skip

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        blocks = [part.markdown() if isinstance(part, Table) else f"* {part}" for part in self.parts()]
        return "\n\n".join(blocks) + "\n"

    def save(self, path: str | PathLike[str]) -> Path:
        """Write it as the name's ending says: ``.json``, ``.md``, ``.html``, or a plot: ``.png``, ``.svg``, ``.pdf``.

        Raises:
            InputError: the ending is none of these.
        """
        file = Path(path)
        check_ending(file)
        if file.suffix in TEXTS:
            write_files({file: TEXTS[file.suffix](self)})
        else:
            out = io.BytesIO()
            self.plot().savefig(out, format=file.suffix[1:], dpi=150)
            write_files({file: out.getvalue()})
        return file

    def plot(self) -> Any:
        """Return a figure (matplotlib): how many times faster than the baseline, point by point."""
        from matplotlib.figure import Figure

        names = [name for name in self.sizes if name != self.baseline]
        figure = Figure(figsize=(1.6 + 1.1 * len(self.points), 3.6), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(names):
            timed = {at: own.speedup for at, point in enumerate(self.points)
                     for own in point.timing.samples if own.name == name}  # fmt: skip
            speed, places = [*timed.values()], [at + 0.8 * (i + 0.5) / len(names) - 0.4 for at in timed]
            spread = [
                [s.value - s.low for s in speed],
                [s.high - s.value if math.isfinite(s.high) else 0 for s in speed],
            ]
            axes.bar(places, [s.value for s in speed], 0.8 / len(names), yerr=spread, capsize=2, label=name)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(self.points)), [_where(point) for point in self.points], rotation=30, ha="right")
        axes.set_ylabel(f"times faster than {self.baseline}")
        axes.legend(frameon=False)
        return figure

    def parts(self) -> list[Table | str]:
        """Return its tables, and how it was measured."""
        sizes = [(name, self.dtype[name], size.parameters, f"{size.bytes / MEGABYTE:,.1f}")
                 for name, size in self.sizes.items()]  # fmt: skip
        tables = [Table(("model", "dtype", "parameters#", "MB#"), sizes)]
        tables.append(Table(POINT, [row for point in self.points for row in _rows(point)]))
        written = [(name, g.batch, g.prompt, g.tokens, _interval(g.prefill[name]), _interval(g.decode[name]))
                   for g in self.generation for name in g.prefill]  # fmt: skip
        if written:
            heads = ("model", "batch#", "prompt#", "new#", "prefill tokens/s#", "decode tokens/s#")
            tables.append(Table(heads, written))
        return [*tables, *self._remarks()]

    def _remarks(self) -> list[str]:
        first = self.points[0].timing
        how = f"interleaved, medians, {first.confidence:.0%} intervals"
        said = [f"{first.device}, {first.threads} threads, torch {first.torch_version}; {how}"]
        slow = [_where(point) for point in self.points if not point.timing.converged]
        slow += [f"generation {g.batch} x {g.prompt}" for g in self.generation if not g.timing.converged]
        if slow:
            what = "times" if len(self.sizes) == 1 else "ratios"
            said.append(f"time was up before {what} were known to {first.target_ci:.1%}: {', '.join(slow)}")
        dropped = dict.fromkeys(name for g in self.generation for name in g.left_out)
        said += [f"{name} does not generate" for name in dropped]
        return [*said, *(f"not compared: {note}" for note in self.notes)]


TEXTS: Mapping[str, Callable[[Benchmark], str]] = {
    ".json": lambda found: json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n",
    ".md": Benchmark.to_markdown,
    ".html": lambda found: f"<!doctype html><meta charset='utf-8'><title>fxslim</title>\n{found._repr_html_()}\n",
}


def check_ending(path: Path) -> None:
    """Raise InputError unless a benchmark can be saved under such a name."""
    if path.suffix not in (*TEXTS, *PLOTS):
        raise InputError(f"{path}: a benchmark is saved as {', '.join((*TEXTS, *PLOTS))}.")


def _rows(point: Point) -> list[tuple[Any, ...]]:
    rows = []
    for sample in point.timing.samples:
        time = [1e3 * seconds for seconds in (sample.time.value, sample.time.low, sample.time.high)]
        speed = sample.speedup
        rows.append((
            point.variant, *("" if size is None else size for size in (point.batch, point.length)), sample.name,
            f"{time[0]:.3g}", f"{time[1]:.3g} .. {time[2]:.3g}", f"{speed.value:.3f}",
            f"{speed.low:.3f} .. {speed.high:.3f}", point.macs[sample.name],
            "" if (peak := point.peak[sample.name]) is None else f"{peak / MEGABYTE:,.1f}",
        ))  # fmt: skip
    return rows


def _where(point: Point) -> str:
    size = " x ".join(str(size) for size in (point.batch, point.length) if size is not None) or "as given"
    return size if point.variant == "eager" else f"{size}, {point.variant}"


def _interval(rate: Estimate) -> str:
    if math.isnan(rate.value):
        return "not resolved"
    return f"{rate.value:,.1f} [{rate.low:,.1f}, {rate.high:,.1f}]"
