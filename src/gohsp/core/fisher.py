"""How much each token's residual matters to the output: a label-free Fisher diagonal.

A least-squares repair that counts all tokens alike spends itself on tokens that the output hardly reads: in the later
blocks of a classifier with a class token nearly all of the gradient runs through that token alone (``docs/oneshot.md``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gohsp.core.gradients import Gradients
from gohsp.structure import Network

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

    def weights(self, network: Network, share: Mapping[type, float]) -> dict[str, Tensor]:
        """The weights.

        Args:
            network: The network.
            share: By type of sub-layer, how much of a token's weight follows the Fisher information, 0 to 1; the rest
                is spread evenly.
        """
        found = {}
        for sub in network.present:
            total, of = self._totals[sub.name], share.get(type(sub), 0.0)
            mean = total.mean()
            if of > 0 and mean > 0:  # the output may not depend on a sub-layer at all
                found[sub.name] = (of * total / mean + (1 - of)).float()
        return found
