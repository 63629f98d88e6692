"""Projection of a block's weights on the structured sparsity set of a plan (design, section 5).

The set: at most ``heads`` heads are non-zero, each of them in at most ``qk`` query/key and ``vo`` value
dimensions, and at most ``ffn`` hidden units are. Two metrics:

- ``euclidean`` zeroes the units that are weakest, in every tensor that they couple;
- ``data`` minimises the change of what the block's readouts compute on calibration data: units go by
  optimal-brain-surgeon saliency and those that stay take over their work. Only readouts and query/key rows
  are constrained, since a unit whose readout column is zero is gone whatever feeds it.

A projection has two parts: *select* a support, and *project* on it, which is a linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gohsp.core.activations import readout_gain, units
from gohsp.core.compensation import (
    RIDGE,
    BlockMoments,
    BrainSurgeon,
    apply_refit,
    idle_inputs,
    refit_map,
    select_units,
    signed_sums,
)
from gohsp.settings import POSITIVE, SHARE, require_settings
from gohsp.structure import BlockPlan, BlockShape, BlockStructure, ModelStructure, Plan, Readout, UnitSlice

Metric = Literal["data", "euclidean"]
Strength = Literal["activation", "norm"]
Values = dict[UnitSlice, Tensor]
"""A block's constrained tensors: what each slice holds for all units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionSettings:
    """How units are compared and weights projected.

    Attributes:
        metric: See the module's text.
        strength: In the Euclidean metric, a unit's strength: its weights' norm, or its readout column's norm
            times the scale of its activation.
        guidance: Share of the graph ranking in a head's strength, 0 (none) to 1 (ranking alone): the soft
            pruning guideline of the paper.
        ridge: Ridge of the refits, relative to the mean diagonal entry of the Gram matrix.
        attention_fisher: Share of the weight of tokens, in what attention writes, that follows the Fisher
            information of the predictions; the rest is spread evenly.
        ffn_fisher: The same in what FFNs write.
    """

    metric: Metric = "data"
    strength: Strength = "activation"
    guidance: float = 0.5
    ridge: float = RIDGE
    attention_fisher: float = 0.3
    ffn_fisher: float = 0.0

    def __post_init__(self) -> None:
        require_settings(
            self, "admm.projection", guidance=SHARE, ridge=POSITIVE, attention_fisher=SHARE, ffn_fisher=SHARE
        )


def bias_slice(readout: Readout) -> UnitSlice | None:
    """The readout's bias, as a slice of ``size`` entries, or None."""
    return UnitSlice(parameter=readout.bias, axis=0, start=0, size=1) if readout.bias else None


def constrained(model: nn.Module, block: BlockStructure, metric: Metric) -> Values:
    """Views of the block's parameters that take part in the constraint; they share the model's memory."""
    shape = block.shape
    counts = {"qk": shape.heads * shape.qk, "vo": shape.heads * shape.vo, "ffn": shape.ffn}
    values: Values = {}
    for kind, count in counts.items():
        for entry in block.slices(kind):  # type: ignore[arg-type]
            if metric == "euclidean" or kind == "qk" or entry.axis == 1:
                values[entry] = units(model, entry, count)
    if metric == "data":
        for readout in (block.attention_readout, block.ffn_readout):
            if entry := bias_slice(readout):
                values[entry] = units(model, entry, readout.size)
    return values


def readout_map(values: Values, readout: Readout) -> Tensor:
    """A readout's ``[weight | bias]``; without a bias its weight."""
    weight, entry = values[readout.columns], bias_slice(readout)
    return weight if entry is None else torch.cat([weight, values[entry][:, None]], dim=1)


def full_map(values: Values, readout: Readout, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A readout's ``[weight | bias]`` and the matching second moment (constant dropped where there is no bias)."""
    entry = bias_slice(readout)
    return _full_map(values, (readout.columns, entry) if entry else (readout.columns,), moment)


def _full_map(values: Values, slices: tuple[UnitSlice, ...], moment: Tensor) -> tuple[Tensor, Tensor]:
    """The same for ``slices``: a weight, then its bias if it has one."""
    weight = values[slices[0]]
    if len(slices) == 1:
        return weight, moment[:-1, :-1]
    return torch.cat([weight, values[slices[1]][:, None]], dim=1), moment


def select(
    block: BlockStructure,
    values: Values,
    moments: BlockMoments,
    shape: BlockShape,
    settings: ProjectionSettings,
    *,
    ranking: Tensor | None = None,
    gains: tuple[Tensor | None, Tensor | None] = (None, None),
    present: BlockPlan | None = None,
    hysteresis: float = 0.0,
) -> BlockPlan:
    """Choose the units that stay.

    Args:
        block: The block.
        values: Its constrained tensors; in ADMM, ``W + U``.
        moments: Its second moments.
        shape: Widths to keep.
        settings: Metric, strength and guidance.
        ranking: Graph scores ``[heads]``, higher stays; None for no guidance.
        gains: LayerScale vectors behind the two readouts.
        present: The support so far; its units' strengths count ``1 + hysteresis`` fold.
        hysteresis: See ``present``.
    """
    bonus = _bonus(block, present, hysteresis, values[block.ffn_readout.columns])
    qk = _grid_strength(block, values, moments, settings, "qk") * bonus.qk
    if settings.metric == "data":
        heads, vo = _select_values_by_data(block, values, moments, shape, settings, ranking, gains[0], bonus)
        weight, gram = full_map(values, block.ffn_readout, moments.hidden)
        ffn = select_units(gram, _scaled(weight, gains[1]), bonus.ffn, shape.ffn, ridge=settings.ridge)
        ffn = ffn[: block.shape.ffn]
    else:
        vo = _grid_strength(block, values, moments, settings, "vo", gains[0]) * bonus.vo
        energy = _top(vo, shape.vo).mul(vo).sum(1)
        if settings.strength == "norm":  # only then do q/k and v/o strengths have one unit, and the sum is exact
            energy = energy + _top(qk, shape.qk).mul(qk).sum(1)
        heads = _top(blend(energy, ranking, settings.guidance) * bonus.heads, shape.heads)
        vo = _top(vo, shape.vo)
        ffn = _top(_ffn_strength(block, values, moments, settings, gains[1]) * bonus.ffn, shape.ffn)
    kept = heads.nonzero().flatten().tolist()
    qk = _top(qk, shape.qk)
    return BlockPlan(
        heads=tuple(kept),
        qk=tuple(_indices(qk[h]) for h in kept),
        vo=tuple(_indices(vo[h]) for h in kept),
        ffn=_indices(ffn),
    )


def select_plan(
    model: nn.Module,
    structure: ModelStructure,
    values: Sequence[Values],
    moments: Sequence[BlockMoments],
    shapes: Sequence[BlockShape],
    settings: ProjectionSettings,
    *,
    scores: Sequence[Sequence[float]] | None = None,
    present: Plan | None = None,
    hysteresis: float = 0.0,
) -> Plan:
    """Choose the units that stay in every block.

    Args:
        model: The model, of which LayerScale is read.
        structure: Its structure.
        values: Constrained tensors by block.
        moments: Second moments by block.
        shapes: Widths to keep, by block.
        settings: Metric, strength and guidance.
        scores: Graph scores by block and head, higher stays; None for no guidance.
        present: The support so far.
        hysteresis: Units of the present support count ``1 + hysteresis`` fold.
    """
    device = next(model.parameters()).device
    return Plan(
        tuple(
            select(
                block,
                values[i],
                moments[i],
                shapes[i],
                settings,
                ranking=None if scores is None else torch.tensor(scores[i], device=device),
                gains=(readout_gain(model, block.attention_readout), readout_gain(model, block.ffn_readout)),
                present=present.blocks[i] if present else None,
                hysteresis=hysteresis,
            )
            for i, block in enumerate(structure.blocks)
        )
    )


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


@dataclass(frozen=True, slots=True)
class _Bonus:
    """Factors of hysteresis on the strengths of each kind of unit."""

    heads: Tensor
    qk: Tensor
    vo: Tensor
    ffn: Tensor


def _bonus(block: BlockStructure, present: BlockPlan | None, hysteresis: float, like: Tensor) -> _Bonus:
    shape = block.shape
    heads = torch.ones(shape.heads, dtype=torch.float64, device=like.device)
    qk = heads.new_ones(shape.heads, shape.qk)
    vo = heads.new_ones(shape.heads, shape.vo)
    ffn = heads.new_ones(shape.ffn)
    if present is not None and hysteresis > 0:
        factor = 1 + hysteresis
        heads[list(present.heads)] = factor
        qk.view(-1)[present.units("qk", shape)] = factor
        vo.view(-1)[present.units("vo", shape)] = factor
        ffn[list(present.ffn)] = factor
    return _Bonus(heads, qk, vo, ffn)


def _row_energy(weight: Tensor, moment: Tensor) -> Tensor:
    """``w G w^T`` for each row ``w``."""
    return (weight @ moment).mul(weight).sum(1)


def _energy(values: Values, slices: tuple[UnitSlice, ...], moment: Tensor) -> Tensor:
    """Mean squared activation of the units that ``slices`` make."""
    weight, moment = _full_map(values, slices, moment)
    return _row_energy(weight.to(moment.dtype), moment)


def _squared_norm(values: Values, slices: tuple[UnitSlice, ...]) -> Tensor:
    """Squared norm of all weights of each unit."""
    parts = [values[s].double().square() for s in slices]
    return torch.stack([p.sum(1 - s.axis) if p.ndim == 2 else p for s, p in zip(slices, parts, strict=True)]).sum(0)


def _grid_strength(
    block: BlockStructure,
    values: Values,
    moments: BlockMoments,
    settings: ProjectionSettings,
    kind: Literal["qk", "vo"],
    gain: Tensor | None = None,
) -> Tensor:
    """Squared strengths ``[heads, width]`` of query/key or value units."""
    if settings.metric == "euclidean" and settings.strength == "norm":
        flat = _squared_norm(values, block.slices(kind))
    elif kind == "qk":
        flat = _energy(values, block.query, moments.attention_input)
        flat = flat * _energy(values, block.key, moments.key_input)
    else:
        norm = _scaled(values[block.attention_readout.columns], gain).double().square().sum(0)
        flat = norm * moments.head_outputs.diagonal()[:-1]
    return flat.view(block.shape.heads, -1)


def _ffn_strength(
    block: BlockStructure, values: Values, moments: BlockMoments, settings: ProjectionSettings, gain: Tensor | None
) -> Tensor:
    if settings.strength == "norm":
        return _squared_norm(values, block.slices("ffn"))
    norm = _scaled(values[block.ffn_readout.columns], gain).double().square().sum(0)
    return norm * moments.hidden.diagonal()[:-1]


def _select_values_by_data(
    block: BlockStructure,
    values: Values,
    moments: BlockMoments,
    shape: BlockShape,
    settings: ProjectionSettings,
    ranking: Tensor | None,
    gain: Tensor | None,
    bonus: _Bonus,
) -> tuple[Tensor, Tensor]:
    """Heads ``[heads]`` and value dimensions ``[heads, vo]`` that stay, by what their removal costs after refit."""
    have = block.shape
    heads = torch.ones(have.heads, dtype=torch.bool, device=bonus.heads.device)
    vo = torch.ones_like(bonus.vo, dtype=torch.bool)
    if shape.heads == have.heads and shape.vo == have.vo:
        return heads, vo
    weight, gram = full_map(values, block.attention_readout, moments.head_outputs)
    grid = torch.arange(have.heads * have.vo, device=heads.device).view(have.heads, have.vo)
    weight = _scaled(weight, gain).masked_fill(idle_inputs(gram, grid.numel()), 0.0)
    surgeon = BrainSurgeon(gram, weight, settings.ridge)
    if shape.heads < have.heads:
        strength = blend(surgeon.group_saliency(grid), ranking, settings.guidance) * bonus.heads
        heads = _top(strength, shape.heads)
        surgeon.remove(grid[~heads].flatten())
    excess, group = have.vo - shape.vo, max(1, have.vo // 16)
    while excess > 0:
        saliency = surgeon.saliency()[: grid.numel()].view_as(grid) * bonus.vo
        saliency[~vo] = torch.inf
        weakest = saliency.topk(min(group, excess), dim=1, largest=False).indices
        vo.scatter_(1, weakest, value=False)
        surgeon.remove(grid.gather(1, weakest)[heads].flatten())
        excess -= weakest.shape[1]
    return heads, vo


@dataclass(frozen=True, slots=True)
class BlockProjection:
    """Projection on a fixed support; a linear map.

    Attributes:
        plan: The support.
        masks: For each constrained slice that only gets entries zeroed, which units stay.
        takeovers: For each readout in the data metric, ``(readout, keep [n], matrix [removed, kept])``.
    """

    plan: BlockPlan
    masks: dict[UnitSlice, Tensor]
    takeovers: tuple[tuple[Readout, Tensor, Tensor], ...]


def on_support(
    block: BlockStructure,
    values: Values,
    moments: BlockMoments,
    plan: BlockPlan,
    settings: ProjectionSettings,
) -> BlockProjection:
    """Make the projection on the support ``plan``."""
    shape, device = block.shape, values[block.ffn_readout.columns].device

    def mask(kind: Literal["qk", "vo", "ffn"], count: int) -> Tensor:
        keep = torch.zeros(count, dtype=torch.bool, device=device)
        keep[plan.units(kind, shape)] = True
        return keep

    qk, vo = mask("qk", shape.heads * shape.qk), mask("vo", shape.heads * shape.vo)
    ffn = mask("ffn", shape.ffn)
    if settings.metric == "euclidean":
        masks = {entry: keep for kind, keep in (("qk", qk), ("vo", vo), ("ffn", ffn)) for entry in block.slices(kind)}  # type: ignore[arg-type]
        return BlockProjection(plan, masks, ())
    # A removed head is gone by its readout columns; its queries and keys need not be pulled anywhere.
    gone = [h for h in range(shape.heads) if h not in plan.heads]
    qk.view(shape.heads, shape.qk)[gone] = True
    takeovers = []
    for readout, keep, moment in (
        (block.attention_readout, vo, moments.head_outputs),
        (block.ffn_readout, ffn, moments.hidden),
    ):
        _, gram = full_map(values, readout, moment)
        count = len(keep)
        keep = torch.cat([keep, keep.new_ones(len(gram) - count)])
        takeovers.append((readout, keep, refit_map(gram, keep, settings.ridge, units=count).float()))
    return BlockProjection(plan, dict.fromkeys(block.query + block.key, qk), tuple(takeovers))


def project(projection: BlockProjection, values: Values) -> Values:
    """Project ``values`` on the support; new tensors."""
    result: Values = {}
    for entry, keep in projection.masks.items():
        value = values[entry]
        result[entry] = value * keep.to(value.dtype).view([-1 if a == entry.axis else 1 for a in range(value.ndim)])
    for readout, keep, takeover in projection.takeovers:
        fitted, entry = apply_refit(readout_map(values, readout), keep, takeover), bias_slice(readout)
        units_ = values[readout.columns].shape[1]
        result[readout.columns] = fitted[:, :units_]
        if entry is not None:
            result[entry] = fitted[:, units_]
    return result


def squared_size(
    block: BlockStructure, values: Values, moments: BlockMoments, metric: Metric, *, probes: int | None = None
) -> float:
    """Squared norm of a block's constrained tensors (or of a difference of such) in the metric.

    In the data's metric, computed in the moments' precision.

    Args:
        block: The block.
        values: The tensors.
        moments: Its second moments.
        metric: The metric.
        probes: In the data's metric, estimate each trace ``tr(W G W^T)`` from this many random signed sums of the rows
            of ``W`` (Hutchinson 1990): unbiased, at a cost that no longer grows with their number. None for the exact
            norm.
    """
    if metric == "euclidean":
        return float(sum(v.double().square().sum() for v in values.values()))
    parts = [
        _full_map(values, block.query, moments.attention_input),
        _full_map(values, block.key, moments.key_input),
        full_map(values, block.attention_readout, moments.head_outputs),
        full_map(values, block.ffn_readout, moments.hidden),
    ]
    total = torch.zeros((), dtype=torch.float64)
    for weight, gram in parts:
        rows = weight.to(gram.dtype)
        if probes is not None:
            rows = signed_sums(probes, len(rows)).to(rows) @ rows
        total += _row_energy(rows, gram).sum().cpu()
    return float(total)
