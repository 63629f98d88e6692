from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from gohsp.core.allocation import (
    Curves,
    DamageCurve,
    WidthSettings,
    allocate,
    allowed_widths,
    predicted_damage,
    require_feasible,
    require_fitting,
    smallest,
)
from gohsp.errors import BudgetError, ConfigError
from gohsp.models import describe
from gohsp.structure import (
    COUNTED,
    MACS,
    PARAMS,
    AttentionTimes,
    AttentionWidths,
    Bound,
    BudgetKind,
    Cost,
    FfnTimes,
    FfnWidths,
    Kind,
    Latency,
    Network,
    PresentSublayer,
    SublayerWidths,
    Widths,
    absent,
    check_widths,
    cost_of,
    excluding,
    is_absent,
    width,
)


@cache
def deit_tiny() -> Network:
    with torch.device("meta"):
        return describe(timm.create_model("deit_tiny_patch16_224"))


def dense(network: Network, cost: Cost) -> float:
    return cost_of(network, network.widths, cost)


def share_of(network: Network, cost: Cost, percent: int) -> Bound:
    return Bound(cost, dense(network, cost) * percent // 100)


def convex(have: int, steepness: float, height: float, widths: tuple[int, ...]) -> DamageCurve:
    """Falls to 0 at the present width, ever more slowly."""
    return DamageCurve(widths, tuple(height * (1 - w / have) ** steepness for w in widths))


def curve_of(sub: PresentSublayer, kind: Kind, settings: WidthSettings, steepness: float, height: float) -> DamageCurve:
    return convex(width(sub.widths, kind), steepness, height, allowed_widths(sub, kind, settings))


def random_curves(network: Network, settings: WidthSettings, seed: int) -> Curves:
    generator = torch.Generator().manual_seed(seed)

    def curve(sub: PresentSublayer, kind: Kind) -> DamageCurve:
        steepness, height = (float(x) for x in torch.rand(2, generator=generator))
        return curve_of(sub, kind, settings, 1 + 3 * steepness, 10 ** (2 * height - 2))

    return {sub.name: {k: curve(sub, k) for k in sub.widths.kinds if k in sub.prunable} for sub in network.present}


def damage(network: Network, curves: Curves, widths: Widths) -> float:
    """The objective as documented: heads that are gone are not damaged by narrower dimensions as well."""
    total = 0.0
    for sub in network.present:
        have, want, curve = sub.widths, widths[sub.name], curves.get(sub.name, {})
        felt = have.kinds[:1] if is_absent(want) else have.kinds
        of = {kind: curve[kind](width(want, kind)) if kind in curve else 0.0 for kind in felt}
        if isinstance(want, FfnWidths) or is_absent(want):
            total += of[have.kinds[0]]
        else:
            total += of["head"] + (of["qk"] + of["vo"]) * want.heads / have.heads
    return total


def options(sub: PresentSublayer, *, gone: bool) -> list[SublayerWidths]:
    """Every shape of a sub-layer."""
    have = sub.widths
    if isinstance(have, FfnWidths):
        shapes: list[SublayerWidths] = [FfnWidths(units=u) for u in range(1, have.units + 1)]
    else:
        grid = product(range(1, have.heads + 1), range(1, have.qk + 1), range(1, have.vo + 1))
        shapes = [AttentionWidths(heads=h, qk=q, vo=v) for h, q, v in grid]
    return [*shapes, absent(have)] if gone else shapes


budget_kinds = st.sampled_from(["params", "macs"])
seeds = st.integers(0, 10**6)


@settings(max_examples=12, deadline=None)
@given(
    seed=seeds,
    kind=budget_kinds,
    percent=st.integers(30, 95),
    multiple=st.sampled_from([8, 16]),
    depth=st.booleans(),
)
def test_any_budget_is_met_from_above_within_one_percent(
    seed: int, kind: BudgetKind, percent: int, multiple: int, depth: bool
) -> None:
    network, how = deit_tiny(), WidthSettings(multiple=multiple, min_width=16, min_ffn=0.1, depth=depth)
    bound = share_of(network, COUNTED[kind], percent)
    widths = allocate(network, random_curves(network, how, seed), bound, how)
    assert 0.99 * bound.limit < bound.of(network, widths) <= bound.limit
    check_widths(network, widths)
    for of in widths.values():
        if is_absent(of):
            assert depth
        elif isinstance(of, AttentionWidths):
            assert 1 <= of.heads <= 3
            assert all(w == 64 or (w % multiple == 0 and 16 <= w < 64) for w in (of.qk, of.vo))
        else:
            assert of.units == 768 or (of.units % multiple == 0 and 76.8 <= of.units < 768)


FREE = WidthSettings(multiple=1, min_width=1, min_ffn=0.0, depth=True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cost", [PARAMS, MACS], ids=["params", "macs"])
@pytest.mark.parametrize("depth", [False, True])
def test_close_to_the_best_of_all_plans(seed: int, cost: Cost, depth: bool) -> None:
    network, how = toys.stack(2, heads=2, qk=2, vo=2, units=6, dim=3), replace(FREE, depth=depth)
    curves = random_curves(network, how, seed)
    alone = [
        [(shape, cost.sublayer(sub, shape), damage(toys.network(sub), curves, {sub.name: shape})) for shape in shapes]
        for sub in network.present
        for shapes in [options(sub, gone=depth)]
    ]
    plans = torch.tensor(
        [[sum(o[1] for o in plan), sum(o[2] for o in plan)] for plan in product(*alone)], dtype=torch.float64
    )
    costs, damages = plans[:, 0] + cost.fixed(network), plans[:, 1]
    worst, gaps = float(damages.max()), []
    for percent in (45, 55, 65, 75, 85, 95):
        bound = share_of(network, cost, percent)
        if bound.limit < bound.of(network, smallest(network, how)):
            continue
        best = float(damages[costs <= bound.limit].min())
        chosen = allocate(network, curves, bound, how)
        assert bound.met(network, chosen)
        gaps.append(damage(network, curves, chosen) - best)
    assert len(gaps) >= 5
    assert min(gaps) > -1e-9
    assert max(gaps) < 0.1 * worst  # a knapsack's last item
    assert sum(gaps) / len(gaps) < 0.015 * worst


@settings(max_examples=40, deadline=None)
@given(seed=seeds, kind=budget_kinds, log_price=st.floats(-4, -1), depth=st.booleans())
def test_optimal_wherever_a_price_leads(seed: int, kind: BudgetKind, log_price: float, depth: bool) -> None:
    """What is cheapest at some price per unit of cost is the best plan of all for its own cost (Everett)."""
    network, cost = toys.stack(2, heads=3, qk=2, vo=3, units=5, dim=3), COUNTED[kind]
    how = replace(FREE, depth=depth)
    curves = random_curves(network, how, seed)

    def price_of(sub: PresentSublayer, shape: SublayerWidths) -> float:
        return damage(toys.network(sub), curves, {sub.name: shape}) + 10**log_price * cost.sublayer(sub, shape)

    best = {
        sub.name: min(options(sub, gone=depth), key=lambda shape, sub=sub: price_of(sub, shape))
        for sub in network.present
    }
    chosen = allocate(network, curves, Bound(cost, cost_of(network, best, cost)), how)
    assert damage(network, curves, chosen) == pytest.approx(damage(network, curves, best), abs=1e-9)


def test_cuts_fall_where_they_hurt_least() -> None:
    network, how = toys.stack(3, heads=4, qk=8, vo=8, units=32), WidthSettings(multiple=4, min_width=4, depth=False)
    bound = share_of(network, PARAMS, 60)
    for fragile in network.blocks:
        curves = {
            sub.name: {k: curve_of(sub, k, how, 2, 100.0 if sub.block == fragile else 1.0) for k in sub.widths.kinds}
            for sub in network.present
        }
        widths = allocate(network, curves, bound, how)
        costs = {
            block: sum(PARAMS.sublayer(sub, widths[sub.name]) for sub in subs) for block, subs in network.blocks.items()
        }
        assert costs[fragile] == max(costs.values()) > min(costs.values())


def test_a_free_cut_is_taken_first() -> None:
    network, how = toys.stack(2, heads=2, qk=8, vo=8, units=16), WidthSettings(multiple=2, min_width=2, depth=True)
    curves = {
        sub.name: {k: curve_of(sub, k, how, 1, 0.0 if k == "qk" else 1.0) for k in sub.widths.kinds}
        for sub in network.present
    }
    without = {n: replace(of, qk=2) if isinstance(of, AttentionWidths) else of for n, of in network.widths.items()}
    assert allocate(network, curves, Bound(PARAMS, cost_of(network, without, PARAMS)), how) == without


def test_a_sublayer_goes_as_a_whole_where_that_hurts_least() -> None:
    """Width 0 is the last point of a head curve or an FFN's; nothing else of the sub-layer is damaged as well."""
    network, how = toys.stack(2, heads=2, qk=8, vo=8, units=16), WidthSettings(multiple=2, min_width=2, depth=True)
    curves = random_curves(network, how, 0)
    for name in ("b0.attn", "b1.mlp"):
        sub = next(sub for sub in network.present if sub.name == name)
        kind = sub.widths.kinds[0]
        widths = allowed_widths(sub, kind, how)
        free = {k: curve_of(sub, k, how, 1, 5.0) for k in sub.widths.kinds} | {
            kind: DamageCurve(widths, (1e-6, *[1e-6] * (len(widths) - 2), 0.0))
        }
        without = {**network.widths, name: absent(sub.widths)}
        given = {**curves, name: free}
        assert allocate(network, given, Bound(PARAMS, cost_of(network, without, PARAMS)), how) == without
        assert predicted_damage(network, given, without) == pytest.approx(1e-6)
        kept = allocate(network, given, Bound(PARAMS, cost_of(network, without, PARAMS)), replace(how, depth=False))
        assert not any(is_absent(of) for of in kept.values())


def test_what_is_absent_stays_absent() -> None:
    dense_network = toys.stack(2, heads=2, qk=8, vo=8, units=16)
    network = toys.network(toys.gone("b0.attn", AttentionWidths(heads=0, qk=0, vo=0)), *dense_network.sublayers[1:])
    how = WidthSettings(multiple=2, min_width=2, depth=True)
    curves = random_curves(network, how, 0)
    assert "b0.attn" not in curves
    bound = share_of(network, PARAMS, 60)
    alike = allocate(network, curves, bound, replace(how, depth=False), uniform=True)
    for widths in (allocate(network, curves, bound, how), alike, smallest(network, how)):
        assert widths["b0.attn"] == AttentionWidths(heads=0, qk=0, vo=0)
        check_widths(network, widths)
        assert bound.met(network, widths)


def test_latency_is_kept_by_the_times_of_each_sublayer() -> None:
    """Two sub-layers of equal damage: the one that takes longer is cut."""
    network, how = toys.stack(2, heads=2, qk=8, vo=8, units=16), WidthSettings(multiple=2, min_width=2, depth=False)
    flat = AttentionTimes((1, 2), (8,), (8,), (((1.0,),), ((1.0,),)), 0.0)
    times = {
        name: flat if name.endswith("attn") else FfnTimes((2, 16), (0.5, 8.0 if name == "b1.mlp" else 1.0))
        for name in network.widths
    }
    cost = Latency(outside=1.0, scale=1.5, times=times)
    curves = {sub.name: {k: curve_of(sub, k, how, 2, 1.0) for k in sub.widths.kinds} for sub in network.present}
    bound = share_of(network, cost, 70)
    widths = allocate(network, curves, bound, how)
    assert bound.met(network, widths)
    assert width(widths["b1.mlp"], "ffn") < width(widths["b0.mlp"], "ffn")
    assert widths["b0.attn"] == network.widths["b0.attn"]  # narrower takes as long


def test_a_kind_without_a_curve_or_permission_is_not_cut() -> None:
    network, how = toys.stack(2, heads=2, qk=8, vo=8, units=16), WidthSettings(multiple=2, min_width=2, depth=True)
    bound = share_of(network, PARAMS, 80)
    whole = AttentionWidths(heads=2, qk=8, vo=8)
    ffn_only: Curves = {
        s.name: {"ffn": curve_of(s, "ffn", how, 2, 1.0)} for s in network.present if s.name.endswith("mlp")
    }
    for chosen in (
        allocate(network, ffn_only, bound, how),
        allocate(network, ffn_only, bound, replace(how, depth=False), uniform=True),
    ):
        for of in chosen.values():
            assert of == whole if isinstance(of, AttentionWidths) else of.units < 16
    fixed = excluding(network, ["head", "qk"])
    for uniform in (False, True):
        widths = allocate(fixed, random_curves(fixed, how, 0), bound, how, uniform=uniform)
        assert all((of.heads, of.qk) == (2, 8) for of in widths.values() if isinstance(of, AttentionWidths))
    held = excluding(network, ["b0"])
    widths = allocate(held, random_curves(held, how, 0), bound, how)
    assert {n: of for n, of in widths.items() if n.startswith("b0")} == {
        n: of for n, of in network.widths.items() if n.startswith("b0")
    }


@pytest.mark.parametrize("depth", [False, True])
def test_a_budget_out_of_reach_names_the_smallest_possible(depth: bool) -> None:
    network, how = deit_tiny(), WidthSettings(depth=depth)
    floor = cost_of(network, smallest(network, how), PARAMS)
    assert all(is_absent(of) == depth for of in smallest(network, how).values())
    curves = random_curves(network, how, 0)
    below = Bound(PARAMS, floor - 1)
    message = rf"no plan meets {floor - 1:,} parameters: the smallest possible model has {floor:,} parameters; raise"
    for ask in (
        lambda: allocate(network, curves, below, how),
        lambda: require_feasible(network, below, how),
    ):
        with pytest.raises(BudgetError, match=message):
            ask()
    assert cost_of(network, allocate(network, curves, Bound(PARAMS, floor), how), PARAMS) == floor
    require_feasible(network, Bound(PARAMS, floor), how)


def test_a_budget_that_the_measured_kinds_cannot_reach() -> None:
    """Curves for FFNs alone: narrow attention would fit, but nobody has measured it."""
    network = toys.stack(2, heads=2, qk=8, vo=8, units=16)
    how = WidthSettings(multiple=2, min_width=2, depth=False)
    curves: Curves = {
        s.name: {"ffn": curve_of(s, "ffn", how, 2, 1.0)} for s in network.present if s.name.endswith("mlp")
    }
    widths = {n: FfnWidths(units=2) if isinstance(of, FfnWidths) else of for n, of in network.widths.items()}
    floor = cost_of(network, widths, PARAMS)
    assert allocate(network, curves, Bound(PARAMS, floor), how) == widths
    with pytest.raises(BudgetError, match=rf"no plan meets {floor - 1:,} parameters: .* {floor:,}"):
        allocate(network, curves, Bound(PARAMS, floor - 1), how)


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("head", WidthSettings(), (1, 2, 3)),
        ("head", WidthSettings(min_heads=2), (2, 3)),
        ("head", WidthSettings(min_heads=9), (3,)),
        ("qk", WidthSettings(), (8, 16, 20)),
        ("vo", WidthSettings(min_width=9), (16, 20)),
        ("qk", WidthSettings(min_width=64), (20,)),
        ("qk", WidthSettings(multiple=16, min_width=1), (16, 20)),
        ("ffn", WidthSettings(multiple=16, min_ffn=0.5), (64, 80, 96, 100)),
        ("ffn", WidthSettings(multiple=1, min_ffn=0.985), (99, 100)),
        ("ffn", WidthSettings(multiple=50, min_ffn=0.0), (50, 100)),
        ("ffn", WidthSettings(min_ffn=1.0), (100,)),
    ],
)
def test_allowed_widths(kind: Kind, how: WidthSettings, expected: tuple[int, ...]) -> None:
    network = toys.stack(1, heads=3, qk=20, vo=20, units=100)
    sub = network.present[kind == "ffn"]
    gone = (0,) if kind in ("head", "ffn") else ()  # a sub-layer goes with its heads or its hidden units
    assert allowed_widths(sub, kind, replace(how, depth=True)) == (*gone, *expected)
    assert allowed_widths(sub, kind, how) == expected
    assert allowed_widths(replace(sub, removable=False), kind, replace(how, depth=True)) == expected
    assert allowed_widths(replace(sub, prunable=sub.prunable - {kind}), kind, replace(how, depth=True)) == (
        *gone,
        expected[-1],
    )
    held = excluding(network, [kind]).present[kind == "ffn"]
    assert allowed_widths(held, kind, replace(how, depth=True)) == expected[-1:]


def test_an_ffn_may_have_a_floor_of_its_own() -> None:
    how = WidthSettings(multiple=16, min_ffn=0.1, depth=False)
    assert allowed_widths(toys.ffn("b0", 100, floor=70), "ffn", how) == (80, 96, 100)


def test_the_smallest_widths() -> None:
    network, how = toys.stack(1, heads=3, qk=20, vo=20, units=100), WidthSettings(min_heads=2, depth=False)
    assert smallest(network, how) == {"b0.attn": AttentionWidths(heads=2, qk=8, vo=8), "b0.mlp": FfnWidths(units=8)}
    assert smallest(network, replace(how, depth=True)) == {n: absent(of) for n, of in network.widths.items()}
    held = excluding(network, ["head"])
    assert smallest(held, replace(how, depth=True))["b0.attn"] == AttentionWidths(heads=3, qk=8, vo=8)


@pytest.mark.parametrize(
    ("setting", "fitting"), [("multiple", 100), ("min_width", 20), ("min_heads", 3)], ids=lambda value: str(value)
)
def test_floors_above_what_the_network_has_are_refused(setting: str, fitting: int) -> None:
    network = toys.stack(2, heads=3, qk=20, vo=20, units=100)
    require_fitting(network, WidthSettings(**{setting: fitting}))
    with pytest.raises(ConfigError, match=rf"widths\.{setting} is {fitting + 1}, but {fitting} is the most .* at most"):
        require_fitting(network, WidthSettings(**{setting: fitting + 1}))
    require_fitting(toys.stack(1, heads=1, qk=2, vo=2, units=4), WidthSettings())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=6, unique_by=lambda p: p[0]))
def test_a_damage_curve_never_rises_with_width(points: list[tuple[int, float]]) -> None:
    points = [*sorted(points), (64, 0.0)]
    curve = DamageCurve(tuple(w for w, _ in points), tuple(d for _, d in points))
    measured = dict(points)
    values = [curve(w) for w in range(points[0][0], 70)]
    assert all(a >= b - 1e-12 for a, b in pairwise(values))
    assert all(curve(w) >= d - 1e-12 for w, d in measured.items())
    assert max(values) <= max(measured.values()) + 1e-12
    assert values[-6:] == [0.0] * 6


def test_a_damage_curve_is_geometric_between_points_and_ends_in_a_parabola() -> None:
    curve = DamageCurve((8, 16, 64), (3.0, 1.0, 0.0))
    got = [curve(w) for w in (8, 10, 12, 16, 28, 40, 64, 100)]
    assert got == pytest.approx([3.0, 3**0.75, 3**0.5, 1.0, 0.75**2, 0.25, 0.0, 0.0])
    noisy = DamageCurve((8, 16, 32, 64), (1.0, 3.0, 2.0, 0.0))  # measured with noise: the dip at 8 is not believed
    assert [noisy(w) for w in (8, 12, 16, 24, 32, 48)] == pytest.approx([3.0, 3.0, 3.0, 6**0.5, 2.0, 0.5])
    free = DamageCurve((8, 16, 64), (3.0, 0.0, 0.0))  # nothing is felt before 16
    assert [free(w) for w in (8, 12, 16, 40)] == pytest.approx([3.0, 0.75, 0.0, 0.0])
    with pytest.raises(BudgetError, match=r"no damage was measured at width 7; the curve covers \(8, 16, 64\)"):
        curve(7)


def test_predicted_damage_is_the_sum_over_sublayers_and_kinds() -> None:
    ffn, qk, head = (
        DamageCurve((8, 16, 64), (3.0, 1.0, 0.0)),
        DamageCurve((2, 8), (0.4, 0.0)),
        DamageCurve((0, 4), (7.0, 0.0)),
    )
    curves: Curves = {"b0.mlp": {"ffn": ffn}, "b1.attn": {"qk": qk, "head": head}, "b1.mlp": {"ffn": ffn}}
    network = toys.stack(3, heads=4, qk=8, vo=2, units=64)
    narrow = AttentionWidths(heads=4, qk=5, vo=2)
    widths = {**network.widths, "b0.mlp": FfnWidths(units=40), "b1.attn": narrow, "b1.mlp": FfnWidths(units=16)}
    assert predicted_damage(network, curves, widths) == pytest.approx(0.25 + 1.0 + 0.1)
    fewer = replace(narrow, heads=3)
    assert predicted_damage(network, curves, {**widths, "b1.attn": fewer}) == pytest.approx(
        0.25 + 1.0 + 7 / 16 + 0.1 * 3 / 4
    )
    assert predicted_damage(network, curves, {**widths, "b1.attn": absent(narrow)}) == pytest.approx(0.25 + 1.0 + 7)
    assert predicted_damage(network, curves, network.widths) == 0


@pytest.mark.parametrize(
    "setting",
    [{"multiple": 0}, {"min_width": 0}, {"min_heads": 0}, {"min_ffn": 1.5}, {"stages": 0}, {"stages": 101}],
)
def test_width_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"widths\.{next(iter(setting))} must be"):
        WidthSettings(**setting)


# All blocks alike


ROOMY = WidthSettings(multiple=2, min_width=2, min_ffn=0.2)


def attention_of(widths: Widths) -> set[SublayerWidths]:
    return {of for of in widths.values() if isinstance(of, AttentionWidths)}


def every_uniform_plan(network: Network) -> list[dict[str, SublayerWidths]]:
    """Of 2 blocks of 3 heads of 8 and 6 dimensions and 10 hidden units, the second with 2 heads."""
    grid = product((1, 2), (2, 4, 6), (2, 4, 6, 8, 10))
    return [
        {
            name: FfnWidths(units=u) if isinstance(of, FfnWidths) else AttentionWidths(heads=h, qk=w, vo=w)
            for name, of in network.widths.items()
        }
        for h, w, u in grid
    ]


@settings(max_examples=25, deadline=None)
@given(seed=seeds, kind=budget_kinds, percent=st.integers(25, 95))
def test_uniform_widths_are_the_best_of_all(seed: int, kind: BudgetKind, percent: int) -> None:
    first, second = toys.stack(1, heads=3, qk=8, vo=6, units=10), toys.stack(2, heads=2, qk=8, vo=6, units=10)
    network = toys.network(*first.sublayers, *second.sublayers[2:])
    curves, bound = random_curves(network, ROOMY, seed), share_of(network, COUNTED[kind], percent)
    plans = [widths for widths in every_uniform_plan(network) if bound.met(network, widths)]
    least = min(bound.of(network, widths) for widths in every_uniform_plan(network))
    assert cost_of(network, smallest(network, ROOMY, uniform=True), bound.cost) == least
    if not plans:
        with pytest.raises(
            BudgetError, match=rf"uniform model \(heads, qk, vo, units cut\) has {least:,} .*uniform = false"
        ):
            allocate(network, curves, bound, ROOMY, uniform=True)
        with pytest.raises(BudgetError, match="uniform model"):
            require_feasible(network, bound, ROOMY, uniform=True)
        return
    require_feasible(network, bound, ROOMY, uniform=True)
    best = min(damage(network, curves, widths) for widths in plans)
    chosen = allocate(network, curves, bound, ROOMY, uniform=True)
    assert chosen in plans
    assert damage(network, curves, chosen) == pytest.approx(best, rel=1e-12)


def test_of_equal_uniform_widths_the_widest_are_taken() -> None:
    network = toys.stack(2, heads=2, qk=8, vo=8, units=16)
    flat = {
        sub.name: {k: convex(width(sub.widths, k), 1, 0.0, allowed_widths(sub, k, ROOMY)) for k in sub.widths.kinds}
        for sub in network.present
    }
    bound = share_of(network, PARAMS, 70)
    costs = [bound.of(network, widths) for widths in every_uniform_plan(network) if bound.met(network, widths)]
    assert bound.of(network, allocate(network, flat, bound, ROOMY, uniform=True)) >= max(costs)


def test_what_is_held_somewhere_is_held_everywhere_where_blocks_are_alike() -> None:
    network = toys.stack(2, heads=2, qk=8, vo=8, units=16)
    held, bound = excluding(network, ["b0.attn"]), share_of(network, PARAMS, 80)
    chosen = allocate(held, random_curves(held, ROOMY, 0), bound, ROOMY, uniform=True)
    assert attention_of(chosen) == {AttentionWidths(heads=2, qk=8, vo=8)}
    narrow = excluding(network, ["qk"])  # and so the heads' one width
    chosen = allocate(narrow, random_curves(narrow, ROOMY, 0), bound, ROOMY, uniform=True)
    assert {(of.qk, of.vo) for of in attention_of(chosen)} == {(8, 8)}  # type: ignore[union-attr]
    with pytest.raises(BudgetError, match=r"uniform model \(units cut\)"):
        require_feasible(excluding(network, ["head", "qk", "vo"]), share_of(network, PARAMS, 30), ROOMY, uniform=True)


def test_hidden_units_go_by_the_width_of_their_stream() -> None:
    """Stages of a Swin: one ratio for both."""
    narrow, wide = (
        toys.stack(1, heads=2, qk=4, vo=4, units=16, dim=8),
        toys.stack(2, heads=4, qk=4, vo=4, units=32, dim=16),
    )
    network = excluding(toys.network(*narrow.sublayers, *wide.sublayers[2:]), ["head", "qk", "vo"])
    curves, bound = random_curves(network, ROOMY, 0), share_of(network, PARAMS, 80)
    chosen = allocate(network, curves, bound, ROOMY, uniform=True)
    assert bound.met(network, chosen)
    assert 2 * width(chosen["b0.mlp"], "ffn") == width(chosen["b1.mlp"], "ffn") < 32
    assert [chosen[name] for name in ("b0.attn", "b1.attn")] == [network.widths[n] for n in ("b0.attn", "b1.attn")]


def test_an_ffn_may_have_a_step_of_its_own() -> None:
    how = WidthSettings(multiple=16, min_ffn=0.1)
    assert allowed_widths(replace(toys.ffn("b0", 100), step=24), "ffn", how) == (48, 96, 100)
