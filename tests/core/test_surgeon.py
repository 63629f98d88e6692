from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gohsp.core.ridge import apply_refit, idle_inputs, refit, refit_map, ridged
from gohsp.core.surgeon import BrainSurgeon, select_units
from linear import problem, random_inputs

seeds = st.integers(0, 10**6)


def best_error(gram: Tensor, weight: Tensor, gone: list[int]) -> float:
    """min over Z, Z's columns ``gone`` zero, of tr((weight - Z) gram (weight - Z)^T): an explicit least squares."""
    root = torch.linalg.cholesky(gram).T  # gram = root^T root
    keep = [j for j in range(len(gram)) if j not in gone]
    target = root @ weight.T
    solution = torch.linalg.lstsq(root[:, keep], target).solution
    return float((target - root[:, keep] @ solution).square().sum())


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


def greedy_over_best(seed: int, count: int) -> float:
    """Error of the greedily selected ``count`` of 8 units, refitted, over that of the best subset of all."""
    x = random_inputs(seed, 8)
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)).double()

    def error(units: tuple[int, ...]) -> float:
        design, target = x[:, [*units, 8]], x @ weight.T
        left = target - design @ torch.linalg.lstsq(design, target).solution
        return float(left.square().sum() / len(x))

    keep = select_units(x.T @ x / len(x), weight, torch.ones(8, dtype=torch.float64), count, ridge=0)
    chosen = tuple(keep[:8].nonzero().flatten().tolist())
    assert bool(keep[8])
    assert len(chosen) == count
    return error(chosen) / min(error(c) for c in combinations(range(8), count))


def test_removing_one_unit_is_optimal() -> None:
    assert max(greedy_over_best(seed, 7) for seed in range(12)) < 1 + 1e-6


@pytest.mark.parametrize("count", [6, 4, 2])
def test_greedy_selection_is_close_to_the_best_subset(count: int) -> None:
    ratios = sorted(greedy_over_best(seed, count) for seed in range(12))
    assert ratios[8] < 1.05
    assert ratios[-1] < 4


@pytest.mark.parametrize("count", [1, 20, 39, 40])
def test_selection_in_groups_keeps_the_asked_number(count: int) -> None:
    x = random_inputs(5, 40, count=200)
    keep = select_units(x.T @ x / 200, torch.randn(4, 41), torch.ones(40, dtype=torch.float64), count)
    assert int(keep[:40].sum()) == count
    assert bool(keep[40])


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
