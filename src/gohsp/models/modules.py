"""Modules of our own, for what libraries' classes cannot hold: unequal widths, and what an absent sub-layer leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrunedAttention(nn.Module):
    """Multi-head self-attention whose query/key width differs from its value width.

    A drop-in for ``timm.layers.Attention``: same parameter names, same call. One fused projection makes
    queries, keys and values; its rows are ordered ``[q of all heads, k of all heads, v of all heads]``.
    The narrower side is padded with zeros inside, since fused kernels want one width
    (``docs/oneshot.md``).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        qk: int,
        vo: int,
        qkv_bias: bool,
        proj_bias: bool,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.vo_dim = heads, qk, vo
        self.scale = qk**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, heads * (2 * qk + vo), bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm or nn.Identity()
        self.proj = nn.Linear(heads * vo, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens; ``x`` and the result are ``[images, tokens, dim]``."""
        b, n, _ = x.shape
        h, qk, vo = self.num_heads, self.qk_dim, self.vo_dim
        q, k, v = self.qkv(x).split((h * qk, h * qk, h * vo), dim=-1)
        q = self.q_norm(q.view(b, n, h, qk)).transpose(1, 2)
        k = self.k_norm(k.view(b, n, h, qk)).transpose(1, 2)
        v = v.view(b, n, h, vo).transpose(1, 2)
        if self.fused_attn or attn_mask is not None or is_causal:
            width = max(qk, vo)
            out = F.scaled_dot_product_attention(
                F.pad(q, (0, width - qk)),
                F.pad(k, (0, width - qk)),
                F.pad(v, (0, width - vo)),
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.0,
                is_causal=is_causal,
                scale=self.scale,
            )[..., :vo]
        else:
            out = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).reshape(b, n, h * vo))))


class Constant(nn.Module):
    """What is left of a sub-layer that was removed: one vector, which it adds to every token.

    A drop-in for an attention or an FFN; what it is given besides the stream it ignores.
    """

    def __init__(self, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """The vector for every token of ``x`` ``[images, tokens, dim]``."""
        return self.bias.to(x.dtype).expand_as(x)
