from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core.activations import units
from gohsp.core.compensation import BlockMoments, select_units
from gohsp.core.projection import (
    ProjectionSettings,
    Values,
    bias_slice,
    blend,
    constrained,
    on_support,
    project,
    select,
    squared_size,
)
from gohsp.models import describe
from gohsp.structure import BlockPlan, BlockShape, BlockStructure, ModelStructure

NORM = ProjectionSettings(metric="euclidean", strength="norm", guidance=0)
ACTIVATION = replace(NORM, strength="activation")
DATA = ProjectionSettings(metric="data", guidance=0, ridge=1e-12)
HEADS, WIDTH, FFN, DIM = 3, 2, 6, 6
FULL = BlockShape(heads=HEADS, qk=WIDTH, vo=WIDTH, ffn=FFN)


@lru_cache
def tiny(dim: int = DIM, **arguments: Any) -> tuple[nn.Module, BlockStructure]:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=dim,
        depth=1,
        num_heads=HEADS,
        mlp_ratio=FFN / DIM,
        num_classes=2,
        **arguments,
    )
    return model, describe(model).blocks[0]


def random_values(block: BlockStructure, settings: ProjectionSettings, seed: int, **arguments: Any) -> Values:
    generator = torch.Generator().manual_seed(seed)
    views = constrained(tiny(**arguments)[0], block, settings.metric)
    return {entry: torch.randn(view.shape, generator=generator) for entry, view in views.items()}


def random_inputs(seed: int, width: int, count: int = 64) -> Tensor:
    """Correlated inputs ``[count, width + 1]``, the last entry 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.4 * torch.randn(width, width, generator=generator)
    x = torch.randn(count, width, generator=generator) @ mix + 0.5
    return torch.cat([x, torch.ones(count, 1)], dim=1).double()


def moments_of(inputs: Tensor, heads: Tensor, hidden: Tensor) -> BlockMoments:
    """Moments of inputs whose rows are all tokens of one image."""
    return BlockMoments(*(x.T @ x / len(x) for x in (inputs, inputs - inputs.mean(0), heads, hidden)))


def random_moments(seed: int) -> BlockMoments:
    return moments_of(random_inputs(seed, DIM), random_inputs(seed + 1, HEADS * WIDTH), random_inputs(seed + 2, FFN))


WHITE = BlockMoments(*(torch.eye(n + 1, dtype=torch.float64) for n in (DIM, DIM, HEADS * WIDTH, FFN)))

shapes = st.builds(
    BlockShape,
    heads=st.integers(1, HEADS),
    qk=st.integers(1, WIDTH),
    vo=st.integers(1, WIDTH),
    ffn=st.integers(1, FFN),
)
seeds = st.integers(0, 10**6)


def unit_energy(values: Values, slices: tuple, count: int) -> Tensor:
    total = torch.zeros(count, dtype=torch.float64)
    for entry in slices:
        value = values[entry].double().square()
        total += value.sum(1 - entry.axis) if value.ndim == 2 else value
    return total


def supports(shape: BlockShape):
    """Every point of the structured set's combinatorial part."""
    for heads in combinations(range(HEADS), shape.heads):
        per_head = [combinations(range(WIDTH), shape.qk) for _ in heads]
        for qk in product(*per_head):
            for vo in product(*[combinations(range(WIDTH), shape.vo) for _ in heads]):
                for ffn in combinations(range(FFN), shape.ffn):
                    yield BlockPlan(heads=heads, qk=qk, vo=vo, ffn=ffn)


@settings(max_examples=25, deadline=None)
@given(shapes, seeds)
def test_euclidean_projection_is_the_nearest_point_of_the_set(shape: BlockShape, seed: int) -> None:
    _, block = tiny()
    values = random_values(block, NORM, seed)
    kept = select(block, values, WHITE, shape, NORM)
    assert kept.shape == shape
    projected = project(on_support(block, values, WHITE, kept, NORM), values)
    distance = float(sum((values[k] - projected[k]).double().square().sum() for k in values))

    energy = {
        kind: unit_energy(values, block.slices(kind), n).tolist() for kind, n in (("qk", 6), ("vo", 6), ("ffn", 6))
    }
    everything = sum(sum(e) for e in energy.values())
    nearest = min(
        everything - sum(energy[kind][u] for kind in energy for u in plan.units(kind, FULL)) for plan in supports(shape)
    )
    assert distance == pytest.approx(nearest, rel=1e-5, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(shapes, seeds, st.sampled_from([NORM, ACTIVATION]))
def test_euclidean_projection_keeps_units_untouched_and_is_idempotent(
    shape: BlockShape, seed: int, how: ProjectionSettings
) -> None:
    _, block = tiny()
    values, moments = random_values(block, how, seed), random_moments(seed)
    kept = select(block, values, moments, shape, how)
    projection = on_support(block, values, moments, kept, how)
    projected = project(projection, values)
    for kind in ("qk", "vo", "ffn"):
        stays = torch.zeros(6, dtype=torch.bool)
        stays[kept.units(kind, FULL)] = True
        for entry in block.slices(kind):
            assert torch.equal(
                projected[entry].movedim(entry.axis, 0)[stays], values[entry].movedim(entry.axis, 0)[stays]
            )
            assert not projected[entry].movedim(entry.axis, 0)[~stays].any()
    assert all(torch.equal(again, projected[k]) for k, again in project(projection, projected).items())
    assert select(block, projected, moments, shape, how) == kept


def test_activation_strength_sees_that_a_strong_weight_is_never_used() -> None:
    _, block = tiny()
    values = random_values(block, ACTIVATION, 0)
    for value in values.values():
        value.fill_(1.0)
    values[block.ffn_readout.columns][:, 0] = 10.0
    asleep = WHITE.hidden.clone()
    asleep[0, 0] = 1e-6
    moments = replace(WHITE, hidden=asleep)
    shape = replace(FULL, ffn=5)
    assert 0 in select(block, values, moments, shape, NORM).ffn
    assert 0 not in select(block, values, moments, shape, ACTIVATION).ffn


def test_activation_strength_of_values_likewise() -> None:
    _, block = tiny()
    values = {k: torch.ones_like(v) for k, v in random_values(block, ACTIVATION, 0).items()}
    values[block.attention_readout.columns][:, 2] = 10.0  # dimension 0 of head 1
    asleep = WHITE.head_outputs.clone()
    asleep[2, 2] = 1e-6
    shape = replace(FULL, vo=1)
    assert select(block, values, WHITE, shape, ACTIVATION).vo[1] == (0,)
    assert select(block, values, replace(WHITE, head_outputs=asleep), shape, ACTIVATION).vo[1] == (1,)


def test_query_key_strength_is_the_product_of_both_sides() -> None:
    _, block = tiny()
    values = random_values(block, ACTIVATION, 0)
    for value in values.values():
        value.fill_(1.0)
    values[block.query[0]][1] = 100.0  # dimension 1 of head 0: loud queries
    for entry in block.key:
        values[entry][1] = 0.0  # that no key ever answers
    kept = select(block, values, WHITE, replace(FULL, qk=1), ACTIVATION)
    assert kept.qk[0] == (0,)


def test_what_all_keys_of_an_image_share_gives_a_dimension_no_strength() -> None:
    _, block = tiny()
    values = {k: torch.ones_like(v) for k, v in random_values(block, ACTIVATION, 0).items()}
    values[block.key[1]][0] = 100.0  # dimension 0 of head 0: a huge key bias
    values[block.key[0]][0] = 0.5  # and little that varies
    moments = moments_of(*(random_inputs(i, 6) for i in range(3)))
    assert select(block, values, moments, replace(FULL, qk=1), ACTIVATION).qk[0] == (1,)


@pytest.mark.parametrize("bias", [True, False])
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds)
def test_data_projection_is_least_squares_on_its_support(bias: bool, shape: BlockShape, seed: int) -> None:
    _, block = tiny(proj_bias=bias)
    values = random_values(block, DATA, seed, proj_bias=bias)
    inputs = [random_inputs(seed + i, 6) for i in range(3)]
    moments = moments_of(*inputs)
    kept = select(block, values, moments, shape, DATA)
    assert kept.shape == shape
    projection = on_support(block, values, moments, kept, DATA)
    projected = project(projection, values)
    for kind, readout, x in (("vo", block.attention_readout, inputs[1]), ("ffn", block.ffn_readout, inputs[2])):
        columns = kept.units(kind, FULL)
        entry = bias_slice(readout)
        weight = values[readout.columns].double()
        target = x[:, :-1] @ weight.T
        design = x[:, columns]
        if bias:
            target = target + values[entry].double()
            design = torch.cat([design, x[:, -1:]], dim=1)
        best = torch.linalg.lstsq(design, target).solution
        got = projected[readout.columns].double()
        gone = [u for u in range(6) if u not in columns]
        assert not got[:, gone].any()
        torch.testing.assert_close(got[:, columns], best[: len(columns)].T, rtol=1e-3, atol=1e-3)
        if bias:
            torch.testing.assert_close(projected[entry].double(), best[-1], rtol=1e-3, atol=1e-3)
    for k, again in project(projection, projected).items():
        torch.testing.assert_close(again, projected[k])


def test_data_projection_zeroes_query_key_dimensions_of_kept_heads_only() -> None:
    _, block = tiny()
    values = random_values(block, DATA, 3)
    kept = BlockPlan(heads=(0, 2), qk=((1,), (0,)), vo=((0,), (0,)), ffn=(0, 1))
    projected = project(on_support(block, values, random_moments(3), kept, DATA), values)
    stays = torch.tensor([False, True, True, True, True, False])  # head 1 is gone by its readout columns
    for entry in block.query + block.key:
        assert torch.equal(projected[entry][stays], values[entry][stays])
        assert not projected[entry][~stays].any()
    assert all(entry in projected for entry in values)


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


@pytest.mark.parametrize("seed", range(4))
def test_removing_one_head_in_the_data_metric_is_optimal(seed: int) -> None:
    _, block = tiny()
    values = random_values(block, DATA, seed)
    heads = random_inputs(seed, 6)
    moments = replace(random_moments(seed), head_outputs=heads.T @ heads / len(heads))
    weight = torch.cat(
        [values[block.attention_readout.columns], values[bias_slice(block.attention_readout)][:, None]], 1
    )
    target = heads @ weight.double().T

    def error(head: int) -> float:
        design = heads[:, [u for u in range(7) if u == 6 or u // WIDTH != head]]
        return float((target - design @ torch.linalg.lstsq(design, target).solution).square().sum())

    kept = select(block, values, moments, replace(FULL, heads=2), DATA)
    (gone,) = {0, 1, 2} - set(kept.heads)
    assert gone == min(range(3), key=error)


def nearly_equal(size: int, a: int, b: int) -> Tensor:
    gram = torch.eye(size, dtype=torch.float64)
    gram[a, b] = gram[b, a] = 0.999
    return gram


def test_a_value_that_takes_over_from_a_removed_head_matters_more() -> None:
    _, block = tiny()
    values = {k: torch.zeros_like(v) for k, v in random_values(block, DATA, 0).items()}
    columns = values[block.attention_readout.columns] = torch.eye(6)
    columns[1, 1] = 0.7
    columns[:, 2] = columns[:, 0]  # head 1 says again what dimension 0 of head 0 says, and goes
    moments = replace(WHITE, head_outputs=nearly_equal(7, 0, 2))
    guided = replace(DATA, guidance=1.0)
    ranking = torch.tensor([1.0, 0.1, 1.0])
    kept = select(block, values, moments, replace(FULL, heads=2, vo=1), guided, ranking=ranking)
    assert kept.heads == (0, 2)
    assert kept.vo[0] == (0,)


def test_values_that_stand_in_for_each_other_do_not_all_go() -> None:
    _, block = tiny(dim=9)
    values = {k: torch.zeros_like(v) for k, v in random_values(block, DATA, 0, dim=9).items()}
    columns = values[block.attention_readout.columns] = torch.eye(9)
    columns[:, 1] = columns[:, 0]
    columns[2, 2] = 0.5  # worth more than either of the two alone while the other is there
    white = torch.eye(10).double()
    moments = BlockMoments(white, white, nearly_equal(10, 0, 1), torch.eye(block.shape.ffn + 1).double())
    kept = select(block, values, moments, replace(block.shape, vo=1), DATA)
    assert kept.vo[0] in ((0,), (1,))
    assert [len(dims) for dims in kept.vo] == [1, 1, 1]


@pytest.mark.parametrize("how", [NORM, ACTIVATION, DATA])
@settings(max_examples=10, deadline=None)
@given(seed=seeds, count=st.integers(1, HEADS), order=st.permutations(range(HEADS)))
def test_full_guidance_follows_the_ranking_alone(
    how: ProjectionSettings, seed: int, count: int, order: list[int]
) -> None:
    _, block = tiny()
    ranking = torch.tensor([0.1 + 0.2 * place for place in order])
    values, moments = random_values(block, how, seed), random_moments(seed)
    kept = select(block, values, moments, replace(FULL, heads=count), replace(how, guidance=1.0), ranking=ranking)
    assert kept.heads == tuple(sorted(ranking.topk(count).indices.tolist()))
    # and without guidance the ranking is not looked at
    free = select(block, values, moments, replace(FULL, heads=count), how, ranking=ranking)
    assert free == select(block, values, moments, replace(FULL, heads=count), how)


def test_blend_is_a_mean_of_shares() -> None:
    strength, ranking = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([0.2, 0.2])
    torch.testing.assert_close(blend(strength, ranking, 0.25), torch.tensor([0.3125, 0.6875], dtype=torch.float64))
    assert blend(strength, None, 0.5) is strength
    assert torch.isfinite(blend(torch.zeros(2), torch.zeros(2), 0.5)).all()


PRESENT = BlockPlan(heads=(0, 2), qk=((1,), (1,)), vo=((1,), (0,)), ffn=(1, 3, 4))
DIAGONAL = (PRESENT, replace(PRESENT, heads=(0, 1), vo=((0,), (1,)), ffn=(0, 2, 5)), replace(PRESENT, heads=(1, 2)))


@pytest.mark.parametrize("how", [NORM, ACTIVATION, DATA])
@pytest.mark.parametrize("present", DIAGONAL)
def test_hysteresis_keeps_the_present_support_under_ties(how: ProjectionSettings, present: BlockPlan) -> None:
    _, block = tiny()
    values = {k: torch.ones_like(v) for k, v in random_values(block, how, 0).items()}
    # identity rows of a readout make units interchangeable but not redundant
    for readout in (block.attention_readout, block.ffn_readout):
        values[readout.columns] = torch.eye(6)
    assert select(block, values, WHITE, present.shape, how, present=present, hysteresis=0.1) == present


@pytest.mark.parametrize(("strength", "stays"), [(1.2, True), (1.4, False)])
@pytest.mark.parametrize("how", [NORM, ACTIVATION, DATA])
def test_hysteresis_gives_way_to_units_that_are_stronger_by_more(
    how: ProjectionSettings, strength: float, stays: bool
) -> None:
    _, block = tiny()
    values = {k: torch.zeros_like(v) for k, v in random_values(block, how, 0).items()}
    values[block.ffn_readout.columns] = torch.eye(6)
    values[block.ffn_readout.columns][:, 5] *= strength**0.5  # squared strength of unit 5, which is out
    values[block.attention_readout.columns] = torch.eye(6)
    present = replace(PRESENT, ffn=(0, 1, 2, 3, 4))
    kept = select(block, values, WHITE, present.shape, how, present=present, hysteresis=0.3)
    assert (5 not in kept.ffn) == stays


def test_layer_scale_decides_what_the_residual_stream_sees() -> None:
    _, block = tiny()
    values = {k: torch.ones_like(v) for k, v in random_values(block, DATA, 0).items()}
    for readout in (block.attention_readout, block.ffn_readout):
        values[readout.columns] = torch.diag(torch.tensor([5.0, 5.0, 1.0, 1.0, 5.0, 5.0]))
    gain = torch.tensor([0.01, 0.01, 1.0, 1.0, 0.01, 0.01])
    shape = BlockShape(heads=1, qk=2, vo=2, ffn=2)
    plain = select(block, values, WHITE, shape, DATA)
    assert 1 not in plain.heads
    assert not {2, 3} & set(plain.ffn)
    scaled = select(block, values, WHITE, shape, DATA, gains=(gain, gain))
    assert (scaled.heads, scaled.ffn) == ((1,), (2, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_size_in_the_data_metric_is_the_energy_of_what_is_computed(bias: bool) -> None:
    arguments = {"proj_bias": bias, "qkv_bias": bias}
    _, block = tiny(**arguments)
    values = random_values(block, DATA, 4, **arguments)
    x, heads, hidden = (random_inputs(i, 6) for i in range(3))

    def energy(inputs: Tensor, weight: Tensor, offset: Tensor | None) -> float:
        out = inputs[:, :-1] @ weight.double().T + (0 if offset is None else offset.double())
        return float(out.square().sum(1).mean())

    expected = energy(x, values[block.query[0]], values[block.query[1]] if bias else None)
    expected += energy(x - x.mean(0), values[block.key[0]], None)  # what all keys share, bias too, is not seen
    for readout, inputs in ((block.attention_readout, heads), (block.ffn_readout, hidden)):
        entry = bias_slice(readout)
        expected += energy(inputs, values[readout.columns], values[entry] if entry else None)
    assert squared_size(block, values, moments_of(x, heads, hidden), "data") == pytest.approx(expected, rel=1e-4)
    plain = sum(float(v.double().square().sum()) for v in values.values())
    assert squared_size(block, values, moments_of(x, heads, hidden), "euclidean") == pytest.approx(plain)


@pytest.mark.parametrize("metric", ["data", "euclidean"])
def test_constrained_tensors_are_views_of_the_model(metric: str, model: nn.Module, structure: ModelStructure) -> None:
    block = structure.blocks[1]
    values = constrained(model, block, metric)
    assert (block.value[0] in values) == (metric == "euclidean")
    assert (block.ffn_in[0] in values) == (metric == "euclidean")
    assert (bias_slice(block.ffn_readout) in values) == (metric == "data")
    values[block.key[0]].fill_(7.0)
    rows = model.blocks[1].attn.qkv.weight
    assert bool((rows[32:64] == 7).all())
    assert not bool((rows[:32] == 7).any())
    assert not bool((rows[64:] == 7).any())
    assert units(model, block.key[0], 32).data_ptr() == values[block.key[0]].data_ptr()


@pytest.mark.parametrize("how", [NORM, DATA])
def test_keeping_everything_changes_nothing(how: ProjectionSettings) -> None:
    _, block = tiny()
    values, moments = random_values(block, how, 8), random_moments(8)
    kept = select(block, values, moments, FULL, how)
    for k, value in project(on_support(block, values, moments, kept, how), values).items():
        assert torch.equal(value, values[k])


def test_probes_estimate_the_size_of_wide_maps() -> None:
    dim = 96
    _, block = tiny(dim)  # heads of 32 dimensions, 6 / 6 * 96 hidden units
    values = random_values(block, DATA, 5, dim=dim)
    moments = moments_of(*(random_inputs(seed, dim) for seed in range(3)))
    exact = squared_size(block, values, moments, "data")
    estimate = squared_size(block, values, moments, "data", probes=24)
    assert estimate == pytest.approx(exact, rel=0.15)
    assert estimate != exact
    assert squared_size(block, values, moments, "data", probes=dim) == exact
