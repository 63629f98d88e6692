"""Damage curves: what cutting one piece of one sub-layer alone, compensated, does to the output (``docs/oneshot.md``).

To second order the distance of two outputs is a quadratic form. With ``delta`` what a cut changes in what its sub-layer
writes, and ``g`` the gradient there of a draw of the objective, the damage is ``1/2 mean (sum_tokens g . delta)^2``:
one pass forward and a few backward give ``g`` for all sub-layers, and no pass through the rest of the network is
needed. What the form misses of an FFN is much the same all along its curve, so one measured pass gives it its scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gohsp.core.allocation import Curves, DamageCurve, WidthSettings, allowed_widths
from gohsp.core.capture import autocast, device_of, evaluating, in_stream, read_by, readout_gain, require_finite, units
from gohsp.core.gradients import Gradients, differentiated, images_at_once
from gohsp.core.moments import Moments, SublayerMoments
from gohsp.core.objective import Objective, mean_distance, outputs
from gohsp.core.projection import (
    HeadScores,
    RepairSettings,
    constrained,
    on_support,
    project,
    ranking_of,
    readout_map,
    select,
)
from gohsp.structure import Attention, Kind, Network, PresentSublayer, UnitSlice, narrowed, unit_count

GRID = (0.0, 0.08, 0.2, 0.4, 0.65)
"""Where between the smallest and the present width damage is measured; denser where curves are steep."""

DRAWS = 8
"""Backward passes of the quadratic form."""

CHECKED = 2
"""Point of an FFN's curve, counted from the smallest width, at which its damage is measured by a pass of its own."""


@torch.no_grad()
def measure_curves(
    model: nn.Module,
    network: Network,
    objective: Objective,
    batches: Sequence[Tensor],
    moments: Moments,
    scores: HeadScores | None,
    widths: WidthSettings,
    settings: RepairSettings,
    *,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    advance: Callable[[], None] = lambda: None,
) -> Curves:
    """Estimate the distance of the model's output from its own when one piece alone is projected to a few widths.

    No labels are read. Weights are changed for one pass through an attention at a time, and always restored.

    Args:
        model: The model, in the basis that pruning will use.
        network: Its description.
        objective: What its output is for.
        batches: Images ``[B, C, H, W]``.
        moments: Second moments of the same model.
        scores: Graph scores of heads, which decide the order in which heads go; None for none.
        widths: Allowed widths.
        settings: Guidance and ridge of the projection.
        seed: Of the objective's draws.
        precision: Data type of passes through the model; below float32 by autocast.
        advance: Called :func:`count_steps` times, for progress.

    Returns:
        Curves by sub-layer and kind, for the kinds that may be cut.

    Raises:
        NonFiniteError: NaN or infinity in the model, or in the damage of a cut.
    """
    cuts = []
    for sub in network.present:
        ranking = ranking_of(sub, scores, device_of(model))
        for kind, width in _points(sub, widths):
            cuts.append(_cut(model, sub, moments[sub.name], kind, width, settings, ranking))
            advance()
    passes = differentiated(model, network, objective, batches, draws=DRAWS, seed=seed, precision=precision)
    with evaluating(model):
        damage = _damage(model, cuts, passes, precision, advance)
        damage = _scaled(model, cuts, damage, objective, batches, precision, advance)
    curves: dict[str, dict[Kind, DamageCurve]] = {}
    for sub in network.present:
        for kind in sub.widths.kinds:
            grid = _grid(sub, kind, widths)
            if len(grid) > 1:
                measured = [damage[sub.name, kind, width] for width in grid[:-1]]
                require_finite(f"the damage of cuts of {kind} in '{sub.name}'", torch.tensor(measured), cut=True)
                curves.setdefault(sub.name, {})[kind] = DamageCurve(grid, (*measured, 0.0))
    return curves


def count_steps(network: Network, widths: WidthSettings, batches: Sequence[int]) -> int:
    """How often :func:`measure_curves` reports progress on batches of so many images."""
    at_once = images_at_once(network)
    passes = sum(-(-images // at_once) for images in batches)
    points = [_points(sub, widths) for sub in network.present]
    checked = [of for of in points if sum(kind == "ffn" and width > 0 for kind, width in of) > CHECKED]
    return passes + sum(map(len, points)) + len(checked)


def fits(curves: Curves, network: Network, widths: WidthSettings) -> bool:
    """Whether curves could have been measured on this network: at its widths, and finite."""
    expected = {(sub.name, kind): _grid(sub, kind, widths) for sub in network.present for kind in sub.widths.kinds}
    expected = {piece: grid for piece, grid in expected.items() if len(grid) > 1}
    given = {(name, kind): curve for name, of in curves.items() for kind, curve in of.items()}
    return {piece: curve.widths for piece, curve in given.items()} == expected and all(
        len(curve.damage) == len(curve.widths) and all(0 <= damage < math.inf for damage in curve.damage)
        for curve in given.values()
    )


def _grid(sub: PresentSublayer, kind: Kind, settings: WidthSettings) -> tuple[int, ...]:
    """Widths at which damage is measured, the present one last; 0 among them where the sub-layer may go."""
    allowed = allowed_widths(sub, kind, settings)
    gone, rest = [w for w in allowed if w == 0], [w for w in allowed if w > 0]
    last = len(rest) - 1
    return (*gone, *(rest[i] for i in sorted({round(share * last) for share in (*GRID, 1.0)})))


def _points(sub: PresentSublayer, settings: WidthSettings) -> list[tuple[Kind, int]]:
    return [(kind, width) for kind in sub.widths.kinds for width in _grid(sub, kind, settings)[:-1]]


@dataclass(frozen=True)
class _Cut:
    """One kind of one sub-layer at one width.

    Attributes:
        sub: The sub-layer.
        kind: The kind.
        width: Its width.
        change: What the cut changes in the readout's map ``[D, n]``, without LayerScale; None of a cut of queries and
            keys, which leaves the readout alone.
        masks: Of such a cut, which units stay of each slice.
    """

    sub: PresentSublayer
    kind: Kind
    width: int
    change: Tensor | None
    masks: Mapping[UnitSlice, Tensor]


def _cut(
    model: nn.Module,
    sub: PresentSublayer,
    moments: SublayerMoments,
    kind: Kind,
    width: int,
    settings: RepairSettings,
    ranking: Tensor | None,
) -> _Cut:
    """Project a sub-layer with ``kind`` alone at ``width``."""
    values = constrained(model, sub)
    wanted, gain = narrowed(sub.widths, kind, width), readout_gain(model, sub.readout)
    kept = select(sub, values, moments, wanted, settings, ranking=ranking, gain=gain)
    projection = on_support(sub, values, moments, kept, settings)
    if kind == "qk":
        return _Cut(sub, kind, width, None, projection.masks)
    target = project(projection, values)
    return _Cut(sub, kind, width, readout_map(target, sub.readout) - readout_map(values, sub.readout), {})


def _damage(
    model: nn.Module,
    cuts: Sequence[_Cut],
    passes: Iterator[Gradients],
    precision: torch.dtype,
    advance: Callable[[], None],
) -> dict[tuple[str, Kind, int], float]:
    """Half the mean square of the objective's draws' change, by cut."""
    totals = {(cut.sub.name, cut.kind, cut.width): 0.0 for cut in cuts}
    images = 0
    for gradients in passes:
        for sub in {cut.sub.name: cut.sub for cut in cuts}.values():
            mine = [cut for cut in cuts if cut.sub is sub]
            for cut, square in zip(mine, _squares(model, sub, mine, gradients, precision), strict=True):
                totals[sub.name, cut.kind, cut.width] += square
        images += gradients.images
        advance()
    return {piece: total / (2 * images * DRAWS) for piece, total in totals.items()}


def _scaled(
    model: nn.Module,
    cuts: Sequence[_Cut],
    damage: Mapping[tuple[str, Kind, int], float],
    objective: Objective,
    batches: Sequence[Tensor],
    precision: torch.dtype,
    advance: Callable[[], None],
) -> dict[tuple[str, Kind, int], float]:
    """Damage with each FFN's curve scaled so that it is the measured one at one point."""
    curves: dict[str, list[_Cut]] = {}
    for cut in cuts:
        if cut.kind == "ffn":
            curves.setdefault(cut.sub.name, []).append(cut)
    present = {name: [cut for cut in of if cut.width > 0] for name, of in curves.items()}
    checked = {name: of[CHECKED] for name, of in present.items() if len(of) > CHECKED}
    reference, scaled = outputs(model, objective, batches, precision) if checked else [], dict(damage)
    for name, cut in checked.items():
        estimated = damage[name, "ffn", cut.width]
        with _changed_readout(model, cut):
            measured = mean_distance(objective, reference, outputs(model, objective, batches, precision))
        scale = measured / estimated if estimated > 0 else 1.0
        for of in curves[name]:
            scaled[name, of.kind, of.width] *= scale
        advance()
    return scaled


@contextmanager
def _changed_readout(model: nn.Module, cut: _Cut) -> Iterator[None]:
    """The readout as a cut leaves it, while the context is open."""
    assert cut.change is not None
    readout, count = cut.sub.readout, unit_count(cut.sub.widths, cut.sub.widths.unit_kinds[-1])
    views = [units(model, readout.columns, count)]
    changes = [cut.change[:, :count]]
    if readout.bias is not None:
        views.append(model.get_parameter(readout.bias).detach())
        changes.append(cut.change[:, -1])
    before = [view.clone() for view in views]
    try:
        for view, change in zip(views, changes, strict=True):
            view += change
        yield
    finally:
        for view, value in zip(views, before, strict=True):
            view.copy_(value)


def _squares(
    model: nn.Module, sub: PresentSublayer, cuts: Sequence[_Cut], gradients: Gradients, precision: torch.dtype
) -> list[float]:
    """Summed squares, over images and draws, of the change that each cut makes to first order."""
    read = gradients.read[sub.name].float()
    of_readout = [cut for cut in cuts if cut.change is not None]
    changes = (
        torch.stack([cut.change.flatten() for cut in of_readout if cut.change is not None]) if of_readout else None
    )
    extended = read if sub.readout.bias is None else torch.cat([read, read.new_ones(*read.shape[:-1], 1)], dim=-1)
    of_queries = [_narrowed_read(model, sub, cut, gradients, precision) - read for cut in cuts if cut.change is None]
    weight = units(model, sub.readout.columns, read.shape[-1]).float()
    totals = torch.zeros(len(cuts), dtype=torch.float64, device=read.device)
    readout_cuts = torch.tensor([cut.change is not None for cut in cuts], device=read.device)
    for drawn in gradients.drawn:
        g = drawn[sub.name].float()
        if changes is not None:
            # The gradient of each image's draw by the readout's map, and the change along each cut.
            by_map = torch.einsum("btd,btn->bdn", g, extended).flatten(1)
            totals[readout_cuts] += (by_map @ changes.T).double().square().sum(0)
        if of_queries:
            at_read = g @ weight
            moved = torch.stack([(at_read * difference).sum((1, 2)) for difference in of_queries])
            totals[~readout_cuts] += moved.double().square().sum(1)
    return totals.tolist()


def _narrowed_read(
    model: nn.Module, sub: PresentSublayer, cut: _Cut, gradients: Gradients, precision: torch.dtype
) -> Tensor:
    """What the readout reads with queries and keys cut ``[B, tokens, units]``."""
    assert isinstance(sub, Attention)
    x = gradients.inputs[sub.name]
    with _masked(model, sub, cut), autocast(x.device, precision):
        read = read_by(model, sub, x, gradients.calls[sub.name]).float()
    return in_stream(sub, read, gradients.images)


@contextmanager
def _masked(model: nn.Module, sub: PresentSublayer, cut: _Cut) -> Iterator[None]:
    """The sub-layer with its queries and keys cut, while the context is open."""
    views = {entry: units(model, entry, unit_count(sub.widths, "qk")) for entry in cut.masks}
    before = {entry: view.clone() for entry, view in views.items()}
    try:
        for entry, view in views.items():
            view.index_fill_(entry.axis, (~cut.masks[entry]).nonzero().flatten(), 0.0)
        yield
    finally:
        for entry, view in views.items():
            view.copy_(before[entry])
