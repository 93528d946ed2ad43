"""An oracle: which linears could lose an output channel, found by disturbing one and running the real model.

If the first later linear that sees the disturbance sees it in part of its input coordinates only, and holding those
coordinates at what they were hides it from whatever the model returns, the channel can be taken out. Graphs, labels and
shapes of architectures play no part.

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
        prunable: whether the channel reaches the model's output, and by no other way.
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


Arrival = tuple[str, tuple[int, ...], int]
"""The linear at which a disturbance arrives, and at which of how many input coordinates."""


def _in_part(arrived: Arrival) -> bool:
    """Tell whether a disturbance arrives at some of a linear's input coordinates, and not at all of them."""
    return 0 < len(arrived[1]) < arrived[2]


class _EverywhereError(Exception):
    """A disturbance does not arrive in part, so that nothing that comes later matters."""


@dataclass
class _Seen:
    """What happened in a run.

    Attributes:
        calls: the linears' inputs, in order of calls, of a run that is not compared with another.
        arrived: the first linear that read something else than in the run it is compared with, at which of how many
            input coordinates: at none where other calls were made.
        outputs: what the model returned; None where it failed, or was not run to its end.
    """

    calls: list[tuple[str, Tensor]] = field(default_factory=list)
    arrived: Arrival | None = None
    outputs: dict[str, Tensor] | None = field(default_factory=dict)


class Oracle:
    """Disturbs channels of one model on one set of inputs."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.linears = linears(model)
        self.tolerance = TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]
        self.plain = _Seen()
        self.plain = self._run()
        self.called = list(dict.fromkeys(path for path, _ in self.plain.calls))

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
        """Disturb a channel, see which linear reads it first, and ask whether it reaches the output past that one."""
        edit = self._disturb(producer, channel)
        loud = self._run(edit, producer)
        path, columns, _ = arrived = loud.arrived or ("", (), 0)
        prunable = _in_part(arrived) and not self._same(loud.outputs)
        if prunable:
            prunable = self._same(self._run(edit, producer, hold=(path, columns)).outputs)
        return Probe(producer, channel, path, columns, prunable=prunable)

    def _columns(self, path: str, before: Tensor, after: Tensor) -> tuple[int, ...]:
        """Return the input coordinates of a linear at which two runs differ."""
        if torch.equal(before, after):  # as everywhere before the producer
            return ()
        changed = self._differs(before, after).movedim(_axis(self.linears[path]), 0)
        return tuple(changed.reshape(len(changed), -1).any(1).nonzero().flatten().tolist())

    def _differs(self, before: Tensor, after: Tensor) -> Tensor:
        if not before.is_floating_point():
            return before != after
        same = (before == after) | (before.isnan() & after.isnan())
        finite = before[before.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        return ~same & ~((before - after).abs() <= self.tolerance * (1e-3 + scale))

    def _same(self, other: Mapping[str, Tensor] | None) -> bool:
        """Tell whether a run returned what the plain one did."""
        plain = self.plain.outputs
        assert plain is not None
        if other is None or any(name not in other or other[name].shape != plain[name].shape for name in plain):
            return False
        return not any(bool(self._differs(plain[name], other[name]).any()) for name in plain)

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
        hold: tuple[str, tuple[int, ...]] | None = None,
    ) -> _Seen:
        """Run the model; edit what one linear returns, and hold coordinates of what another one reads as they were."""
        seen = _Seen()
        handles = []
        plain = iter(self.plain.calls if edit is not None else ())

        def compare(path: str, value: Tensor) -> None:
            other, expected = next(plain, ("", value))
            if path != other or expected.shape != value.shape:
                seen.arrived = (path, (), 0)
            elif columns := self._columns(path, expected, value):
                seen.arrived = (path, columns, value.shape[_axis(self.linears[path])])
            if seen.arrived is not None and not _in_part(seen.arrived):
                raise _EverywhereError

        held = iter([value for path, value in self.plain.calls if path == hold[0]] if hold is not None else ())

        def before(path: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
                value = args[0]
                if edit is None:
                    seen.calls.append((path, value.detach().clone()))
                elif hold is None and seen.arrived is None:
                    compare(path, value)
                elif hold is not None and path == hold[0]:
                    index, axis = torch.tensor(hold[1]), value.ndim + _axis(module)
                    return (value.index_copy(axis, index, next(held).index_select(axis, index)), *args[1:])
                return None

            return hook

        for path, module in self.linears.items():
            if hold is None or path == hold[0]:
                handles.append(module.register_forward_pre_hook(before(path)))
            if edit is not None and path == limit:
                handles.append(module.register_forward_hook(lambda m, a, out, path=path: edit(path, out)))
        try:
            seen.outputs = outputs(self.model, self.inputs)
        except Exception:
            if edit is None:
                raise
            seen.outputs = None  # what was disturbed may lead where the model cannot go
        finally:
            for handle in handles:
                handle.remove()
        return seen
