"""From a model and a shape to a cut and repaired network: moments and reconstruction with a run's settings."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gohsp import models
from gohsp.bench import Bench
from gohsp.core import compensation, fisher, projection, reconstruction, surgery
from gohsp.structure import BlockShape, ModelStructure, Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Basis:
    """A copy of a model that is going to be cut, and what was measured on the model.

    Attributes:
        model: The copy.
        structure: Its structure.
        scores: Graph scores by block and head.
        weights: How much tokens count, by block.
    """

    model: nn.Module
    structure: ModelStructure
    scores: list[list[float]]
    weights: tuple[fisher.TokenWeights, ...]


def based(bench: Bench, dense: nn.Module, structure: ModelStructure, scores: list[list[float]]) -> Basis:
    """A working copy of the dense model; few images are warned of."""
    images = sum(len(batch) for batch in bench.calibration)
    if images < structure.embed_dim:
        logger.warning(
            "%d calibration images are fewer than the model's %d channels: at any one token, such as the class token, "
            "second moments are singular, and only the ridge makes repairs possible; give %d images or more",
            images,
            structure.embed_dim,
            4 * structure.embed_dim,
        )
    with bench.timed("weigh"):
        return basis_of(bench, dense, structure, scores)


def basis_of(bench: Bench, model: nn.Module, structure: ModelStructure, scores: list[list[float]]) -> Basis:
    """A copy of ``model`` with token weights."""
    settings = bench.recipe.admm.projection
    with bench.autocast(), bench.fast_attention(model):
        weights = fisher.token_weights(
            model,
            structure,
            bench.images(bench.recipe.data.ranking_images),
            attention=settings.attention_fisher,
            ffn=settings.ffn_fisher,
            seed=bench.recipe.seed,
        )
    return Basis(copy.deepcopy(model), structure, scores, weights)


def measured(bench: Bench, basis: Basis) -> tuple[compensation.BlockMoments, ...]:
    """Second moments of the basis' model as it is now."""
    with bench.autocast(), bench.fast_attention(basis.model):
        return compensation.collect_moments(basis.model, basis.structure, bench.calibration, basis.weights)


def put_on_set(
    bench: Bench, basis: Basis, dense: nn.Module, shapes: Sequence[BlockShape], support: Plan | None = None
) -> Plan:
    """Put the basis' model on the sparsity set of ``shapes``, with repairs where the metric is the data's.

    Args:
        bench: Images and settings.
        basis: Its model is changed in place, its shapes stay.
        dense: The model to stay close to.
        shapes: Widths to reach.
        support: The units to keep, where ADMM has chosen them; None selects them.

    Returns:
        The plan, ready for compaction.
    """
    settings, work, structure = bench.recipe.admm.projection, basis.model, basis.structure
    if settings.metric == "data":
        return _reconstructed(bench, basis, dense, shapes, support)
    if support is None:
        values = [projection.constrained(work, block, settings.metric) for block in structure.blocks]
        moments = measured(bench, basis)
        support = projection.select_plan(work, structure, values, moments, shapes, settings, scores=basis.scores)
    # In the Euclidean metric the projection is the mask, and nothing takes over.
    surgery.mask(work, structure, support)
    return support


def _reconstructed(
    bench: Bench, basis: Basis, dense: nn.Module, shapes: Sequence[BlockShape], support: Plan | None
) -> Plan:
    # After ADMM the network is another than the dense one, and it is its own function that must survive the cut.
    target = dense if support is None else copy.deepcopy(basis.model)
    embedded = bench.embedded(models.stages(target), bench.calibration, mirror=bench.mirror)
    with (
        bench.fast_attention(target, basis.model),
        bench.progress("cut and repair", len(basis.structure.blocks)) as advance,
    ):
        return reconstruction.reconstruct(
            target,
            basis.model,
            basis.structure,
            shapes,
            embedded,
            basis.scores,
            bench.recipe.admm.projection,
            support=support,
            weights=basis.weights,
            precision=bench.precision,
            store=bench.folder.spool,
            advance=advance,
        )
