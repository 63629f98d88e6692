"""Optimal brain surgeon (Hassibi and Stork 1993): inputs of a linear map go, and those that stay take over."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gohsp.core.ridge import RIDGE, idle_inputs, inverse, ridged

ROUNDS = 16
"""Groups that a greedy removal is done in; each costs one pass over the inverse Gram matrix."""


class BrainSurgeon:
    """Greedy removal of inputs of a linear map, the others taking over exactly (optimal brain surgeon).

    Args:
        gram: Second moment ``[n, n]`` of the inputs.
        weight: The map ``[outputs, n]``.
        ridge: Relative to the mean diagonal entry of ``gram``.
    """

    def __init__(self, gram: Tensor, weight: Tensor, ridge: float = RIDGE) -> None:
        self.inverse = inverse(ridged(gram, ridge))
        self.weight = weight.detach().double().clone()

    def saliency(self) -> Tensor:
        """Increase ``[n]`` of the expected squared output error when one input alone goes and the rest is refitted."""
        return self.weight.square().sum(0) / self.inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)

    def group_saliency(self, groups: Iterable[Tensor]) -> Tensor:
        """The same for whole groups of inputs, each given by its indices."""
        return torch.stack([self._coefficients(g).mul(self.weight[:, g]).sum() for g in groups])

    def remove(self, index: Tensor) -> None:
        """Take the inputs ``index`` out, refit the others and down-date the inverse."""
        rows = self.inverse[index]
        block = torch.linalg.solve(rows[:, index], rows)
        self.weight -= self.weight[:, index] @ block
        self.weight[:, index] = 0
        self.inverse.addmm_(rows.T, block, alpha=-1)  # symmetric: the rows are the columns
        self.inverse[index] = 0
        self.inverse[:, index] = 0

    def _coefficients(self, index: Tensor) -> Tensor:
        """``V_R (G^-1_RR)^-1`` ``[outputs, removed]``."""
        return torch.linalg.solve(self.inverse[index][:, index], self.weight[:, index].T).T


def select_units(gram: Tensor, weight: Tensor, bonus: Tensor, count: int, *, ridge: float = RIDGE) -> Tensor:
    """Choose ``count`` inputs to keep, by greedy removal in small groups.

    Args:
        gram: Second moment ``[n, n]``.
        weight: The map ``[outputs, n]``.
        bonus: Factors ``[units]`` on the saliencies of the first ``units`` inputs, which are the candidates;
            those behind them (the constant) always stay.
        count: How many of the candidates stay.
        ridge: Relative to the mean diagonal entry.

    Returns:
        Boolean mask ``[n]``.
    """
    keep = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    units = len(bonus)
    excess = units - count
    if excess == 0:
        return keep
    # Measured with a ridge, idle units would seem to matter by the size of their weights.
    surgeon = BrainSurgeon(gram, weight.masked_fill(idle_inputs(gram, units), 0.0), ridge)
    group = max(1, -(-excess // ROUNDS))
    while excess > 0:
        saliency = surgeon.saliency()[:units] * bonus
        saliency[~keep[:units]] = torch.inf
        index = saliency.topk(min(group, excess), largest=False).indices
        surgeon.remove(index)
        keep[index] = False
        excess -= len(index)
    return keep
