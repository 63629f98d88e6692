"""Streaming statistics of attention heads: edges between them, and how much each one matters (``docs/ranking.md``).

Every sum has a fixed size whatever the number of images, and attention rows of a few images are compared at a time.

Shapes: ``nodes`` are heads, numbered attention by attention; ``rows`` are images times tokens; ``units`` are an
attention's value dimensions, heads times ``vo``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from gohsp.core.capture import Call, attention_rows, autocast, readout_gain, require_finite, units
from gohsp.core.gradients import Gradients
from gohsp.errors import DataError, UnsupportedModelError
from gohsp.structure import Attention, Network

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
# Relative to a unit's mean square: a unit that varies less is constant, but for rounding. Left in, that noise could be
# negative variances, which no ridge relative to them can mend.
_ROUNDING = 1e-12
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
        heads: Heads of each attention, by its name.
        images: Images seen.
        edges: Edge weights ``[nodes, nodes]`` of each graph, 0 on the diagonal: one over all heads that see equally
            many tokens (scope ``global``) or one an attention (scope ``layer``). Attention rows are compared in every
            fourth image.
        contribution: Root mean squared norm ``[nodes]`` of what a head adds to the residual stream, centred
            over images and tokens. None, as the following, where it was not asked for.
        fisher: Second-order estimate ``[nodes]``, in nats, of what zeroing a head costs: ``E[a^2] / 2``, with ``a`` the
            first-order change of the objective's confidence (of a classifier, the predicted class's log-probability),
            or of its draws where it has none.
        taylor: Both orders ``[nodes]``, in nats: ``E[a] + E[a^2] / 2``; negative where the model would grow surer
            of its predictions. ``fisher`` where the objective has no confidence.
        fisher_residual: ``fisher`` ``[nodes]`` for that part of a head's output which no linear map of the attention's
            other heads can give, tokens taken as independent.
    """

    heads: Mapping[str, int]
    images: int
    edges: tuple[Tensor, ...]
    contribution: Tensor | None
    fisher: Tensor | None
    taylor: Tensor | None
    fisher_residual: Tensor | None

    def among(self, kept: Tensor) -> HeadStatistics:
        """The statistics of some heads alone, as if there were no others.

        Args:
            kept: Which heads ``[nodes]``, boolean, at least one. An attention or a graph without any is left out.
        """
        counts = [int(of.sum()) for of in kept.split(list(self.heads.values()))]
        graphs = zip(self.edges, kept.split([len(edges) for edges in self.edges]), strict=True)
        values = {name: getattr(self, name) for name in STATISTICS}
        return replace(
            self,
            heads={name: count for name, count in zip(self.heads, counts, strict=True) if count},
            edges=tuple(edges[of][:, of] for edges, of in graphs if of.any()),
            **{name: None if of is None else of[kept] for name, of in values.items()},
        )


class HeadStatisticsFitter:
    """Accumulates head statistics pass by pass: ``update`` takes gradients, ``statistics`` gives the result.

    Memory beside what a pass takes: with ``U`` units an attention and ``H`` heads, ``H^2`` numbers for the edges,
    ``U^2`` an attention where a statistic or an edge needs covariances; output edges in scope ``global`` need ``(sum of
    U)^2``.

    Args:
        model: The model that the passes run through.
        network: Its description.
        scope: Heads that share a graph: those of an attention, or all that see equally many tokens.
        edge: Edge weight; see :func:`attention_divergence` and :func:`output_distance`.
        wanted: What to gather beside the edges. All but ``contribution`` need gradients.
        precision: Data type of the logits of attention; below float32 by autocast. Probabilities and sums stay wider.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        *,
        scope: Scope,
        edge: Edge,
        wanted: Collection[Statistic] = STATISTICS,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._subs, self._edge, self._precision = model, network.attentions, edge, precision
        self._wanted = wanted = wanted if self._subs else ()  # where no head is left, images tell nothing of any
        count = range(len(self._subs))
        self._graphs = _alike(self._subs) if scope == "global" else [[i] for i in count]
        heads = [sub.widths.heads for sub in self._subs]
        widths = [sub.widths.heads * sub.widths.vo for sub in self._subs]
        self._images = 0
        self._compared = [0] * len(self._graphs)
        self._generator = torch.Generator().manual_seed(0)
        within = edge in _OUTPUT_EDGES and scope == "layer"
        covariances = within or "contribution" in wanted or "fisher_residual" in wanted
        self._moments = [_Moments(width) for width in widths] if covariances else []
        if edge not in _OUTPUT_EDGES:
            self._divergence = [_zeros(*2 * [sum(heads[i] for i in graph)]) for graph in self._graphs]
        elif scope == "global":
            self._joint_moments = [_Moments(sum(widths[i] for i in graph)) for graph in self._graphs]
        else:
            self._joint_moments = self._moments
        self._slope, self._square = _zeros(sum(heads)), _zeros(sum(heads))
        residual = self._subs if "fisher_residual" in wanted else ()
        self._gradients = [_zeros(sub.widths.heads, sub.widths.vo, sub.widths.vo) for sub in residual]

    @torch.no_grad()
    def update(self, gradients: Gradients) -> None:
        """Add a few images.

        Raises:
            NonFiniteError: NaN or infinity in what heads make.
            UnsupportedModelError: Scope ``global`` where attentions differ in their number of tokens.
        """
        if self._subs:
            self._add(gradients)
        self._images += gradients.images

    def _add(self, gradients: Gradients) -> None:
        outputs = [gradients.read[sub.name] for sub in self._subs]
        for sub, z in zip(self._subs, outputs, strict=True):
            require_finite(f"the input of module '{sub.readout.module}'", z)
        flat = [z.flatten(0, 1) for z in outputs]
        for moments, z in zip(self._moments, flat, strict=False):
            moments.update(z)
        if self._edge not in _OUTPUT_EDGES:
            self._compare(gradients)
        elif self._joint_moments is not self._moments:
            for moments, graph in zip(self._joint_moments, self._graphs, strict=True):
                moments.update(torch.cat([flat[i] for i in graph], dim=1))
        if any(name in GRADIENT_STATISTICS for name in self._wanted):
            self._add_gradients(gradients)

    def _compare(self, gradients: Gradients) -> None:
        few = slice(-self._images % _EVERY, None, _EVERY)  # the same images whatever the batches
        if not range(gradients.images)[few]:
            return
        inputs = [
            x.unflatten(0, (gradients.images, -1))[few].flatten(0, 1).float()
            for x in (gradients.inputs[sub.name] for sub in self._subs)
        ]
        for i, graph in enumerate(self._graphs):
            maps = self._attention(graph, inputs, [gradients.calls[sub.name] for sub in self._subs])
            self._divergence[i] += attention_divergence(maps, self._edge)
            self._compared[i] += len(maps) * maps.shape[2]

    def _add_gradients(self, gradients: Gradients) -> None:
        """Add to first and second order what zeroing each head changes.

        Both are of the confidence where the objective has one; else the first order is 0, and draws give the second.
        """
        sides = gradients.drawn if gradients.confidence is None else [gradients.confidence]
        if not sides:
            raise UnsupportedModelError("gradient statistics need gradients; ask for a draw or for the confidence")
        for side in sides:
            changes = []
            for i, sub in enumerate(self._subs):
                split = (-1, (sub.widths.heads, sub.widths.vo))
                weight = units(self._model, sub.readout.columns, sub.widths.heads * sub.widths.vo).float()
                g = (side[sub.name].float() @ weight).unflatten(*split)
                changes.append((gradients.read[sub.name].float().unflatten(*split) * g).sum(dim=(1, 3)))
                if self._gradients:
                    self._gradients[i] += torch.einsum("bnhi,bnhj->hij", g, g).cpu() / len(sides)
            change = torch.cat(changes, dim=1).double()
            if gradients.confidence is not None:
                self._slope += change.sum(dim=0).cpu()
            self._square += change.square().sum(dim=0).cpu() / len(sides)

    def _attention(self, graph: Sequence[int], inputs: Sequence[Tensor], calls: Sequence[Call]) -> Tensor:
        """Attention rows ``[images, nodes, queries, keys]`` of a graph's heads, float32, at a draw of queries."""
        sub, first = self._subs[graph[0]], inputs[graph[0]]
        tokens = sub.keys if sub.cuts else first.shape[1:-1].numel()
        queries = torch.randperm(tokens, generator=self._generator)[:_QUERIES].to(first.device)
        with autocast(first.device, self._precision):
            maps = [attention_rows(self._model, self._subs[i], inputs[i], calls[i], queries) for i in graph]
        for i, rows in zip(graph, maps, strict=True):  # fused kernels can hide a NaN that is plain to see here
            require_finite(f"the attention map of module '{self._subs[i].name}'", rows)
        return torch.cat(maps, dim=1)

    @property
    def statistics(self) -> HeadStatistics:
        """The statistics of all images so far.

        Raises:
            DataError: There were none.
        """
        if not self._images:
            raise DataError("no images to rank heads on; give at least one batch, better 500 images or more")
        weights = [_readout_weights(self._model, sub) for sub in self._subs]
        fisher = self._square / (2 * self._images)
        wanted = self._wanted
        return HeadStatistics(
            heads={sub.name: sub.widths.heads for sub in self._subs},
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


def _alike(subs: Sequence[Attention]) -> list[list[int]]:
    """Neighbouring attentions in groups whose heads can be compared row by row: those that see equally many tokens."""
    grouped = groupby(range(len(subs)), key=lambda i: (subs[i].tokens, subs[i].keys))
    return [list(group) for _, group in grouped] or [[]]


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
        mean, products = self._sum / self._count, self._products / self._count
        covariance = products - torch.outer(mean, mean)
        varies = (covariance.diagonal() > _ROUNDING * products.diagonal()).double()
        return covariance * torch.outer(varies, varies)


def _readout_weights(model: nn.Module, sub: Attention) -> list[Tensor]:
    """Each head's columns ``[dim, vo]`` of the output projection, LayerScale included, float64 on the CPU."""
    columns = units(model, sub.readout.columns, sub.widths.heads * sub.widths.vo)
    weight = columns.to("cpu", torch.float64)
    gain = readout_gain(model, sub.readout)
    if gain is not None:
        weight = gain.to("cpu", torch.float64)[:, None] * weight
    return list(weight.split(sub.widths.vo, dim=1))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
