from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from gohsp.errors import PlanError
from gohsp.structure import (
    KINDS,
    AttentionKept,
    AttentionWidths,
    FfnKept,
    FfnWidths,
    SublayerKept,
    absent,
    check_kept,
    is_absent,
    is_whole,
    keep_all,
    keep_none,
    kept_from_json,
    kept_to_json,
    kept_widths,
    narrowed,
    unit_count,
    width,
    widths_from_json,
    widths_to_json,
)

WHOLE = AttentionWidths(heads=3, qk=4, vo=2)
UNITS = FfnWidths(units=10)
NETWORK = toys.stack(2, heads=3, qk=4, vo=2, units=10)
ATTENTION = AttentionKept(heads=(0, 2), qk=((0, 3), (1, 2)), vo=((1,), (0,)))


@st.composite
def cuts(draw: st.DrawFn) -> dict[str, SublayerKept]:
    """Any cut of the network, absent sub-layers among them."""

    def pick(n: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.permutations(range(n)))[:count]))

    def attention() -> AttentionKept:
        heads = pick(3, draw(st.integers(0, 3)))
        qk, vo = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        return AttentionKept(heads=heads, qk=tuple(pick(4, qk) for _ in heads), vo=tuple(pick(2, vo) for _ in heads))

    return {
        name: attention() if name.endswith("attn") else FfnKept(units=pick(10, draw(st.integers(0, 10))))
        for name in NETWORK.widths
    }


@given(cuts())
def test_a_cut_and_its_widths_survive_json_and_fit_their_network(kept: dict[str, SublayerKept]) -> None:
    assert kept_from_json(kept_to_json(kept)) == kept
    widths = kept_widths(kept)
    assert widths_from_json(widths_to_json(widths)) == widths
    check_kept(NETWORK, kept)
    for name, of in kept.items():
        nothing_stays = not (of.heads if isinstance(of, AttentionKept) else of.units)
        assert is_absent(widths[name]) == nothing_stays
        assert (of == keep_none(NETWORK.widths[name])) == nothing_stays


def test_json_is_what_people_read_and_edit() -> None:
    widths = {"b0.attn": WHOLE, "b0.mlp": UNITS, "b1.mlp": FfnWidths(units=0)}
    tables = {"b0.attn": {"heads": 3, "qk": 4, "vo": 2}, "b0.mlp": {"units": 10}, "b1.mlp": {"units": 0}}
    assert widths_to_json(widths) == tables
    assert kept_to_json({"a": ATTENTION}) == {"a": {"heads": [0, 2], "qk": [[0, 3], [1, 2]], "vo": [[1], [0]]}}
    assert kept_to_json({"a": keep_none(WHOLE)}) == {"a": {"heads": [], "qk": [], "vo": []}}


def test_units_are_flat_grid_indices_of_the_present_widths() -> None:
    assert ATTENTION.flat("qk", WHOLE) == [0, 3, 2 * 4 + 1, 2 * 4 + 2]
    assert ATTENTION.flat("vo", WHOLE) == [1, 2 * 2 + 0]
    assert FfnKept(units=(2, 5, 7)).flat("ffn", UNITS) == [2, 5, 7]
    assert ATTENTION.widths == AttentionWidths(heads=2, qk=2, vo=1)


def test_all_of_a_sublayer_is_every_unit_and_none_is_no_unit() -> None:
    for widths in (WHOLE, UNITS):
        assert keep_all(widths).widths == widths
        assert keep_none(widths).widths == absent(widths)
        for kind in widths.unit_kinds:
            assert keep_all(widths).flat(kind, widths) == list(range(unit_count(widths, kind)))
            assert keep_none(widths).flat(kind, widths) == []


def test_widths_by_kind() -> None:
    assert [width(WHOLE, kind) for kind in WHOLE.kinds] == [3, 4, 2]
    assert [unit_count(WHOLE, kind) for kind in WHOLE.unit_kinds] == [12, 6]
    assert (width(UNITS, "ffn"), unit_count(UNITS, "ffn")) == (10, 10)
    assert {*WHOLE.kinds, *UNITS.kinds} == set(KINDS)


def test_at_width_0_of_any_kind_nothing_is_left() -> None:
    assert narrowed(WHOLE, "qk", 2) == AttentionWidths(heads=3, qk=2, vo=2)
    for kind in WHOLE.kinds:
        assert narrowed(WHOLE, kind, 0) == absent(WHOLE) == AttentionWidths(heads=0, qk=0, vo=0)
    assert narrowed(UNITS, "ffn", 0) == absent(UNITS)
    assert is_absent(AttentionWidths(heads=3, qk=0, vo=2))
    assert not is_absent(WHOLE)


@pytest.mark.parametrize(("value", "whole"), [(3, True), (-1, True), (True, False), (3.0, False), ("3", False)])
def test_what_counts_as_a_whole_number(value: object, whole: bool) -> None:
    assert is_whole(value) == whole


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"b.mlp": {"unit": 3}}, r"'b\.mlp' of the plan: unknown key 'unit'; did you mean 'units'\?"),
        ({"b.attn": {"heads": 1, "qkk": 2, "vo": 1}}, r"'b\.attn' of the plan: unknown key 'qkk'; did you mean 'qk'\?"),
        ({"b.mlp": {"units": 3, "qk": 2}}, r"'b\.mlp' of the plan: unknown key 'units'; valid: 'heads', 'qk', 'vo'"),
        ({"b.attn": {"heads": 1, "vo": 2}}, r"'b\.attn' of the plan lacks \['qk'\]; give heads, qk and vo"),
        ({"b.mlp": {}}, r"'b\.mlp' of the plan lacks \['units'\]; .* units of an FFN"),
        ([{"units": 3}], r"the plan's widths must be a table with a table for each sub-layer, such as .*; got \["),
        ({"b.mlp": 3}, r"must be a table with a table for each sub-layer"),
        (None, r"must be a table with a table for each sub-layer"),
        ({"b.mlp": {"units": -1}}, r"'units' must be a whole number of at least 0, got -1"),
        ({"b.attn": {"heads": 0, "qk": 4, "vo": 2}}, r"'b\.attn' of the plan: give no width of 0, or all of them"),
        ({"b.attn": {"heads": 3, "qk": 4, "vo": 0}}, r"give no width of 0, or all of them"),
    ],
)
def test_bad_widths_are_refused_by_name_and_key(tables: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        widths_from_json(tables)


@pytest.mark.parametrize("value", [2.0, "2", None, True, [2], float("nan")])
@pytest.mark.parametrize("key", ["heads", "units"])
def test_json_whose_width_is_no_whole_number(key: str, value: Any) -> None:
    table = {"units": value} if key == "units" else asdict(WHOLE) | {key: value}
    with pytest.raises(PlanError, match=rf"'b' of the plan: '{key}' must be a whole number of at least 0, got"):
        widths_from_json({"b": table})


@pytest.mark.parametrize("key", ["heads", "qk", "vo", "units"])
@pytest.mark.parametrize("value", [3, None, ["x"], [[[0]]], [0.5, 1], "01", [True], {"0": 1}])
def test_json_whose_units_are_no_indices(key: str, value: object) -> None:
    table = {"units": value} if key == "units" else kept_to_json({"b": ATTENTION})["b"] | {key: value}
    with pytest.raises(PlanError, match="'b' of the plan: kept units must be lists of indices, got"):
        kept_from_json({"b": table})


def test_kept_units_that_are_no_tables() -> None:
    with pytest.raises(PlanError, match="the plan's kept units must be a table with a table for each sub-layer"):
        kept_from_json([[0, 1]])
    with pytest.raises(PlanError, match=r"'b' of the plan lacks \['qk', 'vo'\]"):
        kept_from_json({"b": {"heads": [0]}})
