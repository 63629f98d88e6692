"""Units that do nothing, from ranking to compaction: a tiny model with such units becomes one that is finite and right.

Right means: where the cut takes dead units alone, the pruned model computes what the dense one does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core import admm, surgery
from gohsp.core.allocation import WidthSettings, allocate
from gohsp.core.capture import open_trunk
from gohsp.core.curves import measure_curves
from gohsp.core.fisher import TokenWeightFitter, blended
from gohsp.core.gradients import differentiated
from gohsp.core.moments import collect_moments
from gohsp.core.objective import classification, mean_distance
from gohsp.core.objective import outputs as outputs_of
from gohsp.core.projection import Metric, RepairSettings, constrained, select_all
from gohsp.core.ranking import HeadStatisticsFitter, RankingSettings, rank_by
from gohsp.core.reconstruction import reconstruct
from gohsp.core.rotation import rotate
from gohsp.errors import NonFiniteError
from gohsp.models import Compaction, check_finite, compact, describe
from gohsp.structure import (
    AttentionWidths,
    FfnWidths,
    SublayerWidths,
    bound_for,
    is_absent,
    kept_widths,
    parse_budget,
)

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
ONE_TOKEN = {"patch_size": 8, "class_token": False, "global_pool": "avg"}
OBJECTIVE = classification()
REPAIR = RepairSettings(guidance=0.0)  # which heads go is up to what they do, not up to the graph
ANY_WIDTH = WidthSettings(multiple=1, min_width=1, depth=True)

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


def photographs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


FRESH = photographs(32, seed=2)
"""Images that nothing is calibrated on."""


def prune(
    model: nn.Module,
    *,
    widths: Mapping[str, SublayerWidths] | None = None,
    images: Tensor | None = None,
    budget: str = "params=-30%",
    uniform: bool = False,
    metric: Metric = "data",
    ranking: RankingSettings | None = None,
    fisher: float = 0.5,
) -> Compaction:
    """Rank, rotate, measure, allocate, select, repair and compact, as a one-shot run does."""
    network, ranking = describe(model), ranking or RankingSettings()
    batches = list((photographs(48) if images is None else images).split(16))
    heads = HeadStatisticsFitter(model, network, scope=ranking.scope, edge=ranking.edge, wanted=ranking.wanted)
    tokens = TokenWeightFitter()
    for gradients in differentiated(model, network, OBJECTIVE, batches, confidence=True):
        heads.update(gradients)
        tokens.update(gradients)
    scores = rank_by(heads.statistics, model, network, ranking).scores
    assert sum(map(sum, scores.values())) == pytest.approx(1)
    weights = blended(tokens.weights, dict.fromkeys(network.widths, fisher))
    work = copy.deepcopy(model)
    moments = collect_moments(work, network, batches, weights)
    if metric == "data":
        moments = rotate(work, network, moments)
    curves = measure_curves(work, network, OBJECTIVE, batches, moments, scores, ANY_WIDTH, REPAIR)
    if widths is None:
        bound = bound_for(network, parse_budget(budget))
        widths = allocate(network, curves, bound, ANY_WIDTH, uniform=uniform)
    if metric == "data":
        trunk = open_trunk(model, network, batches[0])
        with torch.no_grad():
            entered = [trunk.enter(batch) for batch in batches]
        kept = reconstruct(trunk, work, network, widths, entered, scores, REPAIR, weights=weights)
    else:
        values = {sub.name: constrained(work, sub, metric) for sub in network.present}
        kept = select_all(work, network, values, moments, widths, REPAIR, metric=metric, scores=scores)
        surgery.mask(work, network, kept)
    assert kept_widths(kept) == widths
    return compact(work, kept, batches[0])


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(FRESH)


def divergence(dense: nn.Module, pruned: nn.Module, images: Tensor = FRESH) -> float:
    return mean_distance(OBJECTIVE, *(outputs_of(model, OBJECTIVE, [images]) for model in (dense, pruned)))


def require_sound(dense: nn.Module, result: Compaction) -> None:
    """Finite weights and outputs, and the widths and the equality that were asked for."""
    check_finite(result.model)
    assert torch.isfinite(outputs(result.model)).all()
    assert result.max_relative_difference <= 1e-5
    assert divergence(dense, result.model) >= 0


def widths(kept: dict[str, int], heads: int = HEADS) -> dict[str, SublayerWidths]:
    """Present widths of both blocks, but for those in ``kept``; a sub-layer of width 0 is absent."""
    found = {"heads": heads, "qk": DIM // heads, "vo": DIM // heads, "units": FFN, **kept}
    ffn, attention = FfnWidths(units=found.pop("units")), AttentionWidths(**found)
    if is_absent(attention):
        attention = AttentionWidths(heads=0, qk=0, vo=0)
    return {f"blocks.{i}.{part}": of for i in range(2) for part, of in (("attn", attention), ("mlp", ffn))}


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
    "all values, and no attention is left": Case(
        zero("attn.qkv.weight", "attn.qkv.bias", rows=V), {}, {"heads": 0, "qk": 0, "vo": 0}
    ),
    "all readouts, and no attention is left": Case(zero("attn.proj.weight"), {}, {"heads": 0, "qk": 0, "vo": 0}),
    "attention, by LayerScale, and none is left": Case(tiny_gains, LAYER_SCALE, {"heads": 0, "qk": 0, "vo": 0}),
    "half of many heads of width 1": Case(
        zero("attn.qkv.weight", "attn.qkv.bias", rows=HALF_V), {"num_heads": DIM}, {"heads": 8}
    ),
    # Hidden units
    "half the hidden units' inputs": Case(
        zero("mlp.fc1.weight", "mlp.fc1.bias", rows=slice(0, FFN // 2)), {}, {"units": FFN // 2}
    ),
    "half the hidden units' readouts": Case(
        zero("mlp.fc2.weight", columns=slice(0, FFN // 2)), {}, {"units": FFN // 2}
    ),
    "half the hidden units, never active": Case(never_active, {}, {"units": FFN // 2}),
    "hidden units that are constant": Case(zero("mlp.fc1.weight"), {}, {"units": 1}),
    "half the hidden units, constant": Case(zero("mlp.fc1.weight", rows=slice(0, FFN // 2)), {}, {"units": FFN // 2}),
    "all hidden units": Case(zero("mlp.fc1.weight", "mlp.fc1.bias"), {}, {"units": 1}),
    "the FFN, by LayerScale": Case(zero("ls2.gamma"), LAYER_SCALE, {"units": 1}),
    "all hidden units, and no FFN is left": Case(zero("mlp.fc1.weight", "mlp.fc1.bias"), {}, {"units": 0}),
    "hidden units that are constant, and no FFN is left": Case(zero("mlp.fc1.weight"), {}, {"units": 0}),
    "the FFN, by LayerScale, and none is left": Case(zero("ls2.gamma"), LAYER_SCALE, {"units": 0}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cut_of_dead_units_changes_nothing(case: Case) -> None:
    dense = tiny(case.injure, **case.arguments)
    result = prune(dense, widths=widths(case.kept, case.arguments.get("num_heads", HEADS)))
    require_sound(dense, result)
    assert change(dense, result.model) < 1e-4


def test_twin_heads_lose_less_than_others() -> None:
    lost = {}
    for name, injuries in {"twins": [twin_heads], "others": []}.items():
        dense = tiny(*injuries)
        result = prune(dense, widths=widths({"heads": 1}))
        require_sound(dense, result)
        lost[name] = divergence(dense, result.model)
    assert lost["twins"] < 0.2 * lost["others"]


@pytest.mark.parametrize("images", [1, 2, 8])
@pytest.mark.parametrize("arguments", [{}, ONE_TOKEN, {"num_heads": 1}], ids=["plain", "one token", "one head"])
def test_few_images_that_are_all_the_same(images: int, arguments: dict[str, Any]) -> None:
    dense, same = tiny(**arguments), photographs(1).repeat(images, 1, 1, 1)
    result = prune(dense, images=same)
    require_sound(dense, result)
    assert divergence(dense, result.model, same) < 0.1  # one image is soon learnt by heart


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


@settings(max_examples=12, deadline=None)
@given(
    arguments=st.sampled_from(list(MODELS.values())),
    done=injuries,
    seed=st.integers(0, 3),
    uniform=st.booleans(),
    metric=st.sampled_from(["data", "data", "activation", "norm"]),
    edge=st.sampled_from(["jsd", "kl", "similarity", "cosine", "cka"]),
    scope=st.sampled_from(["global", "layer"]),
    teleport=st.sampled_from(["uniform", "weight_norm", "contribution", "fisher", "fisher_residual", "taylor"]),
    fisher=st.sampled_from([0.0, 1.0]),
    images=st.sampled_from([1, 3, 48]),
)
def test_any_cut_of_degenerate_units_ends_sound(
    arguments: dict[str, Any],
    done: list[tuple[str, str, tuple[int, int], float]],
    seed: int,
    uniform: bool,
    metric: Metric,
    edge: Any,
    scope: Any,
    teleport: Any,
    fisher: float,
    images: int,
) -> None:
    ranking = RankingSettings(edge=edge, scope=scope, teleport=teleport)
    dense = tiny(*(scaled(*one) for one in done), seed=seed, **arguments)
    shown = photographs(images)
    require_sound(dense, prune(dense, images=shown, uniform=uniform, metric=metric, ranking=ranking, fisher=fisher))


def test_admm_on_dead_units() -> None:
    dense = tiny(zero("attn.qkv.weight", rows=QK), zero("ls1.gamma"), zero("mlp.fc1.weight"), **LAYER_SCALE)
    work, network = copy.deepcopy(dense), describe(dense)
    moments, optimizer = collect_moments(work, network, [photographs(48)]), torch.optim.AdamW(work.parameters(), 1e-3)
    target = widths({"heads": 2, "qk": 2, "units": 9})
    state = admm.start(work, network, target, moments, None, admm.AdmmSettings(interval=2, reselect=1))
    for step in range(12):
        work(photographs(16, seed=step)).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = admm.after_step(state, progress=(step + 1) / 12)
    kept = admm.finish(state)
    assert kept_widths(kept) == target
    require_sound(dense, compact(work, kept, FRESH))


# Whose NaN it is


@pytest.mark.parametrize(
    ("weight", "what"), [(3e30, "the model's output"), (3e19, r"the input of module 'blocks\.1\.mlp\.fc2'")]
)
def test_a_given_model_whose_finite_weights_overflow_is_named_as_the_cause(weight: float, what: str) -> None:
    def huge(model: Any) -> None:
        model.blocks[1].mlp.fc1.weight.fill_(weight)

    with pytest.raises(NonFiniteError, match=rf"{what} holds .* in the model as given; check its weights for huge"):
        prune(tiny(huge))


def test_a_cut_that_goes_wrong_is_not_blamed_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = "gohsp.core.reconstruction.rotate_queries_keys"
    monkeypatch.setattr(spoilt, lambda model, *_: model.blocks[1].attn.qkv.weight.fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"'blocks\.1\..* not in the model as given: gohsp's doing"):
        prune(tiny(), widths=widths({"qk": 2}))
