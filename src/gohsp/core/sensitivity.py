"""Measured damage curves: cut one piece of one block, compensated, and ask the network (design, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core.activations import readout_gain
from gohsp.core.allocation import FIELDS, Curves, DamageCurve, WidthSettings, allowed_widths
from gohsp.core.compensation import BlockMoments
from gohsp.core.projection import ProjectionSettings, constrained, on_support, project, select
from gohsp.structure import KINDS, BlockStructure, Kind, ModelStructure

GRID = (0.0, 0.08, 0.2, 0.4, 0.65)
"""Where between the smallest and the present width damage is measured; denser where curves are steep."""


def measure_curves(
    model: nn.Module,
    structure: ModelStructure,
    moments: Sequence[BlockMoments],
    batches: Sequence[Tensor],
    scores: Sequence[Sequence[float]] | None,
    widths: WidthSettings,
    settings: ProjectionSettings,
    *,
    precision: torch.dtype = torch.float32,
    advance: Callable[[], None] = lambda: None,
) -> Curves:
    """KL divergence from the dense predictions when each piece alone is projected to each of a few widths.

    No labels are read. The model is changed in place for one forward pass at a time and always restored.

    Args:
        model: The dense model, in the basis that pruning will use.
        structure: Its structure.
        moments: Its second moments.
        batches: Calibration images.
        scores: Graph scores by block and head, which decide the order in which heads go; None for none.
        widths: Allowed widths.
        settings: Metric and strength of the projection.
        precision: Data type of the forward passes; below float32 by autocast.
        advance: Called once per measured point (:func:`count_points` of them), for progress.

    Returns:
        Curves by block and kind, for the kinds that may be cut.
    """
    reference = predictions(model, batches, precision)
    curves = []
    for i, block in enumerate(structure.blocks):
        ranking = None if scores is None else torch.tensor(scores[i], device=reference[0].device)
        of_block: dict[Kind, DamageCurve] = {}
        for kind in KINDS:
            grid = _grid(block, kind, widths)
            if len(grid) < 2:
                continue
            damage = []
            for width in grid[:-1]:
                damage.append(
                    _damage(model, block, moments[i], kind, width, ranking, settings, batches, reference, precision)
                )
                advance()
            of_block[kind] = DamageCurve(grid, (*damage, 0.0))
        curves.append(of_block)
    return tuple(curves)


def count_points(structure: ModelStructure, widths: WidthSettings) -> int:
    """How many forward passes over the images :func:`measure_curves` takes, the dense one not counted."""
    return sum(len(_grid(b, kind, widths)) - 1 for b in structure.blocks for kind in KINDS)


def _grid(block: BlockStructure, kind: Kind, settings: WidthSettings) -> tuple[int, ...]:
    allowed = allowed_widths(block, kind, settings)
    last = len(allowed) - 1
    return tuple(allowed[i] for i in sorted({round(share * last) for share in (*GRID, 1.0)}))


def predictions(model: nn.Module, batches: Sequence[Tensor], precision: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probabilities ``[B, classes]`` of every batch, in float32."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    # Autocast keeps casts of weights until it is left; left after every pass, it never sees stale ones.
    with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        logits = [model(images.to(device)) for images in batches]
    result = [batch.float().log_softmax(-1) for batch in logits]
    model.train(training)
    return result


def divergence(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean KL divergence ``KL(reference || other)`` per image, in nats."""
    total = sum(F.kl_div(b, a, reduction="sum", log_target=True) for a, b in zip(reference, other, strict=True))
    return float(total) / sum(len(a) for a in reference)


@torch.no_grad()
def _damage(
    model: nn.Module,
    block: BlockStructure,
    moments: BlockMoments,
    kind: Kind,
    width: int,
    ranking: Tensor | None,
    settings: ProjectionSettings,
    batches: Sequence[Tensor],
    reference: Sequence[Tensor],
    precision: torch.dtype,
) -> float:
    values = constrained(model, block, settings.metric)
    shape = replace(block.shape, **{FIELDS[kind]: width})
    gains = (readout_gain(model, block.attention_readout), readout_gain(model, block.ffn_readout))
    kept = select(block, values, moments, shape, settings, ranking=ranking, gains=gains)
    before = {entry: value.clone() for entry, value in values.items()}
    try:
        for entry, target in project(on_support(block, values, moments, kept, settings), values).items():
            values[entry].copy_(target)
        return divergence(reference, predictions(model, batches, precision))
    finally:
        for entry, value in before.items():
            values[entry].copy_(value)
