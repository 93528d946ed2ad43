"""Blocks as vision and diffusion libraries write them: what is found is named, and both forms equal the masked model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxslim

from agreement import EXACT, difference, outputs, random_plan

D, H, E, F = 12, 3, 4, 10
"""Model width, heads, head width, hidden width."""


class Mlp(nn.Module):
    def __init__(self, width: int = D, hidden: int = F) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2 = nn.Identity(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))


class SwiGlu(nn.Module):
    """Gate and value from linears of their own, and a norm over the hidden channels if asked for."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x, self.fc2 = nn.Linear(D, F), nn.Linear(D, F), nn.Linear(F, D)
        self.norm = nn.LayerNorm(F) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(functional.silu(self.fc1_g(x)) * self.fc1_x(x)))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class FusedAttention(nn.Module):
    """One linear for queries, keys and values, which are unbound; ``width`` says where the output's width is from."""

    def __init__(self, width: str = "own") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.width = H, E, H * E, width
        self.qkv, self.proj = nn.Linear(D, 3 * H * E), nn.Linear(H * E, D)
        self.q_norm, self.k_norm = nn.LayerNorm(E), nn.LayerNorm(E)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2)
        return self.proj(mixed.reshape(b, n, self.attn_dim if self.width == "own" else c))


class VitBlock(nn.Module):
    def __init__(self, mlp: nn.Module, width: str = "own") -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = nn.LayerNorm(D), FusedAttention(width), LayerScale(), nn.Identity()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(D), mlp, LayerScale(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Vit(nn.Module):
    """Patches, a class token, positions, blocks."""

    def __init__(self, mlp: Callable[[], nn.Module] = Mlp, width: str = "own") -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, D, 2, 2)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.zeros(1, 5, D))
        self.blocks = nn.Sequential(*(VitBlock(mlp(), width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = self.proj(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def windows(x: Tensor, side: int) -> Tensor:
    b, height, width, c = x.shape
    x = x.view(b, height // side, side, width // side, side, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, side * side, c)


class WindowAttention(nn.Module):
    """Scores plus a table of relative positions plus a mask for every window."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, E**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * heads * E), nn.Linear(heads * E, width)
        self.table = nn.Parameter(torch.zeros(9, heads))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None] + 1
        self.register_buffer("index", offset[0] * 3 + offset[1])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        many, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(many, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()  # type: ignore[operator]
        attn = attn + bias.unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            attn = attn.view(many // count, count, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, n, n)
        return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(many, n, -1))


class SwinBlock(nn.Module):
    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.norm1, self.norm2 = shift, nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = WindowAttention(D, H), Mlp()
        mask = None
        if shift:
            row = torch.tensor([0, 0, 1, 2])
            region = windows((row[:, None] * 3 + row).view(1, 4, 4, 1), 2).squeeze(-1)
            mask = (region[:, None] - region[:, :, None] != 0) * -100.0
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        b, height, width, c = x.shape
        y = self.norm1(x)
        y = torch.roll(y, (-self.shift, -self.shift), (1, 2)) if self.shift else y
        y = self.attn(windows(y, 2), self.attn_mask).view(-1, 2, 2, c)
        y = y.view(b, height // 2, width // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, height, width, c)
        x = x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """A plain and a shifted block, then four neighbours merged into one place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([SwinBlock(0), SwinBlock(1)])
        self.norm, self.reduction = nn.LayerNorm(4 * D), nn.Linear(4 * D, 2 * D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x))


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


class Mixer(nn.Module):
    """One MLP over the tokens, one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens, self.norm2, self.channels = nn.LayerNorm(D), Mlp(7, 8), nn.LayerNorm(D), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Grn(nn.Module):
    """Scale every channel by its norm over the map, relative to the mean over all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(F)), nn.Parameter(torch.zeros(F))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(1, 2), keepdim=True)
        return x + torch.addcmul(self.bias, self.weight, x * (size / (size.mean(-1, keepdim=True) + 1e-6)))


class ConvNext(nn.Module):
    def __init__(self, conv: bool = False, grn: bool = False) -> None:
        super().__init__()
        self.conv, self.conv_dw, self.norm = conv, nn.Conv2d(D, D, 7, padding=3, groups=D), nn.LayerNorm(D)
        self.fc1, self.fc2 = (nn.Conv2d(a, b, 1) if conv else nn.Linear(a, b) for a, b in ((D, F), (F, D)))
        self.grn, self.gamma = Grn() if grn else nn.Identity(), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = y.permute(0, 3, 1, 2) if self.conv else y
        y = self.fc2(self.grn(functional.gelu(self.fc1(y))))
        y = y if self.conv else y.permute(0, 3, 1, 2)
        return x + y * self.gamma.reshape(1, -1, 1, 1)


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


class MbConv(nn.Module):
    """Widen, convolve every channel, weigh the channels by what they hold, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(D, F, 1, bias=False), nn.BatchNorm2d(F)
        self.conv_dw, self.bn2 = nn.Conv2d(F, F, 3, padding=1, groups=F, bias=False), nn.BatchNorm2d(F)
        self.reduce, self.expand = nn.Conv2d(F, 5, 1), nn.Conv2d(5, F, 1)
        self.conv_pwl, self.bn3 = nn.Conv2d(F, D, 1, bias=False), nn.BatchNorm2d(D)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(self.bn1(self.conv_pw(x)))
        y = functional.silu(self.bn2(self.conv_dw(y)))
        y = y * self.expand(functional.silu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.bn3(self.conv_pwl(y))


class Gmlp(nn.Module):
    """Half of the channels, mixed over the tokens, gate the other half."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, 2 * F), nn.Linear(F, D)
        self.gate_norm, self.places = nn.LayerNorm(F) if norm else nn.Identity(), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        u, v = functional.gelu(self.fc1(self.norm(x))).chunk(2, dim=-1)
        return x + self.fc2(u * self.places(self.gate_norm(v).transpose(-1, -2)).transpose(-1, -2))


class TalkingHeads(nn.Module):
    """Heads are mixed before and after the softmax, by linears over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = H, E**-0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(D, D) for _ in range(4))
        self.proj_l, self.proj_w = nn.Linear(H, 5), nn.Linear(5, H)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).reshape(b, n, -1, E).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        attn = self.proj_l((q * self.scale @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = self.proj_w(attn.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


class ClassAttention(nn.Module):
    """Only the class token asks."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.norm = H, nn.LayerNorm(D)
        self.q, self.k, self.v, self.proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.norm(x)
        q = self.q(y[:, 0]).unsqueeze(1).reshape(b, 1, self.num_heads, E).permute(0, 2, 1, 3)
        k, v = (f(y).reshape(b, n, self.num_heads, E).permute(0, 2, 1, 3) for f in (self.k, self.v))
        token = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 1, self.num_heads * E)
        return torch.cat([x[:, :1] + self.proj(token), x[:, 1:]], dim=1)


class Einsums(nn.Module):
    """Projections with heads as an axis of the weight, rotary angles, shared keys, a gated feed-forward."""

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.wq, self.wo = nn.Parameter(torch.zeros(D, 4, E)), nn.Parameter(torch.zeros(4, E, D))
        self.wk, self.wv = (nn.Parameter(torch.zeros(D, shared, E)) for _ in range(2))
        self.norm1, self.norm2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.w1, self.w3, self.w2 = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), 0.5 ** torch.arange(E // 2, dtype=x.dtype))
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rms(x, self.norm1)
        q, k, v = (torch.einsum("btd,dhe->bthe", y, w) for w in (self.wq, self.wk, self.wv))
        q, k = self.turn(q), self.turn(k)
        k, v = (torch.repeat_interleave(p, q.shape[2] // p.shape[2], dim=2) for p in (k, v))
        scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(E)
        scores = scores + torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1)
        x = x + torch.einsum("bhts,bshe,hed->btd", scores.softmax(-1), v, self.wo)
        y = self.rms(x, self.norm2)
        return x + self.w2(functional.silu(self.w1(y)) * self.w3(y))


def drawn(seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)


def tokens(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, length, D))


def seven(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, 7, D))


def images(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, 3, 4, 4))


def maps(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, D, 6, 5))


def places(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, 4, 4, D))


def unet(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    x, context = drawn(seed, (batch, 4, 4, 6), (batch, length, 6))
    return x, torch.arange(1, batch + 1).double() * 7, context


def steps(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return *drawn(seed, (batch, length, 6)), torch.arange(1, batch + 1).double() * 7, torch.arange(batch) % 5


def streams(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, length, D), (batch, 3, D), (batch, D))


@dataclass(frozen=True)
class Case:
    """A model, its inputs for a batch and a length, ``kind units[/groups]`` of its sites, how many the module keeps."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]
    sites: tuple[str, ...]
    zeroed: int = 0


CASES: dict[str, Case] = {
    "vit": Case(Vit, images, ("attention 3", "ffn 10") * 2),
    "vit, width of the input": Case(lambda: Vit(width="input"), images, ("attention 3", "ffn 10") * 2, 2),
    "eva": Case(lambda: Vit(lambda: SwiGlu(False)), images, ("attention 3", "gated_ffn 10") * 2),
    "eva, a norm over hidden channels": Case(lambda: Vit(lambda: SwiGlu(True)), images, ("attention 3",) * 2),
    "swin": Case(Swin, places, ("attention 3", "ffn 10") * 2),
    "unet, convolutions": Case(lambda: UnetStage(False), unet, ("ffn 14", "ffn 9", "generic 3", "generic 3", "attention 3", "attention 3", "gated_ffn 10")),
    "unet, linears": Case(lambda: UnetStage(True), unet, ("ffn 14", "ffn 9", "generic 3", "generic 3", "attention 3", "attention 3", "gated_ffn 10")),
    "mixer": Case(Mixer, seven, ("ffn 8", "ffn 10")),
    "convnext": Case(ConvNext, maps, ("ffn 10",)),
    "convnext, convolutions": Case(lambda: ConvNext(conv=True), maps, ("ffn 10",)),
    "convnext v2": Case(lambda: ConvNext(grn=True), maps, ()),
    "dit": Case(Dit, steps, ("ffn 14", "generic 12", "attention 3", "ffn 10")),
    "mm-dit": Case(MmDit, streams, ("attention 3", "ffn 10", "ffn 10")),
    "perceiver": Case(Perceiver, lambda b, n, s: drawn(s, (b, n, 6)), ("attention 3", "gated_ffn 10") * 2),
    "mbconv": Case(MbConv, maps, ("generic 10", "ffn 5")),
    "gmlp": Case(lambda: Gmlp(False), seven, ("gated_ffn 10",)),
    "gmlp, a norm of the gate": Case(lambda: Gmlp(True), seven, ()),
    "talking heads": Case(TalkingHeads, tokens, ("generic 3", "generic 5", "generic 12/3"), 1),
    "class attention": Case(ClassAttention, tokens, ("attention 3",)),
    "einsums": Case(lambda: Einsums(4), tokens, ("generic 4", "generic 4", "gated_ffn 10")),
    "einsums, shared keys": Case(lambda: Einsums(2), tokens, ("generic 4/2", "generic 4", "gated_ffn 10")),
}


def built(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.build().double().eval()
        for tensor in model.parameters():
            nn.init.normal_(tensor, std=0.5 if tensor.ndim > 1 else 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def written(found: fxslim.Inspection) -> tuple[str, ...]:
    return tuple(f"{s.kind} {s.units}" + (f"/{s.group_count}" if s.groups is not None else "") for s in found.sites)


@pytest.mark.parametrize("name", CASES)
def test_both_forms_compute_what_the_masked_model_does(name: str) -> None:
    case = CASES[name]
    model, given = built(case), case.inputs(2, 6, 0)
    found = fxslim.inspect(model, given)
    assert written(found) == case.sites
    assert found.pinned  # what stays says why
    plan = random_plan(model, found.sites, seed=1)
    small, graph = fxslim.slim(model, given, plan=plan), fxslim.compile(model, given, plan=plan)
    assert len(small.fxslim.plan.zeroed) == case.zeroed
    for other in (given, case.inputs(1, 5, 1), case.inputs(4, 9, 2)):
        with fxslim.masked(model, plan):
            expected = outputs(model, other)
        assert difference(expected, outputs(model, other)) > 1e-3 or not case.sites
        for form in (small, graph):
            assert difference(expected, outputs(form, other)) < EXACT
