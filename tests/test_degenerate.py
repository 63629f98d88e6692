"""Units that do nothing, end to end: a one-shot run of a tiny model with such units ends finite and right.

Right means: where the cut takes dead units alone, the pruned model computes what the dense one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gohsp
from gohsp import recipe as recipes

HEADS, WIDTH, FFN, DIM = 4, 4, 32, 16
TINY = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": DIM,
    "depth": 2,
    "num_heads": HEADS,
    "mlp_ratio": FFN / DIM,
    "num_classes": 10,
}
FEW = {"calibration_images": 48, "ranking_images": 16, "allocation_images": 16, "holdout_images": 16}
ONESHOT = {
    "route": "oneshot",
    "device": "cpu",
    "data": FEW,
    "widths": {"multiple": 1, "min_width": 1},
    "latency": {"rounds": 1},
    "admm": {"projection": {"guidance": 0.0}},  # which heads go is up to what they do, not up to the graph
    "finetune": {"epochs": 0},
    "training": {"precision": "no"},
}
ONE_TOKEN = {"patch_size": 8, "class_token": False, "global_pool": "avg"}

Injury = Callable[[Any], None]


def tiny(*injuries: Injury, seed: int = 0, **arguments: Any) -> nn.Module:
    """A tiny ViT with random weights that matter everywhere, and the injuries done to it."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **arguments}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
            elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        for injure in injuries:
            injure(model)
    return model


def prune(model: nn.Module, out: Path, *, source: str = "digits", budget: str = "params=-1%", **options: Any) -> Any:
    changes = options.pop("recipe", {})
    recipe = recipes.from_mapping({**ONESHOT, **changes})
    return gohsp.prune(model, source, budget, out, recipe=recipe, quiet=True, overwrite=True, **options)


def outputs(model: nn.Module) -> Tensor:
    """Logits of a few digits, which no run is calibrated on."""
    from gohsp import data

    split = data.open_split(data.DataSource(source="digits"), "test")
    transform = data.eval_transform(data.Preprocessing.from_model(model))
    with torch.no_grad():
        return model(torch.stack([transform(split.image(i)) for i in range(32)]))


def require_sound(result: Any, folder: Path) -> None:
    """Finite weights and outputs, a model that loads as it was, a report whose figures are figures."""
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    logits = outputs(result.model)
    assert torch.isfinite(logits).all()
    assert torch.equal(outputs(gohsp.load(folder)), logits)
    assert result.report["equality"]["max_relative_difference"] <= 1e-5
    assert result.report["fidelity"]["kl"] >= 0


# Injuries


def zero(*names: str, rows: slice = slice(None), columns: slice = slice(None)) -> Injury:
    """Parts of the named parameters of every block are 0."""

    def injure(model: Any) -> None:
        for block in model.blocks:
            for name in names:
                parameter = block.get_parameter(name)
                parameter[(rows, columns)[: parameter.ndim]] = 0

    return injure


Q, K, V = (slice(i * DIM, (i + 1) * DIM) for i in range(3))
QK, HALF = slice(0, 2 * DIM), slice(0, 2 * WIDTH)
HALF_Q, HALF_K, HALF_V = (slice(i * DIM, i * DIM + 2 * WIDTH) for i in range(3))


def both(*injuries: Injury) -> Injury:
    def injure(model: Any) -> None:
        for one in injuries:
            one(model)

    return injure


def never_active(model: Any) -> None:
    """Half of the hidden units lie far below where a GELU is 0."""
    for block in model.blocks:
        block.mlp.fc1.bias[: FFN // 2] = -100


def twin_heads(model: Any) -> None:
    """All heads of a block have the same queries, keys and values."""
    for block in model.blocks:
        for part in (Q, K, V):
            for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                parameter[part] = parameter[part][:WIDTH].repeat(HEADS, *[1] * (parameter.ndim - 1))


def tiny_gains(model: Any) -> None:
    """LayerScale shuts attention off, exactly in the first block and all but that in the second."""
    model.blocks[0].ls1.gamma.zero_()
    model.blocks[1].ls1.gamma.mul_(1e-40)


@dataclass(frozen=True)
class Case:
    """What is dead, and the widths that it leaves."""

    injure: Injury
    arguments: dict[str, Any]
    kept: dict[str, int]
    tolerance: float = 1e-3


LAYER_SCALE, NO_BIAS = {"init_values": 1.0}, {"qkv_bias": False, "proj_bias": False}
CASES = {
    # Queries and keys
    "query and key weights, biases kept": Case(zero("attn.qkv.weight", rows=QK), {}, {"qk": 1}),
    "query weights, biases kept": Case(zero("attn.qkv.weight", rows=Q), {}, {"qk": 1}),
    "key weights, biases kept": Case(zero("attn.qkv.weight", rows=K), {}, {"qk": 1}),
    "queries": Case(zero("attn.qkv.weight", "attn.qkv.bias", rows=Q), {}, {"qk": 1}),
    "keys": Case(zero("attn.qkv.weight", "attn.qkv.bias", rows=K), {}, {"qk": 1}),
    "queries and keys without biases": Case(zero("attn.qkv.weight", rows=QK), NO_BIAS, {"qk": 1}),
    "one token an image": Case(both(), ONE_TOKEN, {"qk": 1}),
    "what attention reads, but for its bias": Case(zero("norm1.weight"), {}, {"qk": 1}),
    "what attention reads": Case(zero("norm1.weight", "norm1.bias"), {}, {"qk": 1}),
    # Values and heads
    "half the heads' values": Case(zero("attn.qkv.weight", "attn.qkv.bias", rows=HALF_V), {}, {"heads": 2}),
    "half the heads' readouts": Case(zero("attn.proj.weight", columns=HALF), {}, {"heads": 2}),
    "half the heads, biases kept": Case(
        both(*(zero("attn.qkv.weight", rows=rows) for rows in (HALF_Q, HALF_K, HALF_V))), {}, {"heads": 2}, 0.02
    ),
    "all values": Case(zero("attn.qkv.weight", "attn.qkv.bias", rows=V), {}, {"heads": 1, "qk": 1, "vo": 1}),
    "all readouts": Case(zero("attn.proj.weight"), {}, {"heads": 1, "qk": 1, "vo": 1}),
    "attention, by LayerScale": Case(tiny_gains, LAYER_SCALE, {"heads": 1, "qk": 1, "vo": 1}),
    "half of many heads of width 1": Case(
        zero("attn.qkv.weight", "attn.qkv.bias", rows=HALF_V), {"num_heads": DIM}, {"heads": 8}
    ),
    "heads that are one": Case(twin_heads, {}, {"heads": 1}, 0.02),
    # Hidden units
    "half the hidden units' inputs": Case(
        zero("mlp.fc1.weight", "mlp.fc1.bias", rows=slice(0, FFN // 2)), {}, {"ffn": FFN // 2}
    ),
    "half the hidden units' readouts": Case(zero("mlp.fc2.weight", columns=slice(0, FFN // 2)), {}, {"ffn": FFN // 2}),
    "half the hidden units, never active": Case(never_active, {}, {"ffn": FFN // 2}),
    "hidden units that are constant": Case(zero("mlp.fc1.weight"), {}, {"ffn": 1}, 0.02),
    "all hidden units": Case(zero("mlp.fc1.weight", "mlp.fc1.bias"), {}, {"ffn": 1}),
    "the FFN, by LayerScale": Case(zero("ls2.gamma"), LAYER_SCALE, {"ffn": 1}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cut_of_dead_units_changes_nothing(case: Case, tmp_path: Path) -> None:
    dense = tiny(case.injure, **case.arguments)
    heads = case.arguments.get("num_heads", HEADS)
    whole = {"heads": heads, "qk": DIM // heads, "vo": DIM // heads, "ffn": FFN}
    result = prune(dense, tmp_path / "run", shapes=(gohsp.BlockShape(**{**whole, **case.kept}),) * 2)
    require_sound(result, tmp_path / "run")
    expected = outputs(dense)
    difference = (outputs(result.model) - expected).abs().max() / expected.abs().max()
    assert difference <= case.tolerance
