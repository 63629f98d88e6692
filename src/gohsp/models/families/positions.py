"""What becomes of queries and keys, and what is added to their products, in classes of several libraries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gohsp.models.attention import Attended, attribute_at


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Bias ``[1, heads, tokens, tokens]`` of a table ``[distances, heads]`` and the distance of each two tokens."""
    side = math.isqrt(index.numel())
    return table[index.flatten()].unflatten(0, (side, side)).permute(2, 0, 1)[None]


def by_window(bias: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """``bias`` for ``count`` windows; in shifted ones ``mask`` ``[windows, queries, keys]`` shuts some keys off.

    The count is a tensor's ``shape[0]``: its ``len`` would fix the batch in a compiled or exported model.
    """
    return bias if mask is None else bias + mask[:, None].repeat(count // len(mask), 1, 1, 1)


def cosines(
    attn: Any,
    q: Tensor,
    k: Tensor,
    args: tuple[Any, ...],
    given: Mapping[str, Any],
    *,
    mlp: str,
    inside: str | None = None,
) -> Attended:
    """Cosines of queries and keys in windows, times a factor for each head, and a bias made of log-distances (Swin v2).

    Args:
        attn: The attention.
        q: Queries.
        k: Keys.
        args: What it was called with: the windows' mask, if it was not named.
        given: The same, named.
        mlp: The attribute that makes the bias.
        inside: The module in the attention that holds what this reads; None for the attention itself.
    """
    of: Any = attn if inside is None else attribute_at(attn, inside)
    table = getattr(of, mlp)(of.relative_coords_table).flatten(0, -2)
    bias = 16 * looked_up(table, of.relative_position_index).sigmoid()
    factor = of.logit_scale.clamp(max=math.log(100)).exp() / attn.scale
    mask = given.get("mask", args[0] if args else None)
    return Attended(F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), by_window(bias, mask, q.shape[0]))


def along_axes(attn: Any, q: Tensor, k: Tensor, _args: tuple[Any, ...], _given: Mapping[str, Any]) -> Attended:
    """On a grid, a learnt vector for each distance along either axis, times the query (SAM)."""
    tables, bias = (getattr(attn, "rel_pos_h", None), getattr(attn, "rel_pos_w", None)), None
    if tables[0] is not None:
        down, across = (_at_distances(table, size) for table, size in zip(tables, q.shape[2:4], strict=True))
        down, across = torch.einsum("bnhwc,hkc->bnhwk", q, down), torch.einsum("bnhwc,wkc->bnhwk", q, across)
        bias = (down[..., None] + across[..., None, :]).flatten(4).flatten(2, 3)
    return Attended(q.flatten(2, 3), k.flatten(2, 3), bias)


def _at_distances(table: Any, size: int) -> Tensor:
    """Vectors ``[size, size, qk]`` of a table ``[distances, qk]``, which is resampled if it is of another size."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps + size - 1]
