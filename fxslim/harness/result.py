"""What a benchmark found: tables, plain data, Markdown, a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fxslim.text import table
from fxslim.timer import Estimate, Timing

MEGABYTE = 1e6


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
        batch: rows.
        length: tokens in a row; None where inputs have none.
        macs: model -> multiply-accumulates of one forward.
        peak: model -> bytes of tensors that one forward holds at a time beyond the weights.
        timing: times and ratios to the baseline.
    """

    variant: str
    batch: int
    length: int | None
    macs: Mapping[str, int]
    peak: Mapping[str, int]
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
    """

    batch: int
    prompt: int
    tokens: int
    prefill: Mapping[str, Estimate]
    decode: Mapping[str, Estimate]
    timing: Timing


@dataclass(frozen=True)
class Benchmark:
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
        return all(point.timing.converged for point in self.points)

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
                 **{what: {name: asdict(rate) for name, rate in getattr(g, what).items()} for what in ("prefill", "decode")},
                 "converged": g.timing.converged, "rounds": g.timing.rounds}
                for g in self.generation
            ],
            "notes": list(self.notes),
        }  # fmt: skip

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        parts = []
        for columns, rows in self._tables():
            names = [column.removesuffix("#") for column in columns]
            rule = ["---:" if column.endswith("#") else "---" for column in columns]
            parts.append("\n".join("| " + " | ".join(map(str, row)) + " |" for row in (names, rule, *rows)))
        return "\n\n".join([*parts, *(f"* {line}" for line in self._remarks())]) + "\n"

    def __str__(self) -> str:
        return "\n".join([*(table(columns, rows) for columns, rows in self._tables()), *self._remarks()])

    def plot(self) -> Any:
        """Return a figure (matplotlib): how many times faster than the baseline, point by point."""
        from matplotlib.figure import Figure

        names = [name for name in self.sizes if name != self.baseline]
        figure = Figure(figsize=(1.6 + 1.1 * len(self.points), 3.6), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(names):
            speed = [point.timing[name].speedup for point in self.points]
            places = [at + 0.8 * (i + 0.5) / len(names) - 0.4 for at in range(len(speed))]
            spread = [[s.value - s.low for s in speed], [s.high - s.value for s in speed]]
            axes.bar(places, [s.value for s in speed], 0.8 / len(names), yerr=spread, capsize=2, label=name)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(self.points)), [_where(point) for point in self.points], rotation=30, ha="right")
        axes.set_ylabel(f"times faster than {self.baseline}")
        axes.legend(frameon=False)
        return figure

    def _tables(self) -> Iterator[tuple[Sequence[str], list[tuple[str, ...]]]]:
        rows = [(name, self.dtype[name], f"{size.parameters:,}", f"{size.bytes / MEGABYTE:,.1f}")
                for name, size in self.sizes.items()]  # fmt: skip
        yield ("model", "dtype", "parameters#", "MB#"), rows
        yield (
            ("variant", "batch#", "length#", "model", "ms#", "95 % interval#", "times faster#", "95 % interval#", "MACs#", "peak MB#"),
            [row for point in self.points for row in _rows(point)],
        )  # fmt: skip
        if self.generation:
            heads = ("model", "batch#", "prompt#", "new#", "prefill tokens/s#", "decode tokens/s#")
            yield heads, [
                (name, str(g.batch), str(g.prompt), str(g.tokens), _interval(g.prefill[name]), _interval(g.decode[name]))
                for g in self.generation for name in g.prefill
            ]  # fmt: skip

    def _remarks(self) -> list[str]:
        first = self.points[0].timing
        said = [f"{first.device}, {first.threads} threads, torch {first.torch_version}; interleaved, medians"]
        slow = [_where(point) for point in self.points if not point.timing.converged]
        if slow:
            said.append(f"time was up before ratios were known to {first.target_ci:.1%}: {', '.join(slow)}")
        return [*said, *(f"not compared: {note}" for note in self.notes)]


def _rows(point: Point) -> list[tuple[str, ...]]:
    rows = []
    for sample in point.timing.samples:
        time = [1e3 * seconds for seconds in (sample.time.value, sample.time.low, sample.time.high)]
        speed = sample.speedup
        rows.append((
            point.variant, str(point.batch), "" if point.length is None else str(point.length), sample.name,
            f"{time[0]:.3g}", f"{time[1]:.3g} .. {time[2]:.3g}", f"{speed.value:.3f}",
            f"{speed.low:.3f} .. {speed.high:.3f}", f"{point.macs[sample.name]:,}",
            f"{point.peak[sample.name] / MEGABYTE:,.1f}",
        ))  # fmt: skip
    return rows


def _where(point: Point) -> str:
    size = str(point.batch) if point.length is None else f"{point.batch} x {point.length}"
    return size if point.variant == "eager" else f"{size}, {point.variant}"


def _interval(rate: Estimate) -> str:
    return f"{rate.value:,.1f} [{rate.low:,.1f}, {rate.high:,.1f}]"
