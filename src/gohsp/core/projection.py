"""Projection of a sub-layer's weights on the structured sparsity set of given widths (``docs/admm.md``).

The set: at most ``heads`` heads are non-zero, each of them in at most ``qk`` query/key and ``vo`` value
dimensions, and at most ``units`` hidden units are. Three metrics:

- ``data`` minimises the change of what readouts compute on calibration data: units go by optimal-brain-surgeon saliency
  and those that stay take over their work. Only readouts and query/key rows are constrained, since a unit whose readout
  column is zero is gone whatever feeds it.
- ``activation`` zeroes, in every tensor that they couple, the units that are weakest by their readout column's norm
  times the scale of their activation.
- ``norm`` does so by the norm of all their weights.

A projection has two parts: *select* a support, and *project* on it, which is a linear map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gohsp.core.capture import readout_gain, units
from gohsp.core.moments import AttentionMoments, FfnMoments, Moments, SublayerMoments
from gohsp.core.ridge import RIDGE, apply_refit, idle_inputs, refit_map, signed_sums
from gohsp.core.surgeon import BrainSurgeon, select_units
from gohsp.settings import POSITIVE, SHARE, require_settings
from gohsp.structure import (
    Attention,
    AttentionKept,
    AttentionWidths,
    FfnKept,
    FfnWidths,
    Kept,
    Network,
    PresentSublayer,
    Readout,
    Rows,
    SublayerKept,
    SublayerWidths,
    UnitKind,
    UnitSlice,
    Widths,
    is_absent,
    keep_none,
    unit_count,
)

Metric = Literal["data", "activation", "norm"]
Values = dict[UnitSlice, Tensor]
"""A sub-layer's constrained tensors: what each slice holds for all units."""
HeadScores = Mapping[str, tuple[float, ...]]
"""Scores of the heads of each attention, by its name; higher stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairSettings:
    """How units are chosen, and what is left made to do the work of all.

    Attributes:
        guidance: Share of the graph ranking in a head's strength, 0 (none) to 1 (ranking alone): the soft
            pruning guideline of the paper.
        ridge: Ridge of the refits, relative to the mean diagonal entry of the Gram matrix; where it can be, it is the
            start of a search on held-out parts of the calibration images.
    """

    guidance: float = 0.5
    ridge: float = RIDGE

    def __post_init__(self) -> None:
        require_settings(self, "repair", guidance=SHARE, ridge=POSITIVE)


def constrained(model: nn.Module, sub: PresentSublayer, metric: Metric = "data") -> Values:
    """Views of the sub-layer's parameters that take part in the constraint; they share the model's memory."""
    values: Values = {}
    for kind in sub.widths.unit_kinds:
        for entry in sub.slices(kind):
            if metric != "data" or kind == "qk" or entry.axis == 1:
                values[entry] = units(model, entry, unit_count(sub.widths, kind))
    if metric == "data" and (entry := sub.readout.bias_slice):
        values[entry] = units(model, entry, sub.readout.size)
    return values


def readout_map(values: Values, readout: Readout) -> Tensor:
    """A readout's ``[weight | bias]``; without a bias its weight."""
    weight, entry = values[readout.columns], readout.bias_slice
    return weight if entry is None else torch.cat([weight, values[entry][:, None]], dim=1)


def full_map(values: Values, readout: Readout, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A readout's ``[weight | bias]`` and the matching second moment (constant dropped where there is no bias)."""
    weight = readout_map(values, readout)
    return weight, moment[: weight.shape[1], : weight.shape[1]]


def select(
    sub: PresentSublayer,
    values: Values,
    moments: SublayerMoments,
    widths: SublayerWidths,
    settings: RepairSettings,
    *,
    metric: Metric = "data",
    ranking: Tensor | None = None,
    gain: Tensor | None = None,
    present: SublayerKept | None = None,
    hysteresis: float = 0.0,
) -> SublayerKept:
    """Choose the units that stay.

    Args:
        sub: The sub-layer.
        values: Its constrained tensors; in ADMM, ``W + U``.
        moments: Its second moments.
        widths: Widths to keep.
        settings: Guidance and ridge.
        metric: See the module's text.
        ranking: Graph scores ``[heads]``, higher stays; None for no guidance.
        gain: LayerScale vector behind the readout.
        present: The support so far; its units' strengths count ``1 + hysteresis`` fold.
        hysteresis: See ``present``.
    """
    if is_absent(widths):
        return keep_none(sub.widths)
    bonus = _bonus(sub, present, hysteresis, values[sub.readout.columns])
    if isinstance(sub, Attention):
        assert isinstance(widths, AttentionWidths)
        assert isinstance(moments, AttentionMoments)
        return _select_attention(sub, values, moments, widths, settings, metric, ranking, gain, bonus)
    assert isinstance(widths, FfnWidths)
    assert isinstance(moments, FfnMoments)
    if metric == "data":
        weight, gram = full_map(values, sub.readout, moments.read)
        kept = select_units(gram, _scaled(weight, gain), bonus["ffn"], widths.units, ridge=settings.ridge)
        return FfnKept(units=_indices(kept[: sub.widths.units]))
    strength = _squared_norm(values, sub.slices()) if metric == "norm" else _read_strength(sub, values, moments, gain)
    return FfnKept(units=_indices(_top(strength * bonus["ffn"], widths.units)))


def _select_attention(
    sub: Attention,
    values: Values,
    moments: AttentionMoments,
    widths: AttentionWidths,
    settings: RepairSettings,
    metric: Metric,
    ranking: Tensor | None,
    gain: Tensor | None,
    bonus: Mapping[str, Tensor],
) -> AttentionKept:
    grid = (sub.widths.heads, -1)
    if metric == "norm":
        qk = _squared_norm(values, sub.slices("qk")).view(grid) * bonus["qk"]
    else:
        queries = _energy(values, sub.query, moments.inputs)
        qk = (queries * _energy(values, sub.key, moments.key_inputs)).view(grid) * bonus["qk"]
    if metric == "data":
        heads, vo = _select_values_by_data(sub, values, moments, widths, settings, ranking, gain, bonus)
    else:
        norm = metric == "norm"
        strength = _squared_norm(values, sub.slices("vo")) if norm else _read_strength(sub, values, moments, gain)
        vo = strength.view(grid) * bonus["vo"]
        energy = _top(vo, widths.vo).mul(vo).sum(1)
        if norm:  # only then do q/k and v/o strengths have one unit, and the sum is exact
            energy = energy + _top(qk, widths.qk).mul(qk).sum(1)
        heads = _top(blend(energy, ranking, settings.guidance) * bonus["head"], widths.heads)
        vo = _top(vo, widths.vo)
    kept, qk = heads.nonzero().flatten().tolist(), _top(qk, widths.qk)
    return AttentionKept(
        heads=tuple(kept), qk=tuple(_indices(qk[h]) for h in kept), vo=tuple(_indices(vo[h]) for h in kept)
    )


def select_all(
    model: nn.Module,
    network: Network,
    values: Mapping[str, Values],
    moments: Moments,
    widths: Widths,
    settings: RepairSettings,
    *,
    metric: Metric = "data",
    scores: HeadScores | None = None,
    present: Kept | None = None,
    hysteresis: float = 0.0,
) -> dict[str, SublayerKept]:
    """Choose the units that stay in every sub-layer; arguments as of :func:`select`, by name.

    Args:
        model: The model, of which LayerScale is read.
        network: Its description.
        values: Constrained tensors.
        moments: Second moments.
        widths: Widths to keep.
        settings: Guidance and ridge.
        metric: See the module's text.
        scores: Graph scores of heads; None for no guidance.
        present: The support so far.
        hysteresis: Units of the present support count ``1 + hysteresis`` fold.
    """
    kept: dict[str, SublayerKept] = {sub.name: keep_none(sub.widths) for sub in network.sublayers}
    for sub in network.present:
        kept[sub.name] = select(
            sub,
            values[sub.name],
            moments[sub.name],
            widths[sub.name],
            settings,
            metric=metric,
            ranking=ranking_of(sub, scores, values[sub.name][sub.readout.columns].device),
            gain=readout_gain(model, sub.readout),
            present=present[sub.name] if present else None,
            hysteresis=hysteresis,
        )
    return kept


def ranking_of(sub: PresentSublayer, scores: HeadScores | None, device: torch.device) -> Tensor | None:
    """Graph scores ``[heads]`` of an attention; None of anything else, or without scores."""
    return None if scores is None or sub.name not in scores else torch.tensor(scores[sub.name], device=device)


def blend(strength: Tensor, ranking: Tensor | None, guidance: float) -> Tensor:
    """Mix head strengths with graph scores, each normalised to sum 1; the soft guideline."""
    if ranking is None or guidance == 0:
        return strength
    tiny = torch.finfo(strength.dtype).tiny
    strength = strength / strength.sum().clamp_min(tiny)
    ranking = ranking.to(strength) / ranking.to(strength).sum().clamp_min(tiny)
    return (1 - guidance) * strength + guidance * ranking


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def _top(strength: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` strongest along the last axis."""
    index = strength.topk(count, dim=-1).indices
    return torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, index, value=True)


def _scaled(weight: Tensor, gain: Tensor | None) -> Tensor:
    return weight if gain is None else weight * gain[:, None]


def _bonus(sub: PresentSublayer, present: SublayerKept | None, hysteresis: float, like: Tensor) -> dict[str, Tensor]:
    """Factors of hysteresis on the strengths of each kind of unit: heads ``[heads]``, others as they lie."""
    factors: dict[str, Tensor] = {}
    for kind in sub.widths.unit_kinds:
        flat = torch.ones(unit_count(sub.widths, kind), dtype=torch.float64, device=like.device)
        if present is not None:
            flat[present.flat(kind, sub.widths)] = 1 + hysteresis
        factors[kind] = flat
    if isinstance(sub, Attention):
        heads = torch.ones(sub.widths.heads, dtype=torch.float64, device=like.device)
        if isinstance(present, AttentionKept):
            heads[list(present.heads)] = 1 + hysteresis
        grid = {kind: flat.view(sub.widths.heads, -1) for kind, flat in factors.items()}
        return {"head": heads, **grid}
    return factors


def _row_energy(weight: Tensor, moment: Tensor) -> Tensor:
    """``w G w^T`` for each row ``w``."""
    return (weight @ moment).mul(weight).sum(1)


def _rows_map(values: Values, rows: Rows, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[weight | bias]`` and the matching second moment."""
    weight = values[rows.weight]
    if rows.bias is None:
        return weight, moment[:-1, :-1]
    return torch.cat([weight, values[rows.bias][:, None]], dim=1), moment


def _energy(values: Values, rows: Rows, moment: Tensor) -> Tensor:
    """Mean squared activation of the units that ``rows`` make."""
    weight, moment = _rows_map(values, rows, moment)
    return _row_energy(weight.to(moment.dtype), moment)


def _squared_norm(values: Values, slices: tuple[UnitSlice, ...]) -> Tensor:
    """Squared norm of all weights of each unit."""
    parts = [values[s].double().square() for s in slices]
    return torch.stack([p.sum(1 - s.axis) if p.ndim == 2 else p for s, p in zip(slices, parts, strict=True)]).sum(0)


def _read_strength(sub: PresentSublayer, values: Values, moments: SublayerMoments, gain: Tensor | None) -> Tensor:
    """Squared norm of each unit's readout column times the mean square of its activation."""
    norm = _scaled(values[sub.readout.columns], gain).double().square().sum(0)
    return norm * moments.read.diagonal()[:-1]


def _select_values_by_data(
    sub: Attention,
    values: Values,
    moments: AttentionMoments,
    widths: AttentionWidths,
    settings: RepairSettings,
    ranking: Tensor | None,
    gain: Tensor | None,
    bonus: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Heads ``[heads]`` and value dimensions ``[heads, vo]`` that stay, by what their removal costs after refit."""
    have = sub.widths
    heads = torch.ones(have.heads, dtype=torch.bool, device=bonus["head"].device)
    vo = torch.ones_like(bonus["vo"], dtype=torch.bool)
    if widths.heads == have.heads and widths.vo == have.vo:
        return heads, vo
    weight, gram = full_map(values, sub.readout, moments.read)
    grid = torch.arange(have.heads * have.vo, device=heads.device).view(have.heads, have.vo)
    weight = _scaled(weight, gain).masked_fill(idle_inputs(gram, grid.numel()), 0.0)
    surgeon = BrainSurgeon(gram, weight, settings.ridge)
    if widths.heads < have.heads:
        strength = blend(surgeon.group_saliency(grid), ranking, settings.guidance) * bonus["head"]
        heads = _top(strength, widths.heads)
        surgeon.remove(grid[~heads].flatten())
    excess, group = have.vo - widths.vo, max(1, have.vo // 16)
    while excess > 0:
        saliency = surgeon.saliency()[: grid.numel()].view_as(grid) * bonus["vo"]
        saliency[~vo] = torch.inf
        weakest = saliency.topk(min(group, excess), dim=1, largest=False).indices
        vo.scatter_(1, weakest, value=False)
        surgeon.remove(grid.gather(1, weakest)[heads].flatten())
        excess -= weakest.shape[1]
    return heads, vo


@dataclass(frozen=True, slots=True)
class SublayerProjection:
    """Projection on a fixed support; a linear map.

    Attributes:
        kept: The support.
        masks: For each constrained slice that only gets entries zeroed, which units stay.
        readout: The readout that takes over, in the data's metric; else None.
        keep: Which of the readout's inputs ``[n]`` stay.
        takeover: The matrix ``[removed, kept]`` by which they do.
    """

    kept: SublayerKept
    masks: dict[UnitSlice, Tensor]
    readout: Readout | None = None
    keep: Tensor | None = None
    takeover: Tensor | None = None


def on_support(
    sub: PresentSublayer,
    values: Values,
    moments: SublayerMoments,
    kept: SublayerKept,
    settings: RepairSettings,
    *,
    metric: Metric = "data",
) -> SublayerProjection:
    """Make the projection on the support ``kept``."""
    device = values[sub.readout.columns].device

    def mask(kind: UnitKind) -> Tensor:
        keep = torch.zeros(unit_count(sub.widths, kind), dtype=torch.bool, device=device)
        keep[kept.flat(kind, sub.widths)] = True
        return keep

    if metric != "data":
        masks = {kind: mask(kind) for kind in sub.widths.unit_kinds}
        return SublayerProjection(kept, {entry: keep for kind, keep in masks.items() for entry in sub.slices(kind)})
    masks = {}
    if isinstance(sub, Attention) and isinstance(kept, AttentionKept):
        qk = mask("qk")
        # A removed head is gone by its readout columns; its queries and keys need not be pulled anywhere.
        gone = [h for h in range(sub.widths.heads) if h not in kept.heads]
        qk.view(sub.widths.heads, sub.widths.qk)[gone] = True
        masks = dict.fromkeys(sub.query.slices + sub.key.slices, qk)
    _, gram = full_map(values, sub.readout, moments.read)
    keep = mask(sub.widths.unit_kinds[-1])
    count = len(keep)
    keep = torch.cat([keep, keep.new_ones(len(gram) - count)])
    takeover = refit_map(gram, keep, settings.ridge, units=count).float()
    return SublayerProjection(kept, masks, sub.readout, keep, takeover)


def project(projection: SublayerProjection, values: Values) -> Values:
    """Project ``values`` on the support; new tensors."""
    result: Values = {}
    for entry, keep in projection.masks.items():
        value = values[entry]
        result[entry] = value * keep.to(value.dtype).view([-1 if a == entry.axis else 1 for a in range(value.ndim)])
    readout = projection.readout
    if readout is not None and projection.keep is not None and projection.takeover is not None:
        fitted = apply_refit(readout_map(values, readout), projection.keep, projection.takeover)
        count = values[readout.columns].shape[1]
        result[readout.columns] = fitted[:, :count]
        if readout.bias_slice is not None:
            result[readout.bias_slice] = fitted[:, count]
    return result


def squared_size(
    sub: PresentSublayer, values: Values, moments: SublayerMoments, metric: Metric, *, probes: int | None = None
) -> float:
    """Squared norm of a sub-layer's constrained tensors (or of a difference of such) in the metric.

    In the data's metric, computed in the moments' precision.

    Args:
        sub: The sub-layer.
        values: The tensors.
        moments: Its second moments.
        metric: The metric.
        probes: In the data's metric, estimate each trace ``tr(W G W^T)`` from this many random signed sums of the rows
            of ``W`` (Hutchinson 1990): unbiased, at a cost that no longer grows with their number. None for the exact
            norm.
    """
    if metric != "data":
        return float(sum(v.double().square().sum() for v in values.values()))
    parts = [full_map(values, sub.readout, moments.read)]
    if isinstance(sub, Attention) and isinstance(moments, AttentionMoments):
        parts += [_rows_map(values, sub.query, moments.inputs), _rows_map(values, sub.key, moments.key_inputs)]
    total = torch.zeros((), dtype=torch.float64)
    for weight, gram in parts:
        rows = weight.to(gram.dtype)
        if probes is not None:
            rows = signed_sums(probes, len(rows)).to(rows) @ rows
        total += _row_energy(rows, gram).sum().cpu()
    return float(total)
