"""Small stacks of every layer that fxslim promises to narrow, with the sites that must be found in them.

A layer's specification is a frozen value, so that hypothesis can draw it; ``build`` makes a float64 module of it. The
specification says by itself, without any graph, which tensors follow which units: that is what tests compare with.

Shapes: B batch, S sequence, D model width, F hidden width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "tanh gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "shifted": lambda x: torch.cos(x) + 1.0,
}
"""Several of them are not zero at zero, so that masking producers' rows instead of consumers' inputs would show."""

Form = Literal["by hand", "sdpa", "einsum"]
Share = Literal["expand", "repeat_interleave", "enable_gqa"]
Layout = Literal["apart", "contiguous", "interleaved"]


@dataclass(frozen=True)
class Feed:
    """Feed-forward: ``gates`` further projections multiply the hidden value."""

    hidden: int = 5
    gates: int = 0
    activation: str = "gelu"
    dropout: bool = False
    bias: bool = True
    scale: bool = False

    def build(self, width: int) -> nn.Module:
        """Return the layer."""
        return FeedForward(self, width)

    @property
    def units(self) -> int:
        """Return how many units the layer's site has."""
        return self.hidden

    @property
    def groups(self) -> int:
        """Return in how many groups equally many units stay; as many as units where they are free."""
        return self.hidden

    def rows(self) -> dict[str, tuple[int, str, list[list[int]]]]:
        """Return tensor -> dimension, role, rows of each unit."""
        own = [[unit] for unit in range(self.hidden)]
        found = {f"up.{i}.weight": (0, "out", own) for i in range(self.gates + 1)}
        if self.bias:
            found |= {f"up.{i}.bias": (0, "out", own) for i in range(self.gates + 1)}
        if self.scale:
            found["scale"] = (0, "out", own)
        return found | {"down.weight": (1, "in", own)}


class FeedForward(nn.Module):
    """down(act(up_0 x) * up_1 x * ...)"""

    def __init__(self, spec: Feed, width: int) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(width, spec.hidden, bias=spec.bias) for _ in range(spec.gates + 1)])
        self.down = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]
        self.dropout = nn.Dropout(0.5) if spec.dropout else nn.Identity()
        self.scale = nn.Parameter(torch.ones(spec.hidden)) if spec.scale else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.up[0](x))
        for gate in self.up[1:]:
            hidden = hidden * gate(x)
        if self.scale is not None:
            hidden = hidden * self.scale
        down: Tensor = self.down(self.dropout(hidden))
        return down


@dataclass(frozen=True)
class Attend:
    """Attention: ``per_group`` query heads for each of ``groups_`` key/value heads."""

    kv: int = 2
    per_group: int = 1
    head: int = 2
    form: Form = "sdpa"
    share: Share = "expand"
    layout: Layout = "apart"
    cross: bool = False
    bias: bool = True

    def build(self, width: int) -> nn.Module:
        """Return the layer."""
        return Attention(self, width)

    @property
    def units(self) -> int:
        """Return the number of query heads."""
        return self.kv * self.per_group

    @property
    def groups(self) -> int:
        """Return the number of key/value heads."""
        return self.kv

    def rows(self) -> dict[str, tuple[int, str, list[list[int]]]]:
        """Return tensor -> dimension, role, rows of each query head (a shared key/value head appears several times)."""
        wide, e, kv = self.units, self.head, self.kv

        def span(start: int) -> list[int]:
            return list(range(start, start + e))

        shared = [unit // self.per_group for unit in range(wide)]
        queries = [span(unit * e) for unit in range(wide)]
        names = ("weight", "bias") if self.bias else ("weight",)
        out: dict[str, tuple[int, str, list[list[int]]]] = {"o.weight": (1, "in", queries)}
        if self.layout == "apart":
            for name in names:
                out[f"q.{name}"] = (0, "out", queries)
                out[f"k.{name}"] = out[f"v.{name}"] = (0, "out", [span(group * e) for group in shared])
            return out
        if self.layout == "contiguous":
            rows = [[*queries[u], *span((wide + g) * e), *span((wide + kv + g) * e)] for u, g in enumerate(shared)]
        else:  # for every key/value head: its query heads, its key, its value
            block = (self.per_group + 2) * e
            rows = [
                [*span(g * block + (u % self.per_group) * e), *range((g + 1) * block - 2 * e, (g + 1) * block)]
                for u, g in enumerate(shared)
            ]
        return out | {f"qkv.{name}": (0, "out", rows) for name in names}


class Attention(nn.Module):
    """Attention written by hand; whole-number sizes are attributes, as in most models."""

    def __init__(self, spec: Attend, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.heads, self.kv, self.group, self.head = spec.units, spec.kv, spec.per_group, spec.head
        inner = spec.head
        if spec.layout == "apart":
            self.q = nn.Linear(width, spec.units * inner, bias=spec.bias)
            self.k = nn.Linear(width, spec.kv * inner, bias=spec.bias)
            self.v = nn.Linear(width, spec.kv * inner, bias=spec.bias)
        else:
            self.qkv = nn.Linear(width, (spec.units + 2 * spec.kv) * inner, bias=spec.bias)
        self.o = nn.Linear(spec.units * inner, width, bias=spec.bias)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = self._project(x, x if memory is None else memory)
        mixed = self._mix(q, k, v)
        out: Tensor = self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return out

    def _project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, (B, heads, S, E)."""
        if self.spec.layout == "apart":
            return tuple(y.unflatten(-1, (-1, self.head)).transpose(1, 2)
                         for y in (self.q(x), self.k(memory), self.v(memory)))  # type: ignore[return-value] # fmt: skip
        fused = self.qkv(x)
        if self.spec.layout == "contiguous":
            sizes = [self.heads * self.head, self.kv * self.head, self.kv * self.head]
            return tuple(y.unflatten(-1, (-1, self.head)).transpose(1, 2)
                         for y in fused.split(sizes, -1))  # type: ignore[return-value] # fmt: skip
        grouped = fused.view(x.shape[0], x.shape[1], -1, self.group + 2, self.head)
        q, k, v = grouped[..., : self.group, :], grouped[..., self.group, :], grouped[..., self.group + 1, :]
        return q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _shared(self, x: Tensor) -> Tensor:
        """Repeat key/value heads for their query heads."""
        if self.spec.per_group == 1:
            return x
        if self.spec.share == "repeat_interleave":
            return x.repeat_interleave(self.group, 1)
        b, k, s, e = x.shape
        return x[:, :, None].expand(b, k, self.group, s, e).reshape(b, k * self.group, s, e)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spec.form == "sdpa":
            if self.spec.share == "enable_gqa" and self.spec.per_group > 1:
                return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return functional.scaled_dot_product_attention(q, self._shared(k), self._shared(v))
        k, v = self._shared(k), self._shared(v)
        if self.spec.form == "by hand":
            return ((q @ k.transpose(-1, -2)) * self.head**-0.5).softmax(-1) @ v
        scores = torch.einsum("bhse,bhte->bhst", q, k) * self.head**-0.5
        return torch.einsum("bhst,bhte->bhse", scores.softmax(-1), v)


Layer = Feed | Attend


@dataclass(frozen=True)
class Stack:
    """A stack of layers, each with or without a residual stream and a norm in front."""

    layers: tuple[Layer, ...]
    width: int = 4
    residual: bool = True
    norm: bool = True

    def build(self, seed: int = 0) -> nn.Module:
        """Return a float64 module in eval mode with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Stacked(self).double().eval()
            for parameter in made.parameters():
                nn.init.normal_(parameter, std=0.6)
        return made

    def inputs(self, batch: int = 2, length: int = 5, seed: int = 0) -> Tensor:
        """Return an input, (B, S, D)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.width, generator=generator, dtype=torch.float64)

    def rows(self, layer: int) -> dict[str, tuple[int, str, list[list[int]]]]:
        """Return full tensor name -> dimension, role, rows of each unit of a layer's site."""
        return {f"layers.{layer}.{name}": found for name, found in self.layers[layer].rows().items()}


class Stacked(nn.Module):
    """Layers one after the other; cross attention reads the stack's input."""

    def __init__(self, spec: Stack) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList([layer.build(spec.width) for layer in spec.layers])
        self.norms = nn.ModuleList([nn.LayerNorm(spec.width) if spec.norm else nn.Identity() for _ in spec.layers])

    def forward(self, x: Tensor) -> Tensor:
        memory = x.cos()
        for spec, layer, norm in zip(self.spec.layers, self.layers, self.norms, strict=True):
            more: Any = (memory,) if isinstance(spec, Attend) and spec.cross else ()
            y = layer(norm(x), *more)
            x = x + y if self.spec.residual else y
        return x
