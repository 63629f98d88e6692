"""Head statistics against direct computation on explicit attention maps and contributions."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gohsp.core import gradients
from gohsp.core.gradients import differentiated
from gohsp.core.objective import Objective, classification, features
from gohsp.core.ranking import statistics as of_heads
from gohsp.core.ranking.statistics import (
    EDGES,
    GRADIENT_STATISTICS,
    SCOPES,
    STATISTICS,
    Edge,
    HeadStatistics,
    HeadStatisticsFitter,
    Scope,
    Statistic,
    attention_divergence,
    output_distance,
    residual_covariances,
)
from gohsp.errors import DataError, NonFiniteError, UnsupportedModelError
from gohsp.models import describe, resize
from gohsp.structure import Network, absent

HEADS, DEPTH, WIDTH = 4, 2, 8  # of the model fixture
MakeModel = Callable[..., nn.Module]


def collect(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    scope: Scope = "global",
    edge: Edge = "jsd",
    wanted: Collection[Statistic] = STATISTICS,
    precision: torch.dtype = torch.float32,
    objective: Objective | None = None,
    draws: int = 0,
    network: Network | None = None,
) -> HeadStatistics:
    """Statistics of a stream of batches, from the confidence of a classifier unless another objective is given."""
    network = network or describe(model)
    fitter = HeadStatisticsFitter(model, network, scope=scope, edge=edge, wanted=wanted, precision=precision)
    confidence = bool(set(wanted) & set(GRADIENT_STATISTICS))
    how = {"draws": draws, "confidence": confidence, "precision": precision}
    for found in differentiated(model, network, objective or classification(), batches, **how):
        fitter.update(found)
    return fitter.statistics


def contributions(model: Any, images: Tensor) -> Tensor:
    """``W_O^h (A_h v_h)`` of every head ``[nodes, rows, dim]``, by timm's own modules and one head at a time."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    found = []
    for block in model.blocks:
        attn = block.attn
        b, n, _ = x.shape
        q, k, v = attn.qkv(block.norm1(x)).reshape(b, n, 3, HEADS, WIDTH).permute(2, 3, 0, 1, 4)
        for h in range(HEADS):
            A = (q[h] @ k[h].transpose(1, 2) / math.sqrt(WIDTH)).softmax(dim=-1)
            W = torch.zeros_like(attn.proj.weight)
            W[:, h * WIDTH : (h + 1) * WIDTH] = attn.proj.weight[:, h * WIDTH : (h + 1) * WIDTH]
            padded = torch.zeros(b, n, HEADS * WIDTH)
            padded[:, :, h * WIDTH : (h + 1) * WIDTH] = A @ v[h]
            found.append(block.ls1(padded @ W.T).flatten(0, 1))
        x = block(x)
    return torch.stack(found).detach().double()


def random_maps(nodes: int = 3, images: int = 2, tokens: int = 5, sharpness: float = 2.0) -> Tensor:
    scores = torch.randn(images, nodes, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return (sharpness * scores).softmax(dim=-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0))


def row_sums(maps: Tensor, compare: Callable[[Tensor, Tensor], float]) -> Tensor:
    images, nodes, queries, _ = maps.shape
    sums = torch.zeros(nodes, nodes, dtype=torch.float64)
    for i in range(nodes):
        for j in range(nodes):
            sums[i, j] = sum(compare(maps[b, i, q], maps[b, j, q]) for b in range(images) for q in range(queries))
    return sums


def jsd(p: Tensor, q: Tensor) -> float:
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


@pytest.mark.parametrize("chunk", [1, 7, 1 << 14])
def test_divergences_are_those_of_explicit_probabilities(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_heads, "_CHUNK", chunk)
    maps = random_maps()
    direct = row_sums(maps, jsd)
    torch.testing.assert_close(attention_divergence(maps, "jsd"), direct, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention_divergence(maps, "kl"), row_sums(maps, kl), rtol=1e-4, atol=1e-5)
    rows = maps.shape[0] * maps.shape[2]
    similarity = (rows - direct / math.log(2)).fill_diagonal_(0)
    torch.testing.assert_close(attention_divergence(maps, "similarity"), similarity, rtol=1e-4, atol=1e-5)


def test_jsd_is_symmetric_and_bounded_and_kl_is_neither() -> None:
    maps = torch.zeros(1, 3, 2, 4)
    maps[0, 0, :, 0] = maps[0, 1, :, 1] = 1  # disjoint: the largest divergence there is
    maps[0, 2] = 0.25
    sums = attention_divergence(maps, "jsd")
    assert torch.equal(sums, sums.T)
    assert sums[0, 1] == pytest.approx(2 * math.log(2))
    assert sums.max() <= 2 * math.log(2) + 1e-6
    directed = attention_divergence(maps, "kl")
    assert directed[0, 2] == pytest.approx(2 * math.log(4))  # a point seen from the uniform distribution
    assert directed[2, 0] > 50  # and the other way round: infinite, but for float32's smallest number
    assert torch.isfinite(directed).all()


@pytest.mark.parametrize("edge", ["jsd", "kl"])
def test_equal_heads_do_not_diverge(edge: Edge) -> None:
    maps = random_maps(nodes=1).expand(-1, 2, -1, -1)
    assert attention_divergence(maps, edge).abs().max() < 1e-4


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_contribution_is_the_centred_norm_of_what_a_head_adds(
    make_model: MakeModel, images: Tensor, layer_scale: float | None
) -> None:
    model = make_model(init_values=layer_scale)
    c = contributions(model, images)
    expected = (c - c.mean(dim=1, keepdim=True)).square().sum(dim=2).mean(dim=1).sqrt()
    found = collect(model, [images], wanted=["contribution"]).contribution
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("edge", ["cosine", "cka"])
def test_output_edges_compare_explicit_contributions(
    model: nn.Module, images: Tensor, scope: Scope, edge: Edge
) -> None:
    c = contributions(model, images)
    c = c - c.mean(dim=1, keepdim=True)
    features = c.flatten(1) if edge == "cosine" else torch.stack([x @ x.T for x in c]).flatten(1)
    unit = features / features.norm(dim=1, keepdim=True)
    expected = (1 - (unit @ unit.T).abs()).fill_diagonal_(0)
    if scope == "global":
        (found,) = collect(model, [images], scope=scope, edge=edge, wanted=()).edges
    else:
        found = torch.block_diag(*collect(model, [images], scope=scope, edge=edge, wanted=()).edges)
        expected = torch.block_diag(*(expected[i : i + HEADS, i : i + HEADS] for i in (0, HEADS)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_cka_is_blind_to_rotations_and_cosine_is_not() -> None:
    data = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    both = torch.cat([data, data @ rotation], dim=1)
    weights = [torch.eye(3, dtype=torch.float64)] * 2
    covariance = both.T.cov(correction=0)
    assert output_distance(covariance, weights, "cka")[0, 1] == pytest.approx(0, abs=1e-9)
    assert output_distance(covariance, weights, "cosine")[0, 1] > 0.1


def test_a_silent_head_is_far_from_all_others() -> None:
    covariance = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    weights = [torch.ones(1, 1, dtype=torch.float64)] * 2
    assert output_distance(covariance, weights, "cosine").tolist() == [[0, 1], [1, 0]]


def test_residual_is_what_least_squares_on_the_other_heads_leaves() -> None:
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] += 0.8 * x[:, 4] - 0.5 * x[:, 3]
    x = x - x.mean(dim=0)
    found = residual_covariances(x.T.cov(correction=0), heads=3)
    for h in range(3):
        own, others = x[:, 2 * h : 2 * h + 2], torch.cat([x[:, : 2 * h], x[:, 2 * h + 2 :]], dim=1)
        left = own - others @ torch.linalg.lstsq(others, own).solution
        torch.testing.assert_close(found[h], left.T.cov(correction=0), rtol=1e-4, atol=1e-6)


def test_residual_of_a_copied_head_vanishes_and_stays_finite() -> None:
    x = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = torch.cat([x, x, torch.zeros_like(x)], dim=1).T.cov(correction=0)
    found = residual_covariances(covariance, heads=3)
    assert torch.isfinite(found).all()
    assert found.abs().max() < 1e-4


def gates_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the predicted class with every head scaled by a gate, and its derivative by the gates."""
    gates = torch.ones(len(images), DEPTH * HEADS, requires_grad=True)
    with torch.no_grad():
        predicted = model(images).argmax(dim=-1)

    def hook_for(index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            own = gates[:, index * HEADS : (index + 1) * HEADS].repeat_interleave(WIDTH, dim=1)
            return args[0] * own[:, None]

        return hook

    hooks = [
        model.get_submodule(sub.readout.module).register_forward_pre_hook(hook_for(i))
        for i, sub in enumerate(describe(model).attentions)
    ]
    chosen = model(images).log_softmax(dim=-1).gather(1, predicted[:, None])
    for hook in hooks:
        hook.remove()
    return chosen.detach(), torch.autograd.grad(chosen.sum(), gates)[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_fisher_and_taylor_expand_the_predicted_classes_log_probability(
    model: nn.Module, images: Tensor, frozen: bool
) -> None:
    model.requires_grad_(not frozen)
    _, slopes = gates_of(model, images)
    found = collect(model, images.split(5), edge="cosine", scope="layer")
    torch.testing.assert_close(found.fisher, slopes.double().square().mean(dim=0) / 2, rtol=1e-3, atol=1e-7)
    expected = slopes.double().mean(dim=0) + found.fisher
    torch.testing.assert_close(found.taylor, expected, rtol=1e-3, atol=1e-6)


def test_fisher_residual_weighs_what_is_left_by_the_squared_gradient(model: Any, images: Tensor) -> None:
    outputs: dict[str, Tensor] = {}
    proj = model.blocks[0].attn.proj
    hook = proj.register_forward_pre_hook(lambda _module, args: outputs.update(z=args[0]))
    confidence = model(images).log_softmax(dim=-1).amax(dim=-1).sum()
    hook.remove()
    z = outputs["z"]
    g = torch.autograd.grad(confidence, z)[0].flatten(0, 1).double()
    rows = z.detach().flatten(0, 1).double()
    rows = rows - rows.mean(dim=0)
    left = residual_covariances(rows.T @ rows / len(rows), HEADS)
    squared = (g.T @ g / len(images)).view(HEADS, WIDTH, HEADS, WIDTH)
    expected = torch.stack([(squared[h, :, h] * left[h]).sum() / 2 for h in range(HEADS)])
    found = collect(model, images.split(16), edge="cosine", scope="layer").fisher_residual
    assert found is not None
    torch.testing.assert_close(found[:HEADS], expected, rtol=1e-3, atol=0)


def test_heads_that_send_a_constant_vary_by_nothing(model: nn.Module, images: Tensor) -> None:
    qkv = model.get_submodule("blocks.1.attn.qkv")
    with torch.no_grad():
        qkv.weight.zero_()  # type: ignore[operator]
        qkv.bias.copy_(10 * torch.rand(len(qkv.bias), generator=torch.Generator().manual_seed(0)))  # type: ignore[arg-type, operator]
    found = collect(model, images.split(5), edge="cosine", scope="layer")
    assert found.contribution is not None
    assert found.fisher_residual is not None
    assert not found.contribution[HEADS:].any()
    assert found.fisher_residual[HEADS:].abs().max() < 1e-30
    assert (found.contribution[:HEADS] > 0).all()


def test_fisher_residual_vanishes_for_a_head_that_another_copies(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        for rows in (model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.bias):
            by_head = rows.view(3, HEADS, WIDTH, -1)
            by_head[:, 1] = by_head[:, 0]
    residual = collect(model, [images], edge="cosine", scope="layer").fisher_residual
    assert residual is not None
    assert residual[:2].max() < 1e-3 * residual[2:HEADS].min()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("edge", EDGES)
def test_streaming_equals_one_shot(model: nn.Module, images: Tensor, scope: Scope, edge: Edge) -> None:
    images = images[:21]  # more than the attention maps taken at a time
    whole = collect(model, [images], scope=scope, edge=edge)
    streamed = collect(model, iter(images.split([1, 13, 7])), scope=scope, edge=edge)
    assert whole.images == streamed.images == 21
    assert len(whole.edges) == (1 if scope == "global" else DEPTH)
    for a, b in zip(whole.edges, streamed.edges, strict=True):
        assert a.diagonal().abs().max() == 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for field in ("contribution", "fisher", "taylor", "fisher_residual"):
        torch.testing.assert_close(getattr(whole, field), getattr(streamed, field), rtol=1e-3, atol=1e-6)


def test_edges_are_means_over_images_and_queries(model: nn.Module, images: Tensor) -> None:
    (edges,) = collect(model, [images], scope="global", edge="jsd", wanted=()).edges
    assert 0 < edges.max() <= math.log(2)
    (twice,) = collect(model, [images, images], scope="global", edge="jsd", wanted=()).edges
    torch.testing.assert_close(edges, twice)


def test_layer_graphs_are_blocks_of_the_global_one(model: nn.Module, images: Tensor) -> None:
    (whole,) = collect(model, [images], scope="global", wanted=()).edges
    for i, part in enumerate(collect(model, [images], scope="layer", wanted=()).edges):
        nodes = slice(i * HEADS, (i + 1) * HEADS)
        torch.testing.assert_close(part, whole[nodes, nodes], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", SCOPES)
def test_attention_maps_of_few_images_live_at_a_time(
    model: nn.Module, images: Tensor, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    living: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(model: nn.Module, block: Any, x: Tensor, call: Any, tokens: Tensor) -> Tensor:
        nonlocal most
        maps = real(model, block, x, call, tokens)
        living.append(weakref.ref(maps))
        most = max(most, sum(held.shape[0] * held.shape[1] for ref in living if (held := ref()) is not None))
        return maps

    real = of_heads.attention_rows
    monkeypatch.setattr(of_heads, "attention_rows", watched)
    monkeypatch.setattr(gradients, "IMAGES", 8)
    collect(model, images.split(16), scope=scope, edge="jsd")
    assert len(living) == 4 * DEPTH  # two batches, in two parts each, all blocks
    assert 0 < most <= 8 / of_heads._EVERY * HEADS * DEPTH


def test_backward_passes_take_few_images_whatever_the_batches(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, whole, sizes = describe(model), collect(model, [images]), []
    model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(gradients, "IMAGES", 5)
    parts = collect(model, [images], network=network)
    assert sizes == [5] * 6 + [2]
    assert parts.images == whole.images
    torch.testing.assert_close(parts.taylor, whole.taylor)
    torch.testing.assert_close(parts.contribution, whole.contribution)
    for a, b in zip(parts.edges, whole.edges, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 3, 7, 32])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_fourth_image_is_compared_whatever_the_batches(
    model: nn.Module, images: Tensor, scope: Scope, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = collect(model, images.split(size), scope=scope, edge="jsd")
    assert few.images == len(images)
    monkeypatch.setattr(of_heads, "_EVERY", 1)
    fourths = collect(model, [images[::4]], scope=scope, edge="jsd")
    for a, b in zip(few.edges, fourths.edges, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_rows_are_made_in_the_precision_asked_for(
    model: nn.Module, images: Tensor, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watched(model: nn.Module, block: Any, x: Tensor, call: Any, tokens: Tensor) -> Tensor:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        rows = real(model, block, x, call, tokens)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), rtol=0, atol=1e-5)  # no bf16 in between
        return rows

    real = of_heads.attention_rows
    monkeypatch.setattr(of_heads, "attention_rows", watched)
    collect(model, [images], edge="jsd", precision=precision)
    assert set(seen) == {precision}


@pytest.mark.parametrize("scope", SCOPES)
def test_few_queries_tell_what_all_of_them_tell(
    model: nn.Module, images: Tensor, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def watched(maps: Tensor, edge: Edge) -> Tensor:
        rows.append(maps.shape[2])
        return attention_divergence(maps, edge)

    monkeypatch.setattr(of_heads, "attention_divergence", watched)
    everything = collect(model, [images], scope=scope, edge="jsd").edges
    tokens = rows[0]
    assert tokens < of_heads._QUERIES
    monkeypatch.setattr(of_heads, "_QUERIES", tokens // 2)
    rows.clear()
    drawn = collect(model, [images], scope=scope, edge="jsd").edges
    assert set(rows) == {tokens // 2}
    for few, whole in zip(drawn, everything, strict=True):
        torch.testing.assert_close(few, whole, rtol=0.25, atol=1e-4)
        assert not torch.equal(few, whole)


def test_without_gradients_one_forward_pass_and_no_more(model: nn.Module, images: Tensor) -> None:
    network, graphs = describe(model), []
    model.register_forward_hook(lambda _module, _args, out: graphs.append(out.requires_grad))
    statistics = collect(model, images.split(16), wanted=(), network=network)
    assert graphs == [False] * 2
    assert all(getattr(statistics, name) is None for name in STATISTICS)
    collect(model, images.split(16), network=network)
    assert graphs[2:] == [True] * 2


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_does_not_depend_on_what_else_is_wanted(model: nn.Module, images: Tensor, name: Statistic) -> None:
    everything, alone = collect(model, [images]), collect(model, [images], wanted=[name])
    torch.testing.assert_close(getattr(alone, name), getattr(everything, name))
    assert [other for other in STATISTICS if getattr(alone, other) is not None] == [name]
    for a, b in zip(alone.edges, everything.edges, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_taken_under_no_grad_too(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        quiet = collect(model, [images])
    assert torch.equal(quiet.taylor, collect(model, [images]).taylor)


def test_the_model_is_left_as_it_was(model: nn.Module, images: Tensor) -> None:
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    collect(model, [images])
    assert model.training
    assert not images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("blocks.0.attn.qkv.weight", r"'blocks\.0\.attn(\.proj)?'"),
        ("blocks.0.attn.proj.weight", r"'blocks\.0\.mlp\.fc2'"),
        ("head.weight", "the model's output"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_named(
    model: nn.Module, images: Tensor, parameter: str, named: str, value: float
) -> None:
    model.get_parameter(parameter).data[0, 0] = value
    with pytest.raises(NonFiniteError, match=named):
        collect(model, [images])


def test_no_images_is_an_error(model: nn.Module) -> None:
    with pytest.raises(DataError, match="no images"):
        collect(model, [])


def test_what_has_no_confidence_is_weighed_by_its_draws(make_model: MakeModel, images: Tensor) -> None:
    """Half the mean square of what zeroing a head changes of a draw, image by image; no first order."""
    model = make_model(mlp_ratio=2, num_classes=0)
    network, objective = describe(model), features(scale=0.7)
    found = collect(model, images.split(8), objective=objective, draws=3, network=network)
    assert found.fisher is not None
    assert torch.equal(found.fisher, found.taylor)
    expected = torch.zeros(DEPTH * HEADS, dtype=torch.float64)
    for passed in differentiated(model, network, objective, images.split(8), draws=3):
        for drawn in passed.drawn:
            slopes = []
            for sub in network.attentions:
                weight = model.get_submodule(sub.readout.module).weight
                z = passed.read[sub.name].unflatten(2, (HEADS, WIDTH))
                g = (drawn[sub.name] @ weight).unflatten(2, (HEADS, WIDTH))
                slopes.append((z * g).sum((1, 3)))
            expected += torch.cat(slopes, dim=1).double().square().sum(0) / (2 * 3 * len(images))
    torch.testing.assert_close(found.fisher, expected, rtol=1e-4, atol=0)


def test_gradient_statistics_need_gradients(make_model: MakeModel, images: Tensor) -> None:
    model = make_model(num_classes=0)
    with pytest.raises(UnsupportedModelError, match="gradient statistics need gradients"):
        collect(model, [images], objective=features())
    assert collect(model, [images], objective=features(), wanted=["contribution"]).images == 32


@pytest.mark.parametrize("edge", EDGES)
def test_attentions_that_see_other_numbers_of_tokens_have_a_graph_of_their_own(
    model: nn.Module, images: Tensor, edge: Edge
) -> None:
    """As where a network merges tokens on its way."""
    network = describe(model)
    first, second = network.attentions
    (passed,) = differentiated(model, network, classification(), [images], draws=0)
    fewer = replace(passed, inputs={**passed.inputs, second.name: passed.inputs[second.name][:, :3]})
    halved = replace(network, sublayers=(first, replace(second, tokens=3, keys=3)))
    for scope, alone in (("layer", network), ("global", halved)):
        fitter = HeadStatisticsFitter(model, alone, scope=scope, edge=edge, wanted=())  # type: ignore[arg-type]
        fitter.update(fewer if edge in ("jsd", "kl", "similarity") else passed)
        assert [len(edges) for edges in fitter.statistics.edges] == [HEADS, HEADS]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("edge", EDGES)
def test_a_sublayer_that_is_gone_has_no_heads(model: nn.Module, images: Tensor, scope: Scope, edge: Edge) -> None:
    network = describe(model)
    resize(model, {**network.widths, "blocks.0.attn": absent(network.widths["blocks.0.attn"])})
    found = collect(model, [images], scope=scope, edge=edge)
    assert found.heads == {"blocks.1.attn": HEADS}
    assert [len(edges) for edges in found.edges] == [HEADS]
    assert found.taylor is not None
    assert len(found.taylor) == HEADS
