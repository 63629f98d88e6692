from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gohsp.core.moments import Regression, RegressionFitter
from gohsp.core.ridge import RIDGE_STEP, cross_validated_ridge, inverse, refit, refit_map, residual_refit, signed_sums
from gohsp.errors import NonFiniteError
from linear import problem, weighted

seeds = st.integers(0, 10**6)
CPU = torch.device("cpu")
masks = st.lists(st.booleans(), min_size=5, max_size=5).map(lambda m: torch.tensor([*m, True]))


@settings(max_examples=30, deadline=None)
@given(seeds, masks)
def test_refit_is_least_squares_on_the_inputs_that_stay(seed: int, keep: Tensor) -> None:
    x, gram, weight = problem(seed)
    fitted = refit(gram, weight, keep, ridge=0)
    solution = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution
    torch.testing.assert_close(fitted[:, keep], solution.T, rtol=1e-6, atol=1e-8)
    assert not fitted[:, ~keep].any()


@settings(max_examples=30, deadline=None)
@given(seeds, masks, st.floats(1e-3, 1.0))
def test_ridge_pulls_the_refit_towards_the_map_that_was(seed: int, keep: Tensor, ridge: float) -> None:
    x, gram, weight = problem(seed)
    level = ridge * float(gram.diagonal().mean())
    # E ||V x - Z x_keep||^2 + level ||Z - V_keep||^2 as one least-squares system
    design = torch.cat([x[:, keep] / len(x) ** 0.5, level**0.5 * torch.eye(int(keep.sum()), dtype=torch.float64)])
    target = torch.cat([x @ weight.T / len(x) ** 0.5, level**0.5 * weight[:, keep].T])
    solution = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(refit(gram, weight, keep, ridge)[:, keep], solution.T, rtol=1e-6, atol=1e-8)


def test_refit_map_has_a_row_for_every_removed_input() -> None:
    _, gram, _ = problem(0)
    keep = torch.tensor([True, False, True, False, False, True])
    assert refit_map(gram, keep).shape == (3, 3)
    assert refit_map(gram, torch.ones(6, dtype=torch.bool)).shape == (0, 6)


WEIGHTS = torch.tensor([2.5, 0.0, 0.7, 0.3])


@pytest.mark.parametrize("weights", [WEIGHTS, None], ids=["weights", "none"])
def test_a_streamed_regression_equals_least_squares_on_all_rows(weights: Tensor | None) -> None:
    x, y = torch.randn(9, 4, 5) + 0.5, torch.randn(9, 4, 3) - 1
    y = y + x[..., :3]
    fitter = RegressionFitter(5, 3, CPU, weights)
    for a, b in zip(x.split([4, 4, 1]), y.split([4, 4, 1]), strict=True):
        fitter.update(a, b)
    weights = torch.ones(4) if weights is None else weights
    rows, targets = weighted(x, weights), weighted(y, weights)[:, :-1]
    torch.testing.assert_close(fitter.total.gram, rows.T @ rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fitter.total.cross, targets.T @ rows, rtol=1e-5, atol=1e-6)
    fitted = residual_refit(fitter.total, torch.randn(3, 6), ridge=0)
    torch.testing.assert_close(fitted, torch.linalg.lstsq(rows, targets).solution.T, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(1e-3, 10.0))
def test_ridge_pulls_a_residual_refit_towards_the_present_map(seed: int, ridge: float) -> None:
    x, gram, weight = problem(seed)
    y = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(seed + 1)).double() + x[:, :3]
    level = ridge * float(gram.diagonal().mean())
    design = torch.cat([x / len(x) ** 0.5, level**0.5 * torch.eye(6, dtype=torch.float64)])
    target = torch.cat([y / len(x) ** 0.5, level**0.5 * weight.T])
    expected = torch.linalg.lstsq(design, target).solution.T
    fitted = residual_refit(Regression(gram, y.T @ x / len(x), len(x)), weight, ridge)
    torch.testing.assert_close(fitted, expected, rtol=1e-6, atol=1e-8)


def test_a_residual_refit_leaves_a_map_that_reaches_its_target() -> None:
    x, gram, weight = problem(3)
    fitted = residual_refit(Regression(gram, (x @ weight.T).T @ x / len(x), len(x)), weight)
    torch.testing.assert_close(fitted, weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_a_fit_to_sums_of_targets_is_that_sum_of_the_fits(ridge: float) -> None:
    x, gram, weight = problem(4)
    y = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(5)).double()
    fit, sums = Regression(gram, y.T @ x / len(x), len(x)), torch.randn(2, 3)
    keep = torch.tensor([True, False, True, True, False, True])

    def cut(fit: Regression, weight: Tensor) -> Tensor:
        return refit(gram, residual_refit(fit, weight, ridge), keep, ridge)

    summed = cut(fit.of_sums(sums), sums.double() @ weight)
    torch.testing.assert_close(summed, sums.double() @ cut(fit, weight), rtol=1e-8, atol=1e-10)


def test_signed_sums_keep_squared_norms() -> None:
    sums = signed_sums(64, 500)
    torch.manual_seed(1)
    assert torch.equal(sums, signed_sums.__wrapped__(64, 500))  # whatever the seed
    torch.testing.assert_close(sums.square().sum(0), torch.ones(500))
    matrix = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    assert float((sums @ matrix).square().sum()) == pytest.approx(float(matrix.square().sum()), rel=0.1)
    assert torch.equal(signed_sums(64, 64), torch.eye(64))  # few rows are left as they are


def test_one_image_cannot_be_split() -> None:
    fitter = RegressionFitter(5, 3, CPU)
    fitter.update(torch.randn(1, 4, 5), torch.randn(1, 4, 3))
    assert fitter.splits() == []
    assert cross_validated_ridge([], lambda _fit, _ridge: torch.zeros(3, 6), 0.1) == 0.1


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0, 1e-3), (30.0, 10, 1e4)], ids=["exact", "noise"])
def test_the_ridge_follows_how_far_a_fit_can_be_trusted(noise: float, low: float, high: float) -> None:
    x, truth = torch.randn(40, 3, 5), torch.randn(5, 3)
    fitter = RegressionFitter(5, 3, CPU)
    fitter.update(x, x @ truth + noise * torch.randn(40, 3, 3))
    present = torch.zeros(3, 6)
    ridge = cross_validated_ridge(fitter.splits(), lambda fit, ridge: residual_refit(fit, present, ridge), 0.1)
    assert low <= ridge <= high

    def error(ridge: float) -> float:
        return sum(held_out.error(residual_refit(rest, present, ridge)) for rest, held_out in fitter.splits())

    assert error(ridge) <= min(error(ridge * RIDGE_STEP), error(ridge / RIDGE_STEP if ridge > 2e-4 else ridge))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20])
def test_what_reads_nothing_stays_as_it_is(scale: float) -> None:
    fitter = RegressionFitter(4, 3, torch.device("cpu"))
    x, y = scale * torch.randn(8, 5, 4), torch.randn(8, 5, 3)
    fitter.update(x, y)
    fit, weight = fitter.total.first(4), torch.randn(3, 4).double()
    torch.testing.assert_close(residual_refit(fit, weight), weight, rtol=0, atol=1e-3)


def test_a_raised_ridge_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    singular = torch.ones(4, 4, dtype=torch.float64) - 1e-12 * torch.eye(4, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(inverse(singular)).all()
    assert "singular in spite of its ridge" in caplog.text
    caplog.clear()
    inverse(torch.eye(3, dtype=torch.float64))
    assert not caplog.text


def test_what_no_ridge_mends_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="cannot be inverted"):
        inverse(torch.full((3, 3), torch.nan, dtype=torch.float64))
