"""An oracle: which linears could lose an output channel, found by disturbing one and running the real model.

If the first later linear that sees the disturbance sees it in part of its input coordinates only, and zeros at those
coordinates hide it from whatever the model returns, the channel can be taken out. Graphs, labels and shapes of
architectures play no part.

Linears are ``nn.Linear``, transformers' ``Conv1D``, and ungrouped convolutions with a kernel of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.zoo.cases import outputs

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Smallest difference that counts, relative to the largest value: rounding is far below, a channel far above."""
CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Probe:
    """What a disturbed channel of a linear does.

    Attributes:
        producer: path of the linear.
        channel: the output channel.
        consumer: path of the first later linear that sees it, or "".
        columns: input coordinates at which it does.
        prunable: whether zeros there hide the channel from the model's output.
    """

    producer: str
    channel: int
    consumer: str
    columns: tuple[int, ...]
    prunable: bool


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linears of a model by path."""
    return {path: module for path, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear | Conv1D)


def _axis(module: nn.Module) -> int:
    """Return the channel axis of what a linear reads and returns, counted from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1


@dataclass
class _Seen:
    """What happened in a run: the linears' inputs, in order of calls, and the model's outputs."""

    calls: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Arrived(Exception):  # noqa: N818 - no error: a run is over as soon as it has shown what it was for
    """A disturbance reached a linear: at which of how many input coordinates; at none where other calls are made."""

    def __init__(self, path: str, columns: tuple[int, ...], width: int) -> None:
        super().__init__(path)
        self.path, self.columns, self.width = path, columns, width


class Oracle:
    """Disturbs channels of one model on one set of inputs."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.linears = linears(model)
        self.tolerance = TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]
        self.plain = self._run()
        self.called = list(dict.fromkeys(path for path, _ in self.plain.calls))
        self._hidden: dict[tuple[str, tuple[int, ...]], dict[str, Tensor]] = {}
        self._read: dict[str, bool] = {}

    def probe(self, producer: str) -> Probe:
        """Disturb the first channel of a linear, and the middle one if that cannot go: fused weights hold several."""
        width = self._width(producer)
        if width == 1:  # without it nothing would be left
            return Probe(producer, 0, "", (), prunable=False)
        for channel in dict.fromkeys((0, width // 2)):
            found = self._probe(producer, channel)
            if found.prunable:
                return found
        return found

    def _width(self, path: str) -> int:
        module = self.linears[path]
        weight: Any = module.weight
        return int(weight.shape[1 if isinstance(module, Conv1D) else 0])

    def _probe(self, producer: str, channel: int) -> Probe:
        """Disturb a channel, stop at the first linear that sees it, and ask whether zeros there would hide it."""
        try:
            self._run(edit=self._disturb(producer, channel), limit=producer, stop=True)
        except _Arrived as arrived:
            path, columns = arrived.path, arrived.columns
            hides = 0 < len(columns) < arrived.width and self._hides(producer, channel, path, columns)
            return Probe(producer, channel, path, columns, prunable=hides)
        return Probe(producer, channel, "", (), prunable=False)

    def _columns(self, path: str, before: Tensor, after: Tensor) -> tuple[int, ...]:
        """Return the input coordinates of a linear at which two runs differ."""
        changed = self._differs(before, after).movedim(_axis(self.linears[path]), 0)
        return tuple(changed.reshape(len(changed), -1).any(1).nonzero().flatten().tolist())

    def _differs(self, before: Tensor, after: Tensor) -> Tensor:
        if not before.is_floating_point():
            return before != after
        same = (before == after) | (before.isnan() & after.isnan())
        finite = before[before.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        return ~same & ~((before - after).abs() <= self.tolerance * (1e-3 + scale))

    def _hides(self, producer: str, channel: int, consumer: str, columns: tuple[int, ...]) -> bool:
        """Hold input coordinates at zero, with and without the disturbance, and compare what the model returns."""
        key = (consumer, columns)
        if key not in self._hidden:
            self._hidden[key] = self._run(zero=key).outputs
        quiet = self._hidden[key]
        loud = self._run(edit=self._disturb(producer, channel), limit=producer, zero=key).outputs
        if quiet.keys() != loud.keys():
            return False
        return self._same(quiet, loud) and not self._dead(producer, channel)

    def _dead(self, producer: str, channel: int) -> bool:
        """Tell whether nothing that the model returns depends on a channel: there is nothing to hide."""
        if producer not in self._read:
            loud = self._run(edit=self._disturb(producer, channel), limit=producer).outputs
            self._read[producer] = not self._same(self.plain.outputs, loud)
        return not self._read[producer]

    def _same(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
        """Tell whether two runs return the same."""
        if any(first[name].shape != second[name].shape for name in first):
            return False
        return not any(bool(self._differs(first[name], second[name]).any()) for name in first)

    def _disturb(self, producer: str, channel: int) -> Callable[[str, Tensor], Tensor]:
        """Return an edit of the producer's output: larger than what is there, of both signs."""

        def edit(path: str, value: Tensor) -> Tensor:
            value = value.clone()
            entry = value.select(_axis(self.linears[path]), channel)
            generator = torch.Generator().manual_seed(5)
            noise = torch.rand(entry.shape, generator=generator, dtype=torch.float64) * 2 - 1
            entry.add_(
                ((noise + noise.sign()) * (1 + float(entry.abs().max() if entry.numel() else 0))).to(value.dtype)
            )
            return value

        return edit

    def _run(
        self,
        edit: Callable[[str, Tensor], Tensor] | None = None,
        limit: str = "",
        zero: tuple[str, tuple[int, ...]] | None = None,
        *,
        stop: bool = False,
    ) -> _Seen:
        """Run the model; edit what one linear returns, and zero coordinates of what another one reads.

        With ``stop``, raise `_Arrived` at the first linear that reads something else than in the plain run.
        """
        seen = _Seen()
        handles = []
        plain = iter(self.plain.calls) if stop else iter(())

        def compare(path: str, value: Tensor) -> None:
            other, expected = next(plain, ("", value))
            if path != other or expected.shape != value.shape:
                raise _Arrived(path, (), 0)
            columns = self._columns(path, expected, value)
            if columns:
                raise _Arrived(path, columns, value.shape[_axis(self.linears[path])])

        def before(path: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
                value = args[0]
                if zero is not None and path == zero[0]:
                    value = value.clone()
                    index = torch.tensor(zero[1])
                    value.index_fill_(value.ndim + _axis(module), index, 0)
                    return (value, *args[1:])
                if stop:
                    compare(path, value)
                elif zero is None and edit is None:
                    seen.calls.append((path, value.detach().clone()))
                return None

            return hook

        for path, module in self.linears.items():
            handles.append(module.register_forward_pre_hook(before(path)))
            if edit is not None and path == limit:
                handles.append(module.register_forward_hook(lambda m, a, out, path=path: edit(path, out)))
        try:
            seen.outputs = outputs(self.model, self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return seen
