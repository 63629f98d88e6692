"""Head rankings: how much each attention head matters, and the chain that says so (``docs/ranking.md``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from gohsp.core.capture import units
from gohsp.core.ranking.graph import (
    StationaryDistribution,
    isolated_nodes,
    normalise,
    stationary_distribution,
    transition_matrix,
)
from gohsp.core.ranking.statistics import GRADIENT_STATISTICS, STATISTICS, Edge, HeadStatistics, Scope, Statistic
from gohsp.settings import SHARE, require_settings, whole
from gohsp.structure import Network

Teleport = Literal["uniform", "weight_norm", "contribution", "fisher", "fisher_residual", "taylor"]
TELEPORTS: tuple[Teleport, ...] = ("uniform", "weight_norm", "contribution", "fisher", "fisher_residual", "taylor")
Method = Literal["chain", "random"]
METHODS: tuple[Method, ...] = ("chain", "random")
TOLERANCE = 1e-10
"""Bound on the L1 residual of the stationary distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingSettings:
    """How heads are ranked. The defaults are those that measured best; see ``docs/ranking.md``.

    Attributes:
        method: ``chain``, the stationary distribution of a damped Markov chain on the graph of heads, or
            ``random``, the control that any other ranking must beat.
        edge: Edge weight of the graph.
        scope: Heads that share a graph.
        damping: Share of the chain: 1 walks the graph alone, 0 ranks by the teleport alone.
        teleport: Where the walk lands when it leaves the graph: on each head alike, or in proportion to its
            weight norm, its contribution, or a gradient statistic.
        steps: Rankings, one after the other: behind each an equal share of the heads, the weakest, is silenced, and the
            next one is of those that are left. A head that goes later ranks higher.
    """

    method: Method = "chain"
    edge: Edge = "jsd"
    scope: Scope = "global"
    damping: float = 0.3
    teleport: Teleport = "taylor"
    steps: int = 1

    def __post_init__(self) -> None:
        require_settings(self, "ranking", damping=SHARE, steps=whole(1))

    @property
    def wanted(self) -> tuple[Statistic, ...]:
        """What has to be gathered of the heads beside the edges."""
        return tuple(name for name in STATISTICS if self.method == "chain" and self.teleport == name)

    @property
    def rankings(self) -> int:
        """How often heads are ranked: random scores know nothing of other heads, so once is enough."""
        return self.steps if self.method == "chain" else 1

    @property
    def needs_gradients(self) -> bool:
        """Whether heads are weighed by gradients of the objective."""
        return any(name in GRADIENT_STATISTICS for name in self.wanted)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRanking:
    """The heads' scores and where they come from.

    Attributes:
        scores: Score of every head, by attention: at least 0, comparable across attentions, summing to 1 over the
            model.
        transition: For each attention, the chain among its own heads: rows ``[heads, heads]`` that sum to 1.
        iterations: Power iterations of the slowest graph; 0 without a chain.
        residual: Largest L1 residual of a graph's stationary distribution.
        settings: What was asked for.
        images: Images seen.
        notes: What a reader should know: chains that did not converge or are reducible, isolated heads, ties.
        left_at: For each head of an attention, the last step that it was ranked in, counted from 1.
    """

    scores: Mapping[str, tuple[float, ...]]
    transition: Mapping[str, tuple[tuple[float, ...], ...]]
    iterations: int
    residual: float
    settings: RankingSettings
    images: int
    notes: tuple[str, ...]
    left_at: Mapping[str, tuple[int, ...]]

    def order(self, attention: str) -> list[int]:
        """Heads of an attention, the one to keep longest first; ties by index."""
        scores = self.scores[attention]
        return sorted(range(len(scores)), key=lambda h: -scores[h])


def rank_by(
    statistics: HeadStatistics, model: nn.Module, network: Network, settings: RankingSettings, *, seed: int = 0
) -> HeadRanking:
    """Rank all heads of a model from statistics of calibration images.

    Args:
        statistics: What was gathered with the settings' edge and scope, and with what they want.
        model: The model, of which weights may be read.
        network: Its description.
        settings: How to rank.
        seed: Of the ``random`` method.

    Raises:
        NonFiniteError: NaN or infinity in weights or statistics.
    """
    if not statistics.heads:
        return HeadRanking(
            scores={},
            transition={},
            iterations=0,
            residual=0.0,
            settings=settings,
            images=statistics.images,
            notes=("no heads are left to rank",),
            left_at={},
        )
    if settings.method == "chain":
        return rank(statistics, head_values(model, network, statistics, settings.teleport), settings)
    generator = torch.Generator().manual_seed(seed)
    return _ranking(
        statistics,
        normalise(torch.rand(sum(statistics.heads.values()), generator=generator)),
        [transition_matrix(edges) for edges in statistics.edges],
        settings=settings,
        iterations=0,
        residual=0.0,
        notes=[f"random scores, seed {seed}: the transition matrix had no say in them"],
    )


def rank(statistics: HeadStatistics, values: Tensor, settings: RankingSettings) -> HeadRanking:
    """Rank heads by their chain, from statistics that were gathered with the same edge and scope.

    In scope ``layer`` each attention has its own chain, whose distribution is scaled by its share of the teleport: with
    damping 0 both scopes give the same scores.

    Args:
        statistics: What calibration images told.
        values: What the walk's landings are proportional to ``[nodes]``. Where some are negative, all are raised
            until the least is 0, which keeps their order.
        settings: How to rank.
    """
    jump, notes = _landings(values, settings.teleport)
    graphs = jump.split([len(edges) for edges in statistics.edges])
    transitions = [transition_matrix(edges) for edges in statistics.edges]
    solved = [
        stationary_distribution(P, damping=settings.damping, teleport=part if part.any() else None, tolerance=TOLERANCE)
        for P, part in zip(transitions, graphs, strict=True)
    ]
    places = [_place(names, whole=len(names) == len(statistics.heads)) for names in _graphs(statistics)]
    for where, edges, chain in zip(places, statistics.edges, solved, strict=True):
        notes += _chain_notes(where, edges, chain, settings)
    return _ranking(
        statistics,
        torch.cat([chain.pi * part.sum() for chain, part in zip(solved, graphs, strict=True)]),
        transitions,
        settings=settings,
        iterations=max(chain.iterations for chain in solved),
        residual=max(chain.residual for chain in solved),
        notes=notes,
    )


def head_values(model: nn.Module, network: Network, statistics: HeadStatistics, teleport: Teleport) -> Tensor:
    """What a teleport measures of every head ``[nodes]``, float64; a statistic of images must have been gathered."""
    if teleport == "uniform":
        return torch.ones(sum(statistics.heads.values()), dtype=torch.float64)
    if teleport == "weight_norm":
        return weight_norms(model, network)
    return getattr(statistics, teleport)


def weight_norms(model: nn.Module, network: Network) -> Tensor:
    """Euclidean norm of all parameters that go with a head ``[nodes]``, float64: the data-free baseline."""
    norms = []
    for sub in network.attentions:
        heads = sub.widths.heads
        squares = torch.zeros(heads, dtype=torch.float64)
        for kind, width in (("qk", sub.widths.qk), ("vo", sub.widths.vo)):
            for entry in sub.slices(kind):
                held = units(model, entry, heads * width).movedim(entry.axis, 0)
                squares += held.reshape(heads, -1).double().square().sum(dim=1).cpu()
        norms.append(squares.sqrt())
    return torch.cat(norms)


def _landings(values: Tensor, teleport: Teleport) -> tuple[Tensor, list[str]]:
    """Where the walk lands when it leaves the graph ``[nodes]``, summing to 1, and notes on how that came about."""
    raised = values - values.min().clamp(max=0)
    if raised.any():
        return normalise(raised), []
    return normalise(torch.ones_like(raised)), [f"teleport '{teleport}' tells no head from another; it is uniform here"]


def _chain_notes(where: str, edges: Tensor, chain: StationaryDistribution, settings: RankingSettings) -> list[str]:
    notes = []
    isolated = isolated_nodes(edges)
    if isolated:
        notes.append(f"{where}: heads {isolated} have no edges; from there the walk moves to every head alike")
    if not chain.irreducible:
        remedy = "damping makes the scores unique" if settings.damping < 1 else "set damping below 1"
        notes.append(f"{where} is reducible: not every head can be reached from every other; {remedy}")
    if not chain.converged:
        notes.append(
            f"{where}: no convergence in {chain.iterations} iterations (residual {chain.residual:.2g}, "
            f"tolerance {TOLERANCE:.2g})"
        )
    return notes


def _graphs(statistics: HeadStatistics) -> list[list[str]]:
    """The attentions of each graph."""
    names, graphs = list(statistics.heads), []
    for edges in statistics.edges:
        graph, nodes = [], 0
        while nodes < len(edges):
            graph.append(names.pop(0))
            nodes += statistics.heads[graph[-1]]
        graphs.append(graph)
    return graphs


def _place(names: Sequence[str], *, whole: bool) -> str:
    """How a note calls the graph of some attentions."""
    if len(names) == 1:
        return f"the graph of '{names[0]}'"
    return "the graph of all heads" if whole else f"the graph of '{names[0]}' to '{names[-1]}'"


def _diagonal(matrix: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The blocks on the diagonal."""
    ends = list(accumulate(sizes))
    return [matrix[end - size : end, end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _ranking(
    statistics: HeadStatistics,
    scores: Tensor,
    transitions: Sequence[Tensor],
    *,
    settings: RankingSettings,
    iterations: int,
    residual: float,
    notes: Sequence[str],
) -> HeadRanking:
    heads = statistics.heads
    if settings.scope == "global":
        transitions = [
            transition_matrix(part)
            for names, matrix in zip(_graphs(statistics), transitions, strict=True)
            for part in _diagonal(matrix, [heads[name] for name in names])
        ]
    return HeadRanking(
        scores={name: tuple(of.tolist()) for name, of in zip(heads, scores.split(list(heads.values())), strict=True)},
        transition={name: tuple(map(tuple, of.tolist())) for name, of in zip(heads, transitions, strict=True)},
        iterations=iterations,
        residual=residual,
        settings=settings,
        images=statistics.images,
        notes=tuple(notes),
        left_at={name: (1,) * count for name, count in heads.items()},
    )
