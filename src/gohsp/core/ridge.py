"""Closed-form repair of what a cut takes away, in the metric of the data.

All functions work on a linear map ``V`` ``[outputs, n]`` whose input has second moment ``G`` ``[n, n]``
(mean of ``x x^T`` over tokens). Where the map has a bias, the input carries a last entry 1 and the bias is
the last column; that column is never a candidate for removal. Solves run in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from gohsp.core.moments import Regression
from gohsp.errors import NonFiniteError

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
    ridge, and so does the mean of everything where no unit stays.

    Args:
        gram: Second moment ``[n, n]`` of the inputs.
        keep: Boolean mask ``[n]``.
        ridge: Relative to the mean diagonal entry.
        units: How many inputs are units; one behind them is the constant. None for all.
    """
    if keep.all():
        return gram.new_zeros(0, len(keep), dtype=torch.float64)
    if not keep[:units].any():
        return gram.double()[~keep][:, keep]
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
