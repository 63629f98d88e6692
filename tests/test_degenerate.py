"""Units that do nothing, end to end: a one-shot run of a tiny model with such units ends finite and right.

Right means: where the cut takes dead units alone, the pruned model computes what the dense one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import gohsp
from gohsp import data
from gohsp import recipe as recipes
from gohsp.errors import NonFiniteError

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
TRAINING = {"batch_size": 256, "precision": "no", "augment": "none"}
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


def widths(kept: dict[str, int], heads: int = HEADS) -> tuple[gohsp.BlockShape, ...]:
    """Present widths of both blocks, but for those in ``kept``."""
    return (gohsp.BlockShape(**{"heads": heads, "qk": DIM // heads, "vo": DIM // heads, "ffn": FFN, **kept}),) * 2


def change(dense: nn.Module, pruned: nn.Module) -> float:
    """Largest difference of their logits, relative to the largest logit."""
    before, after = outputs(dense), outputs(pruned)
    return float((after - before).abs().max() / before.abs().max())


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
        both(*(zero("attn.qkv.weight", rows=rows) for rows in (HALF_Q, HALF_K, HALF_V))), {}, {"heads": 2}
    ),
    "all values": Case(zero("attn.qkv.weight", "attn.qkv.bias", rows=V), {}, {"heads": 1, "qk": 1, "vo": 1}),
    "all readouts": Case(zero("attn.proj.weight"), {}, {"heads": 1, "qk": 1, "vo": 1}),
    "attention, by LayerScale": Case(tiny_gains, LAYER_SCALE, {"heads": 1, "qk": 1, "vo": 1}),
    "half of many heads of width 1": Case(
        zero("attn.qkv.weight", "attn.qkv.bias", rows=HALF_V), {"num_heads": DIM}, {"heads": 8}
    ),
    # Hidden units
    "half the hidden units' inputs": Case(
        zero("mlp.fc1.weight", "mlp.fc1.bias", rows=slice(0, FFN // 2)), {}, {"ffn": FFN // 2}
    ),
    "half the hidden units' readouts": Case(zero("mlp.fc2.weight", columns=slice(0, FFN // 2)), {}, {"ffn": FFN // 2}),
    "half the hidden units, never active": Case(never_active, {}, {"ffn": FFN // 2}),
    "hidden units that are constant": Case(zero("mlp.fc1.weight"), {}, {"ffn": 1}),
    "half the hidden units, constant": Case(zero("mlp.fc1.weight", rows=slice(0, FFN // 2)), {}, {"ffn": FFN // 2}),
    "all hidden units": Case(zero("mlp.fc1.weight", "mlp.fc1.bias"), {}, {"ffn": 1}),
    "the FFN, by LayerScale": Case(zero("ls2.gamma"), LAYER_SCALE, {"ffn": 1}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cut_of_dead_units_changes_nothing(case: Case, tmp_path: Path) -> None:
    dense = tiny(case.injure, **case.arguments)
    result = prune(dense, tmp_path / "run", shapes=widths(case.kept, case.arguments.get("num_heads", HEADS)))
    require_sound(result, tmp_path / "run")
    assert change(dense, result.model) < 1e-4


def test_twin_heads_lose_less_than_others(tmp_path: Path) -> None:
    lost = {}
    for name, injuries in {"twins": [twin_heads], "others": []}.items():
        dense = tiny(*injuries)
        result = prune(dense, tmp_path / name, shapes=widths({"heads": 1}))
        require_sound(result, tmp_path / name)
        lost[name] = result.report["fidelity"]["kl"]
    assert lost["twins"] < 0.2 * lost["others"]


@pytest.mark.parametrize("images", [1, 2, 8])
@pytest.mark.parametrize("arguments", [{}, ONE_TOKEN, {"num_heads": 1}], ids=["plain", "one token", "one head"])
def test_few_images_that_are_all_the_same(images: int, arguments: dict[str, Any], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8)).astype(np.uint8)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(images):
            Image.fromarray(pixels).save(tmp_path / split / "a" / f"{i}.png")
    result = prune(tiny(**arguments), tmp_path / "run", source=str(tmp_path), budget="params=-30%")
    require_sound(result, tmp_path / "run")
    assert result.report["fidelity"]["kl"] < 0.1  # one image is soon learnt by heart


# Everything at random

MODELS = {
    "plain": {},
    "LayerScale": LAYER_SCALE,
    "one head": {"num_heads": 1},
    "heads of width 1": {"num_heads": DIM},
    "no biases": NO_BIAS,
    "one token": ONE_TOKEN,
    "qk-norm": {"qk_norm": True},
}
PARTS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2", "ls1", "ls2"]
FACTORS = [0.0, 1e-42, 1e-30, 1e-12, 1e6]
rows = st.tuples(st.sampled_from([0, 4, DIM]), st.sampled_from([1, WIDTH, DIM, 2 * DIM, 3 * DIM]))
injuries = st.lists(
    st.tuples(st.sampled_from(PARTS), st.sampled_from(["weight", "bias"]), rows, st.sampled_from(FACTORS)),
    min_size=1,
    max_size=4,
)


def scaled(part: str, which: str, rows: tuple[int, int], factor: float) -> Injury:
    """Some rows (of readouts, columns) of a part of every block, times a factor; a part that is not there is left."""

    def injure(model: Any) -> None:
        for block in model.blocks:
            name = f"{part}.gamma" if part.startswith("ls") else f"{part}.{which}"
            parameter = dict(block.named_parameters()).get(name)
            if parameter is not None:
                view = parameter.T if part in ("attn.proj", "mlp.fc2") and parameter.ndim > 1 else parameter
                view[rows[0] : rows[0] + rows[1]] *= factor

    return injure


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arguments=st.sampled_from(list(MODELS.values())),
    done=injuries,
    seed=st.integers(0, 3),
    allocation=st.sampled_from(["measured", "uniform"]),
    metric=st.sampled_from(["data", "data", "euclidean"]),
    edge=st.sampled_from(["jsd", "kl", "similarity", "cosine", "cka"]),
    scope=st.sampled_from(["global", "layer"]),
    teleport=st.sampled_from(["uniform", "weight_norm", "contribution", "fisher", "fisher_residual", "taylor"]),
    fisher=st.sampled_from([0.0, 1.0]),
    images=st.sampled_from([1, 3, 48]),
)
def test_any_run_on_degenerate_units_ends_sound(
    arguments: dict[str, Any],
    done: list[tuple[str, str, tuple[int, int], float]],
    seed: int,
    allocation: str,
    metric: str,
    edge: str,
    scope: str,
    teleport: str,
    fisher: float,
    images: int,
    tmp_path: Path,
) -> None:
    recipe = {
        "allocation": allocation,
        "data": {**FEW, "calibration_images": images},
        "ranking": {"edge": edge, "scope": scope, "teleport": teleport},
        "admm": {"projection": {"metric": metric, "attention_fisher": fisher, "ffn_fisher": fisher}},
    }
    dense = tiny(*(scaled(*one) for one in done), seed=seed, **arguments)
    result = prune(dense, tmp_path / "run", budget="params=-30%", recipe=recipe)
    require_sound(result, tmp_path / "run")
    assert sum(sum(scores) for scores in result.report["ranking"]["scores"]) == pytest.approx(1)


def test_the_training_route_on_dead_units(tmp_path: Path) -> None:
    epoch = {"epochs": 1, "warmup": 0.0}
    recipe = {"route": "train", "admm_stage": epoch, "finetune": epoch, "retrain_dense": False, "training": TRAINING}
    dense = tiny(zero("attn.qkv.weight", rows=QK), zero("ls1.gamma"), zero("mlp.fc1.weight"), **LAYER_SCALE)
    result = prune(dense, tmp_path / "run", budget="params=-30%", recipe=recipe)
    require_sound(result, tmp_path / "run")


# Whose NaN it is


@pytest.mark.parametrize(("weight", "what"), [(3e30, "the model's output"), (3e19, r"'blocks\.1\.mlp\.fc2'")])
def test_a_given_model_whose_finite_weights_overflow_is_named_as_the_cause(
    weight: float, what: str, tmp_path: Path
) -> None:
    def huge(model: Any) -> None:
        model.blocks[1].mlp.fc1.weight.fill_(weight)

    with pytest.raises(NonFiniteError, match=rf"{what} holds .* in the model as given; check its weights for huge"):
        prune(tiny(huge), tmp_path / "run")


def test_a_cut_that_goes_wrong_is_not_blamed_on_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = "gohsp.core.reconstruction.rotate_queries_keys"
    monkeypatch.setattr(spoilt, lambda model, *_: model.blocks[1].attn.qkv.weight.fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"'blocks\.1\..* not in the model as given: gohsp's doing"):
        prune(tiny(), tmp_path / "run", shapes=widths({"qk": 2}))
