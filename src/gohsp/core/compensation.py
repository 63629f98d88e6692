"""Closed-form repair of what a cut takes away, in the metric of the data (design, section 6).

All functions work on a linear map ``V`` ``[outputs, n]`` whose input has second moment ``G`` ``[n, n]``
(mean of ``x x^T`` over tokens). Where the map has a bias, the input carries a last entry 1 and the bias is
the last column; that column is never a candidate for removal. Solves run in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from gohsp.core.activations import forward_all, observe_inputs, require_finite
from gohsp.core.fisher import TokenWeights
from gohsp.errors import NonFiniteError
from gohsp.structure import ModelStructure

logger = logging.getLogger(__name__)

RIDGE = 0.1
"""Default ridge, relative to the mean diagonal entry of the Gram matrix."""

LEAST_ENERGY = torch.finfo(torch.float32).eps ** 2
"""Mean square up to which inputs of a map count as 0: a stream of order 1 loses what they write in its rounding."""

ROUNDING = 5e-3
"""Share of its root mean square up to which what varies of an input counts as rounding.

Moments are sums of float32 products, which leave up to 2e-3 of a constant when its mean is taken off.
"""

RIDGE_STEP = 10**0.5
"""Ratio of neighbouring ridges that cross-validation compares."""

FOLDS = 4
"""Parts of the calibration images that cross-validation holds out in turn."""

ROUNDS = 16
"""Groups that a greedy removal is done in; each costs one pass over the inverse Gram matrix."""


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


def cross_validated_ridge(
    splits: Sequence[tuple[Regression, Regression]], fitted: Callable[[Regression, float], Tensor], start: float
) -> float:
    """The ridge whose fit to all folds but one has the least squared error on that one, summed over folds.

    Candidates lie :data:`RIDGE_STEP` apart; from ``start`` they are walked towards less error until it grows.

    Args:
        splits: As :meth:`RegressionFitter.splits` makes them; with none, ``start`` stays.
        fitted: Makes a map ``[outputs, n]`` of a regression and a ridge.
        start: First candidate.
    """

    def error(ridge: float) -> float:
        return sum(held_out.error(fitted(rest, ridge)) for rest, held_out in splits)

    if not splits:
        return start
    best, least = start, error(start)
    for factor in (RIDGE_STEP, 1 / RIDGE_STEP):
        while 1e-4 < best * factor < 1e3 and (now := error(best * factor)) < least:
            best, least = best * factor, now
        if best != start:
            break
    return best


@cache
def signed_sums(count: int, size: int) -> Tensor:
    """A matrix ``[count, size]`` of random signs over ``count ** 0.5``, always the same; the identity of few rows.

    The squared norm of its product with a matrix of ``size`` rows estimates that matrix' own without bias
    (Hutchinson 1990), and what is then done with the product costs no more for more rows.
    """
    if size <= count:
        return torch.eye(size)
    draws = torch.randint(2, (count, size), generator=torch.Generator().manual_seed(0))
    return (2.0 * draws - 1.0) / count**0.5


def weighted_rows(x: Tensor, token_weights: Tensor | None) -> Tensor:
    """``x`` ``[..., width]`` as float32 rows with a last entry 1, each times the root of its token's weight."""
    x = x.detach().float()
    extended = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    if token_weights is not None:
        extended = extended * token_weights.sqrt()[:, None]
    return extended.reshape(-1, extended.shape[-1])


@dataclass(frozen=True, slots=True)
class BlockMoments:
    """Second moments (float64, last entry the constant 1) of what a block's prunable maps read.

    Attributes:
        attention_input: Of the normalised residual stream that queries, keys and values read, ``[D + 1, D + 1]``.
        key_input: The same about each image's mean, which the softmax does not see; its last row is 0.
        head_outputs: Of the concatenated head outputs, ``[heads * vo + 1, heads * vo + 1]``.
        hidden: Of the FFN's hidden activations, ``[ffn + 1, ffn + 1]``.
    """

    attention_input: Tensor
    key_input: Tensor
    head_outputs: Tensor
    hidden: Tensor


def tensors_of(moments: BlockMoments) -> tuple[Tensor, ...]:
    """The moments in the order of the fields."""
    return moments.attention_input, moments.key_input, moments.head_outputs, moments.hidden


class InputFitter:
    """Moments of an attention's inputs, and of the same about their image's mean."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._all, self._means = MomentFitter(width, device), MomentFitter(width, device)

    def update(self, x: Tensor) -> None:
        """Add a batch ``[B, tokens, width]``."""
        self._all.update(x)
        self._means.update(x.detach().float().mean(1))

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
    structure: ModelStructure,
    batches: Sequence[Tensor],
    weights: Sequence[TokenWeights] | None = None,
) -> tuple[BlockMoments, ...]:
    """Stream calibration images ``[B, C, H, W]`` through the model once and take every block's moments.

    Args:
        model: The model.
        structure: Its structure.
        batches: The images.
        weights: How much each token counts in what the readouts read, by block; None counts all alike.

    Raises:
        NonFiniteError: An activation is NaN or infinite; the message names the module.
    """
    device = next(model.parameters()).device
    inputs: list[InputFitter] = []
    fitters: dict[str, MomentFitter] = {}
    watch: dict[str, Callable[[Tensor], None]] = {}
    for i, block in enumerate(structure.blocks):
        shape = block.shape
        of_block = weights[i] if weights else TokenWeights(None, None)
        attention, ffn = block.attention_readout.module, block.ffn_readout.module
        inputs.append(InputFitter(structure.embed_dim, device))
        fitters[attention] = MomentFitter(shape.heads * shape.vo, device, of_block.attention)
        fitters[ffn] = MomentFitter(shape.ffn, device, of_block.ffn)
        watch |= {block.attention: inputs[i].update, attention: fitters[attention].update, ffn: fitters[ffn].update}
    with observe_inputs(model, watch):
        forward_all(model, batches)
    moments = tuple(
        BlockMoments(
            attention_input=inputs[i].moment,
            key_input=inputs[i].within,
            head_outputs=fitters[b.attention_readout.module].moment,
            hidden=fitters[b.ffn_readout.module].moment,
        )
        for i, b in enumerate(structure.blocks)
    )
    for block, of in zip(structure.blocks, moments, strict=True):
        for name, moment in (
            (block.attention, of.attention_input),
            (block.attention_readout.module, of.head_outputs),
            (block.ffn_readout.module, of.hidden),
        ):
            require_finite(f"the input of module '{name}'", moment)
    return moments


def ridge_level(gram: Tensor, ridge: float) -> Tensor:
    """``ridge`` times the mean diagonal entry of ``gram``; where inputs are all but 0, of :data:`LEAST_ENERGY`."""
    return ridge * gram.double().diagonal().mean().clamp_min(LEAST_ENERGY)


def ridged(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """``gram`` with :func:`ridge_level` added to the diagonal, float64."""
    result = gram.to(torch.float64, copy=True)
    result.diagonal().add_(ridge_level(gram, ridge))
    return result


def cholesky(gram: Tensor) -> Tensor:
    """Lower factor of a symmetric positive definite matrix; where the ridge had to be raised for it, that is logged.

    Raises:
        NonFiniteError: No ridge helps.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    extra = 1e-8
    while failed and extra < 1:
        extra *= 10
        factor, failed = torch.linalg.cholesky_ex(ridged(gram, extra))
    if extra > 1e-8:
        logger.warning("a Gram matrix is singular in spite of its ridge; raised by %.0e of its mean diagonal", extra)
    if failed:
        raise NonFiniteError("a Gram matrix of activations cannot be inverted; check the weights for huge values")
    return factor


def inverse(gram: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix; errors as :func:`cholesky`."""
    return torch.cholesky_inverse(cholesky(gram))


def divided(rows: Tensor, gram: Tensor) -> Tensor:
    """``rows @ gram^-1``, without the inverse: for a map's few outputs that takes less than half the time."""
    return torch.cholesky_solve(rows.T, cholesky(gram)).T


def idle_inputs(gram: Tensor, units: int) -> Tensor:
    """Mask ``[n]`` of the inputs that do nothing which the constant behind them, or 0, would not do as well.

    Args:
        gram: Second moment ``[n, n]`` of the inputs.
        units: How many of them are units; one behind them is the constant.
    """
    energy = gram.diagonal()
    varying = energy if len(gram) == units else energy - gram[:, -1].square()
    idle = (varying <= ROUNDING**2 * energy) | (energy <= LEAST_ENERGY)
    idle[units:] = False
    return idle


def refit_map(gram: Tensor, keep: Tensor, ridge: float = RIDGE, *, units: int | None = None) -> Tensor:
    """The matrix ``M`` ``[removed, kept]`` by which kept inputs take over removed ones.

    With ``V`` the map before the cut, ``V_keep + V_removed M`` minimises
    ``E ||V x - Z x_keep||^2 + ridge ||Z - V_keep||^2`` over ``Z``. What is constant goes to the constant, whatever the
    ridge.

    Args:
        gram: Second moment ``[n, n]`` of the inputs.
        keep: Boolean mask ``[n]``.
        ridge: Relative to the mean diagonal entry.
        units: How many inputs are units; one behind them is the constant. None for all.
    """
    if keep.all():
        return gram.new_zeros(0, len(keep), dtype=torch.float64)
    kept = ridged(gram, ridge)[keep][:, keep]
    takeover = gram.double()[~keep][:, keep] @ inverse(kept)
    if units is not None and units < len(gram):
        idle = idle_inputs(gram, units)[~keep]
        takeover[idle] = 0
        takeover[idle, -1] = gram.double()[~keep, -1][idle]
    return takeover


def residual_refit(fit: Regression, weight: Tensor, ridge: float = RIDGE) -> Tensor:
    """The map that minimises ``E ||y - V x||^2 + ridge ||V - weight||^2``: nothing cut, a target to reach.

    Args:
        fit: Moments of the inputs ``x`` and the targets ``y``.
        weight: The present map ``[outputs, n]``.
        ridge: Relative to the mean diagonal entry of the Gram matrix.
    """
    return divided(fit.cross + ridge_level(fit.gram, ridge) * weight.double(), ridged(fit.gram, ridge))


def refit(gram: Tensor, weight: Tensor, keep: Tensor, ridge: float = RIDGE) -> Tensor:
    """``weight`` ``[outputs, n]`` with removed columns zero, kept ones at the ridge solution of :func:`refit_map`."""
    result = torch.zeros_like(weight)
    result[:, keep] = weight[:, keep]
    if not keep.all():
        lost = weight[:, ~keep].double() @ gram.double()[~keep][:, keep]
        result[:, keep] += divided(lost, ridged(gram, ridge)[keep][:, keep]).to(weight.dtype)
    return result


def apply_refit(weight: Tensor, keep: Tensor, takeover: Tensor) -> Tensor:
    """Move the removed columns of ``weight`` on to the kept ones through ``takeover`` ``[removed, kept]``."""
    result = torch.zeros_like(weight)
    result[:, keep] = weight[:, keep] + weight[:, ~keep] @ takeover.to(weight.dtype)
    return result


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
