from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import toys
from gohsp.errors import PlanError, nearest
from gohsp.structure import (
    Absent,
    AttentionKept,
    AttentionWidths,
    FfnKept,
    FfnWidths,
    Network,
    absent,
    check_kept,
    check_widths,
    excluding,
    keep_everything,
    keep_none,
    kept_widths,
    unit_macs,
    unit_params,
)

NETWORK = toys.stack(2, heads=3, qk=4, vo=2, units=10)
ATTENTION = AttentionKept(heads=(0, 2), qk=((0, 3), (1, 2)), vo=((1,), (0,)))
KEPT = {"b0.attn": ATTENTION, "b0.mlp": FfnKept(units=(2, 5, 7)), "b1.attn": ATTENTION, "b1.mlp": FfnKept(units=(1,))}
WITHOUT = toys.network(
    toys.gone("b0.attn", AttentionWidths(heads=0, qk=0, vo=0)), toys.ffn("b0", 10), *NETWORK.sublayers[2:]
)


def test_a_network_tells_its_sublayers_apart() -> None:
    assert list(NETWORK.widths) == ["b0.attn", "b0.mlp", "b1.attn", "b1.mlp"]
    assert {name: [sub.name for sub in of] for name, of in NETWORK.blocks.items()} == {
        "b0": ["b0.attn", "b0.mlp"],
        "b1": ["b1.attn", "b1.mlp"],
    }
    assert [sub.name for sub in NETWORK.attentions] == ["b0.attn", "b1.attn"]
    assert [sub.name for sub in WITHOUT.present] == ["b0.mlp", "b1.attn", "b1.mlp"]
    assert [sub.name for sub in WITHOUT.attentions] == ["b1.attn"]
    assert list(WITHOUT.widths) == list(NETWORK.widths)
    wide = toys.network(*NETWORK.sublayers[:2], toys.ffn("b1", 10, dim=9))
    assert (NETWORK.embed_dim, wide.embed_dim) == (6, 9)


def test_units_hold_rows_and_columns() -> None:
    attention, ffn = NETWORK.sublayers[:2]
    assert not isinstance(attention, Absent)
    assert not isinstance(ffn, Absent)
    assert [unit_params(attention, kind) for kind in ("qk", "vo")] == [2 * (6 + 1), (6 + 1) + 6]
    assert [unit_macs(attention, kind) for kind in ("qk", "vo")] == [2 * 6, 2 * 6]
    assert attention.slices("head") == attention.slices("qk") + attention.slices("vo")
    assert (unit_params(ffn, "ffn"), unit_macs(ffn, "ffn")) == (13, 12)
    gated = toys.ffn("b0", 10, inputs=(toys.rows("b0.fc1", 6), toys.rows("b0.fc1", 6, 10)))
    assert (unit_params(gated, "ffn"), unit_macs(gated, "ffn")) == (20, 18)


def test_the_dense_cut_keeps_everything() -> None:
    kept = keep_everything(NETWORK)
    assert kept_widths(kept) == NETWORK.widths
    check_kept(NETWORK, kept)
    check_kept(WITHOUT, keep_everything(WITHOUT))


def test_a_cut_of_whole_sublayers() -> None:
    check_kept(NETWORK, KEPT | {"b0.attn": keep_none(NETWORK.widths["b0.attn"]), "b1.mlp": FfnKept(units=())})
    held = replace(NETWORK, sublayers=tuple(replace(sub, removable=False) for sub in NETWORK.present))
    with pytest.raises(PlanError, match=r"'b1\.mlp' cannot be removed in this model; keep some of it, such as FfnW"):
        check_kept(held, KEPT | {"b1.mlp": FfnKept(units=())})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("b1.attn", {"heads": (0,), "qk": ((),), "vo": ((0,),)}, r"'b1\.attn': 'qk' must be from 1 to 4, got 0"),
        ("b1.attn", {"qk": ((), ())}, r"'b1\.attn': 'qk' must be from 1 to 4, got 0"),
        ("b1.attn", {"qk": ((0, 1), (2,))}, r"'b1\.attn': 'qk' must list equally many"),
        ("b1.attn", {"vo": ((0,),)}, r"'vo' must list equally many dimensions for each of the 2"),
        ("b1.attn", {"vo": ((0,), (2,))}, r"'b1\.attn': 'vo' must be ascending distinct indices from 0 to 1"),
        ("b1.attn", {"heads": (1, 1)}, r"'b1\.attn': 'heads' must be ascending"),
        ("b1.attn", {"heads": (0, 3)}, r"'b1\.attn': 'heads' must be ascending distinct indices from 0 to 2"),
        ("b1.mlp", {"units": (3, 10)}, r"'b1\.mlp': 'units' must be ascending distinct indices from 0 to 9"),
        ("b1.mlp", {"units": (-1, 3)}, r"'b1\.mlp': 'units' must be ascending"),
        ("b1.mlp", {"units": (5, 2)}, r"'b1\.mlp': 'units' must be ascending"),
        ("b1.mlp", {"units": tuple(range(11))}, r"'b1\.mlp': 'units' must be from 1 to 10, got 11"),
    ],
)
def test_a_bad_cut_is_refused_by_sublayer_and_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_kept(NETWORK, {**KEPT, name: replace(KEPT[name], **change)})


@pytest.mark.parametrize("check", ["widths", "kept"])
def test_sublayers_that_are_missing_or_unknown(check: str) -> None:
    def run(names: dict[str, Any]) -> None:
        if check == "widths":
            check_widths(NETWORK, names)
        else:
            check_kept(NETWORK, names)

    whole: dict[str, Any] = dict(NETWORK.widths) if check == "widths" else dict(KEPT)
    with pytest.raises(PlanError, match=r"the plan lacks \['b1\.attn', 'b1\.mlp'\]; give the widths of all 4"):
        run(dict(list(whole.items())[:2]))
    with pytest.raises(PlanError, match=r"the plan lacks .* and 1 more"):
        run({})
    with pytest.raises(PlanError, match=r"has a sub-layer 'b1\.mpl', the model has none; did you mean 'b1\.mlp'\?"):
        run(whole | {"b1.mpl": whole["b1.mlp"]})
    with pytest.raises(PlanError, match=r"'b0\.mlp' of the plan must have FfnWidths"):
        run(whole | {"b0.mlp": whole["b0.attn"]})


def with_(**changes: Any) -> dict[str, Any]:
    return {**NETWORK.widths, "b0.attn": replace(NETWORK.sublayers[0].widths, **changes)}


def test_a_kind_that_may_not_be_cut_is_named_with_what_may() -> None:
    fixed = excluding(NETWORK, ["qk"])
    with pytest.raises(PlanError, match=r"'b0\.attn': 'qk' cannot be cut here .*\['head', 'vo'\].*keep it at 4"):
        check_widths(fixed, with_(qk=2))
    check_widths(fixed, with_(heads=1, vo=1))
    with pytest.raises(PlanError, match=r"allowed: nothing"):
        check_widths(excluding(NETWORK, ["b0"]), with_(qk=2))


@pytest.mark.parametrize("width", [0, -1, 5])
def test_widths_are_within_the_present_one(width: int) -> None:
    with pytest.raises(PlanError, match=rf"'b0\.attn': 'qk' must be from 1 to 4, got {width}"):
        check_widths(NETWORK, with_(qk=width))


@pytest.mark.parametrize("width", [2.0, True, "2"])
def test_widths_are_whole(width: Any) -> None:
    with pytest.raises(PlanError, match=r"'b0\.attn': 'qk' must be a whole number"):
        check_widths(NETWORK, with_(qk=width))


def test_what_is_gone_does_not_come_back() -> None:
    check_widths(WITHOUT, WITHOUT.widths)
    with pytest.raises(PlanError, match=r"'b0\.attn' was removed from this model and cannot come back"):
        check_widths(WITHOUT, NETWORK.widths)


def left(network: Network, name: str) -> tuple[set[str], bool]:
    sub = next(sub for sub in network.present if sub.name == name)
    return set(sub.prunable), sub.removable


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ([], [({"head", "qk", "vo"}, True), ({"ffn"}, True)] * 2),
        (["b0"], [(set(), False), (set(), False), ({"head", "qk", "vo"}, True), ({"ffn"}, True)]),
        (["b1.mlp"], [({"head", "qk", "vo"}, True), ({"ffn"}, True), ({"head", "qk", "vo"}, True), (set(), False)]),
        (["qk"], [({"head", "vo"}, False), ({"ffn"}, True)] * 2),
        (["ffn", "b0.attn"], [(set(), False), (set(), False), ({"head", "qk", "vo"}, True), (set(), False)]),
    ],
)
def test_what_is_excluded_is_left_alone(exclude: list[str], expected: list[tuple[set[str], bool]]) -> None:
    network = excluding(NETWORK, exclude)
    assert [left(network, name) for name in NETWORK.widths] == expected
    assert network.widths == NETWORK.widths


def test_excluding_takes_absent_sublayers_and_deeper_names() -> None:
    assert excluding(WITHOUT, ["b0"]).sublayers[0] == WITHOUT.sublayers[0]
    deep = toys.network(toys.ffn("encoder.layer.1", 4), toys.ffn("encoder.layer.10", 4))
    network = excluding(deep, ["encoder.layer.1"])
    assert [left(network, sub.name)[1] for sub in deep.sublayers] == [False, True]  # 10 does not begin with 1
    assert not any(sub.removable for sub in excluding(deep, ["encoder"]).present)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("qk", r"exclude must be a list of names, got the text 'qk'; write \['qk'\]"),
        (["b0.mpl"], r"exclude names 'b0\.mpl', which is no sub-layer and no kind here; did you mean 'b0\.mlp'\?"),
        (["heads"], r"exclude names 'heads', .*did you mean 'head'\?"),
        (["b2"], r"exclude names 'b2'"),
        ([3], r"exclude names 3"),
    ],
)
def test_names_of_nothing_are_refused(exclude: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        excluding(NETWORK, exclude)


def test_absent_widths_keep_their_type() -> None:
    assert absent(NETWORK.widths["b0.attn"]) == AttentionWidths(heads=0, qk=0, vo=0)
    with pytest.raises(PlanError, match=r"'b0\.attn' of the plan must have AttentionWidths"):
        check_widths(NETWORK, {**NETWORK.widths, "b0.attn": FfnWidths(units=0)})


def test_nearest_names_one_or_all() -> None:
    assert nearest("enable_warmpup", ["enable_warmup", "epochs"]) == "did you mean 'enable_warmup'?"
    assert nearest("zzz", ["b", "a"]) == "valid: 'a', 'b'"
