"""Measured damage curves: cut one piece of one block, compensated, and ask the network (design, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core.activations import Stages, evaluating, readout_gain, require_finite
from gohsp.core.allocation import FIELDS, Curves, DamageCurve, WidthSettings, allowed_widths
from gohsp.core.compensation import BlockMoments
from gohsp.core.projection import ProjectionSettings, constrained, on_support, project, select
from gohsp.structure import KINDS, BlockStructure, Kind, ModelStructure

GRID = (0.0, 0.08, 0.2, 0.4, 0.65)
"""Where between the smallest and the present width damage is measured; denser where curves are steep."""

EDITION = 6
"""Raised with every change by which curves come out otherwise, so that cached ones are not used any more."""


@torch.no_grad()
def measure_curves(
    model: nn.Module,
    stages: Stages,
    structure: ModelStructure,
    moments: Sequence[BlockMoments],
    embedded: Sequence[Tensor],
    scores: Sequence[Sequence[float]] | None,
    widths: WidthSettings,
    settings: ProjectionSettings,
    *,
    precision: torch.dtype = torch.float32,
    advance: Callable[[], None] = lambda: None,
) -> Curves:
    """KL divergence from the model's own predictions when one piece alone is projected to a few widths.

    No labels are read. A point costs one pass through the blocks from the piece's own to the last, since what
    enters the block does not change. The model is changed in place for one pass at a time and always restored.

    Args:
        model: The model, in the basis that pruning will use.
        stages: The same model as embedding, blocks and head.
        structure: Its structure.
        moments: Its second moments.
        embedded: What enters the first block, in batches ``[B, tokens, D]``.
        scores: Graph scores by block and head, which decide the order in which heads go; None for none.
        widths: Allowed widths.
        settings: Metric and strength of the projection.
        precision: Data type of the forward passes; below float32 by autocast.
        advance: Called once per measured point (:func:`count_points` of them), for progress.

    Returns:
        Curves by block and kind, for the kinds that may be cut.

    Raises:
        NonFiniteError: A cut makes the predictions NaN or infinite.
    """
    with evaluating(model):
        reference = predictions(stages, embedded, precision)
        stream, curves = list(embedded), []
        for i, block in enumerate(structure.blocks):
            cut = _Cut(
                model, block, moments[i], None if scores is None else torch.tensor(scores[i]).to(reference[0]), settings
            )
            of_block: dict[Kind, DamageCurve] = {}
            for kind in KINDS:
                grid = _grid(block, kind, widths)
                damage = []
                for width in grid[:-1]:
                    with cut.to(kind, width):
                        after = divergence(reference, predictions(stages, stream, precision, first=i))
                    what = f"the predictions' divergence with {kind} of block {i} cut to {width}"
                    require_finite(what, torch.tensor(after), cut=True)
                    damage.append(after)
                    advance()
                if damage:
                    of_block[kind] = DamageCurve(grid, (*damage, 0.0))
            curves.append(of_block)
            stream = [passed(stages.blocks[i], x, precision) for x in stream]
    return tuple(curves)


def count_points(structure: ModelStructure, widths: WidthSettings) -> int:
    """How many forward passes over the images :func:`measure_curves` takes, the dense one not counted."""
    return sum(len(_grid(b, kind, widths)) - 1 for b in structure.blocks for kind in KINDS)


def fits(curves: Curves, structure: ModelStructure, widths: WidthSettings) -> bool:
    """Whether curves could have been measured on a model of this structure: at its widths, and finite."""
    measured = [{kind: _grid(block, kind, widths) for kind in KINDS} for block in structure.blocks]
    expected = [{kind: grid for kind, grid in of_block.items() if len(grid) > 1} for of_block in measured]
    given = [{kind: curve.widths for kind, curve in of_block.items()} for of_block in curves]
    return given == expected and all(
        len(curve.damage) == len(curve.widths) and all(0 <= damage < math.inf for damage in curve.damage)
        for of_block in curves
        for curve in of_block.values()
    )


def _grid(block: BlockStructure, kind: Kind, settings: WidthSettings) -> tuple[int, ...]:
    allowed = allowed_widths(block, kind, settings)
    last = len(allowed) - 1
    return tuple(allowed[i] for i in sorted({round(share * last) for share in (*GRID, 1.0)}))


@torch.no_grad()
def predictions(
    stages: Stages, stream: Sequence[Tensor], precision: torch.dtype = torch.float32, *, first: int = 0
) -> list[Tensor]:
    """Log-probabilities ``[B, classes]`` in float32, of batches of a residual stream that enters block ``first``."""
    return [passed(lambda x: stages.logits(x, first), x, precision).log_softmax(-1) for x in stream]


def passed(function: Callable[[Tensor], Tensor], x: Tensor, precision: torch.dtype) -> Tensor:
    """``function(x)`` in float32, computed in ``precision``."""
    # Autocast keeps casts of weights until it is left; left after every pass, it never sees stale ones.
    with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
        return function(x).float()


def divergence(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean KL divergence ``KL(reference || other)`` per image, in nats; rounding does not make it negative."""
    total = sum(F.kl_div(b, a, reduction="sum", log_target=True) for a, b in zip(reference, other, strict=True))
    return max(float(total) / sum(len(a) for a in reference), 0.0)


@dataclass(frozen=True)
class _Cut:
    """Cuts of one kind in one block, undone afterwards."""

    model: nn.Module
    block: BlockStructure
    moments: BlockMoments
    ranking: Tensor | None
    settings: ProjectionSettings

    @contextmanager
    def to(self, kind: Kind, width: int) -> Iterator[None]:
        """The block with ``kind`` alone projected to ``width``, while the context is open."""
        block, settings = self.block, self.settings
        values = constrained(self.model, block, settings.metric)
        shape = replace(block.shape, **{FIELDS[kind]: width})
        gains = (readout_gain(self.model, block.attention_readout), readout_gain(self.model, block.ffn_readout))
        kept = select(block, values, self.moments, shape, settings, ranking=self.ranking, gains=gains)
        targets = project(on_support(block, values, self.moments, kept, settings), values)
        before = {entry: value.clone() for entry, value in values.items()}
        try:
            for entry, target in targets.items():
                values[entry].copy_(target)
            yield
        finally:
            for entry, value in before.items():
                values[entry].copy_(value)
