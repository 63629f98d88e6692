"""Changes of basis inside attention that keep the function and sort dimensions by importance (design, section 6).

``q^T k`` depends on ``W_Q^T W_K`` only, and a head's contribution on ``W_O W_V`` only, so either pair may be mixed
by an invertible matrix and its inverse. After :func:`rotate`, keeping a head's first dimensions is the best
low-rank approximation of it in the data's metric, which makes unit-wise pruning as good as truncating an SVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gohsp.core.activations import readout_gain, rows, units
from gohsp.core.compensation import BlockMoments
from gohsp.structure import BlockStructure, ModelStructure, UnitSlice

_FLOOR = 1e-8
"""Share of the largest eigenvalue below which a direction counts as carrying nothing; bounds the condition number."""


def rotate(model: nn.Module, structure: ModelStructure, moments: Sequence[BlockMoments]) -> tuple[BlockMoments, ...]:
    """Rotate query/key and value dimensions of every block that allows it, in place.

    Args:
        model: The model; its function changes by rounding only.
        structure: Its structure.
        moments: Its second moments.

    Returns:
        The second moments after the change.
    """
    for block, of_block in zip(structure.blocks, moments, strict=True):
        rotate_queries_keys(model, block, of_block)
    return tuple(rotate_values(model, b, m) for b, m in zip(structure.blocks, moments, strict=True))


def rotate_queries_keys(model: nn.Module, block: BlockStructure, moments: BlockMoments) -> None:
    """Rotate one block's query/key dimensions in place, if it allows that."""
    if "qk" not in block.rotatable:
        return
    heads, qk = block.shape.heads, block.shape.qk
    query = extended_rows(model, block.query, heads * qk)
    key = extended_rows(model, block.key, heads * qk)
    width = query.shape[1]
    for h in range(heads):
        part = slice(h * qk, (h + 1) * qk)
        to_query, to_key = balance_query_key(
            query[part], key[part], moments.attention_input[:width, :width], moments.key_input[:width, :width]
        )
        _mix_rows(model, block.query, h, qk, to_query)
        _mix_rows(model, block.key, h, qk, to_key)


def rotate_values(model: nn.Module, block: BlockStructure, moments: BlockMoments) -> BlockMoments:
    """Rotate one block's value dimensions in place, if it allows that; returns the moments after the change."""
    if "vo" not in block.rotatable:
        return moments
    heads, vo = block.shape.heads, block.shape.vo
    mixing = torch.eye(heads * vo + 1, dtype=torch.float64, device=moments.head_outputs.device)
    columns = units(model, block.attention_readout.columns, heads * vo)
    gain = readout_gain(model, block.attention_readout)
    written = columns if gain is None else gain[:, None] * columns
    spread = moments.head_outputs
    if block.attention_readout.bias:  # the bias takes over means, so that only what varies counts
        spread = spread - torch.outer(spread[:, -1], spread[:, -1])
    for h in range(heads):
        part = slice(h * vo, (h + 1) * vo)
        forward, backward = order_values(written[:, part], spread[part, part])
        _mix_rows(model, block.value, h, vo, forward)
        columns[:, part] = (columns[:, part].double() @ backward).to(columns.dtype)
        mixing[part, part] = forward
    turned = mixing @ moments.head_outputs @ mixing.T
    return replace(moments, head_outputs=(turned + turned.T) / 2)


def extended_rows(model: nn.Module, slices: Sequence[UnitSlice], count: int) -> Tensor:
    """Rows ``[count, inputs (+ 1)]`` in float64, the bias (if any) as last column."""
    weight, bias = rows(model, slices, count)
    return (weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)).double()


def _mix_rows(model: nn.Module, slices: Sequence[UnitSlice], head: int, width: int, matrix: Tensor) -> None:
    for entry in slices:
        part = units(model, entry, (head + 1) * width).narrow(0, head * width, width)
        part.copy_((matrix @ part.double()).to(part.dtype))


def _half(moment: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of ``rows moment rows^T`` ``[d, d]``, null directions dropped."""
    values, vectors = torch.linalg.eigh(rows @ moment @ rows.T)
    floor = values.max().clamp_min(torch.finfo(torch.float64).tiny) * _FLOOR
    root = values.clamp_min(floor).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def balance_query_key(query: Tensor, key: Tensor, moment: Tensor, key_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Invertible matrices that order a head's query/key dimensions by their share of the attention logits.

    With ``X = query C^1/2`` and ``Y = key K^1/2``, the singular vectors of ``X^T Y`` give the basis in which
    dropping trailing dimensions is the best low-rank approximation (Eckart-Young) of the logits' map.

    Args:
        query: Rows ``[d, n]`` that make a head's queries from inputs (bias as last column, if any).
        key: Rows ``[d, n]`` that make its keys.
        moment: Second moment ``C`` ``[n, n]`` of the inputs.
        key_moment: Second moment ``K`` ``[n, n]`` of the inputs about their image's mean: what all keys of an
            image share shifts a query's logits alike, and the softmax does not see it.

    Returns:
        ``(S, T)``, each ``[d, d]`` with ``S^T T = 1``: new queries ``S q``, new keys ``T k``.
    """
    root_q, inverse_root_q = _half(moment.double(), query.double())
    root_k, _ = _half(key_moment.double(), key.double())
    u, s, _ = torch.linalg.svd(root_q @ root_k)
    # A floor keeps both matrices invertible where trailing dimensions carry nothing.
    gain = s.clamp_min(s[0].clamp_min(torch.finfo(torch.float64).tiny) * _FLOOR).sqrt()
    to_query = gain[:, None] * (u.T @ inverse_root_q)
    return to_query, torch.linalg.inv(to_query).T


def order_values(readout: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Invertible matrix that orders a head's value dimensions by their share of its contribution's energy.

    Args:
        readout: The head's columns ``[D, d]`` of the output projection, LayerScale included.
        moment: Second moment or covariance ``[d, d]`` of the head's output.

    Returns:
        ``(T, T^-1)``: new values ``T v``, new columns ``readout T^-1``.
    """
    root, inverse_root = _half(moment.double(), torch.eye(len(moment), dtype=torch.float64, device=moment.device))
    _, s, vt = torch.linalg.svd(readout.double() @ root, full_matrices=False)
    gain = s.clamp_min(s[0].clamp_min(torch.finfo(torch.float64).tiny) * _FLOOR).sqrt()
    forward = gain[:, None] * (vt @ inverse_root)
    backward = (root @ vt.T) / gain
    return forward, backward
