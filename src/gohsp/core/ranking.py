"""Head rankings: how much each attention head matters, and the chain that says so (design, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gohsp.core.activations import units
from gohsp.core.attention_stats import (
    GRADIENT_STATISTICS,
    STATISTICS,
    Edge,
    HeadStatistics,
    Scope,
    collect_head_statistics,
)
from gohsp.core.graph import (
    StationaryDistribution,
    isolated_nodes,
    normalise,
    stationary_distribution,
    transition_matrix,
)
from gohsp.settings import SHARE, Range, require_settings
from gohsp.structure import ModelStructure

Teleport = Literal["uniform", "weight_norm", "contribution", "fisher", "fisher_residual", "taylor"]
TELEPORTS: tuple[Teleport, ...] = ("uniform", "weight_norm", "contribution", "fisher", "fisher_residual", "taylor")
Method = Literal["chain", "random"]
METHODS: tuple[Method, ...] = ("chain", "random")


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
            weight norm, its contribution, or a gradient statistic (these need class logits).
        tolerance: Bound on the L1 residual of the stationary distribution.
    """

    method: Method = "chain"
    edge: Edge = "jsd"
    scope: Scope = "global"
    damping: float = 0.3
    teleport: Teleport = "taylor"
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        require_settings(self, "ranking", damping=SHARE, tolerance=Range(0, 1, above=True, below=True))

    @property
    def needs_logits(self) -> bool:
        """Whether heads are weighed by gradients of class predictions."""
        return self.method == "chain" and self.teleport in GRADIENT_STATISTICS


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRanking:
    """The heads' scores and where they come from.

    Attributes:
        scores: Score of every head, block by block: at least 0, comparable across blocks, summing to 1 over the model.
        transition: Transition matrix ``[nodes, nodes]`` of each graph: one (scope ``global``) or one a block.
        iterations: Power iterations of the slowest graph; 0 without a chain.
        residual: Largest L1 residual of a graph's stationary distribution.
        settings: What was asked for.
        images: Images seen.
        notes: What a reader should know: chains that did not converge or are reducible, isolated heads, ties.
    """

    scores: tuple[tuple[float, ...], ...]
    transition: tuple[Tensor, ...]
    iterations: int
    residual: float
    settings: RankingSettings
    images: int
    notes: tuple[str, ...]

    def order(self, block: int) -> list[int]:
        """Heads of a block, the one to keep longest first; ties by index."""
        scores = self.scores[block]
        return sorted(range(len(scores)), key=lambda h: -scores[h])

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report; the transition of each block is that among its own heads, rows summing to 1."""
        settings = asdict(self.settings)
        return {
            **{key: settings[key] for key in ("method", "edge", "scope", "damping", "teleport")},
            "scores": [list(scores) for scores in self.scores],
            "transition": [matrix.tolist() for matrix in self._block_transitions()],
            "iterations": self.iterations,
            "residual": self.residual,
            "images": self.images,
            "notes": list(self.notes),
        }

    def _block_transitions(self) -> list[Tensor]:
        if self.settings.scope == "layer":
            return list(self.transition)
        ends = list(accumulate(len(scores) for scores in self.scores))
        nodes = [slice(end - len(scores), end) for end, scores in zip(ends, self.scores, strict=True)]
        return [transition_matrix(self.transition[0][s, s]) for s in nodes]


def rank_heads(
    model: nn.Module,
    structure: ModelStructure,
    batches: Iterable[Tensor],
    settings: RankingSettings,
    *,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
) -> HeadRanking:
    """Rank all heads of a model on calibration images, without labels, in one pass over them.

    Args:
        model: The model; left as it was.
        structure: Its structure.
        batches: Images ``[images, channels, height, width]``, preprocessed. One backward pass goes with the forward
            pass where the teleport is a gradient statistic. Attention rows are compared in every fourth image.
        settings: How to rank.
        seed: Of the ``random`` method.
        precision: Data type of the passes through the model; below float32 by autocast.

    Raises:
        DataError: No images.
        NonFiniteError: NaN or infinity in weights or activations.
        UnsupportedModelError: The settings ask more than the model can give; the message says what to set.
    """
    wanted = [name for name in STATISTICS if settings.method == "chain" and settings.teleport == name]
    statistics = collect_head_statistics(
        model,
        structure,
        batches,
        scope=settings.scope,
        edge=settings.edge,
        wanted=wanted,
        precision=precision,
    )
    if settings.method == "chain":
        return rank(statistics, head_values(model, structure, statistics, settings.teleport), settings)
    generator = torch.Generator().manual_seed(seed)
    scores = normalise(torch.rand(sum(statistics.heads), generator=generator))
    return _ranking(
        statistics,
        scores,
        [transition_matrix(edges) for edges in statistics.edges],
        settings=settings,
        iterations=0,
        residual=0.0,
        notes=[f"random scores, seed {seed}: the transition matrix had no say in them"],
    )


def rank(statistics: HeadStatistics, values: Tensor, settings: RankingSettings) -> HeadRanking:
    """Rank heads by their chain, from statistics that were gathered with the same edge and scope.

    In scope ``layer`` each block has its own chain, whose distribution is scaled by the block's share of the
    teleport: with damping 0 both scopes give the same scores.

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
        stationary_distribution(
            P, damping=settings.damping, teleport=part if part.any() else None, tolerance=settings.tolerance
        )
        for P, part in zip(transitions, graphs, strict=True)
    ]
    for block, (edges, chain) in enumerate(zip(statistics.edges, solved, strict=True)):
        where = "the graph of all heads" if settings.scope == "global" else f"the graph of block {block}"
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


def head_values(model: nn.Module, structure: ModelStructure, statistics: HeadStatistics, teleport: Teleport) -> Tensor:
    """What a teleport measures of every head ``[nodes]``, float64; a statistic of images must have been gathered."""
    if teleport == "uniform":
        return torch.ones(sum(statistics.heads), dtype=torch.float64)
    if teleport == "weight_norm":
        return weight_norms(model, structure)
    return getattr(statistics, teleport)


def weight_norms(model: nn.Module, structure: ModelStructure) -> Tensor:
    """Euclidean norm of all parameters that go with a head ``[nodes]``, float64: the data-free baseline."""
    norms = []
    for block in structure.blocks:
        heads = block.shape.heads
        squares = torch.zeros(heads, dtype=torch.float64)
        for kind, width in (("qk", block.shape.qk), ("vo", block.shape.vo)):
            for entry in block.slices(kind):
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
            f"tolerance {settings.tolerance:.2g})"
        )
    return notes


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
    return HeadRanking(
        scores=tuple(tuple(block.tolist()) for block in scores.split(statistics.heads)),
        transition=tuple(transitions),
        iterations=iterations,
        residual=residual,
        settings=settings,
        images=statistics.images,
        notes=tuple(notes),
    )
