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
from gohsp.structure import (
    PARAMS,
    AttentionKept,
    FfnKept,
    Kept,
    Network,
    UnitSlice,
    cost_of,
    keep_everything,
    keep_none,
    kept_widths,
)

HEADS = AttentionKept(heads=(1, 3), qk=((0, 2, 7), (1, 4, 5)), vo=((0, 1, 2, 3, 6), (0, 2, 4, 6, 7)))
UNITS = FfnKept(units=(0, 5, 6, 7, 31, 63))
QK = [8, 10, 15, 25, 28, 29]
VO = [8, 9, 10, 11, 14, 24, 26, 28, 30, 31]


@pytest.fixture
def kept(network: Network) -> Kept:
    """Block 0 cut, block 1 left whole."""
    return {**keep_everything(network), "blocks.0.attn": HEADS, "blocks.0.mlp": UNITS}


def test_masking_zeroes_every_coupled_entry_and_no_other(model: nn.Module, network: Network, kept: Kept) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgery.mask(model, network, kept)
    attn_rows = torch.zeros(96, dtype=torch.bool)
    attn_rows[[*QK, *(32 + u for u in QK), *(64 + u for u in VO)]] = True
    values, hidden = torch.zeros(32, dtype=torch.bool), torch.zeros(64, dtype=torch.bool)
    values[VO], hidden[list(UNITS.units)] = True, True
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
    model: nn.Module, network: Network, kept: Kept
) -> None:
    dense = model.state_dict()
    state = surgery.cut_state(model, network, kept)
    weight, bias = dense["blocks.0.attn.qkv.weight"], dense["blocks.0.attn.qkv.bias"]
    scale = (3 / 8) ** 0.5  # the new module divides by sqrt(3), the function by sqrt(8)
    keys, values, hidden = [32 + u for u in QK], [64 + u for u in VO], list(UNITS.units)
    expected = {
        "attn.qkv.weight": torch.cat([weight[QK] * scale, weight[keys], weight[values]]),
        "attn.qkv.bias": torch.cat([bias[QK] * scale, bias[keys], bias[values]]),
        "attn.proj.weight": dense["blocks.0.attn.proj.weight"][:, VO],
        "mlp.fc1.weight": dense["blocks.0.mlp.fc1.weight"][hidden],
        "mlp.fc1.bias": dense["blocks.0.mlp.fc1.bias"][hidden],
        "mlp.fc2.weight": dense["blocks.0.mlp.fc2.weight"][:, hidden],
    }
    assert state.keys() == dense.keys()
    for name, value in state.items():
        prefix, _, rest = name.partition("blocks.0.")
        torch.testing.assert_close(value, dense[name] if prefix else expected.get(rest, dense[name]))
    assert sum(v.numel() for v in state.values()) == cost_of(network, kept_widths(kept), PARAMS)


@pytest.mark.parametrize("gain", [None, 0.5], ids=["plain", "LayerScale"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "norm", "scale", "readout"),
    [("blocks.0.attn", "norm1", "ls1", "attn.proj"), ("blocks.1.mlp", "norm2", "ls2", "mlp.fc2")],
)
def test_of_an_absent_sublayer_one_vector_is_left(
    name: str, norm: str, scale: str, readout: str, bias: bool, gain: float | None, make_model: Callable[..., nn.Module]
) -> None:
    model = make_model(mlp_ratio=2, proj_bias=bias, init_values=gain)
    network, dense, block = describe(model), model.state_dict(), name.rpartition(".")[0]
    if gain:
        dense[f"{block}.{scale}.gamma"][3] = 1e-12  # shut, to repair and cut alike
    kept = {**keep_everything(network), name: keep_none(network.widths[name])}
    state = surgery.cut_state(model, network, kept)
    gone = (f"{name}.", f"{block}.{norm}.", f"{block}.{scale}.")
    assert state.keys() == {k for k in dense if not k.startswith(gone)} | {f"{name}.bias"}
    assert all(torch.equal(value, dense[k]) for k, value in state.items() if k != f"{name}.bias")
    expected = dense[f"{block}.{readout}.bias"] if bias else torch.zeros(32)
    if gain:
        expected = expected * dense[f"{block}.{scale}.gamma"]
        expected[3] = 0
    assert torch.equal(state[f"{name}.bias"], expected)
    assert sum(v.numel() for v in state.values()) == cost_of(network, kept_widths(kept), PARAMS)


def test_masking_an_absent_sublayer_leaves_its_readouts_bias_alone(model: nn.Module, network: Network) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    none = {name: keep_none(network.widths[name]) for name in ("blocks.0.attn", "blocks.1.mlp")}
    surgery.mask(model, network, {**keep_everything(network), **none})
    emptied = ("blocks.0.attn.qkv.", "blocks.0.attn.proj.weight", "blocks.1.mlp.fc1.", "blocks.1.mlp.fc2.weight")
    for name, value in model.state_dict().items():
        assert not value.any() if name.startswith(emptied) else torch.equal(value, before[name]), name


def test_query_norm_keeps_queries_as_they_are(make_model: Callable[..., nn.Module]) -> None:
    model = make_model(qk_norm=True, mlp_ratio=2)
    network = describe(model)
    # any other scale: a norm would swallow what the queries absorb
    others = tuple(replace(sub, scale=1.0) if sub in network.attentions else sub for sub in network.sublayers)
    network = replace(network, sublayers=others)
    heads = replace(HEADS, qk=(tuple(range(8)),) * 2)
    state = surgery.cut_state(model, network, {**keep_everything(network), "blocks.1.attn": heads})
    weight = model.state_dict()["blocks.1.attn.qkv.weight"]
    assert torch.equal(state["blocks.1.attn.qkv.weight"][:16], weight[[*range(8, 16), *range(24, 32)]])


def test_what_a_head_owns_goes_with_it(model: nn.Module, network: Network, kept: Kept) -> None:
    """A table of position biases has a column for each head."""
    model.blocks[0].attn.table = nn.Parameter(torch.randn(9, 4))
    table = UnitSlice(parameter="blocks.0.attn.table", axis=1, start=0, size=9)
    first, *rest = network.sublayers
    owning = replace(network, sublayers=(replace(first, owned=(table,)), *rest))
    before = model.blocks[0].attn.table.detach().clone()
    state = surgery.cut_state(model, owning, kept)
    assert torch.equal(state["blocks.0.attn.table"], before[:, [1, 3]])
    assert sum(v.numel() for v in state.values()) == cost_of(owning, kept_widths(kept), PARAMS)
    surgery.mask(model, owning, kept)
    assert torch.equal(model.blocks[0].attn.table, before * torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("gone", [(), ("blocks.0.attn", "blocks.1.mlp")], ids=["narrowed", "absent"])
def test_the_cut_state_shares_no_memory_with_the_model(
    gone: tuple[str, ...], model: nn.Module, network: Network, kept: Kept
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {**kept, **{name: keep_none(network.widths[name]) for name in gone}}
    for tensor in surgery.cut_state(model, network, kept).values():
        tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masking_twice_and_keeping_everything_are_harmless(
    model: nn.Module, network: Network, kept: Kept, images: Tensor
) -> None:
    whole = copy.deepcopy(model)
    surgery.mask(whole, network, keep_everything(network))
    assert relative_difference(model, whole, images) == 0
    surgery.mask(model, network, kept)
    once = copy.deepcopy(model)
    surgery.mask(model, network, kept)
    assert relative_difference(once, model, images) == 0
    assert relative_difference(whole, once, images) > 0.01


@pytest.mark.parametrize("carry_out", [surgery.mask, surgery.cut_state])
def test_a_cut_that_does_not_fit_changes_nothing(
    carry_out: Callable[..., object], model: nn.Module, network: Network, kept: Kept
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = {**kept, "blocks.1.mlp": FfnKept(units=(0, 64))}
    with pytest.raises(PlanError, match=r"'blocks\.1\.mlp': 'units' must be ascending distinct indices from 0 to 63"):
        carry_out(model, network, bad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
