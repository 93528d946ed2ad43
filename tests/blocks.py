"""Blocks as vision libraries write them, small."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

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
        self.norm1, self.attn, self.ls1, self.drop_path1 = (
            nn.LayerNorm(D),
            FusedAttention(width),
            LayerScale(),
            nn.Identity(),
        )
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
        b, n, _ = x.shape
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
        self.w1, self.w3, self.w2 = (
            nn.Linear(D, F, bias=False),
            nn.Linear(D, F, bias=False),
            nn.Linear(F, D, bias=False),
        )

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


class Parallel(nn.Module):
    """Attention and feed-forward side by side, out of one linear and into one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.hidden = H, F
        self.norm, self.into, self.out = nn.LayerNorm(D), nn.Linear(D, F + 3 * H * E), nn.Linear(F + H * E, D)

    def forward(self, x: Tensor) -> Tensor:
        width = self.heads * E
        hidden, q, k, v = torch.split(self.into(self.norm(x)), [self.hidden, width, width, width], dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, E)).transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(torch.cat([functional.gelu(hidden), mixed], dim=-1))


class Reduced(nn.Module):
    """Keys and values from a coarser map; a depthwise convolution between the linears of the feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.sr, self.norm = H, nn.Conv2d(D, D, 2, 2), nn.LayerNorm(D)
        self.q, self.kv, self.proj = nn.Linear(D, H * E), nn.Linear(D, 2 * H * E), nn.Linear(H * E, D)
        self.fc1, self.dw, self.fc2 = nn.Linear(D, F), nn.Conv2d(F, F, 3, padding=1, groups=F), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        x, coarse = x.flatten(2).transpose(1, 2), self.norm(self.sr(x).reshape(b, c, -1).permute(0, 2, 1))
        q = self.q(x).reshape(b, -1, self.heads, E).permute(0, 2, 1, 3)
        k, v = self.kv(coarse).reshape(b, -1, 2, self.heads, E).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, -1)
        )
        y = self.fc1(x)
        y = self.dw(y.transpose(1, 2).view(b, y.shape[-1], height, width)).flatten(2).transpose(1, 2)
        return x + self.fc2(functional.gelu(y))
