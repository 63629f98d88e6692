"""How much each token's residual matters to the output: a label-free Fisher diagonal.

A least-squares repair that counts all tokens alike spends itself on tokens that the output hardly reads: in the later
blocks of a classifier with a class token nearly all of the gradient runs through that token alone
(``docs/oneshot.md``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gohsp.core.gradients import Gradients

TokenWeights = Mapping[str, Tensor]
"""Weights ``[tokens]`` of mean 1 by sub-layer, for what its readout writes; one that is missing weighs all alike."""


class TokenWeightFitter:
    """Weighs tokens by the mean squared gradient of the objective at what is written to them."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def update(self, gradients: Gradients) -> None:
        """Add a few images; all must be of one size."""
        for drawn in gradients.drawn:
            for name, gradient in drawn.items():
                square = gradient.double().square().sum((0, 2))
                self._totals[name] = self._totals[name] + square if name in self._totals else square

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights ``[tokens]``; a sub-layer that the output does not depend on at all is missing."""
        means = {name: total.mean() for name, total in self._totals.items()}
        return {name: (total / means[name]).float() for name, total in self._totals.items() if means[name] > 0}


def blended(fisher: TokenWeights, share: Mapping[str, float]) -> dict[str, Tensor]:
    """Weights of which a share follows the Fisher information, the rest being spread evenly.

    Args:
        fisher: Weights that follow it altogether.
        share: The share by sub-layer, 0 to 1; one that is missing or 0 weighs all tokens alike.
    """
    return {name: share[name] * of + (1 - share[name]) for name, of in fisher.items() if share.get(name)}
