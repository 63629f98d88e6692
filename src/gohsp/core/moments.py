"""Second moments of what a network's prunable maps read, accumulated in constant memory.

Inputs are extended by a last entry 1, which carries biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from gohsp.core.capture import (
    autocast,
    device_of,
    forward_all,
    in_stream,
    observe_inputs,
    require_finite,
    rows_of_input,
)
from gohsp.core.fisher import TokenWeights
from gohsp.errors import UnsupportedModelError
from gohsp.structure import Attention, Network, PresentSublayer, unit_count

FOLDS = 4
"""Parts of the calibration images that cross-validation holds out in turn."""


class MomentFitter:
    """Accumulates ``sum w x x^T`` of inputs extended by a constant 1, in constant memory.

    Args:
        width: Entries of one input.
        device: Where to accumulate.
        token_weights: Weights ``[tokens]`` of an image's tokens; None weighs all alike.
    """

    def __init__(self, width: int, device: torch.device, token_weights: Tensor | None = None) -> None:
        self._sum = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self._count = 0.0
        self._weights = token_weights

    def update(self, x: Tensor) -> None:
        """Add a batch ``[..., width]``; with token weights, ``[B, tokens, width]``."""
        self.update_rows(weighted_rows(x, self._weights))

    def update_rows(self, rows: Tensor) -> None:
        """Add what :func:`weighted_rows` made of a batch."""
        with torch.autocast(rows.device.type, enabled=False):
            self._sum += (rows.T @ rows).double()
        self._count += float(rows[:, -1].square().sum())

    @property
    def count(self) -> float:
        """Summed weight of the inputs."""
        return self._count

    @property
    def moment(self) -> Tensor:
        """Second moment ``[width + 1, width + 1]``, float64."""
        return self._sum / max(self._count, 1e-30)


class RegressionFitter:
    """Accumulates what a least-squares fit of ``y`` on ``x`` needs, in constant memory and apart for a few folds.

    Args:
        width: Entries of one input; it is extended by a constant 1.
        outputs: Entries of one target.
        device: Where to accumulate.
        token_weights: Weights ``[tokens]`` of an image's tokens; None weighs all alike.
    """

    def __init__(self, width: int, outputs: int, device: torch.device, token_weights: Tensor | None = None) -> None:
        self._inputs = [MomentFitter(width, device, token_weights) for _ in range(FOLDS)]
        self._cross = torch.zeros(FOLDS, outputs, width + 1, dtype=torch.float64, device=device)
        self._weights = token_weights

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of inputs ``[B, tokens, width]`` and targets ``[B, tokens, outputs]``.

        Image ``i`` of a batch belongs to fold ``i % FOLDS``, so that views of one image share a fold where their
        batches have one order.
        """
        for fold in range(min(FOLDS, len(x))):
            inputs = weighted_rows(x[fold::FOLDS], self._weights)
            targets = weighted_rows(y[fold::FOLDS], self._weights)[:, :-1]
            self._inputs[fold].update_rows(inputs)
            with torch.autocast(x.device.type, enabled=False):
                self._cross[fold] += (targets.T @ inputs).double()

    @property
    def total(self) -> Regression:
        """All images."""
        return self._sum(range(FOLDS))

    def splits(self) -> list[tuple[Regression, Regression]]:
        """Each fold that holds an image, as ``(all others, the fold)``; none if there is only one such fold."""
        filled = [f for f in range(FOLDS) if self._inputs[f].count > 0]
        if len(filled) < 2:
            return []
        return [(self._sum(g for g in filled if g != f), self._sum([f])) for f in filled]

    def _sum(self, folds: Iterable[int]) -> Regression:
        folds = list(folds)
        count = max(sum(self._inputs[f].count for f in folds), 1e-30)
        gram = torch.stack([self._inputs[f].moment * (self._inputs[f].count / count) for f in folds]).sum(0)
        return Regression(gram, self._cross[folds].sum(0) / count, count)


@dataclass(frozen=True, slots=True)
class Regression:
    """What a least-squares fit needs, float64.

    Attributes:
        gram: Second moment ``[n, n]`` of the inputs.
        cross: Cross moment ``[outputs, n]`` of targets and inputs.
        count: Summed weight of the inputs.
    """

    gram: Tensor
    cross: Tensor
    count: float

    def first(self, n: int) -> Regression:
        """The regression on the first ``n`` inputs alone."""
        return Regression(self.gram[:n, :n], self.cross[:, :n], self.count)

    def of_sums(self, rows: Tensor) -> Regression:
        """The regression of weighted sums of the targets, ``rows`` ``[sums, outputs]``."""
        return Regression(self.gram, rows.double() @ self.cross, self.count)

    def error(self, weight: Tensor) -> float:
        """Summed squared error of a map ``[outputs, n]``, up to a constant."""
        quadratic = (weight @ self.gram).mul(weight).sum()
        return self.count * float(quadratic - 2 * weight.mul(self.cross).sum())


def weighted_rows(x: Tensor, token_weights: Tensor | None) -> Tensor:
    """``x`` ``[..., width]`` as float32 rows with a last entry 1, each times the root of its token's weight."""
    x = x.detach().float()
    extended = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    if token_weights is not None:
        extended = extended * token_weights.sqrt()[:, None]
    return extended.reshape(-1, extended.shape[-1])


@dataclass(frozen=True, slots=True)
class AttentionMoments:
    """Second moments (float64, last entry the constant 1) of what an attention's prunable maps read.

    Attributes:
        inputs: Of the normed residual stream that queries, keys and values read, ``[D + 1, D + 1]``.
        key_inputs: The same about each image's mean, which the softmax does not see; its last row is 0.
        read: Of the concatenated head outputs, which the readout reads, ``[heads * vo + 1, heads * vo + 1]``.
    """

    inputs: Tensor
    key_inputs: Tensor
    read: Tensor


@dataclass(frozen=True, slots=True)
class FfnMoments:
    """Second moments (float64, last entry the constant 1) of what a feed-forward network's readout reads.

    Attributes:
        read: Of the hidden activations ``[units + 1, units + 1]``.
    """

    read: Tensor


SublayerMoments = AttentionMoments | FfnMoments
Moments = Mapping[str, SublayerMoments]
"""Moments of present sub-layers by their names."""


def tensors_of(moments: SublayerMoments) -> tuple[Tensor, ...]:
    """The moments in the order of the fields."""
    return tuple(getattr(moments, field.name) for field in fields(moments))


class InputFitter:
    """Moments of an attention's inputs, and of the same about their image's mean."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._all, self._means = MomentFitter(width, device), MomentFitter(width, device)

    def update(self, x: Tensor) -> None:
        """Add a batch ``[B, ..., width]``, the tokens that attend to each other together."""
        self._all.update(x)
        self._means.update(x.detach().float().flatten(1, -2).mean(1))

    @property
    def moment(self) -> Tensor:
        """Second moment ``[width + 1, width + 1]``, float64."""
        return self._all.moment

    @property
    def within(self) -> Tensor:
        """Second moment about the image's mean, float64."""
        return self._all.moment - self._means.moment


def collect_moments(
    model: nn.Module,
    network: Network,
    batches: Iterable[Tensor],
    weights: TokenWeights | None = None,
    precision: torch.dtype = torch.float32,
) -> dict[str, SublayerMoments]:
    """Stream calibration images ``[B, C, H, W]`` through the model once and take every sub-layer's moments.

    Args:
        model: The model; left as it is.
        network: Its description.
        batches: The images.
        weights: How much each token counts in what readouts read; None counts all alike.
        precision: Data type of the forward passes; below float32 by autocast.

    Raises:
        NonFiniteError: An activation is NaN or infinite; the message names the module.
    """
    device, weights = device_of(model), weights or {}
    inputs = {sub.name: InputFitter(sub.readout.size, device) for sub in network.attentions}
    read = {
        sub.name: MomentFitter(unit_count(sub.widths, sub.widths.unit_kinds[-1]), device, weights.get(sub.name))
        for sub in network.present
    }
    count = 0

    def enter(sub: Attention, x: Tensor) -> None:
        inputs[sub.name].update(rows_of_input(model, sub, x))

    def add(sub: PresentSublayer, rows: Tensor) -> None:
        read[sub.name].update(in_stream(sub, rows, count))

    def counted() -> Iterator[Tensor]:
        nonlocal count
        for images in batches:
            count = len(images)
            yield images

    watch: dict[str, Callable[[Tensor], None]] = {sub.name: partial(enter, sub) for sub in network.attentions}
    watch |= {sub.readout.module: partial(add, sub) for sub in network.present}
    with observe_inputs(model, watch), autocast(device, precision):
        forward_all(model, counted())
    for sub in network.present:
        if count and not read[sub.name].count:
            raise UnsupportedModelError(
                f"module '{sub.readout.module}' never ran as a module of its own; give the model that "
                "gohsp.models.working_copy makes of yours"
            )
    moments: dict[str, SublayerMoments] = {}
    for sub in network.present:
        of = read[sub.name].moment
        require_finite(f"the input of module '{sub.readout.module}'", of)
        if isinstance(sub, Attention):
            require_finite(f"the input of module '{sub.name}'", inputs[sub.name].moment)
            moments[sub.name] = AttentionMoments(inputs[sub.name].moment, inputs[sub.name].within, of)
        else:
            moments[sub.name] = FfnMoments(of)
    return moments
