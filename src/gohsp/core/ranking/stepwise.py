"""Ranking in steps: the weakest heads are silenced, and those that are left are ranked anew (``docs/ranking.md``).

A ranking made once speaks of one head removed alone. What a head is worth depends on which others are still there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from gohsp.core.capture import units
from gohsp.core.ranking.graph import normalise
from gohsp.core.ranking.ranking import HeadRanking, RankingSettings, head_values, rank, rank_by
from gohsp.core.ranking.statistics import HeadStatistics
from gohsp.structure import Network


def rank_in_steps(
    model: nn.Module,
    network: Network,
    gather: Callable[[nn.Module], HeadStatistics],
    settings: RankingSettings,
    *,
    seed: int = 0,
) -> HeadRanking:
    """Rank all heads of a model, as often as the settings say.

    Heads are in the order in which they go. Their scores are those of the chains that they went by, given out anew in
    that order, so that no head scores higher than one that outlives it. Chains, notes and residuals are the first
    ranking's, of all heads.

    Args:
        model: The model; left as it is.
        network: Its description.
        gather: Runs images through a model that differs from ``model`` by its weights alone, and gathers what the
            settings want.
        settings: How to rank.
        seed: Of the ``random`` method.

    Raises:
        NonFiniteError: NaN or infinity in weights or statistics.
    """
    statistics = gather(model)
    first = rank_by(statistics, model, network, settings, seed=seed)
    total, steps = sum(statistics.heads.values()), count_rankings(network, settings)
    if steps == 1:
        return first
    work = copy.deepcopy(model)
    scores, left_at = _flat(first), torch.ones(total, dtype=torch.int64)
    order: list[int] = []
    for step in range(2, steps + 1):
        going = round(total * (step - 1) / steps) - len(order)
        left = [head for head in range(total) if head not in order]
        order += sorted(left, key=lambda head: float(scores[head]))[:going]
        kept = torch.ones(total, dtype=torch.bool)
        kept[order] = False
        silence(work, network, ~kept)
        statistics = gather(work)
        values = head_values(work, network, statistics, settings.teleport)[kept]
        # In proportion to how many there are: the mean score of all steps is the same.
        scores[kept] = _flat(rank(statistics.among(kept), values, settings)) * kept.sum() / total
        left_at[kept] = step
    order += sorted(set(range(total)) - set(order), key=lambda head: float(scores[head]))
    scores[order] = normalise(scores.sort().values)
    return replace(first, scores=_by_attention(scores, first), left_at=_by_attention(left_at, first))


def count_rankings(network: Network, settings: RankingSettings) -> int:
    """How often :func:`rank_in_steps` ranks: at least one head goes in every step."""
    return max(1, min(settings.rankings, sum(sub.widths.heads for sub in network.attentions)))


def silence(model: nn.Module, network: Network, heads: Tensor) -> None:
    """Set what readouts take of some heads to 0, in place.

    Args:
        model: The model.
        network: Its description.
        heads: Which ``[nodes]``, boolean.
    """
    counts = [sub.widths.heads for sub in network.attentions]
    for sub, gone in zip(network.attentions, heads.split(counts), strict=True):
        columns = units(model, sub.readout.columns, sub.widths.heads * sub.widths.vo)
        columns[:, gone.repeat_interleave(sub.widths.vo).to(columns.device)] = 0


def _flat(ranking: HeadRanking) -> Tensor:
    return torch.tensor([score for of in ranking.scores.values() for score in of], dtype=torch.float64)


def _by_attention(values: Tensor, ranking: HeadRanking) -> dict[str, tuple]:
    parts = values.split([len(of) for of in ranking.scores.values()])
    return {name: tuple(of.tolist()) for name, of in zip(ranking.scores, parts, strict=True)}
