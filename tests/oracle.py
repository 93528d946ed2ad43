"""The disturbance oracle: find out by experiment what follows a linear layer's output channel.

Disturb one output channel of one linear (the *producer*), run the real model, and see at which input coordinates of
which other linears (the *consumers*) the change arrives. Each arrival is undone on the spot, by putting the undisturbed
values back, so that what is seen further down came another way. If nothing is left to see, the channel and those
consumer columns are claimed to be all there is, and the claim is put to the test: with those columns held at zero, in a
disturbed and in an undisturbed run, the model's outputs must agree.

Nothing here knows about graphs, labels or shapes of architectures, and nothing is shared with the analysis it checks.

What the answer means: *this channel reaches the output through these columns alone*. It does not say what else writes
to those columns: the other half of a gated FFN, the value channels behind a query channel, or a residual stream that
cannot go at all. Ask their producers. Only linears that are called as modules are seen (``nn.MultiheadAttention`` never
calls its ``out_proj``), and only tensors in the model's output count (mappings, tuples and lists are searched, caches
are not).

All probes of one producer share a run: the inputs are stacked along the batch, one copy per channel and one that is not
disturbed. A model that does not keep the copies apart (its batch is not the leading axis, or rows meet, as in CLIP's
logits), gets a run per channel.

Shapes: B batch, S sequence, N probes in one run, C copies of the inputs in one run (1, or N + 1), I and O the input and
output width of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TOLERANCE = 1e-6
"""Smallest change that counts, relative to 1 + the largest undisturbed value. Real changes are above 1e-4 on all test
architectures; rounding may reach 1e-7, for models in float64 still compute norms and softmax in float32."""

Edit = Callable[[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Channel:
    """Say what one output channel of one linear reaches.

    Attributes:
        producer: Name of the linear.
        channel: Index of the output channel, in [0, O).
        consumers: Input coordinates of linears at which a change arrives, in execution order. What lies behind the
            first consumer that sees the change in *all* its coordinates is not looked at.
        prunable: Whether holding these columns at zero hides the channel from the model's output. Refused, too, where
            one consumer's calls see the change in different columns: its weight has only one set of columns.
        reason: Why, in words.
    """

    producer: str
    channel: int
    consumers: Mapping[str, frozenset[int]]
    prunable: bool
    reason: str


@dataclass
class _Probe:
    """Collect where one disturbed channel arrives: per linear, the columns of every call from the first arrival on."""

    channel: int
    calls: dict[str, list[frozenset[int]]] = field(default_factory=dict)
    blocked: str = ""

    def columns(self, name: str) -> frozenset[int]:
        return frozenset[int]().union(*self.calls.get(name, ()))

    def result(self, producer: str) -> Channel:
        consumers = {name: self.columns(name) for name in self.calls}
        through = ", ".join(f"{len(columns)} inputs of {name}" for name, columns in consumers.items())
        reason = self.blocked or f"reaches the output only through {through}"
        return Channel(producer, self.channel, consumers, not self.blocked, reason)


@dataclass(frozen=True)
class _Trail:
    """Hold an undisturbed run: every linear call's input in execution order, and the output tensors."""

    calls: tuple[tuple[str, Tensor], ...]
    output: tuple[Tensor, ...]


class _NotStackableError(ValueError):
    """Say that copies stacked along the batch do not stay apart in this model."""


def prunable_linears(model: nn.Module, inputs: Mapping[str, Tensor], *, probe: int = 3) -> dict[str, list[Channel]]:
    """Probe a few channels, evenly spread from the first to the last, of every linear that the model calls.

    Args:
        model: In eval mode and float64, with eager attention.
        inputs: Keyword arguments for ``forward``, batch leading, at least three tokens per row that are not padding.
        probe: Channels per linear (all of them where there are fewer).
    """
    trail = _observe(model, inputs)
    linears = _linears(model)
    result: dict[str, list[Channel]] = {}
    for name in dict.fromkeys(name for name, _ in trail.calls):
        spread = torch.linspace(0, _width(linears[name]) - 1, probe, dtype=torch.float64).round().long()
        result[name] = _disturb(model, inputs, name, sorted(set(spread.tolist())), trail)
    return result


def disturb(
    model: nn.Module, inputs: Mapping[str, Tensor], producer: str, channels: Sequence[int] | None = None
) -> list[Channel]:
    """Disturb output channels (default: all) of one linear, each on its own, and see what each one reaches.

    Raises:
        ValueError: The producer is not a linear that the model calls; the model is in training mode or not float64;
            its output is not finite; or which linears it calls depends on what was disturbed.
    """
    trail = _observe(model, inputs)
    called = list(dict.fromkeys(name for name, _ in trail.calls))
    if producer not in called:
        raise ValueError(f"{producer!r} is not a linear that the model calls; those are {called}")
    every = range(_width(_linears(model)[producer]))
    return _disturb(model, inputs, producer, every if channels is None else channels, trail)


def _disturb(
    model: nn.Module, inputs: Mapping[str, Tensor], producer: str, channels: Sequence[int], trail: _Trail
) -> list[Channel]:
    """Trace and test all channels in one stacked run, or in a run each if the model does not keep copies apart."""
    try:
        probes = _trace(model, inputs, producer, channels, trail)
    except _NotStackableError:
        if len(channels) == 1:
            raise
        return [found for one in channels for found in _disturb(model, inputs, producer, [one], trail)]
    _confirm(model, inputs, producer, [probe for probe in probes if not probe.blocked])
    return [probe.result(producer) for probe in probes]


def _trace(
    model: nn.Module, inputs: Mapping[str, Tensor], producer: str, channels: Sequence[int], trail: _Trail
) -> list[_Probe]:
    """Run the model once with copy n's channel n disturbed; note every arrival and undo it."""
    probes = [_Probe(channel) for channel in channels]
    count = _copies(channels)
    calls = iter(trail.calls)

    def arrive(name: str, x: Tensor) -> Tensor:
        expected, reference = next(calls, ("nothing", x))
        if expected != name:
            raise ValueError(f"disturbing {producer!r} changes what the model calls: {name!r} instead of {expected!r}")
        copies = _unstack(x, reference, count).clone()  # [C, B, ..., I]
        arrived = _reached(copies, reference, probes)  # [N, I]
        for probe, copy, columns in zip(probes, copies[: len(probes)], arrived, strict=True):
            if probe.blocked:
                continue
            found = frozenset(columns.nonzero().flatten().tolist())
            if found or name in probe.calls:
                probe.calls.setdefault(name, []).append(found)
            if len(found) == x.shape[-1]:
                probe.blocked = f"reaches all {len(found)} inputs of {name}"
            copy[..., columns] = reference[..., columns]
        return copies.reshape(x.shape)

    output = _run(model, inputs, count, arrive, _disturbance(producer, channels))
    _settle(probes, trail, [_unstack(o, reference, count) for o, reference in zip(output, trail.output, strict=True)])
    return probes


def _settle(probes: Sequence[_Probe], trail: _Trail, output: Sequence[Tensor]) -> None:
    """Decide which channels must stay: from the output, and from calls of a consumer that differ in their columns."""
    reached = torch.zeros(len(probes), dtype=torch.bool)
    for copies, reference in zip(output, trail.output, strict=True):
        reached |= _reached(copies[..., None], reference[..., None], probes).any(1)
    names = [name for name, _ in trail.calls]
    for probe, out in zip(probes, reached.tolist(), strict=True):
        uneven = [n for n, found in probe.calls.items() if len(found) != names.count(n) or len(set(found)) > 1]
        if probe.blocked:
            continue
        if out:
            probe.blocked = "reaches the output past every linear"
        elif uneven:
            probe.blocked = f"reaches other inputs, or none, in other calls of {uneven[0]}"
        elif not probe.calls:
            probe.blocked = "reaches nothing"


def _confirm(model: nn.Module, inputs: Mapping[str, Tensor], producer: str, probes: Sequence[_Probe]) -> None:
    """Hold each probe's consumer columns at zero in every call; a channel that still changes the output must stay."""
    if not probes:
        return

    channels = [probe.channel for probe in probes]
    count = _copies(channels)

    def hide(name: str, x: Tensor) -> Tensor:
        x = x.clone()
        for probe, copy in zip(probes, x.chunk(count), strict=False):
            copy[..., sorted(probe.columns(name))] = 0
        return x

    still = _run(model, inputs, count, hide, None)
    moved = _run(model, inputs, count, hide, _disturbance(producer, channels))
    for before, after in zip(still, moved, strict=True):
        changed = _differs(after, before)
        for probe, copy in zip(probes, changed.chunk(count) if count > 1 else [changed], strict=False):
            if copy.any():
                probe.blocked = "reaches the output although the columns that it reaches are zero"


def _disturbance(producer: str, channels: Sequence[int]) -> Edit:
    """Return the edit that adds a random vector over tokens to copy n's channel n of the producer's output.

    Every entry is larger than any undisturbed value, and both signs occur, so that no activation swallows all of them.
    """

    def add(name: str, y: Tensor) -> Tensor | None:
        if name != producer:
            return None
        y = y.clone()
        copies = y.chunk(_copies(channels))  # C times [B, ..., O]
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(copies[0].shape[:-1], generator=generator, dtype=torch.float64) * 2 - 1
        noise = (noise + noise.sign()) * (1 + y.abs().max())
        for channel, copy in zip(channels, copies, strict=False):
            copy[..., channel] += noise
        return y

    return add


def _copies(channels: Sequence[int]) -> int:
    """Return C: several channels share a run with an undisturbed copy, one channel has the run to itself."""
    return len(channels) + (len(channels) > 1)


def _reached(copies: Tensor, reference: Tensor, probes: Sequence[_Probe]) -> Tensor:
    """Say per probe and coordinate, ``[N, I]``, where ``copies``, ``[C, B, ..., I]``, differ from the undisturbed run.

    Raises:
        _NotStackableError: The copy that was not disturbed differs too.
    """
    changed = _differs(copies, reference).reshape(len(copies), -1, copies.shape[-1]).any(1)
    if changed[len(probes) :].any():
        raise _NotStackableError("a disturbance reaches the copy that was not disturbed")
    return changed[: len(probes)]


def _differs(value: Tensor, reference: Tensor) -> Tensor:
    """Say elementwise where values differ by more than rounding; NaN differs from everything."""
    return ~((value - reference).abs() <= TOLERANCE * (1 + reference.abs().max()))


def _unstack(value: Tensor, reference: Tensor, count: int) -> Tensor:
    """View ``[C * B, ...]`` as ``[C, B, ...]``, where the undisturbed run had ``[B, ...]``."""
    if count == 1 and value.shape == reference.shape:
        return value[None]
    if reference.dim() == 0 or value.shape != (count * reference.shape[0], *reference.shape[1:]):
        raise _NotStackableError(f"{tuple(value.shape)} is not {count} copies of {tuple(reference.shape)}")
    return value.view(count, *reference.shape)


def _observe(model: nn.Module, inputs: Mapping[str, Tensor]) -> _Trail:
    """Run the model undisturbed, once."""
    if model.training or any(p.is_floating_point() and p.dtype != torch.float64 for p in model.parameters()):
        raise ValueError("the oracle needs a model in eval mode and float64: call model.double().eval()")
    calls: list[tuple[str, Tensor]] = []
    output = _run(model, inputs, 1, lambda name, x: calls.append((name, x.clone())), None)
    if not all(value.isfinite().all() for value in output):
        raise ValueError("the undisturbed output is not finite; is a row fully masked?")
    return _Trail(tuple(calls), output)


def _run(
    model: nn.Module, inputs: Mapping[str, Tensor], count: int, before: Edit | None, after: Edit | None
) -> tuple[Tensor, ...]:
    """Run the model on ``count`` copies of the inputs, editing linear inputs and outputs; return its output tensors."""
    batch = next(iter(inputs.values())).shape[0]
    stacked = {k: torch.cat([v] * count) if v.shape[0] == batch else v for k, v in inputs.items()}
    with torch.no_grad(), _hooked(model, before, after):
        return tuple(_tensors(model(**stacked)))


@contextmanager
def _hooked(model: nn.Module, before: Edit | None, after: Edit | None) -> Iterator[None]:
    """Pass the input of every linear call through ``before`` and its output through ``after``; None changes nothing."""
    handles = []
    for name, linear in _linears(model).items():
        if before is not None:
            handles.append(linear.register_forward_pre_hook(lambda *call, n=name: before(n, call[1][0])))
        if after is not None:
            handles.append(linear.register_forward_hook(lambda *call, n=name: after(n, call[-1])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the floating point tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the leaf linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _width(linear: nn.Module) -> int:
    """Return O."""
    return linear.out_features if isinstance(linear, nn.Linear) else cast("Conv1D", linear).nf
