"""Linear maps and correlated inputs that several test modules solve by brute force."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core.capture import rows_of
from gohsp.structure import Attention, Rows


def random_inputs(seed: int, width: int, count: int = 64) -> Tensor:
    """Correlated inputs ``[count, width + 1]``, the last entry 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.4 * torch.randn(width, width, generator=generator)
    x = torch.randn(count, width, generator=generator) @ mix + 0.5
    return torch.cat([x, torch.ones(count, 1)], dim=1).double()


def problem(seed: int, n: int = 6, outputs: int = 3, count: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``[count, n]`` with a last entry 1, their second moment, and a map on them."""
    x = random_inputs(seed, n - 1, count)
    weight = torch.randn(outputs, n, generator=torch.Generator().manual_seed(seed + 1)).double()
    return x, x.T @ x / count, weight


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Rows ``[B * tokens, width + 1]``, last entry 1, each times the root of its token's share of all weight."""
    rows = torch.cat([x.double(), torch.ones(*x.shape[:-1], 1)], dim=-1)
    share = weights.double() / (weights.double().sum() * len(x))
    return (rows * share.sqrt()[None, :, None]).flatten(0, 1)


def queries_keys(model: nn.Module, sub: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[images, heads, tokens, qk]`` of an attention whose input is ``x``; norms applied."""
    heads, qk = sub.widths.heads, sub.widths.qk

    def of(rows: Rows, norm: str | None) -> Tensor:
        split = F.linear(x, *rows_of(model, rows, heads * qk)).unflatten(-1, (heads, qk))
        return (model.get_submodule(norm)(split) if norm else split).transpose(1, 2)

    return of(sub.query, sub.query_norm), of(sub.key, sub.key_norm)
