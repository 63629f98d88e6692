from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gohsp.errors import BudgetError, PlanError, nearest
from gohsp.structure import (
    BlockPlan,
    BlockShape,
    BlockStructure,
    ModelStructure,
    Plan,
    Readout,
    UnitSlice,
    block_cost,
    check_plan,
    check_shapes,
    dense_plan,
    model_cost,
    parse_budget,
    shapes_from_json,
    shapes_to_json,
)

D, TOKENS = 6, 5


def rows(name: str, start: int) -> tuple[UnitSlice, UnitSlice]:
    return (
        UnitSlice(parameter=f"{name}.weight", axis=0, start=start, size=D),
        UnitSlice(parameter=f"{name}.bias", axis=0, start=start, size=1),
    )


def readout(name: str) -> Readout:
    return Readout(module=name, weight=f"{name}.weight", bias=f"{name}.bias", gain=None, size=D)


BLOCK = BlockStructure(
    name="b",
    shape=BlockShape(heads=3, qk=4, vo=2, ffn=10),
    prunable=frozenset({"head", "qk", "vo", "ffn"}),
    rotatable=frozenset(),
    scale=0.5,
    attention="b.attn",
    query=rows("b.qkv", 0),
    key=rows("b.qkv", 12),
    value=rows("b.qkv", 24),
    query_norm=None,
    key_norm=None,
    attention_readout=readout("b.proj"),
    ffn_in=rows("b.fc1", 0),
    ffn_readout=readout("b.fc2"),
)
MODEL = ModelStructure(blocks=(BLOCK, BLOCK), embed_dim=D, tokens=TOKENS, fixed_params=100, fixed_macs=1000)
KEPT = BlockPlan(heads=(0, 2), qk=((0, 3), (1, 2)), vo=((1,), (0,)), ffn=(2, 5, 7))


@st.composite
def block_plans(draw: st.DrawFn) -> BlockPlan:
    def pick(n: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.permutations(range(n)))[:count]))

    heads = pick(3, draw(st.integers(1, 3)))
    qk, vo = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    return BlockPlan(
        heads=heads,
        qk=tuple(pick(4, qk) for _ in heads),
        vo=tuple(pick(2, vo) for _ in heads),
        ffn=pick(10, draw(st.integers(1, 10))),
    )


@given(st.lists(block_plans(), min_size=2, max_size=2))
def test_a_plan_survives_json_and_fits_its_model(blocks: list[BlockPlan]) -> None:
    plan = Plan(tuple(blocks))
    assert Plan.from_json(plan.to_json()) == plan
    assert shapes_from_json(shapes_to_json(plan.shapes)) == plan.shapes
    check_plan(MODEL, plan)


def test_the_dense_plan_keeps_everything() -> None:
    plan = dense_plan(MODEL)
    assert plan.shapes == MODEL.shapes
    for kind, count in (("qk", 12), ("vo", 6), ("ffn", 10)):
        assert plan.blocks[0].units(kind, BLOCK.shape) == list(range(count))


def test_units_are_flat_grid_indices_of_the_present_widths() -> None:
    assert KEPT.units("qk", BLOCK.shape) == [0, 3, 2 * 4 + 1, 2 * 4 + 2]
    assert KEPT.units("vo", BLOCK.shape) == [1, 2 * 2 + 0]
    assert KEPT.units("ffn", BLOCK.shape) == [2, 5, 7]


def test_costs_by_hand() -> None:
    shape = BlockShape(heads=2, qk=3, vo=1, ffn=7)
    # query and key rows with bias; value rows with bias and output columns; FFN rows with bias and columns
    params = 2 * 3 * 2 * (D + 1) + 2 * 1 * (D + 1 + D) + 7 * (D + 1 + D)
    assert block_cost(MODEL, BLOCK, shape, "params") == params
    linear = 2 * 3 * 2 * D + 2 * 1 * 2 * D + 7 * 2 * D
    products = 2 * (3 + 1) * TOKENS**2
    assert block_cost(MODEL, BLOCK, shape, "macs") == TOKENS * linear + products
    assert model_cost(MODEL, (shape, shape), "params") == 100 + 2 * params
    assert model_cost(MODEL, (shape, shape), "macs") == 1000 + 2 * (TOKENS * linear + products)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (), "qk": (), "vo": ()}, r"block 1: 'heads' must be from 1 to 3, got 0"),
        ({"ffn": ()}, r"block 1: 'ffn' must be from 1 to 10, got 0"),
        ({"qk": ((), ())}, r"block 1: 'qk' must be from 1 to 4, got 0"),
        ({"ffn": (3, 10)}, r"block 1: 'ffn' must be ascending distinct indices from 0 to 9"),
        ({"ffn": (-1, 3)}, r"block 1: 'ffn' must be ascending"),
        ({"ffn": (5, 2)}, r"block 1: 'ffn' must be ascending"),
        ({"heads": (1, 1)}, r"block 1: 'heads' must be ascending"),
        ({"qk": ((0, 1), (2,))}, r"block 1: 'qk' must list equally many"),
        ({"vo": ((0,),)}, r"block 1: 'vo' must list equally many dimensions for each of the 2"),
        ({"vo": ((0,), (2,))}, r"block 1: 'vo' must be ascending distinct indices from 0 to 1"),
    ],
)
def test_a_bad_plan_is_refused_by_block_and_key(change: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(MODEL, Plan((KEPT, replace(KEPT, **change))))


def test_wrong_number_of_blocks() -> None:
    with pytest.raises(PlanError, match="the plan has 1 blocks, the model has 2"):
        check_plan(MODEL, Plan((KEPT,)))


def test_a_kind_that_may_not_be_cut_is_named_with_what_may() -> None:
    fixed = replace(MODEL, blocks=(BLOCK, replace(BLOCK, prunable=frozenset({"head", "ffn"}))))
    with pytest.raises(PlanError, match=r"block 1: 'qk' cannot be cut .*\['ffn', 'head'\].*keep it at 4"):
        check_shapes(fixed, (BLOCK.shape, replace(BLOCK.shape, qk=2)))
    check_shapes(fixed, (replace(BLOCK.shape, qk=2), replace(BLOCK.shape, heads=1)))


@pytest.mark.parametrize("width", [0, -1, 5])
def test_widths_are_within_the_present_one(width: int) -> None:
    with pytest.raises(PlanError, match=rf"block 0: 'qk' must be from 1 to 4, got {width}"):
        check_shapes(MODEL, (replace(BLOCK.shape, qk=width), BLOCK.shape))


def test_json_with_a_misspelt_key_names_the_nearest() -> None:
    good = Plan((KEPT, KEPT)).to_json()
    bad = [good[0], {("fnn" if key == "ffn" else key): value for key, value in good[1].items()}]
    with pytest.raises(PlanError, match=r"block 1 .*unknown key 'fnn'; did you mean 'ffn'\?"):
        Plan.from_json(bad)
    with pytest.raises(PlanError, match=r"block 0 .*unknown key 'head_count'"):
        shapes_from_json([{"head_count": 3}])


def test_json_that_lacks_a_key() -> None:
    with pytest.raises(PlanError, match=r"block 0 of the plan lacks \['qk', 'ffn'\]"):
        shapes_from_json([{"heads": 1, "vo": 2}])


@pytest.mark.parametrize("key", ["heads", "qk", "ffn"])
@pytest.mark.parametrize("value", [3, None, ["x"], [[[0]]], [0.5, 1], "01", [True], {"0": 1}])
def test_json_whose_units_are_no_indices(key: str, value: object) -> None:
    with pytest.raises(PlanError, match="block 0 of the plan: kept units must be lists of indices, got"):
        Plan.from_json([{**Plan((KEPT,)).to_json()[0], key: value}])


@pytest.mark.parametrize("width", [2.0, "2", None, True])
def test_json_whose_width_is_no_whole_number(width: object) -> None:
    with pytest.raises(PlanError, match=r"block 0 of the plan: 'qk' must be a whole number"):
        shapes_from_json([{"heads": 1, "qk": width, "vo": 1, "ffn": 1}])


DENSE = {kind: model_cost(MODEL, MODEL.shapes, kind) for kind in ("params", "macs")}


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("params=-30%", "params", int(0.7 * DENSE["params"])),
        ("params=60%", "params", int(0.6 * DENSE["params"])),
        (" macs=-12.5% ", "macs", int(0.875 * DENSE["macs"])),
        ("MACS=2k", "macs", 2000),
        ("params=0.0003M", "params", 300),
        ("macs=0.000002G", "macs", 2000),
        ("params=345", "params", 345),
    ],
)
def test_budgets(text: str, kind: str, limit: int) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.limit(DENSE[kind]), budget.requested) == (kind, limit, text)


@pytest.mark.parametrize(("text", "limit"), [("latency=-25%", 6.0), ("latency=7.5ms", 7.5), ("latency=0.002s", 2.0)])
def test_latency_budgets_are_milliseconds(text: str, limit: float) -> None:
    budget = parse_budget(text)
    assert budget.kind == "latency"
    assert budget.limit(8.0) == pytest.approx(limit) == budget.bound(8.0)
    assert budget.bound(1.0) > 0  # a machine that runs faster today than its budget is no error once work is done


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params", "cannot be read; write params=4.0M"),
        ("params=4X", "cannot be read"),
        ("params=4 M", "cannot be read"),
        ("params=+30%", "cannot be read"),
        ("", "cannot be read"),
        ("param=-30%", r"'param' is unknown; did you mean 'params'\?"),
        ("speed=-30%", "'speed' is unknown; valid: 'latency', 'macs', 'params'"),
        ("latency=3", r"ends with one of \['ms', 's'\], or %"),
        ("latency=3M", "ends with one of"),
        ("params=3ms", r"ends with one of \['k', 'm', 'g'\], or %"),
        ("params=-4M", "must be a percentage, as in params=-30%"),
        ("params=100%", "leaves 100 % of the model; ask for more than 0 and less than 100 %"),
        ("params=-0%", "leaves 100 %"),
        ("macs=-140%", "leaves -40 %"),
        ("params=-100%", "leaves 0 %"),
        ("params=0", "finite number above 0, as in params=4.0M"),
        ("params=" + "9" * 400, "finite number above 0"),
        ("macs=1G", f"allows 1,000,000,000 MACs, the model has {DENSE['macs']:,} MACs"),
    ],
)
def test_bad_budgets_say_what_to_write(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budget(text).limit(DENSE["macs" if text.startswith("macs") else "params"])


def test_nearest_names_one_or_all() -> None:
    assert nearest("enable_warmpup", ["enable_warmup", "epochs"]) == "did you mean 'enable_warmup'?"
    assert nearest("zzz", ["b", "a"]) == "valid: 'a', 'b'"
