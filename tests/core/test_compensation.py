from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core.compensation import (
    RIDGE_STEP,
    BrainSurgeon,
    InputFitter,
    MomentFitter,
    Regression,
    RegressionFitter,
    apply_refit,
    collect_moments,
    cross_validated_ridge,
    idle_inputs,
    inverse,
    refit,
    refit_map,
    residual_refit,
    ridged,
    select_units,
    signed_sums,
    tensors_of,
)
from gohsp.core.fisher import TokenWeights
from gohsp.errors import NonFiniteError
from gohsp.structure import ModelStructure

seeds = st.integers(0, 10**6)
CPU = torch.device("cpu")


def problem(seed: int, n: int = 6, outputs: int = 3, count: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs ``[count, n]`` with a last entry 1, their second moment, and a map on them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) + 0.5 * torch.randn(n, n, generator=generator)
    x = (torch.randn(count, n, generator=generator) @ mix + 0.3).double()
    x[:, -1] = 1
    weight = torch.randn(outputs, n, generator=generator).double()
    return x, x.T @ x / count, weight


def best_error(gram: Tensor, weight: Tensor, gone: list[int]) -> float:
    """min over Z, Z's columns ``gone`` zero, of tr((weight - Z) gram (weight - Z)^T): an explicit least squares."""
    root = torch.linalg.cholesky(gram).T  # gram = root^T root
    keep = [j for j in range(len(gram)) if j not in gone]
    target = root @ weight.T
    solution = torch.linalg.lstsq(root[:, keep], target).solution
    return float((target - root[:, keep] @ solution).square().sum())


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


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([0.0, 1e-4, 0.1]))
def test_saliency_is_the_error_that_removal_and_refit_leave(seed: int, ridge: float) -> None:
    _, gram, weight = problem(seed)
    surgeon = BrainSurgeon(gram, weight, ridge)
    metric = ridged(gram, ridge)
    expected = torch.tensor([best_error(metric, weight, [j]) for j in range(6)], dtype=torch.float64)
    torch.testing.assert_close(surgeon.saliency(), expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds, st.permutations(range(6)))
def test_group_saliency_is_the_error_of_the_whole_group(seed: int, order: list[int]) -> None:
    _, gram, weight = problem(seed)
    groups = [order[:2], order[2:5], order[5:]]
    expected = torch.tensor([best_error(ridged(gram, 0), weight, g) for g in groups], dtype=torch.float64)
    got = BrainSurgeon(gram, weight, 0).group_saliency([torch.tensor(g) for g in groups])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds, st.permutations(range(6)))
def test_down_dating_equals_starting_afresh(seed: int, order: list[int]) -> None:
    _, gram, weight = problem(seed)
    surgeon = BrainSurgeon(gram, weight, 1e-4)
    surgeon.remove(torch.tensor(order[:1]))
    surgeon.remove(torch.tensor(order[1:3]))
    keep = torch.ones(6, dtype=torch.bool)
    keep[order[:3]] = False
    torch.testing.assert_close(surgeon.weight, refit(gram, weight, keep, 1e-4), rtol=1e-6, atol=1e-8)
    left = torch.linalg.inv(ridged(gram, 1e-4)[keep][:, keep])
    torch.testing.assert_close(surgeon.inverse[keep][:, keep], left, rtol=1e-6, atol=1e-8)
    assert not surgeon.inverse[~keep].any()
    assert not surgeon.inverse[:, ~keep].any()
    # the next removal costs what the whole set then costs, less what it has cost so far
    for j in order[3:]:
        so_far = best_error(ridged(gram, 1e-4), weight, order[:3])
        then = best_error(ridged(gram, 1e-4), weight, [*order[:3], j])
        assert float(surgeon.saliency()[j]) == pytest.approx(then - so_far, rel=1e-5, abs=1e-8)


def test_the_surgeon_leaves_its_arguments_alone() -> None:
    _, gram, weight = problem(1)
    before = gram.clone(), weight.clone()
    BrainSurgeon(gram, weight).remove(torch.tensor([0, 3]))
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


def test_a_copy_of_an_input_goes_first_and_for_nothing() -> None:
    x, _, weight = problem(2)
    x[:, 4] = x[:, 1]
    gram = x.T @ x / len(x)
    keep = select_units(gram, weight, torch.ones(5, dtype=torch.float64), 4, ridge=1e-9)
    assert (~keep).nonzero().flatten().tolist() in ([1], [4])
    fitted = refit(gram, weight, keep, ridge=1e-9)
    torch.testing.assert_close(x @ fitted.T, x @ weight.T, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_streamed_moments_equal_those_of_one_batch(seed: int, sizes: list[int]) -> None:
    x = torch.randn(sum(sizes), 2, 4, generator=torch.Generator().manual_seed(seed))
    streamed = MomentFitter(4, CPU)
    for part in x.split(sizes):
        streamed.update(part)
    flat = torch.cat([x.reshape(-1, 4), torch.ones(2 * len(x), 1)], dim=1).double()
    torch.testing.assert_close(streamed.moment, flat.T @ flat / len(flat), rtol=1e-5, atol=1e-5)
    assert streamed.moment.dtype == torch.float64


def test_half_precision_activations_are_accumulated_in_full() -> None:
    x = torch.full((4096, 1), 0.1, dtype=torch.bfloat16)
    fitter = MomentFitter(1, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fitter.update(x)
    value = float(x[0].double())
    # Equal terms round alike, so that a float32 sum may err by 2e-5 in some BLAS; bfloat16 by 1e-3 or more.
    assert float(fitter.moment[0, 0]) == pytest.approx(value**2, rel=1e-4)
    assert float(fitter.moment[0, 1]) == pytest.approx(value, rel=1e-4)


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Rows ``[B * tokens, width + 1]``, last entry 1, each times the root of its token's share of all weight."""
    rows = torch.cat([x.double(), torch.ones(*x.shape[:-1], 1)], dim=-1)
    share = weights.double() / (weights.double().sum() * len(x))
    return (rows * share.sqrt()[None, :, None]).flatten(0, 1)


WEIGHTS = torch.tensor([2.5, 0.0, 0.7, 0.3])


@pytest.mark.parametrize("weights", [WEIGHTS, 3 * WEIGHTS, None], ids=["weights", "scaled", "none"])
def test_token_weights_weigh_the_moment(weights: Tensor | None) -> None:
    x = torch.randn(7, 4, 3) + 1
    fitter = MomentFitter(3, CPU, weights)
    for part in x.split([2, 5]):
        fitter.update(part)
    rows = weighted(x, torch.ones(4) if weights is None else weights)
    torch.testing.assert_close(fitter.moment, rows.T @ rows, rtol=1e-5, atol=1e-6)
    assert float(fitter.moment[-1, -1]) == pytest.approx(1)


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


def test_folds_are_disjoint_by_image_and_add_up() -> None:
    x, y = torch.randn(6, 4, 5), torch.randn(6, 4, 3)
    fitter = RegressionFitter(5, 3, CPU)
    fitter.update(x, y)
    fitter.update(x.flip(1), y.flip(1))  # another view of the same images belongs to the same folds
    splits = fitter.splits()
    assert [held_out.count for _, held_out in splits] == [16, 16, 8, 8]
    weight = torch.randn(3, 6, dtype=torch.float64)
    for fold, (rest, held_out) in enumerate(splits):
        for part, mine in ((held_out, True), (rest, False)):
            images = [i for i in range(6) if (i % 4 == fold) == mine]
            rows = torch.cat([x[images], torch.ones(len(images), 4, 1)], dim=-1).flatten(0, 1).double()
            targets = y[images].flatten(0, 1).double()
            torch.testing.assert_close(part.gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
            error = 2 * ((rows @ weight.T - targets).square().sum() - targets.square().sum())
            assert part.error(weight) == pytest.approx(float(error), rel=1e-4)


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


def test_moments_about_each_images_mean() -> None:
    x = torch.randn(7, 4, 3) + 3 * torch.randn(7, 1, 3)
    fitter = InputFitter(3, CPU)
    for part in x.split([3, 1, 3]):
        fitter.update(part)
    centred = torch.cat([(x - x.mean(1, keepdim=True)).double(), torch.zeros(7, 4, 1)], dim=-1).flatten(0, 1)
    torch.testing.assert_close(fitter.within, centred.T @ centred / 28, rtol=1e-4, atol=1e-5)
    rows = weighted(x, torch.ones(4))
    torch.testing.assert_close(fitter.moment, rows.T @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weigh", [True, False])
def test_collected_moments_are_those_of_the_modules_inputs(
    weigh: bool, model: nn.Module, structure: ModelStructure, images: Tensor
) -> None:
    model.train()
    even = torch.ones(5)
    of_second = TokenWeights(torch.tensor([3.0, 1, 0, 0, 1]), torch.tensor([0.5, 0.5, 1, 1, 2])) if weigh else None
    weights = (TokenWeights(None, None), of_second) if of_second else None
    got = collect_moments(model, structure, list(images.split(5)), weights)
    assert model.training
    seen: dict[str, Tensor] = {}
    for name in ("attn", "attn.proj", "mlp.fc2"):
        module = model.blocks[1].get_submodule(name)
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].double()))
    with torch.no_grad():
        model.eval()(images)
    expected = {
        "attention_input": weighted(seen["attn"], even),
        "key_input": weighted(seen["attn"] - seen["attn"].mean(1, keepdim=True), even) * torch.tensor([1.0] * 32 + [0]),
        "head_outputs": weighted(seen["attn.proj"], of_second.attention if of_second else even),
        "hidden": weighted(seen["mlp.fc2"], of_second.ffn if of_second else even),
    }
    for name, rows in expected.items():
        torch.testing.assert_close(getattr(got[1], name), rows.T @ rows, rtol=1e-4, atol=1e-5)
    assert all(a is getattr(got[1], name) for a, name in zip(tensors_of(got[1]), expected, strict=True))


def test_non_finite_activations_are_named(model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"input of module 'blocks\.1\.mlp\.fc2' holds NaN"):
        collect_moments(model, structure, [images])


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.sampled_from(["alive", "zero", "constant"]), min_size=2, max_size=8), st.booleans())
def test_idle_inputs_go_first_and_without_a_trace(seed: int, kinds: list[str], bias: bool) -> None:
    """Whatever the ridge, and whatever their weights are: 0 is worth nothing, and a bias is as good as a constant."""
    generator = torch.Generator().manual_seed(seed)
    n = len(kinds)
    x = 0.1 * torch.randn(64, n, generator=generator).double()
    for j, kind in enumerate(kinds):
        if kind != "alive":
            x[:, j] = 2.0 if kind == "constant" else 0.0
    if bias:
        x = torch.cat([x, torch.ones(64, 1, dtype=torch.float64)], dim=1)
    weight = torch.randn(3, x.shape[1], generator=generator).double()
    gram = x.T @ x / 64
    idle = torch.tensor([kind == "zero" or (bias and kind == "constant") for kind in kinds])
    assert torch.equal(idle_inputs(gram, n)[:n], idle)
    keep = select_units(gram, weight, torch.ones(n, dtype=torch.float64), n - int(idle.sum()), ridge=0.1)
    assert torch.equal(keep[:n], ~idle)
    if idle.any() and keep.any():
        after = apply_refit(weight, keep, refit_map(gram, keep, 0.1, units=n))
        torch.testing.assert_close(x @ after.T, x @ weight.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20])
def test_what_reads_nothing_stays_as_it_is(scale: float) -> None:
    fitter = RegressionFitter(4, 3, torch.device("cpu"))
    x, y = scale * torch.randn(8, 5, 4), torch.randn(8, 5, 3)
    fitter.update(x, y)
    fit, weight = fitter.total.first(4), torch.randn(3, 4).double()
    torch.testing.assert_close(residual_refit(fit, weight), weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_moments_still_give_finite_solutions(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, rank, generator=generator).double() @ torch.randn(rank, 8, generator=generator).double()
    gram, weight = x.T @ x / 40, torch.randn(3, 8, generator=generator).double()
    keep = select_units(gram, weight, torch.ones(8, dtype=torch.float64), 3, ridge=1e-4)
    assert int(keep.sum()) == 3
    fitted = refit(gram, weight, keep, ridge=1e-4)
    assert torch.isfinite(fitted).all()
    if rank == 3:  # three units carry everything
        torch.testing.assert_close(x @ fitted.T, x @ weight.T, rtol=1e-2, atol=1e-2)


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
