from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import toys
from gohsp.errors import BudgetError
from gohsp.models import describe, resized
from gohsp.structure import (
    MACS,
    PARAMS,
    AttentionTimes,
    AttentionWidths,
    Bound,
    FfnTimes,
    FfnWidths,
    Latency,
    UnitSlice,
    absent,
    bound_for,
    cost_of,
    count_macs,
    count_params,
    parse_budget,
)

D, TOKENS = 6, toys.TOKENS
NETWORK = toys.stack(2, heads=3, qk=4, vo=2, units=10)
ATTENTION, FFN = NETWORK.sublayers[:2]
NARROW, UNITS = AttentionWidths(heads=2, qk=3, vo=1), FfnWidths(units=7)
WIDTHS = {"b0.attn": NARROW, "b0.mlp": UNITS, "b1.attn": NARROW, "b1.mlp": UNITS}


def test_costs_by_hand() -> None:
    # query and key rows with bias; value rows with bias and output columns; norm and output bias
    attention = 2 * 3 * 2 * (D + 1) + 2 * 1 * (D + 1 + D) + 3 * D
    ffn = 7 * (D + 1 + D) + 3 * D
    assert PARAMS.sublayer(ATTENTION, NARROW) == attention
    assert PARAMS.sublayer(FFN, UNITS) == ffn
    assert cost_of(NETWORK, WIDTHS, PARAMS) == 7 + 2 * (attention + ffn)
    linear = 2 * 3 * 2 * D + 2 * 1 * 2 * D
    products = 2 * (3 + 1) * TOKENS**2
    assert MACS.sublayer(ATTENTION, NARROW) == TOKENS * linear + products
    assert MACS.sublayer(FFN, UNITS) == TOKENS * 7 * 2 * D
    assert cost_of(NETWORK, WIDTHS, MACS) == 11 + 2 * (TOKENS * (linear + 7 * 2 * D) + products)


def test_a_window_and_what_heads_own_are_counted() -> None:
    table = UnitSlice(parameter="b0.table", axis=1, start=0, size=9)
    windowed = toys.attention("b0", 3, 4, 2, keys=2, owned=(table,))
    assert MACS.sublayer(ATTENTION, NARROW) - MACS.sublayer(windowed, NARROW) == 2 * (3 + 1) * TOKENS * (TOKENS - 2)
    assert PARAMS.sublayer(windowed, NARROW) - PARAMS.sublayer(ATTENTION, NARROW) == 2 * 9


def test_of_an_absent_sublayer_one_vector_is_left() -> None:
    for sub in (ATTENTION, FFN):
        left = toys.gone(sub.name, absent(sub.widths))
        for of in (sub, left):
            assert PARAMS.sublayer(of, absent(sub.widths)) == D
            assert MACS.sublayer(of, absent(sub.widths)) == 0
    gone = {**WIDTHS, "b1.attn": absent(NARROW)}
    assert cost_of(NETWORK, WIDTHS, PARAMS) - cost_of(NETWORK, gone, PARAMS) == PARAMS.sublayer(ATTENTION, NARROW) - D


ARCHITECTURES: list[dict[str, Any]] = [{}, {"init_values": 0.5}, {"qk_norm": True}, {"qkv_bias": False}]


@pytest.mark.parametrize("arguments", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("gone", [(), ("blocks.0.attn",), ("blocks.1.attn", "blocks.1.mlp")], ids=str)
def test_counts_are_those_of_the_cut_model(
    arguments: dict[str, Any], gone: tuple[str, ...], make_model: Callable[..., nn.Module]
) -> None:
    """Against PyTorch's own counts of the parameters and products of a model that was rebuilt at the widths."""
    model = make_model(mlp_ratio=2, **arguments)
    network = describe(model)
    qk = 8 if arguments.get("qk_norm") else 3
    narrow = {
        name: AttentionWidths(heads=2, qk=qk, vo=5) if isinstance(of, AttentionWidths) else FfnWidths(units=11)
        for name, of in network.widths.items()
    }
    widths = narrow | {name: absent(narrow[name]) for name in gone}
    cut = resized(model, widths).eval()
    assert cost_of(network, widths, PARAMS) == sum(p.numel() for p in cut.parameters())
    again = describe(cut)
    assert again.widths == widths
    assert count_params(again) == sum(p.numel() for p in cut.parameters())
    assert count_macs(again) == cost_of(network, widths, MACS)
    cut = resized(model, widths | {n: replace(w, vo=qk) for n, w in widths.items() if isinstance(w, AttentionWidths)})
    for block in cut.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cut.requires_grad_(False)(torch.zeros(1, 3, 16, 16))
    assert count_macs(describe(cut)) == counter.get_total_flops() // 2


def attention_times(saving: float = 0.25) -> AttentionTimes:
    """Times ``1 + heads (qk + 2 vo)`` on a coarse grid, linear in each width."""
    heads, qk, vo = (1, 3), (2, 4), (1, 2)
    times = tuple(tuple(tuple(1.0 + h * (q + 2 * v) for v in vo) for q in qk) for h in heads)
    return AttentionTimes(heads, qk, vo, times, saving)


@pytest.mark.parametrize(("heads", "qk", "vo"), [*product((1, 2, 3), (2, 3, 4), (1, 2))])
def test_times_are_linear_between_measured_widths(heads: int, qk: int, vo: int) -> None:
    expected = 1 + heads * (qk + 2 * vo) - (0.25 if qk == vo else 0.0)
    assert attention_times()(AttentionWidths(heads=heads, qk=qk, vo=vo)) == pytest.approx(expected)


def test_times_beyond_the_grid_are_those_of_its_ends() -> None:
    times = FfnTimes((4, 8), (1.0, 3.0))
    assert [times(FfnWidths(units=u)) for u in (1, 4, 6, 8, 20)] == pytest.approx([1, 1, 2, 3, 3])
    assert (
        attention_times()(AttentionWidths(heads=9, qk=9, vo=9))
        == attention_times()(AttentionWidths(heads=3, qk=4, vo=2)) - 0.25
    )
    assert attention_times().saved(AttentionWidths(heads=0, qk=0, vo=0)) == 0


def test_latency_is_the_sum_over_sublayers_by_their_own_times() -> None:
    times = {
        "b0.attn": attention_times(),
        "b0.mlp": FfnTimes((4, 10), (1.0, 4.0)),
        "b1.attn": attention_times(saving=1.0),
        "b1.mlp": FfnTimes((4, 10), (10.0, 40.0)),
    }
    cost = Latency(outside=0.5, scale=2.0, times=times)
    narrow = AttentionWidths(heads=2, qk=2, vo=2)
    widths = {"b0.attn": narrow, "b0.mlp": UNITS, "b1.attn": narrow, "b1.mlp": UNITS}
    inside = (13 - 0.25) + 2.5 + (13 - 1.0) + 25.0
    assert cost_of(NETWORK, widths, cost) == pytest.approx(0.5 + 2.0 * inside)
    without = {**widths, "b1.mlp": FfnWidths(units=0), "b0.attn": AttentionWidths(heads=0, qk=0, vo=0)}
    assert cost_of(NETWORK, without, cost) == pytest.approx(0.5 + 2.0 * (2.5 + 12.0))  # what is absent takes no time
    left = toys.network(toys.gone("b0.attn", AttentionWidths(heads=0, qk=0, vo=0)), *NETWORK.sublayers[1:])
    assert cost_of(left, {**left.widths, **without}, cost) == cost_of(NETWORK, without, cost)


def test_a_bound_is_that_of_the_budget_on_the_dense_network() -> None:
    dense = count_params(NETWORK)
    bound = bound_for(NETWORK, parse_budget("params=-25%"))
    assert (bound.cost, bound.limit) == (PARAMS, int(0.75 * dense))
    assert bound.of(NETWORK, NETWORK.widths) == dense
    assert not bound.met(NETWORK, NETWORK.widths)
    assert bound.met(NETWORK, WIDTHS) == (cost_of(NETWORK, WIDTHS, PARAMS) <= bound.limit)
    exact = Bound(MACS, cost_of(NETWORK, WIDTHS, MACS))
    assert exact.met(NETWORK, WIDTHS)
    assert not Bound(MACS, exact.limit - 1).met(NETWORK, WIDTHS)
    times = Latency(outside=1.0, scale=1.0, times={"b0.mlp": FfnTimes((2, 10), (0.5, 2.0))})
    assert bound_for(toys.network(FFN), parse_budget("latency=-50%"), times) == Bound(times, 1.5)
    with pytest.raises(BudgetError, match=rf"allows 1,000,000 parameters, the model has {dense:,} parameters"):
        bound_for(NETWORK, parse_budget("params=1M"))
