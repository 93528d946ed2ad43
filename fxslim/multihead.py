"""``nn.MultiheadAttention`` with some of its heads.

Torch's own forward splits its projections by ``embed_dim // num_heads``, so it cannot run on narrowed weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fxslim.errors import InputError

Maybe = Tensor | None


def is_narrowable(module: nn.Module) -> bool:
    """Tell whether a module is torch's attention, or ours, and no subclass with a forward of its own."""
    return type(module) in (nn.MultiheadAttention, NarrowedMultiheadAttention)


def keep_heads(module: nn.Module, keep: tuple[int, ...]) -> None:
    """Let an attention whose tensors are narrowed compute with the heads that they still hold, in place."""
    if not isinstance(module, NarrowedMultiheadAttention):
        assert isinstance(module, nn.MultiheadAttention)
        module.__class__ = NarrowedMultiheadAttention
        assert isinstance(module, NarrowedMultiheadAttention)
        module.dense_heads = module.num_heads
        module.kept_heads = tuple(range(module.num_heads))
        module._qkv_same_embed_dim = False
    module.kept_heads = tuple(module.kept_heads[head] for head in keep)
    module.num_heads = len(keep)


class NarrowedMultiheadAttention(nn.MultiheadAttention):
    """Torch's attention with H' of its H heads, under the same tensor names.

    ``in_proj_weight`` is (3*H'*E, D), or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` are (H'*E, ...);
    ``in_proj_bias`` is (3*H'*E), ``bias_k`` and ``bias_v`` are (1, 1, H'*E), ``out_proj.weight`` is (D, H'*E).

    The fused layers of ``nn.TransformerEncoderLayer`` cannot run such weights: they are only taken where
    ``_qkv_same_embed_dim`` is true, so that it is false here. An encoder that packs padded rows into a nested tensor
    still does so.

    Attributes:
        dense_heads: H, the heads of the attention that this one was made of.
        kept_heads: which of them are left, in ascending order; ``num_heads`` is their number.
    """

    dense_heads: int
    kept_heads: tuple[int, ...]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Maybe = None,
        need_weights: bool = True,
        attn_mask: Maybe = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Maybe]:
        """Attend as ``nn.MultiheadAttention.forward`` does, with the heads that are left.

        Args:
            query: (L, B, D), (B, L, D) if ``batch_first``, or (L, D).
            key: (S, B, Dk), (B, S, Dk) or (S, Dk).
            value: (S, B, Dv), (B, S, Dv) or (S, Dv).
            key_padding_mask: (B, S) or (S), bool (True is left out) or added to the scores.
            need_weights: whether to return the weights.
            attn_mask: (L, S), or a mask for each head, (B*H, L, S) or (B*H', L, S); bool or added to the scores. Rows
                for all H heads are gathered.
            average_attn_weights: whether to average the weights over heads, which means the H' heads that are left.
            is_causal: whether ``attn_mask`` is the causal mask.

        Returns:
            The output, shaped like the query, and the weights (B, L, S) or (B, H', L, S), or None.

        Raises:
            InputError: shapes or dtypes do not fit.
        """
        if query.is_nested:
            if key is not query or value is not query or key_padding_mask is not None or attn_mask is not None:
                raise InputError("a nested tensor can only attend to itself, without masks.")
            return self._nested(query)
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise InputError(f"expected 2-D or 3-D inputs, got {[tuple(t.shape) for t in (query, key, value)]}.")
        if is_causal and attn_mask is None:
            raise InputError("is_causal says that attn_mask is the causal mask, and there is no attn_mask.")
        batched = query.dim() == 3
        batch_axis = 0 if self.batch_first and batched else 1
        query_, key_, value_ = (t if batched else t.unsqueeze(1) for t in (query, key, value))
        q, k, v = (self._split(t, batch_axis) for t in self._project(query_, key_, value_))
        hinted = is_causal and key_padding_mask is None and not need_weights
        padding = key_padding_mask if key_padding_mask is None or batched else key_padding_mask.unsqueeze(0)
        bias = self._bias(None if hinted else attn_mask, padding, q)
        k, v, bias = self._extended(k, v, bias)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = _weights(q, k, bias, dropout)
            context = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            context = F.scaled_dot_product_attention(q, k, v, bias, dropout, hinted)
        joined = context.permute(*((0, 2) if batch_axis == 0 else (2, 0)), 1, 3).flatten(2)
        out = F.linear(joined, self.out_proj.weight, self.out_proj.bias)
        if batched:
            return out, weights
        return out.squeeze(1), None if weights is None else weights.squeeze(0)

    def extra_repr(self) -> str:
        """Say how many heads are left."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads} of {self.dense_heads}, head_dim={self.head_dim}"

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values of all heads.  (..., D) -> 3 x (..., H'*E)"""
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases: tuple[Maybe, ...] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))

    def _split(self, projected: Tensor, batch_axis: int) -> Tensor:
        """Bring heads to the front.  (B, L, H'*E) or (L, B, H'*E) -> (B, H', L, E)"""
        heads = projected.unflatten(-1, (self.num_heads, self.head_dim))
        moved: Tensor = heads.permute(batch_axis, 2, 1 - batch_axis, 3)
        return moved

    def _bias(self, attn_mask: Maybe, padding: Maybe, q: Tensor) -> Maybe:
        """Return what both masks add to the scores.  (1 or B, 1 or H', 1 or L, S), or None"""
        bias = None if attn_mask is None else self._per_head(_added(attn_mask, q.dtype, "attn_mask"), q.shape[0])
        if padding is None:
            return bias
        kept = _added(padding, q.dtype, "key_padding_mask")[:, None, None, :]
        return kept if bias is None else bias + kept

    def _per_head(self, mask: Tensor, batch: int) -> Tensor:
        """Give a mask axes for batch and heads, the heads that are left.  (L, S) or (B*H, L, S) -> (..., L, S)"""
        if mask.dim() == 2:
            return mask[None, None]
        if mask.dim() == 3 and mask.shape[0] == batch * self.dense_heads:
            kept = torch.tensor(self.kept_heads, device=mask.device)
            chosen: Tensor = mask.unflatten(0, (batch, self.dense_heads)).index_select(1, kept)
            return chosen
        if mask.dim() == 3 and mask.shape[0] == batch * self.num_heads:
            rows: Tensor = mask.unflatten(0, (batch, self.num_heads))
            return rows
        raise InputError(
            f"attn_mask has shape {tuple(mask.shape)}; expected (L, S), or {batch} times {self.dense_heads} heads (or "
            f"the {self.num_heads} that are left) in front."
        )

    def _extended(self, k: Tensor, v: Tensor, bias: Maybe) -> tuple[Tensor, Tensor, Maybe]:
        """Append what is attended to besides the inputs.  (B, H', S, E) -> (B, H', S + up to 2, E)"""
        extra: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            own = [t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (self.bias_k, self.bias_v)]
            extra.append((own[0].expand(k.shape[0], -1, -1, -1), own[1].expand(k.shape[0], -1, -1, -1)))
        if self.add_zero_attn:
            extra.append((torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1])))
        for more_k, more_v in extra:
            k, v = torch.cat([k, more_k], dim=2), torch.cat([v, more_v], dim=2)
            bias = None if bias is None else F.pad(bias, (0, 1))
        return k, v, bias

    def _nested(self, rows: Tensor) -> tuple[Tensor, None]:
        """Attend within rows of different lengths, which an encoder has packed.  (B, each its L, D)"""
        lengths = [row.shape[0] for row in rows.unbind()]
        padded = rows.to_padded_tensor(0.0)
        ends = torch.tensor(lengths, device=padded.device)[:, None]
        padding = torch.arange(padded.shape[1], device=padded.device)[None] >= ends
        out, _ = self.forward(padded, padded, padded, padding, need_weights=False)
        return torch.nested.as_nested_tensor([row[:size] for row, size in zip(out, lengths, strict=True)]), None


def _added(mask: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return what a mask adds to the scores."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise InputError(f"{name} has dtype {mask.dtype}; expected bool or floating point.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _weights(q: Tensor, k: Tensor, bias: Maybe, dropout: float) -> Tensor:
    """Return attention weights.  (B, H', L, E), (B, H', S, E) -> (B, H', L, S)"""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return F.dropout(weights, dropout) if dropout else weights
