"""Blocks as diffusion libraries write them, and a perceiver with the same feed-forward, small."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocks import D, E, F, FusedAttention, H, Mlp


def waves(step: Tensor, width: int) -> Tensor:
    """Sinusoids of a time step.  (B,) -> (B, width)"""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, dtype=torch.float64, device=step.device) / (width // 2))
    angles = step[:, None] * rates[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


class Resnet(nn.Module):
    """Two convolutions with group norms in front; the time is added in between."""

    def __init__(self, width: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, width), nn.Conv2d(width, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out)
        self.norm2, self.dropout, self.conv2 = nn.GroupNorm(3, out), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = y + self.time_emb_proj(functional.silu(time))[:, :, None, None]
        y = self.conv2(self.dropout(functional.silu(self.norm2(y))))
        return (self.conv_shortcut(x) + y) / math.sqrt(2)


class CrossAttention(nn.Module):
    def __init__(self, context: int = D) -> None:
        super().__init__()
        self.heads = H
        self.to_q, self.to_k, self.to_v = (nn.Linear(w, H * E, bias=False) for w in (D, context, context))
        self.to_out = nn.ModuleList([nn.Linear(H * E, D), nn.Dropout(0.1)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        b, width = x.shape[0], k.shape[-1] // self.heads
        q, k, v = (part.view(b, -1, self.heads, width).transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = mixed.transpose(1, 2).reshape(b, -1, self.heads * width)
        for layer in self.to_out:
            x = layer(x)
        return x


class Geglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, 2 * F)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * functional.gelu(gate)


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Geglu(), nn.Dropout(0.1), nn.Linear(F, D)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Transformer2d(nn.Module):
    """Self-attention, cross attention and a gated feed-forward over the places of a map."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.linear, self.norm = linear, nn.GroupNorm(3, D)
        self.proj_in, self.proj_out = ((nn.Linear(D, D) if linear else nn.Conv2d(D, D, 1)) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))
        self.attn1, self.attn2, self.ff = CrossAttention(), CrossAttention(6), Feed()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, _, height, width = x.shape
        y = self.norm(x)
        if not self.linear:
            y = self.proj_in(y)
        c = y.shape[1]
        y = y.permute(0, 2, 3, 1).reshape(b, height * width, c)
        y = self.proj_in(y) if self.linear else y
        y = y + self.attn1(self.norm1(y))
        y = y + self.attn2(self.norm2(y), context)
        y = y + self.ff(self.norm3(y))
        y = self.proj_out(y) if self.linear else y
        y = y.reshape(b, height, width, c).permute(0, 3, 1, 2).contiguous()
        return x + (y if self.linear else self.proj_out(y))


class UnetStage(nn.Module):
    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(8, 14), nn.Linear(14, 9)
        self.resnet, self.attention = Resnet(4, D, 9), Transformer2d(linear)
        self.down = nn.Conv2d(D, D, 3, 2, 1)

    def forward(self, x: Tensor, step: Tensor, context: Tensor) -> Tensor:
        time = self.linear_2(functional.silu(self.linear_1(waves(step, 8))))
        return self.down(self.attention(self.resnet(x, time), context))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Dit(nn.Module):
    """Time and label choose the shifts, scales and gates of a block, and of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Linear(6, D), nn.Embedding(5, D)
        self.t_embedder = nn.Sequential(nn.Linear(8, 14), nn.SiLU(), nn.Linear(14, D))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D, elementwise_affine=False) for _ in range(3))
        self.attn, self.mlp = FusedAttention(), Mlp()
        self.ada, self.last = (nn.Sequential(nn.SiLU(), nn.Linear(D, n * D)) for n in (6, 2))
        self.linear = nn.Linear(D, 6)

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        x, c = self.x_embedder(x), self.t_embedder(waves(step, 8)) + self.y_embedder(label)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return self.linear(modulate(self.norm3(x), *self.last(c).chunk(2, dim=1)))


class MmDit(nn.Module):
    """Image and text have projections of their own and attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = H
        self.qkv, self.add_qkv = (nn.ModuleList(nn.Linear(D, H * E) for _ in range(3)) for _ in range(2))
        self.norm_q, self.norm_k = nn.RMSNorm(E), nn.RMSNorm(E)
        self.to_out, self.to_add_out, self.ff, self.ff_context = nn.Linear(H * E, D), nn.Linear(H * E, D), Mlp(), Mlp()
        self.ada, self.ada_context = (nn.Linear(D, 4 * D) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, out = self.ada(functional.silu(c)).chunk(4, dim=1)
        shift_, scale_, gate_, out_ = self.ada_context(functional.silu(c)).chunk(4, dim=1)
        y, z = modulate(x, shift, scale), modulate(text, shift_, scale_)
        q, k, v = (
            torch.cat([f(p).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, p in ((add, z), (own, y))], dim=2)
            for own, add in zip(self.qkv, self.add_qkv, strict=True)
        )
        mixed = functional.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v).transpose(1, 2).flatten(2)
        text = text + gate_.unsqueeze(1) * self.to_add_out(mixed[:, : text.shape[1]])
        x = x + gate.unsqueeze(1) * self.to_out(mixed[:, text.shape[1] :])
        return x + out.unsqueeze(1) * self.ff(x), text + out_.unsqueeze(1) * self.ff_context(text)


class PerceiverAttention(nn.Module):
    """Keys and values in one linear; batch and heads in one axis."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.heads, self.to_q = H, nn.Linear(D, H * E, bias=False)
        self.to_kv, self.to_out = nn.Linear(context, 2 * H * E, bias=False), nn.Linear(H * E, D)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.heads
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (p.view(*p.shape[:2], h, -1).permute(0, 2, 1, 3).reshape(-1, p.shape[1], E) for p in (q, k, v))
        weights = torch.einsum("bid,bjd->bij", q, k).mul(E**-0.5).softmax(dim=-1)
        mixed = torch.einsum("bij,bjd->bid", weights, v).view(x.shape[0], h, x.shape[1], E)
        return self.to_out(mixed.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], -1))


class Perceiver(nn.Module):
    """Latents that are parameters read the inputs, then each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.norms = nn.Parameter(torch.zeros(5, D)), nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.cross, self.own, self.ff1, self.ff2 = PerceiverAttention(6), PerceiverAttention(D), Feed(), Feed()

    def forward(self, data: Tensor) -> Tensor:
        x = self.latents.unsqueeze(0).repeat(data.shape[0], 1, 1)
        x = x + self.cross(self.norms[0](x), data)
        x = x + self.ff1(self.norms[1](x))
        y = self.norms[2](x)
        x = x + self.own(y, y)
        return (x + self.ff2(self.norms[3](x))).mean(1)


class ScaleShift(nn.Module):
    """The time scales and shifts what a group norm returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(D, F, 3, padding=1), nn.Conv2d(F, D, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(5, F), nn.Linear(9, 2 * F)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(functional.silu(time))[:, :, None, None].chunk(2, dim=1)
        return x + self.conv2(functional.silu(self.norm(self.conv1(functional.silu(x))) * (1 + scale) + shift))
