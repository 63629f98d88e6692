"""Changes of basis inside attention that keep the function and sort dimensions by importance (``docs/oneshot.md``).

``q^T k`` depends on ``W_Q^T W_K`` only, and a head's contribution on ``W_O W_V`` only, so either pair may be mixed
by an invertible matrix and its inverse. After :func:`rotate`, keeping a head's first dimensions is the best
low-rank approximation of it in the data's metric, which makes unit-wise pruning as good as truncating an SVD.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gohsp.core.capture import readout_gain, rows_of, units
from gohsp.core.moments import AttentionMoments, Moments, SublayerMoments
from gohsp.core.ridge import ROUNDING
from gohsp.structure import Attention, Network, Rows

_FLOOR = 1e-8
"""Share of the largest eigenvalue below which a direction counts as carrying nothing; bounds the condition number."""


def rotate(model: nn.Module, network: Network, moments: Moments) -> dict[str, SublayerMoments]:
    """Rotate query/key and value dimensions of every attention that allows it, in place.

    Args:
        model: The model; its function changes by rounding only.
        network: Its description.
        moments: Its second moments.

    Returns:
        The second moments after the change.
    """
    turned = dict(moments)
    for sub in network.attentions:
        of = moments[sub.name]
        assert isinstance(of, AttentionMoments)
        rotate_queries_keys(model, sub, of)
        turned[sub.name] = rotate_values(model, sub, of)
    return turned


def rotate_queries_keys(model: nn.Module, sub: Attention, moments: AttentionMoments) -> None:
    """Rotate one attention's query/key dimensions in place, if it allows that."""
    if "qk" not in sub.rotatable:
        return
    heads, qk = sub.widths.heads, sub.widths.qk
    query = extended_rows(model, sub.query, heads * qk)
    key = extended_rows(model, sub.key, heads * qk)
    for h in range(heads):
        part = slice(h * qk, (h + 1) * qk)
        to_query, to_key = balance_query_key(query[part], key[part], moments.inputs, moments.key_inputs)
        _mix_rows(model, sub.query, h, qk, to_query)
        _mix_rows(model, sub.key, h, qk, to_key)


def rotate_values(model: nn.Module, sub: Attention, moments: AttentionMoments) -> AttentionMoments:
    """Rotate one attention's value dimensions in place, if it allows that; returns the moments after the change."""
    if "vo" not in sub.rotatable:
        return moments
    heads, vo = sub.widths.heads, sub.widths.vo
    mixing = torch.eye(heads * vo + 1, dtype=torch.float64, device=moments.read.device)
    columns = units(model, sub.readout.columns, heads * vo)
    gain = readout_gain(model, sub.readout)
    written = columns if gain is None else gain[:, None] * columns
    sent = moments.read
    for h in range(heads):
        part = slice(h * vo, (h + 1) * vo)
        mean = sent[part, -1] if sub.readout.bias else None
        forward, backward = order_values(written[:, part], sent[part, part], mean)
        _mix_rows(model, sub.value, h, vo, forward)
        columns[:, part] = (columns[:, part].double() @ backward).to(columns.dtype)
        mixing[part, part] = forward
    turned = mixing @ sent @ mixing.T
    return replace(moments, read=(turned + turned.T) / 2)


def extended_rows(model: nn.Module, rows: Rows, count: int) -> Tensor:
    """Rows ``[count, inputs (+ 1)]`` in float64, the bias (if any) as last column."""
    weight, bias = rows_of(model, rows, count)
    return (weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)).double()


def _mix_rows(model: nn.Module, rows: Rows, head: int, width: int, matrix: Tensor) -> None:
    for entry in rows.slices:
        part = units(model, entry, (head + 1) * width).narrow(0, head * width, width)
        part.copy_((matrix @ part.double()).to(part.dtype))


def _half(moment: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Square root ``[d, d]`` of ``rows moment rows^T``; the same with null directions held above a floor; its inverse.

    Rows may be shorter than the moment, whose last entry (the constant's, without a bias) is then left out.
    """
    n = rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ moment[:n, :n] @ rows.T)
    root, floor = values.clamp_min(0).sqrt(), values.max().clamp_min(torch.finfo(torch.float64).tiny) * _FLOOR
    held = values.clamp_min(floor).sqrt()
    return (vectors * root) @ vectors.T, (vectors * held) @ vectors.T, (vectors / held) @ vectors.T


def _size(moment: Tensor, rows: Tensor) -> Tensor:
    """Root mean square of what ``rows`` make, all of them together."""
    n = rows.shape[1]
    return (rows @ moment[:n, :n]).mul(rows).sum().clamp_min(0).sqrt()


def _gains(singular: Tensor, size: Tensor) -> Tensor | None:
    """What balances both sides of a product with these singular values; None where it is all rounding of ``size``."""
    if not singular[0] > ROUNDING * size:
        return None
    return singular.clamp_min(singular[0] * _FLOOR).sqrt()  # both sides stay invertible


def balance_query_key(query: Tensor, key: Tensor, moment: Tensor, key_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Invertible matrices that order a head's query/key dimensions by their share of the attention logits.

    With ``X = query C^1/2`` and ``Y = key K^1/2``, the singular vectors of ``X^T Y`` give the basis in which
    dropping trailing dimensions is the best low-rank approximation (Eckart-Young) of the logits' map. A head whose
    logits do not differ within an image has no such order and stays as it is.

    Args:
        query: Rows ``[d, n]`` that make a head's queries from inputs (bias as last column, if any).
        key: Rows ``[d, n]`` that make its keys; they may have a bias where queries have none, or the reverse.
        moment: Second moment ``C`` of the inputs, those of the longer rows.
        key_moment: Second moment ``K`` of the inputs about their image's mean: what all keys of an image share
            shifts a query's logits alike, and the softmax does not see it.

    Returns:
        ``(S, T)``, each ``[d, d]`` with ``S^T T = 1``: new queries ``S q``, new keys ``T k``.
    """
    query, key, moment, key_moment = query.double(), key.double(), moment.double(), key_moment.double()
    root_q, _, inverse_root_q = _half(moment, query)
    root_k, _, _ = _half(key_moment, key)
    u, singular, _ = torch.linalg.svd(root_q @ root_k)
    gains = _gains(singular, _size(moment, query) * _size(moment, key))
    if gains is None:
        return _unchanged(query), _unchanged(query)
    to_query = gains[:, None] * (u.T @ inverse_root_q)
    return to_query, torch.linalg.inv(to_query).T


def order_values(readout: Tensor, moment: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Invertible matrix that orders a head's value dimensions by their share of its contribution's energy.

    A head that contributes nothing, or only what its readout's bias can take over, stays as it is.

    Args:
        readout: The head's columns ``[D, d]`` of the output projection, LayerScale included.
        moment: Second moment ``[d, d]`` of the head's output.
        mean: Mean ``[d]`` of it, where a bias of the readout can take that over, so that only what varies counts.

    Returns:
        ``(T, T^-1)``: new values ``T v``, new columns ``readout T^-1``.
    """
    readout, moment = readout.double(), moment.double()
    every = _unchanged(moment)
    spread = moment if mean is None else moment - torch.outer(mean, mean)
    root, held_root, inverse_root = _half(spread, every)
    _, singular, vt = torch.linalg.svd(readout @ root, full_matrices=False)
    gains = _gains(singular, readout.norm() * _size(moment, every))
    if gains is None:
        return every, every
    return gains[:, None] * (vt @ inverse_root), (held_root @ vt.T) / gains


def _unchanged(like: Tensor) -> Tensor:
    """The matrix that changes nothing, for as many dimensions as ``like`` has rows."""
    return torch.eye(len(like), dtype=torch.float64, device=like.device)
