from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gohsp.core import surgery
from gohsp.errors import PlanError
from gohsp.models import describe, relative_difference
from gohsp.structure import BlockPlan, ModelStructure, Plan, dense_plan, model_cost

KEPT = BlockPlan(
    heads=(1, 3),
    qk=((0, 2, 7), (1, 4, 5)),
    vo=((0, 1, 2, 3, 6), (0, 2, 4, 6, 7)),
    ffn=(0, 5, 6, 7, 31, 63),
)
QK = [8, 10, 15, 25, 28, 29]
VO = [8, 9, 10, 11, 14, 24, 26, 28, 30, 31]


@pytest.fixture
def plan(structure: ModelStructure) -> Plan:
    """Block 0 cut, block 1 left whole."""
    return Plan((KEPT, dense_plan(structure).blocks[1]))


def test_masking_zeroes_every_coupled_entry_and_no_other(
    model: nn.Module, structure: ModelStructure, plan: Plan
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgery.mask(model, structure, plan)
    attn_rows = torch.zeros(96, dtype=torch.bool)
    attn_rows[[*QK, *(32 + u for u in QK), *(64 + u for u in VO)]] = True
    values, hidden = torch.zeros(32, dtype=torch.bool), torch.zeros(64, dtype=torch.bool)
    values[VO], hidden[list(KEPT.ffn)] = True, True
    stays = {
        "attn.qkv.weight": attn_rows[:, None],
        "attn.qkv.bias": attn_rows,
        "attn.proj.weight": values,
        "mlp.fc1.weight": hidden[:, None],
        "mlp.fc1.bias": hidden,
        "mlp.fc2.weight": hidden,
    }
    for name, value in model.state_dict().items():
        prefix, _, rest = name.partition("blocks.0.")
        factor = stays.get(rest, True) if not prefix else True
        assert torch.equal(value, before[name] * factor), name


def test_cutting_takes_the_kept_entries_and_folds_the_scale_into_the_queries(
    model: nn.Module, structure: ModelStructure, plan: Plan
) -> None:
    dense = model.state_dict()
    state = surgery.cut_state(model, structure, plan)
    weight, bias = dense["blocks.0.attn.qkv.weight"], dense["blocks.0.attn.qkv.bias"]
    scale = (3 / 8) ** 0.5  # the new module divides by sqrt(3), the function by sqrt(8)
    keys, values = [32 + u for u in QK], [64 + u for u in VO]
    expected = {
        "attn.qkv.weight": torch.cat([weight[QK] * scale, weight[keys], weight[values]]),
        "attn.qkv.bias": torch.cat([bias[QK] * scale, bias[keys], bias[values]]),
        "attn.proj.weight": dense["blocks.0.attn.proj.weight"][:, VO],
        "mlp.fc1.weight": dense["blocks.0.mlp.fc1.weight"][list(KEPT.ffn)],
        "mlp.fc1.bias": dense["blocks.0.mlp.fc1.bias"][list(KEPT.ffn)],
        "mlp.fc2.weight": dense["blocks.0.mlp.fc2.weight"][:, list(KEPT.ffn)],
    }
    assert state.keys() == dense.keys()
    for name, value in state.items():
        prefix, _, rest = name.partition("blocks.0.")
        torch.testing.assert_close(value, dense[name] if prefix else expected.get(rest, dense[name]))
    assert sum(v.numel() for v in state.values()) == model_cost(structure, plan.shapes, "params")


def test_query_norm_keeps_queries_as_they_are(make_model: Callable[..., nn.Module]) -> None:
    model = make_model(qk_norm=True, mlp_ratio=2)
    structure = describe(model)
    # any other scale: a norm would swallow what the queries absorb
    structure = replace(structure, blocks=tuple(replace(b, scale=1.0) for b in structure.blocks))
    full = tuple(range(8))
    kept = BlockPlan(heads=(1, 3), qk=(full, full), vo=KEPT.vo, ffn=KEPT.ffn)
    state = surgery.cut_state(model, structure, Plan((kept, kept)))
    weight = model.state_dict()["blocks.1.attn.qkv.weight"]
    assert torch.equal(state["blocks.1.attn.qkv.weight"][:16], weight[[*range(8, 16), *range(24, 32)]])


def test_the_cut_state_shares_no_memory_with_the_model(model: nn.Module, structure: ModelStructure, plan: Plan) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for tensor in surgery.cut_state(model, structure, plan).values():
        tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masking_twice_and_keeping_everything_are_harmless(
    model: nn.Module, structure: ModelStructure, plan: Plan, images: Tensor
) -> None:
    whole = copy.deepcopy(model)
    surgery.mask(whole, structure, dense_plan(structure))
    assert relative_difference(model, whole, images) == 0
    surgery.mask(model, structure, plan)
    once = copy.deepcopy(model)
    surgery.mask(model, structure, plan)
    assert relative_difference(once, model, images) == 0
    assert relative_difference(whole, once, images) > 0.01


@pytest.mark.parametrize("carry_out", [surgery.mask, surgery.cut_state])
def test_a_plan_that_does_not_fit_changes_nothing(
    carry_out: Callable[..., object], model: nn.Module, structure: ModelStructure
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = Plan((KEPT, BlockPlan(heads=KEPT.heads, qk=KEPT.qk, vo=KEPT.vo, ffn=(0, 64))))
    with pytest.raises(PlanError, match="block 1: 'ffn' must be ascending distinct indices from 0 to 63"):
        carry_out(model, structure, bad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
