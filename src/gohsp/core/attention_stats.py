"""Streaming statistics of attention heads: edges between them, and how much each one matters (design, section 3).

Every sum has a fixed size whatever the number of images, and attention rows of a few images are compared at a time.

Shapes: ``nodes`` are heads, numbered block by block; ``rows`` are images times tokens; ``units`` are a
block's value dimensions, heads times ``vo``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gohsp.core.activations import (
    GRADIENT_IMAGES,
    attention_rows,
    evaluating,
    observe_inputs,
    readout_gain,
    require_finite,
)
from gohsp.errors import DataError, UnsupportedModelError
from gohsp.structure import BlockStructure, ModelStructure

Edge = Literal["jsd", "kl", "similarity", "cosine", "cka"]
EDGES: tuple[Edge, ...] = ("jsd", "kl", "similarity", "cosine", "cka")
Scope = Literal["layer", "global"]
SCOPES: tuple[Scope, ...] = ("layer", "global")
Statistic = Literal["contribution", "fisher", "taylor", "fisher_residual"]
STATISTICS: tuple[Statistic, ...] = ("contribution", "fisher", "taylor", "fisher_residual")

GRADIENT_STATISTICS = ("fisher", "taylor", "fisher_residual")

_OUTPUT_EDGES = ("cosine", "cka")  # read from the heads' outputs; the others from their attention rows

# Relative to the mean variance of a block's units: units that are dead or copies of each other make the
# covariance singular, and must not turn the residuals into noise.
_RIDGE = 1e-6
# Entries of one attention map that are compared at a time: few enough to stay in a core's cache.
_CHUNK = 1 << 14
# Rows that are compared: those of a few queries in every fourth image. All pairs of heads are, which is what
# costs most in a large model, and a mean needs few rows.
_QUERIES = 16
_EVERY = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadStatistics:
    """What calibration images tell about every head.

    Attributes:
        heads: Heads of each block.
        images: Images seen.
        edges: Edge weights ``[nodes, nodes]`` of each graph, 0 on the diagonal: one graph over all heads
            (scope ``global``) or one a block (scope ``layer``). Attention rows are compared in every fourth image.
        contribution: Root mean squared norm ``[nodes]`` of what a head adds to the residual stream, centred
            over images and tokens. None, as the following, where it was not asked for.
        fisher: Second-order estimate ``[nodes]``, in nats, of what zeroing a head costs: ``E[a^2] / 2``, with ``a`` the
            first-order change of the predicted class's log-probability.
        taylor: Both orders ``[nodes]``, in nats: ``E[a] + E[a^2] / 2``; negative where the model would grow surer
            of its predictions.
        fisher_residual: ``fisher`` ``[nodes]`` for that part of a head's output which no linear map of the block's
            other heads can give, tokens taken as independent.
    """

    heads: tuple[int, ...]
    images: int
    edges: tuple[Tensor, ...]
    contribution: Tensor | None
    fisher: Tensor | None
    taylor: Tensor | None
    fisher_residual: Tensor | None


def collect_head_statistics(
    model: nn.Module,
    structure: ModelStructure,
    batches: Iterable[Tensor],
    *,
    scope: Scope = "global",
    edge: Edge = "jsd",
    wanted: Collection[Statistic] = STATISTICS,
    precision: torch.dtype = torch.float32,
) -> HeadStatistics:
    """Run every batch through the model once and gather the statistics of its heads.

    Args:
        model: The model; left in the mode it was in.
        structure: Its structure.
        batches: Images ``[images, channels, height, width]``, preprocessed.
        scope: Heads that share a graph: those of a block, or all.
        edge: Edge weight; see :func:`attention_divergence` and :func:`output_distance`.
        wanted: What to gather beside the edges. All but ``contribution`` need a backward pass.
        precision: Data type of both passes and of the logits of attention; below float32 by autocast. Attention
            probabilities and sums stay wider.

    Raises:
        DataError: No images.
        NonFiniteError: NaN or infinity in what flows through a block; the message names the module.
        UnsupportedModelError: A gradient statistic for a model without class logits, or scope ``global`` where
            blocks differ in their number of tokens.
    """
    fitter = HeadStatisticsFitter(model, structure, scope=scope, edge=edge, wanted=wanted, precision=precision)
    with evaluating(model):
        for images in batches:
            fitter.update(images)
    return fitter.statistics


class HeadStatisticsFitter:
    """Accumulates head statistics batch by batch: ``update`` takes images, ``statistics`` gives the result.

    The model must be in evaluation mode. Memory beside what 32 images take: with ``U`` units a block and ``H`` heads,
    ``H^2`` numbers for the edges, ``U^2`` a block where a statistic or an edge needs covariances; output edges in
    scope ``global`` need ``(sum of U)^2``.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: ModelStructure,
        *,
        scope: Scope,
        edge: Edge,
        wanted: Collection[Statistic] = STATISTICS,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._blocks, self._edge, self._wanted = model, structure.blocks, edge, wanted
        self._precision = precision
        self._backward = any(name in GRADIENT_STATISTICS for name in wanted)
        blocks = range(len(structure.blocks))
        self._graphs = [list(blocks)] if scope == "global" else [[i] for i in blocks]
        heads = [b.shape.heads for b in structure.blocks]
        widths = [b.shape.heads * b.shape.vo for b in structure.blocks]
        self._images = 0
        self._compared = [0] * len(self._graphs)
        self._generator = torch.Generator().manual_seed(0)
        within_blocks = edge in _OUTPUT_EDGES and scope == "layer"
        covariances = within_blocks or "contribution" in wanted or "fisher_residual" in wanted
        self._moments = [_Moments(width) for width in widths] if covariances else []
        if edge not in _OUTPUT_EDGES:
            self._divergence = [_zeros(*2 * [sum(heads[i] for i in graph)]) for graph in self._graphs]
        elif scope == "global":
            self._joint_moments = [_Moments(sum(widths))]
        else:
            self._joint_moments = self._moments
        self._slope, self._square = _zeros(sum(heads)), _zeros(sum(heads))
        residual = structure.blocks if "fisher_residual" in wanted else ()
        self._gradients = [_zeros(b.shape.heads, b.shape.vo, b.shape.vo) for b in residual]

    def update(self, images: Tensor) -> None:
        """Add a batch ``[images, channels, height, width]``.

        Raises:
            NonFiniteError: NaN or infinity in what flows through a block.
            UnsupportedModelError: See :func:`collect_head_statistics`.
        """
        for few in images.split(GRADIENT_IMAGES):
            self._update(few)

    def _update(self, images: Tensor) -> None:
        inputs, outputs = self._forward(images)
        with torch.no_grad():
            flat = [z.detach().flatten(0, 1) for z in outputs]
            if self._moments:
                for moments, z in zip(self._moments, flat, strict=True):
                    moments.update(z)
            if self._edge not in _OUTPUT_EDGES:
                few = [x[-self._images % _EVERY :: _EVERY].float() for x in inputs]  # the same whatever the batches
                for i, graph in enumerate(self._graphs if len(few[0]) else ()):
                    maps = self._attention(graph, few)
                    self._divergence[i] += attention_divergence(maps, self._edge)
                    self._compared[i] += len(maps) * maps.shape[2]
            elif self._joint_moments is not self._moments:
                self._joint_moments[0].update(torch.cat(flat, dim=1))
        self._images += len(images)

    def _forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs ``[images, tokens, dim]`` and head outputs ``[images, tokens, units]`` of every attention."""
        seen: dict[str, Tensor] = {}
        names = [(b.attention, b.attention_readout.module) for b in self._blocks]
        images = images.detach().to(next(self._model.parameters()).device)
        # Through the images, so that frozen weights do not cut the graph.
        images.requires_grad_(self._backward)
        watch = {name: partial(seen.__setitem__, name) for pair in names for name in pair}
        with observe_inputs(self._model, watch), torch.set_grad_enabled(self._backward), self._autocast(images.device):
            logits = self._model(images)
        for name, x in seen.items():
            require_finite(f"the input of module '{name}'", x)
        if isinstance(logits, Tensor):
            require_finite("the model's output", logits)
        outputs = [seen[readout] for _, readout in names]
        if self._backward:
            self._add_gradients(logits, outputs)
        return [seen[attention].detach() for attention, _ in names], outputs

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._precision, enabled=self._precision != torch.float32)

    def _add_gradients(self, logits: Tensor, outputs: list[Tensor]) -> None:
        """Differentiate the predicted class's log-probability by the heads' outputs."""
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            raise UnsupportedModelError(
                "the gradient statistics need a classifier that returns logits [images, classes]; "
                "rank by 'contribution' or with teleport 'contribution' or 'uniform' instead"
            )
        with torch.enable_grad():
            confidence = logits.float().log_softmax(dim=-1).amax(dim=-1).sum()
        gradients = torch.autograd.grad(confidence, outputs)
        by_head = [(-1, (block.shape.heads, block.shape.vo)) for block in self._blocks]
        gradients = [g.float().unflatten(*split) for g, split in zip(gradients, by_head, strict=True)]
        changes = [
            (z.detach().float().unflatten(*split) * g).sum(dim=(1, 3))
            for z, g, split in zip(outputs, gradients, by_head, strict=True)
        ]
        if self._gradients:
            for g, total in zip(gradients, self._gradients, strict=True):
                total += torch.einsum("bnhi,bnhj->hij", g, g).cpu()
        change = torch.cat(changes, dim=1).double()
        self._slope += change.sum(dim=0).cpu()
        self._square += change.square().sum(dim=0).cpu()

    def _attention(self, graph: Sequence[int], inputs: Sequence[Tensor]) -> Tensor:
        """Attention rows ``[images, nodes, queries, keys]`` of a graph's heads, float32, at a draw of queries."""
        tokens = {inputs[i].shape[1] for i in graph}
        if len(tokens) > 1:
            raise UnsupportedModelError(
                f"scope 'global' compares heads of all blocks, which here see {sorted(tokens)} tokens; "
                "use scope 'layer'"
            )
        first = inputs[graph[0]]
        queries = torch.randperm(first.shape[1], generator=self._generator)[:_QUERIES].to(first.device)
        with self._autocast(first.device):
            maps = [attention_rows(self._model, self._blocks[i], inputs[i], queries) for i in graph]
        for i, rows in zip(graph, maps, strict=True):  # fused kernels can hide a NaN that is plain to see here
            require_finite(f"the attention map of module '{self._blocks[i].attention}'", rows)
        return torch.cat(maps, dim=1)

    @property
    def statistics(self) -> HeadStatistics:
        """The statistics of all images so far.

        Raises:
            DataError: There were none.
        """
        if not self._images:
            raise DataError("no images to rank heads on; give at least one batch, better 500 images or more")
        weights = [_readout_weights(self._model, b) for b in self._blocks]
        fisher = self._square / (2 * self._images)
        wanted = self._wanted
        return HeadStatistics(
            heads=tuple(b.shape.heads for b in self._blocks),
            images=self._images,
            edges=tuple(self._edges(weights)),
            contribution=self._contribution(weights) if "contribution" in wanted else None,
            fisher=fisher if "fisher" in wanted else None,
            taylor=self._slope / self._images + fisher if "taylor" in wanted else None,
            fisher_residual=self._fisher_residual() if "fisher_residual" in wanted else None,
        )

    def _contribution(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        pairs = zip(self._moments, weights, strict=True)
        return torch.cat([_output_products(m.covariance, w, "cosine").diagonal() for m, w in pairs]).clamp_min(0).sqrt()

    def _edges(self, weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        if self._edge not in _OUTPUT_EDGES:
            return [total / rows for total, rows in zip(self._divergence, self._compared, strict=True)]
        return [
            output_distance(moments.covariance, [w for i in graph for w in weights[i]], self._edge)
            for moments, graph in zip(self._joint_moments, self._graphs, strict=True)
        ]

    def _fisher_residual(self) -> Tensor:
        scores = []
        for gradients, moments in zip(self._gradients, self._moments, strict=True):
            residuals = residual_covariances(moments.covariance, len(gradients))
            scores.append((gradients * residuals).sum(dim=(1, 2)) / (2 * self._images))
        return torch.cat(scores)


def attention_divergence(maps: Tensor, edge: Edge) -> Tensor:
    """Compare heads by their attention rows.

    Args:
        maps: Attention probabilities ``[images, nodes, queries, keys]``.
        edge: ``jsd``, Jensen-Shannon divergence, symmetric, at most ln 2 a row; ``kl``, Kullback-Leibler divergence
            from the row's head to the column's; ``similarity``, 1 - JSD / ln 2.

    Returns:
        Sums over images and queries ``[nodes, nodes]``, float64 on the CPU, 0 on the diagonal.
    """
    nodes, images, queries = maps.shape[1], maps.shape[0], maps.shape[2]
    flat = maps.transpose(0, 1).flatten(1)
    cross = maps.new_zeros(nodes, nodes, dtype=torch.float64)  # cross-entropies, or entropies of mixtures
    entropy = maps.new_zeros(nodes, dtype=torch.float64)
    for p in flat.split(_CHUNK, dim=1):
        log_p = _log(p)
        entropy -= (p * log_p).sum(dim=1)
        if edge == "kl":
            cross -= p @ log_p.T
        else:
            for i in range(nodes - 1):
                mixture = (p[i] + p[i + 1 :]) / 2
                cross[i, i + 1 :] -= (_log(mixture) * mixture).sum(dim=1)
    if edge == "kl":
        divergence = cross - entropy[:, None]
    else:
        jsd = (cross - (entropy[:, None] + entropy) / 2).triu(diagonal=1)
        divergence = jsd + jsd.T if edge == "jsd" else images * queries - (jsd + jsd.T) / math.log(2)
    return divergence.clamp_min(0).fill_diagonal_(0).cpu()  # rounding can leave -1e-7 between equal heads


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_()


def output_distance(covariance: Tensor, weights: Sequence[Tensor], edge: Edge) -> Tensor:
    """Compare heads by what they add to the residual stream.

    Args:
        covariance: Of the heads' concatenated outputs ``[units, units]``.
        weights: What takes each head's output to the residual stream ``[dim, vo]``.
        edge: ``cosine``, 1 - the size of the cosine between centred contributions, over all images, tokens and
            channels at once; ``cka``, 1 - linear centred kernel alignment, blind to rotations.

    Returns:
        Distances ``[nodes, nodes]`` from 0 to 1, 0 on the diagonal; 1 from a head that contributes nothing.
    """
    products = _output_products(covariance, weights, edge)
    norms = products.diagonal().clamp_min(0).sqrt()
    scale = norms[:, None] * norms
    alignment = torch.where(scale > 0, products.abs() / scale, torch.zeros_like(scale))
    return (1 - alignment).clamp(0, 1).fill_diagonal_(0)


def _output_products(covariance: Tensor, weights: Sequence[Tensor], edge: Edge) -> Tensor:
    """Inner products of contributions (``cosine``), or of their ``rows x rows`` kernels (``cka``), per row."""
    widths = [w.shape[1] for w in weights]
    grid = [part.split(widths, dim=1) for part in covariance.split(widths, dim=0)]
    products = _zeros(len(weights), len(weights))
    for i, w in enumerate(weights):
        for j, v in enumerate(weights):
            # <X W^T, Y V^T> = tr(W^T V Y^T X); for the kernels, |W X^T Y V^T|^2: units^2 instead of rows^2.
            seen = w.T @ v if edge == "cosine" else w.T @ w @ grid[i][j] @ v.T @ v
            products[i, j] = (seen * grid[i][j]).sum()
    return products


def residual_covariances(covariance: Tensor, heads: int) -> Tensor:
    """Covariance of each head's output given the others': what is left after their best linear refit.

    Args:
        covariance: Of a block's head outputs ``[units, units]``.
        heads: Heads, equally wide.

    Returns:
        ``[heads, vo, vo]``: the Schur complements, read from the inverse's diagonal blocks.
    """
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
    grid = inverse.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    return torch.linalg.inv(torch.stack([grid[h, :, h] for h in range(heads)]))


class _Moments:
    """Mean and covariance of rows ``[rows, units]``, in float64."""

    def __init__(self, units: int) -> None:
        self._count = 0
        self._sum, self._products = _zeros(units), _zeros(units, units)

    def update(self, rows: Tensor) -> None:
        rows = rows.double()  # the mean's square is taken off later, and can be far larger than the covariance
        self._count += len(rows)
        self._sum += rows.sum(dim=0).cpu()
        self._products += (rows.T @ rows).cpu()

    @property
    def covariance(self) -> Tensor:
        mean = self._sum / self._count
        return self._products / self._count - torch.outer(mean, mean)


def _readout_weights(model: nn.Module, block: BlockStructure) -> list[Tensor]:
    """Each head's columns ``[dim, vo]`` of the output projection, LayerScale included, float64 on the CPU."""
    readout = block.attention_readout
    weight = model.get_parameter(readout.weight).detach().to("cpu", torch.float64)
    gain = readout_gain(model, readout)
    if gain is not None:
        weight = gain.to("cpu", torch.float64)[:, None] * weight
    return list(weight.split(block.shape.vo, dim=1))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
