"""Rankings: invariances, agreement with their parts, and the figure on the real model."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gohsp
from gohsp import Config
from gohsp.core.gradients import differentiated
from gohsp.core.objective import Objective, classification, features
from gohsp.core.ranking import (
    HeadRanking,
    HeadStatistics,
    HeadStatisticsFitter,
    RankingSettings,
    rank,
    rank_by,
    rank_in_steps,
)
from gohsp.core.ranking.graph import stationary_distribution, transition_matrix
from gohsp.core.ranking.ranking import TELEPORTS, Teleport, head_values, weight_norms
from gohsp.core.ranking.statistics import EDGES, SCOPES, STATISTICS, Edge, Scope
from gohsp.errors import ConfigError
from gohsp.models import compact, describe, resize
from gohsp.structure import AttentionKept, Network, absent, keep_all

HEADS, WIDTH, DIM = 4, 8, 32
FIRST, SECOND = "blocks.0.attn", "blocks.1.attn"


def gather(
    model: nn.Module,
    network: Network,
    batches: Iterable[Tensor],
    settings: RankingSettings,
    *,
    precision: torch.dtype = torch.float32,
    objective: Objective | None = None,
    dense: Iterable[Tensor] | None = None,
) -> HeadStatistics:
    """What a ranking by these settings needs of the images."""
    of = {"scope": settings.scope, "edge": settings.edge, "wanted": settings.wanted, "precision": precision}
    fitter = HeadStatisticsFitter(model, network, **of)  # type: ignore[arg-type]
    draws = int(settings.needs_gradients)
    how = {"draws": draws, "confidence": settings.needs_gradients, "dense": dense, "precision": precision}
    for gradients in differentiated(model, network, objective or classification(), batches, **how):
        fitter.update(gradients)
    return fitter.statistics


def rank_heads(
    model: nn.Module,
    network: Network,
    batches: Iterable[Tensor],
    settings: RankingSettings,
    *,
    seed: int = 0,
    **options: Any,
) -> HeadRanking:
    return rank_by(gather(model, network, batches, settings, **options), model, network, settings, seed=seed)


def flat(scores: Mapping[str, tuple[float, ...]]) -> Tensor:
    return torch.tensor([s for of in scores.values() for s in of], dtype=torch.float64)


def statistics_of(edges: list[Tensor], heads: tuple[int, ...]) -> HeadStatistics:
    ones = torch.ones(sum(heads), dtype=torch.float64)
    return HeadStatistics(
        heads={f"blocks.{i}.attn": count for i, count in enumerate(heads)},
        images=1,
        edges=tuple(edges),
        contribution=ones,
        fisher=None,
        taylor=None,
        fisher_residual=None,
    )


def permute_heads(model: Any, block: int, order: list[int]) -> None:
    """Reorder a block's heads; the model's function stays the same."""
    attn = model.blocks[block].attn
    with torch.no_grad():
        for p in (attn.qkv.weight, attn.qkv.bias):
            by_head = p.view(3, HEADS, WIDTH, -1)
            by_head.copy_(by_head[:, order].clone())
        columns = attn.proj.weight.view(DIM, HEADS, WIDTH)
        columns.copy_(columns[:, order].clone())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("edge", "teleport"), [*itertools.product(EDGES, ["taylor"]), *itertools.product(["kl"], TELEPORTS)]
)
def test_renaming_heads_renames_their_scores_and_nothing_else(
    make_model: Callable[..., nn.Module], images: Tensor, scope: Scope, edge: Edge, teleport: Teleport
) -> None:
    settings = RankingSettings(edge=edge, scope=scope, teleport=teleport)
    model = make_model()
    before = rank_heads(model, describe(model), [images], settings)
    order = [2, 0, 3, 1]
    permute_heads(model, 1, order)
    after = rank_heads(model, describe(model), [images], settings)
    expected = {FIRST: before.scores[FIRST], SECOND: tuple(before.scores[SECOND][h] for h in order)}
    torch.testing.assert_close(flat(after.scores), flat(expected), rtol=1e-3, atol=1e-6)
    assert flat(before.scores).std() > 1e-4 or teleport == "uniform"
    assert [order[h] for h in after.order(SECOND)] == before.order(SECOND)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("teleport", TELEPORTS)
def test_scores_are_a_distribution_over_all_heads_and_chains_of_each_attention(
    model: nn.Module, network: Network, images: Tensor, scope: Scope, teleport: Teleport
) -> None:
    ranking = rank_heads(model, network, images.split(16), RankingSettings(scope=scope, teleport=teleport))
    scores = flat(ranking.scores)
    assert {name: len(of) for name, of in ranking.scores.items()} == {FIRST: HEADS, SECOND: HEADS}
    assert scores.sum() == pytest.approx(1)
    assert (scores >= 0).all()
    assert ranking.images == 32
    assert ranking.residual <= 1e-10
    assert list(ranking.transition) == [FIRST, SECOND]
    for rows in ranking.transition.values():
        torch.testing.assert_close(torch.tensor(rows).sum(dim=1), torch.ones(HEADS))


def test_a_global_chain_is_that_of_its_edges_and_teleport(model: nn.Module, network: Network, images: Tensor) -> None:
    settings = RankingSettings(edge="kl", scope="global", damping=0.6, teleport="contribution")
    statistics = gather(model, network, [images], settings)
    P = transition_matrix(statistics.edges[0])
    expected = stationary_distribution(P, damping=0.6, teleport=statistics.contribution)
    ranking = rank_heads(model, network, [images], settings)
    torch.testing.assert_close(flat(ranking.scores), expected.pi)
    assert ranking.iterations == expected.iterations > 0
    for name, heads in ((FIRST, slice(HEADS)), (SECOND, slice(HEADS, None))):
        inside = torch.tensor(ranking.transition[name], dtype=torch.float64)
        torch.testing.assert_close(inside, transition_matrix(statistics.edges[0][heads, heads]))


def test_layer_chains_share_the_teleport_between_blocks() -> None:
    edges = [torch.rand(3, 3), torch.rand(2, 2)]
    values = torch.tensor([1.0, 2, 3, 1, 3])
    ranking = rank(statistics_of(edges, (3, 2)), values, RankingSettings(scope="layer", damping=0.7))
    assert sum(ranking.scores[FIRST]) == pytest.approx(0.6)
    assert sum(ranking.scores[SECOND]) == pytest.approx(0.4)
    within = stationary_distribution(transition_matrix(edges[1]), damping=0.7, teleport=values[3:]).pi
    torch.testing.assert_close(flat(ranking.scores)[3:], 0.4 * within)


def test_without_damping_both_scopes_are_the_teleport_alone() -> None:
    values = torch.tensor([1.0, 2, 3, 4])
    for scope, edges in (("global", [torch.rand(4, 4)]), ("layer", [torch.rand(2, 2)] * 2)):
        ranking = rank(statistics_of(edges, (2, 2)), values, RankingSettings(scope=scope, damping=0.0))
        torch.testing.assert_close(flat(ranking.scores), values.double() / 10)


def test_negative_values_are_raised_and_keep_their_order() -> None:
    values = torch.tensor([-0.5, 0.5, 1.5, 0.0])
    ranking = rank(statistics_of([torch.rand(4, 4)], (4,)), values, RankingSettings(damping=0.0))
    torch.testing.assert_close(flat(ranking.scores), torch.tensor([0, 1, 2, 0.5], dtype=torch.float64) / 3.5)
    assert ranking.order(FIRST) == [2, 1, 3, 0]


def test_ties_isolated_heads_and_islands_are_noted() -> None:
    edges = torch.zeros(4, 4)
    edges[0, 1] = edges[1, 0] = 1
    notes = " ".join(rank(statistics_of([edges], (4,)), torch.zeros(4), RankingSettings()).notes)
    assert "tells no head from another" in notes
    assert "heads [2, 3] have no edges" in notes
    assert "reducible" in notes
    assert not rank(statistics_of([torch.rand(4, 4)], (4,)), torch.rand(4), RankingSettings()).notes


def test_a_chain_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stationary_distribution, "__kwdefaults__", {"max_iterations": 1, "teleport": None})
    ranking = rank(statistics_of([torch.rand(4, 4)], (4,)), torch.rand(4), RankingSettings(damping=0.9))
    assert any("no convergence in 1 iterations" in note for note in ranking.notes)
    assert ranking.residual > 1e-10


@pytest.mark.parametrize("scope", SCOPES)
def test_one_head_blocks_can_be_ranked(make_model: Callable[..., nn.Module], images: Tensor, scope: Scope) -> None:
    model = make_model(num_heads=1)
    ranking = rank_heads(model, describe(model), [images], RankingSettings(scope=scope))
    assert {name: len(of) for name, of in ranking.scores.items()} == {FIRST: 1, SECOND: 1}
    assert ranking.transition == {FIRST: ((1.0,),), SECOND: ((1.0,),)}


def test_random_is_reproducible_by_its_seed_alone(model: nn.Module, network: Network, images: Tensor) -> None:
    settings = RankingSettings(method="random")

    def scores(seed: int) -> Tensor:
        torch.rand(1)  # the global generator has no say
        return flat(rank_heads(model, network, [images], settings, seed=seed).scores)

    assert torch.equal(scores(3), scores(3))
    assert not torch.equal(scores(3), scores(4))
    assert scores(3).sum() == pytest.approx(1)


def test_a_chain_does_not_depend_on_the_seed(model: nn.Module, network: Network, images: Tensor) -> None:
    first, second = (rank_heads(model, network, [images], RankingSettings(), seed=seed) for seed in (0, 1))
    assert first.scores == second.scores


def test_weight_norms_count_every_parameter_of_a_head(model: Any, network: Network) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        attn = model.blocks[1].attn
        attn.qkv.weight.view(3, HEADS, WIDTH, DIM)[0, 2, 5, 7] = 2.0  # a query weight of head 2
        attn.qkv.bias.view(3, HEADS, WIDTH)[2, 2, 1] = 3.0  # a value bias of head 2
        attn.proj.weight.view(DIM, HEADS, WIDTH)[0, 3, 4] = 4.0  # an output column of head 3
    assert weight_norms(model, network).tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 13**0.5, 4])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "magic"),
        ("edge", "jds"),
        ("scope", "block"),
        ("teleport", "tailor"),
        ("damping", 1.5),
        ("damping", float("nan")),
    ],
)
def test_settings_refuse_what_is_not_allowed(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        RankingSettings(**{field: value})


def test_a_refused_name_comes_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"teleport 'tailor' is unknown; did you mean 'taylor'\?"):
        RankingSettings(teleport="tailor")  # type: ignore[arg-type]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("teleport", TELEPORTS)
def test_heads_that_are_one_score_alike(
    edge: Any, scope: Any, teleport: Any, model: nn.Module, network: Network, images: Tensor
) -> None:
    """Two heads with the same weights: no edge between them, and no reason to rank one above the other."""
    with torch.no_grad():
        for part in (0, 32, 64):
            for rows in (model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.bias):
                rows[part + 8 : part + 16] = rows[part : part + 8]
        model.blocks[0].attn.proj.weight[:, 8:16] = model.blocks[0].attn.proj.weight[:, :8]
        model.blocks[1].attn.qkv.weight[:] = 0  # these heads see and send nothing but their biases
    settings = RankingSettings(edge=edge, scope=scope, teleport=teleport)
    scores = rank_heads(model, network, [images], settings).scores
    assert sum(flat(scores).tolist()) == pytest.approx(1)
    assert (flat(scores) >= 0).all()
    assert scores[FIRST][0] == pytest.approx(scores[FIRST][1], rel=1e-3, abs=1e-6)


def leave_one_out(model: Any, batches: list[Tensor], labels: Tensor) -> Tensor:
    """Rise of the mean cross entropy when one head's columns of the output projection are zero ``[nodes]``."""

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(torch.cat([model(x) for x in batches]), labels))

    dense, rises = loss(), []
    for block in model.blocks:
        weight = block.attn.proj.weight
        for h in range(block.attn.num_heads):
            columns = weight.data[:, h * WIDTH : (h + 1) * WIDTH]
            kept = columns.clone()
            columns.zero_()
            rises.append(loss() - dense)
            columns.copy_(kept)
    return torch.tensor(rises, dtype=torch.float64)


def test_taylor_predicts_the_loss_where_heads_matter_little(model: Any, network: Network, images: Tensor) -> None:
    with torch.no_grad():
        for block in model.blocks:  # far from the edge of the expansion
            block.attn.proj.weight.mul_(1e-3)
        predicted = model(images).argmax(dim=-1)
    statistics = gather(model, network, [images], RankingSettings(teleport="taylor"))
    truth = leave_one_out(model, [images], predicted)
    values = head_values(model, network, statistics, "taylor")
    torch.testing.assert_close(values, truth, rtol=0.1, atol=2e-6)
    assert truth.abs().min() > 5e-5


@pytest.mark.assets
def test_default_ranking_reads_what_zeroing_a_head_of_deit_tiny_costs(assets: Path) -> None:
    """Against the true rises that the benchmark measured on 1,000 validation images; random is 0 +- 0.17."""
    from safetensors.torch import load_file
    from scipy.stats import spearmanr
    from timm import create_model

    from gohsp import data

    record = json.loads(
        (Path(__file__).parents[3] / "benchmarks" / "results" / "head_ranking_deit_tiny.json").read_text()
    )
    model = create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(assets / "models" / "deit_tiny_patch16_224.safetensors"))
    batches = data.calibration_images(
        data.DataSource(source=f"hfds/{assets / 'data' / 'imagenet-1k-mini'}"),
        "train",
        64,
        transform=data.eval_transform(data.Preprocessing.from_model(model)),
        batch_size=32,
    )
    ranking = rank_heads(model, describe(model), batches, RankingSettings())
    assert spearmanr(flat(ranking.scores), record["truth"]["evaluation"]["loss"]).statistic > 0.45


def test_a_lower_precision_ranks_nearly_alike(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    model = make_model()
    exact, mixed = (
        flat(rank_heads(model, describe(model), [images], RankingSettings(), precision=given).scores)
        for given in (torch.float32, torch.bfloat16)
    )
    assert not torch.equal(exact, mixed)
    torch.testing.assert_close(exact, mixed, atol=0.05 * float(exact.max()), rtol=0.1)


@pytest.mark.parametrize("teleport", TELEPORTS)
def test_models_without_classes_are_ranked_too(
    teleport: Teleport, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    model = make_model(mlp_ratio=2, num_classes=0)
    settings = RankingSettings(teleport=teleport)
    ranking = rank_heads(model, describe(model), images.split(16), settings, objective=features())
    assert sum(flat(ranking.scores).tolist()) == pytest.approx(1)
    assert flat(ranking.scores).std() > 1e-4
    assert not ranking.notes


def test_only_what_is_wanted_asks_for_gradients() -> None:
    assert {t: RankingSettings(teleport=t).needs_gradients for t in TELEPORTS} == {
        "uniform": False,
        "weight_norm": False,
        "contribution": False,
        "fisher": True,
        "fisher_residual": True,
        "taylor": True,
    }
    assert RankingSettings(method="random", teleport="taylor").wanted == ()
    assert RankingSettings(teleport="uniform").wanted == ()


@pytest.mark.parametrize(
    "settings", [RankingSettings(), RankingSettings(scope="layer"), RankingSettings(method="random")]
)
def test_without_attentions_there_is_nothing_to_rank(settings: RankingSettings, model: Any, images: Tensor) -> None:
    dense = describe(model)
    resize(model, {name: absent(of) if name in (FIRST, SECOND) else of for name, of in dense.widths.items()})
    ranking = rank_heads(model, describe(model), images.split(16), settings)
    assert (ranking.scores, ranking.transition, ranking.images) == ({}, {}, 32)
    assert "no heads" in " ".join(ranking.notes)


def test_a_sublayer_that_is_gone_has_no_scores(model: Any, images: Tensor) -> None:
    dense = describe(model)
    resize(model, {**dense.widths, FIRST: absent(dense.widths[FIRST])})
    for method in ("chain", "random"):
        ranking = rank_heads(model, describe(model), [images], RankingSettings(method=method))
        assert list(ranking.scores) == [SECOND] == list(ranking.transition)
        assert sum(ranking.scores[SECOND]) == pytest.approx(1)


# In steps

HEADS_OF = {FIRST: range(HEADS), SECOND: range(HEADS)}


def in_steps(
    model: nn.Module, network: Network, images: Tensor, settings: RankingSettings, dense: list[Tensor] | None = None
) -> HeadRanking:
    def gathered(silenced: nn.Module) -> HeadStatistics:
        return gather(silenced, network, [images], settings, dense=dense)

    return rank_in_steps(model, network, gathered, settings)


def without(model: nn.Module, network: Network, gone: set[tuple[str, int]], images: Tensor) -> nn.Module:
    """A copy with some heads really cut out."""
    kept = {name: keep_all(of) for name, of in network.widths.items()}
    for name in HEADS_OF:
        of: Any = kept[name]
        left = [h for h in of.heads if (name, h) not in gone]
        kept[name] = AttentionKept(
            heads=tuple(left), qk=tuple(of.qk[h] for h in left), vo=tuple(of.vo[h] for h in left)
        )
    return compact(copy.deepcopy(model), kept, images[:2]).model


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("teleport", ["taylor", "weight_norm"])
def test_every_step_ranks_what_a_model_without_the_heads_that_went_holds(
    model: nn.Module, network: Network, images: Tensor, scope: Scope, teleport: Any
) -> None:
    settings = RankingSettings(steps=4, damping=0.5, scope=scope, teleport=teleport)
    ranking = in_steps(model, network, images, settings)
    gone: set[tuple[str, int]] = set()
    for step in range(1, 4):  # two heads a step
        small = without(model, network, gone, images)
        again = rank_heads(small, describe(small), [images], settings)
        scores = {
            (name, head): score
            for name, of in again.scores.items()
            for head, score in zip([h for h in HEADS_OF[name] if (name, h) not in gone], of, strict=True)
        }
        weakest = set(sorted(scores, key=scores.__getitem__)[:2])
        assert weakest == {
            (name, head) for name, of in ranking.left_at.items() for head, at in enumerate(of) if at == step
        }
        gone |= weakest


def test_heads_that_go_later_score_higher_and_scores_stay_a_distribution(
    model: nn.Module, network: Network, images: Tensor
) -> None:
    ranking = in_steps(model, network, images, RankingSettings(steps=4))
    scores, left_at = flat(ranking.scores), flat(ranking.left_at)
    assert sorted(left_at.tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert scores.sum() == pytest.approx(1)
    for step in (1, 2, 3):
        assert scores[left_at == step].max() <= scores[left_at == step + 1].min()


def test_one_step_is_the_ranking_made_once(model: nn.Module, network: Network, images: Tensor) -> None:
    settings = RankingSettings()
    assert in_steps(model, network, images, settings) == rank_heads(model, network, [images], settings)


def test_of_two_heads_that_stand_in_for_each_other_one_stays(
    make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    """Each of them alone can go at little cost, both together cannot: only a second look tells."""
    model: Any = make_model(mlp_ratio=2)
    attn = model.blocks[0].attn
    with torch.no_grad():
        for rows in (attn.qkv.weight, attn.qkv.bias):
            by_head = rows.view(3, HEADS, WIDTH, -1)
            by_head[:, 1] = by_head[:, 0]
        columns = attn.proj.weight.view(-1, HEADS, WIDTH)
        columns[:, 0] *= 0.6  # each does half of what would be more than any other head does
        columns[:, 1] = columns[:, 0]
    once, steps = (in_steps(model, describe(model), images, RankingSettings(steps=n)) for n in (1, 2 * HEADS))

    def place(ranking: HeadRanking) -> list[int]:
        order = flat(ranking.scores).argsort().tolist()
        return sorted((order.index(0), order.index(1)))

    assert place(once)[1] < place(steps)[1]


def test_later_rankings_ask_for_what_the_dense_model_predicts(
    model: nn.Module, network: Network, images: Tensor
) -> None:
    settings = RankingSettings(steps=2 * HEADS, damping=0.0)
    ranking = gohsp.rank(model, [images], config=Config(ranking=settings, precision="no"))
    images = images[: ranking.images]
    with torch.no_grad():
        expected = in_steps(model, network, images, settings, dense=[model(images)])
    assert ranking.left_at == expected.left_at
    assert ranking.left_at != in_steps(model, network, images, settings).left_at


@pytest.mark.parametrize("steps", [2 * HEADS, 2 * HEADS + 1, 100])
def test_there_are_no_more_steps_than_heads(steps: int, model: nn.Module, network: Network, images: Tensor) -> None:
    left_at = flat(in_steps(model, network, images, RankingSettings(steps=steps)).left_at)
    assert sorted(left_at.tolist()) == list(range(1, 2 * HEADS + 1))


def test_random_scores_know_nothing_of_other_heads(model: nn.Module, network: Network, images: Tensor) -> None:
    settings = RankingSettings(method="random", steps=4)
    assert in_steps(model, network, images, settings) == rank_heads(model, network, [images], settings)


def test_the_model_is_left_as_it_is(model: nn.Module, network: Network, images: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    in_steps(model, network, images, RankingSettings(steps=3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_statistics_among_some_heads_leave_out_what_has_none(
    model: nn.Module, network: Network, images: Tensor
) -> None:
    for scope in SCOPES:
        whole = gather(model, network, [images], RankingSettings(scope=scope, teleport="contribution"))
        kept = torch.tensor([False] * HEADS + [True, False, True, True])
        few = whole.among(kept)
        assert few.heads == {SECOND: 3}
        assert len(few.edges) == 1
        of_second = whole.edges[-1][-HEADS:, -HEADS:]
        assert torch.equal(few.edges[0], of_second[[0, 2, 3]][:, [0, 2, 3]])
        assert few.contribution is not None
        assert whole.contribution is not None
        assert torch.equal(few.contribution, whole.contribution[kept])
        assert all(getattr(few, name) is None for name in STATISTICS if name != "contribution")
