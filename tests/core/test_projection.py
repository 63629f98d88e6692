from __future__ import annotations

from collections.abc import Iterator
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

from gohsp.core.capture import units
from gohsp.core.moments import AttentionMoments, FfnMoments, SublayerMoments
from gohsp.core.projection import (
    Metric,
    RepairSettings,
    Values,
    blend,
    constrained,
    on_support,
    project,
    select,
    select_all,
    squared_size,
)
from gohsp.models import describe
from gohsp.structure import (
    Attention,
    AttentionKept,
    AttentionWidths,
    Ffn,
    FfnKept,
    FfnWidths,
    Network,
    PresentSublayer,
    SublayerKept,
    SublayerWidths,
    absent,
    unit_count,
)
from linear import random_inputs

METRICS: tuple[Metric, ...] = ("norm", "activation", "data")
FREE = RepairSettings(guidance=0, ridge=1e-12)
HEADS, WIDTH, FFN, DIM = 3, 2, 6, 6
WHOLE = AttentionWidths(heads=HEADS, qk=WIDTH, vo=WIDTH)
ALL_UNITS = FfnWidths(units=FFN)


@lru_cache
def tiny(dim: int = DIM, **arguments: Any) -> tuple[nn.Module, Attention, Ffn]:
    """A model of one block, and its two sub-layers."""
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
    attention, ffn = describe(model).present
    assert isinstance(attention, Attention)
    assert isinstance(ffn, Ffn)
    return model, attention, ffn


def sublayer(widths: SublayerWidths) -> PresentSublayer:
    """The sub-layer of the tiny model that such widths are for."""
    return tiny()[1 if isinstance(widths, AttentionWidths) else 2]


def random_values(sub: PresentSublayer, metric: Metric, seed: int, **arguments: Any) -> Values:
    generator = torch.Generator().manual_seed(seed)
    views = constrained(tiny(**arguments)[0], sub, metric)
    return {entry: torch.randn(view.shape, generator=generator) for entry, view in views.items()}


def ones(sub: PresentSublayer, metric: Metric) -> Values:
    return {entry: torch.ones_like(value) for entry, value in random_values(sub, metric, 0).items()}


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def attention_moments(inputs: Tensor, read: Tensor) -> AttentionMoments:
    """Moments of inputs whose rows are all tokens of one image."""
    return AttentionMoments(moment(inputs), moment(inputs - inputs.mean(0)), moment(read))


def random_moments(sub: PresentSublayer, seed: int) -> SublayerMoments:
    read = random_inputs(seed + 1, 6)
    return attention_moments(random_inputs(seed, DIM), read) if isinstance(sub, Attention) else FfnMoments(moment(read))


def white(sub: PresentSublayer) -> Any:
    eye = torch.eye(7, dtype=torch.float64)
    return AttentionMoments(eye, eye, eye) if isinstance(sub, Attention) else FfnMoments(eye)


attention_widths = st.builds(
    AttentionWidths, heads=st.integers(1, HEADS), qk=st.integers(1, WIDTH), vo=st.integers(1, WIDTH)
)
some_widths = st.one_of(
    attention_widths,
    st.builds(FfnWidths, units=st.integers(1, FFN)),
    st.sampled_from([absent(WHOLE), absent(ALL_UNITS)]),
)
seeds = st.integers(0, 10**6)


def unit_energy(values: Values, sub: PresentSublayer, kind: Any) -> Tensor:
    total = torch.zeros(unit_count(sub.widths, kind), dtype=torch.float64)
    for entry in sub.slices(kind):
        value = values[entry].double().square()
        total += value.sum(1 - entry.axis) if value.ndim == 2 else value
    return total


def supports(widths: SublayerWidths) -> Iterator[SublayerKept]:
    """Every point of the structured set's combinatorial part."""
    if isinstance(widths, FfnWidths):
        yield from (FfnKept(units=chosen) for chosen in combinations(range(FFN), widths.units))
        return
    for heads in combinations(range(HEADS), widths.heads):
        for qk in product(*[combinations(range(WIDTH), widths.qk) for _ in heads]):
            for vo in product(*[combinations(range(WIDTH), widths.vo) for _ in heads]):
                yield AttentionKept(heads=heads, qk=qk, vo=vo)


@settings(max_examples=40, deadline=None)
@given(some_widths, seeds)
def test_projection_by_norm_is_the_nearest_point_of_the_set(widths: SublayerWidths, seed: int) -> None:
    sub = sublayer(widths)
    values = random_values(sub, "norm", seed)
    kept = select(sub, values, white(sub), widths, FREE, metric="norm")
    assert kept.widths == widths
    projected = project(on_support(sub, values, white(sub), kept, FREE, metric="norm"), values)
    distance = float(sum((values[k] - projected[k]).double().square().sum() for k in values))

    energy = {kind: unit_energy(values, sub, kind).tolist() for kind in sub.widths.unit_kinds}
    everything = sum(map(sum, energy.values()))
    nearest = min(
        everything - sum(of[u] for kind, of in energy.items() for u in point.flat(kind, sub.widths))
        for point in supports(widths)
    )
    assert distance == pytest.approx(nearest, rel=1e-5, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(some_widths, seeds, st.sampled_from(["norm", "activation"]))
def test_projection_of_weights_keeps_units_untouched_and_is_idempotent(
    widths: SublayerWidths, seed: int, metric: Metric
) -> None:
    sub = sublayer(widths)
    values, moments = random_values(sub, metric, seed), random_moments(sub, seed)
    kept = select(sub, values, moments, widths, FREE, metric=metric)
    projection = on_support(sub, values, moments, kept, FREE, metric=metric)
    projected = project(projection, values)
    for kind in sub.widths.unit_kinds:
        stays = torch.zeros(6, dtype=torch.bool)
        stays[kept.flat(kind, sub.widths)] = True
        for entry in sub.slices(kind):
            assert torch.equal(
                projected[entry].movedim(entry.axis, 0)[stays], values[entry].movedim(entry.axis, 0)[stays]
            )
            assert not projected[entry].movedim(entry.axis, 0)[~stays].any()
    assert all(torch.equal(again, projected[k]) for k, again in project(projection, projected).items())
    assert select(sub, projected, moments, widths, FREE, metric=metric) == kept


def test_activation_strength_sees_that_a_strong_weight_is_never_used() -> None:
    _, _, ffn = tiny()
    values = ones(ffn, "activation")
    values[ffn.readout.columns][:, 0] = 10.0
    asleep = white(ffn).read.clone()
    asleep[0, 0] = 1e-6
    for metric, stays in (("norm", True), ("activation", False)):
        kept = select(ffn, values, FfnMoments(asleep), FfnWidths(units=5), FREE, metric=metric)
        assert (0 in kept.units) == stays


def test_activation_strength_of_values_likewise() -> None:
    _, attention, _ = tiny()
    values = ones(attention, "activation")
    values[attention.readout.columns][:, 2] = 10.0  # dimension 0 of head 1
    awake, widths = white(attention), replace(WHOLE, vo=1)
    asleep = awake.read.clone()
    asleep[2, 2] = 1e-6
    for moments, stays in ((awake, 0), (replace(awake, read=asleep), 1)):
        assert select(attention, values, moments, widths, FREE, metric="activation").vo[1] == (stays,)


def test_query_key_strength_is_the_product_of_both_sides() -> None:
    _, attention, _ = tiny()
    values = ones(attention, "activation")
    values[attention.query.weight][1] = 100.0  # dimension 1 of head 0: loud queries
    for entry in attention.key.slices:
        values[entry][1] = 0.0  # that no key ever answers
    kept = select(attention, values, white(attention), replace(WHOLE, qk=1), FREE, metric="activation")
    assert kept.qk[0] == (0,)


def test_what_all_keys_of_an_image_share_gives_a_dimension_no_strength() -> None:
    _, attention, _ = tiny()
    values = ones(attention, "activation")
    values[attention.key.bias][0] = 100.0  # dimension 0 of head 0: a huge key bias
    values[attention.key.weight][0] = 0.5  # and little that varies
    moments = attention_moments(random_inputs(0, 6), random_inputs(1, 6))
    assert select(attention, values, moments, replace(WHOLE, qk=1), FREE, metric="activation").qk[0] == (1,)


@pytest.mark.parametrize("bias", [True, False])
@settings(max_examples=25, deadline=None)
@given(widths=some_widths, seed=seeds)
def test_data_projection_is_least_squares_on_its_support(bias: bool, widths: SublayerWidths, seed: int) -> None:
    """An absent sub-layer, too: what is left of its readout is the bias that its mean is worth."""
    _, *subs = tiny(proj_bias=bias)
    sub = subs[isinstance(widths, FfnWidths)]
    values = random_values(sub, "data", seed, proj_bias=bias)
    x, readout = random_inputs(seed + 1, 6), sub.readout
    inputs = random_inputs(seed, 6)
    moments = attention_moments(inputs, x) if isinstance(sub, Attention) else FfnMoments(moment(x))
    kept = select(sub, values, moments, widths, FREE)
    assert kept.widths == widths
    projection = on_support(sub, values, moments, kept, FREE)
    projected = project(projection, values)
    columns = kept.flat(sub.widths.unit_kinds[-1], sub.widths)
    target, design = x[:, :-1] @ values[readout.columns].double().T, x[:, columns]
    if bias:
        target = target + values[readout.bias_slice].double()
        design = torch.cat([design, x[:, -1:]], dim=1)
    got = projected[readout.columns].double()
    assert not got[:, [u for u in range(6) if u not in columns]].any()
    if design.shape[1]:
        best = torch.linalg.lstsq(design, target).solution
        torch.testing.assert_close(got[:, columns], best[: len(columns)].T, rtol=1e-3, atol=1e-3)
        if bias:
            torch.testing.assert_close(projected[readout.bias_slice].double(), best[-1], rtol=1e-3, atol=1e-3)
    for k, again in project(projection, projected).items():
        torch.testing.assert_close(again, projected[k])


def test_data_projection_zeroes_query_key_dimensions_of_kept_heads_only() -> None:
    _, attention, _ = tiny()
    values = random_values(attention, "data", 3)
    kept = AttentionKept(heads=(0, 2), qk=((1,), (0,)), vo=((0,), (0,)))
    projected = project(on_support(attention, values, random_moments(attention, 3), kept, FREE), values)
    stays = torch.tensor([False, True, True, True, True, False])  # head 1 is gone by its readout columns
    for entry in attention.query.slices + attention.key.slices:
        assert torch.equal(projected[entry][stays], values[entry][stays])
        assert not projected[entry][~stays].any()
    assert projected.keys() == values.keys()


@pytest.mark.parametrize("seed", range(4))
def test_removing_one_head_in_the_data_metric_is_optimal(seed: int) -> None:
    _, attention, _ = tiny()
    values, readout = random_values(attention, "data", seed), attention.readout
    read = random_inputs(seed, 6)
    weight = torch.cat([values[readout.columns], values[readout.bias_slice][:, None]], 1)
    target = read @ weight.double().T

    def error(head: int) -> float:
        design = read[:, [u for u in range(7) if u == 6 or u // WIDTH != head]]
        return float((target - design @ torch.linalg.lstsq(design, target).solution).square().sum())

    moments = attention_moments(random_inputs(seed + 1, 6), read)
    kept = select(attention, values, moments, replace(WHOLE, heads=2), FREE)
    (gone,) = {0, 1, 2} - set(kept.heads)
    assert gone == min(range(3), key=error)


def nearly_equal(size: int, a: int, b: int) -> Tensor:
    gram = torch.eye(size, dtype=torch.float64)
    gram[a, b] = gram[b, a] = 0.999
    return gram


def test_a_value_that_takes_over_from_a_removed_head_matters_more() -> None:
    _, attention, _ = tiny()
    values = {k: torch.zeros_like(v) for k, v in ones(attention, "data").items()}
    columns = values[attention.readout.columns] = torch.eye(6)
    columns[1, 1] = 0.7
    columns[:, 2] = columns[:, 0]  # head 1 says again what dimension 0 of head 0 says, and goes
    moments = replace(white(attention), read=nearly_equal(7, 0, 2))
    guided, ranking = replace(FREE, guidance=1.0), torch.tensor([1.0, 0.1, 1.0])
    kept = select(attention, values, moments, replace(WHOLE, heads=2, vo=1), guided, ranking=ranking)
    assert kept.heads == (0, 2)
    assert kept.vo[0] == (0,)


def test_values_that_stand_in_for_each_other_do_not_all_go() -> None:
    _, attention, _ = tiny(dim=9)
    values = {k: torch.zeros_like(v) for k, v in random_values(attention, "data", 0, dim=9).items()}
    columns = values[attention.readout.columns] = torch.eye(9)
    columns[:, 1] = columns[:, 0]
    columns[2, 2] = 0.5  # worth more than either of the two alone while the other is there
    eye = torch.eye(10, dtype=torch.float64)
    moments = AttentionMoments(eye, eye, nearly_equal(10, 0, 1))
    kept = select(attention, values, moments, replace(attention.widths, vo=1), FREE)
    assert kept.vo[0] in ((0,), (1,))
    assert [len(dims) for dims in kept.vo] == [1, 1, 1]


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=10, deadline=None)
@given(seed=seeds, count=st.integers(1, HEADS), order=st.permutations(range(HEADS)))
def test_full_guidance_follows_the_ranking_alone(metric: Metric, seed: int, count: int, order: list[int]) -> None:
    _, attention, _ = tiny()
    ranking, widths = torch.tensor([0.1 + 0.2 * place for place in order]), replace(WHOLE, heads=count)
    values, moments = random_values(attention, metric, seed), random_moments(attention, seed)
    guided = replace(FREE, guidance=1.0)
    kept = select(attention, values, moments, widths, guided, metric=metric, ranking=ranking)
    assert kept.heads == tuple(sorted(ranking.topk(count).indices.tolist()))
    # and without guidance the ranking is not looked at
    free = select(attention, values, moments, widths, FREE, metric=metric, ranking=ranking)
    assert free == select(attention, values, moments, widths, FREE, metric=metric)


def test_blend_is_a_mean_of_shares() -> None:
    strength, ranking = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([0.2, 0.2])
    torch.testing.assert_close(blend(strength, ranking, 0.25), torch.tensor([0.3125, 0.6875], dtype=torch.float64))
    assert blend(strength, None, 0.5) is strength
    assert torch.isfinite(blend(torch.zeros(2), torch.zeros(2), 0.5)).all()


PRESENT = AttentionKept(heads=(0, 2), qk=((1,), (1,)), vo=((1,), (0,)))
SUPPORTS = (
    PRESENT,
    replace(PRESENT, heads=(0, 1), vo=((0,), (1,))),
    replace(PRESENT, heads=(1, 2)),
    FfnKept(units=(1, 3, 4)),
    FfnKept(units=(0, 2, 5)),
)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("present", SUPPORTS, ids=str)
def test_hysteresis_keeps_the_present_support_under_ties(metric: Metric, present: SublayerKept) -> None:
    sub = sublayer(present.widths)
    values = ones(sub, metric)
    values[sub.readout.columns] = torch.eye(6)  # identity rows make units interchangeable but not redundant
    arguments = {"metric": metric, "present": present, "hysteresis": 0.1}
    assert select(sub, values, white(sub), present.widths, FREE, **arguments) == present


@pytest.mark.parametrize(("strength", "stays"), [(1.2, True), (1.4, False)])
@pytest.mark.parametrize("metric", METRICS)
def test_hysteresis_gives_way_to_units_that_are_stronger_by_more(metric: Metric, strength: float, stays: bool) -> None:
    _, _, ffn = tiny()
    values = {k: torch.zeros_like(v) for k, v in ones(ffn, metric).items()}
    values[ffn.readout.columns] = torch.eye(6)
    values[ffn.readout.columns][:, 5] *= strength**0.5  # squared strength of unit 5, which is out
    arguments = {"metric": metric, "present": FfnKept(units=(0, 1, 2, 3, 4)), "hysteresis": 0.3}
    kept = select(ffn, values, white(ffn), FfnWidths(units=5), FREE, **arguments)
    assert (5 not in kept.units) == stays


@pytest.mark.parametrize("metric", ["data", "activation"])
def test_layer_scale_decides_what_the_residual_stream_sees(metric: Metric) -> None:
    gain = torch.tensor([0.01, 0.01, 1.0, 1.0, 0.01, 0.01])
    for widths, weakest in ((replace(WHOLE, heads=1), {1}), (FfnWidths(units=2), {2, 3})):
        sub = sublayer(widths)
        values = ones(sub, metric)
        values[sub.readout.columns] = torch.diag(torch.tensor([5.0, 5.0, 1.0, 1.0, 5.0, 5.0]))
        plain, scaled = (select(sub, values, white(sub), widths, FREE, metric=metric, gain=g) for g in (None, gain))
        chosen = [set(kept.heads if isinstance(kept, AttentionKept) else kept.units) for kept in (plain, scaled)]
        assert not chosen[0] & weakest
        assert chosen[1] == weakest


@pytest.mark.parametrize("bias", [True, False])
def test_size_in_the_data_metric_is_the_energy_of_what_is_computed(bias: bool) -> None:
    arguments = {"proj_bias": bias, "qkv_bias": bias}
    _, attention, ffn = tiny(**arguments)
    x, read = random_inputs(0, 6), random_inputs(1, 6)

    def energy(inputs: Tensor, weight: Tensor, offset: Tensor | None) -> float:
        out = inputs[:, :-1] @ weight.double().T + (0 if offset is None else offset.double())
        return float(out.square().sum(1).mean())

    for sub, moments in ((attention, attention_moments(x, read)), (ffn, FfnMoments(moment(read)))):
        values, offset = random_values(sub, "data", 4, **arguments), sub.readout.bias_slice
        expected = energy(read, values[sub.readout.columns], values[offset] if offset else None)
        if isinstance(sub, Attention):
            expected += energy(x, values[sub.query.weight], values[sub.query.bias] if sub.query.bias else None)
            expected += energy(x - x.mean(0), values[sub.key.weight], None)  # what all keys share is not seen
        assert squared_size(sub, values, moments, "data") == pytest.approx(expected, rel=1e-4)
        plain = sum(float(v.double().square().sum()) for v in values.values())
        for metric in ("norm", "activation"):
            assert squared_size(sub, values, moments, metric) == pytest.approx(plain)


@pytest.mark.parametrize("metric", METRICS)
def test_constrained_tensors_are_views_of_the_model(metric: Metric, model: nn.Module, network: Network) -> None:
    _, _, attention, ffn = network.sublayers
    values = constrained(model, attention, metric)
    assert (attention.value.weight in values) == (metric != "data")
    assert (attention.readout.bias_slice in values) == (metric == "data")
    hidden = constrained(model, ffn, metric)
    assert (ffn.inputs[0].weight in hidden) == (metric != "data")
    assert (ffn.readout.bias_slice in hidden) == (metric == "data")
    values[attention.key.weight].fill_(7.0)
    rows = model.blocks[1].attn.qkv.weight
    assert bool((rows[32:64] == 7).all())
    assert not bool((rows[:32] == 7).any())
    assert not bool((rows[64:] == 7).any())
    assert units(model, attention.key.weight, 32).data_ptr() == values[attention.key.weight].data_ptr()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("whole", [WHOLE, ALL_UNITS], ids=str)
def test_keeping_everything_changes_nothing(whole: SublayerWidths, metric: Metric) -> None:
    sub = sublayer(whole)
    values, moments = random_values(sub, metric, 8), random_moments(sub, 8)
    kept = select(sub, values, moments, whole, FREE, metric=metric)
    for k, value in project(on_support(sub, values, moments, kept, FREE, metric=metric), values).items():
        assert torch.equal(value, values[k])


def test_all_sublayers_are_selected_as_each_alone(
    model: nn.Module, network: Network, moments: dict[str, SublayerMoments]
) -> None:
    widths = network.widths | {
        "blocks.0.attn": AttentionWidths(heads=2, qk=3, vo=5),
        "blocks.1.attn": absent(network.widths["blocks.1.attn"]),
        "blocks.1.mlp": FfnWidths(units=9),
    }
    scores = {"blocks.0.attn": (0.1, 0.4, 0.2, 0.3)}
    values = {sub.name: constrained(model, sub) for sub in network.present}
    guided = replace(FREE, guidance=1.0, ridge=0.1)
    kept = select_all(model, network, values, moments, widths, guided, scores=scores)
    assert {name: of.widths for name, of in kept.items()} == widths
    assert kept["blocks.0.attn"].heads == (1, 3)
    for sub in network.present[2:]:
        assert kept[sub.name] == select(sub, values[sub.name], moments[sub.name], widths[sub.name], guided)


def test_probes_estimate_the_size_of_wide_maps() -> None:
    dim = 96
    _, attention, ffn = tiny(dim)  # heads of 32 dimensions, 6 / 6 * 96 hidden units
    moments = (
        attention_moments(random_inputs(0, dim), random_inputs(1, dim)),
        FfnMoments(moment(random_inputs(2, dim))),
    )
    for sub, of in zip((attention, ffn), moments, strict=True):
        values = random_values(sub, "data", 5, dim=dim)
        exact = squared_size(sub, values, of, "data")
        estimate = squared_size(sub, values, of, "data", probes=24)
        assert estimate == pytest.approx(exact, rel=0.15)
        assert estimate != exact
        assert squared_size(sub, values, of, "data", probes=dim) == exact
