"""Cutting block by block, each repaired against the dense model's residual stream (design, section 6).

A block is calibrated on what the already pruned blocks before it really send, and fitted to where the dense
model's residual stream is at the same depth, so that errors are repaired and not passed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core.activations import evaluating, inputs_of, readout_gain, require_finite, units
from gohsp.core.compensation import (
    BlockMoments,
    InputFitter,
    Regression,
    RegressionFitter,
    cross_validated_ridge,
    refit,
    residual_refit,
    select_units,
    signed_sums,
)
from gohsp.core.fisher import TokenWeights
from gohsp.core.projection import ProjectionSettings, Values, constrained, on_support, project, readout_map, select
from gohsp.core.rotation import rotate_queries_keys, rotate_values
from gohsp.structure import (
    BlockPlan,
    BlockShape,
    BlockStructure,
    ModelStructure,
    Plan,
    Readout,
    check_shapes,
    dense_block_plan,
)

logger = logging.getLogger(__name__)

PROBES = 64
"""Random sums of outputs on which ridges are compared."""

Store = Callable[[], MutableSequence[Tensor]]
"""Makes an empty place for batches of a residual stream; ``list`` keeps them in memory."""


@torch.no_grad()
def reconstruct(
    dense: nn.Module,
    model: nn.Module,
    structure: ModelStructure,
    shapes: Sequence[BlockShape],
    embedded: Iterable[Tensor],
    scores: Sequence[Sequence[float]] | None,
    settings: ProjectionSettings,
    *,
    support: Plan | None = None,
    weights: Sequence[TokenWeights] | None = None,
    precision: torch.dtype = torch.float32,
    store: Store = list,
    advance: Callable[[], None] = lambda: None,
) -> Plan:
    """Put ``model`` on the sparsity set of ``shapes``, first block to last.

    In each block queries and keys go first, then heads and values, then FFN units. Before each of the latter two
    cuts the readout is fitted to the dense stream, so that what is selected and refitted is the best full map.

    Args:
        dense: The model to stay close to (after ADMM, which has moved it, the trained one); left as it is.
        model: A copy of it; changed in place, its shapes stay.
        structure: Structure of both.
        shapes: Widths to reach.
        embedded: What enters the first block, in batches ``[B, tokens, D]``; the same for both models.
        scores: Graph scores by block and head; None for no guidance.
        settings: Guidance, ridge; the metric is the data's, whatever they say.
        support: The units to keep, where they are chosen already (by ADMM); None selects them, in a basis that
            is rotated anew.
        weights: How much each token counts; None counts all alike.
        precision: Data type of the forward passes; below float32 by autocast.
        store: Where streams are kept between blocks.
        advance: Called once per block.

    Returns:
        The plan, ready for compaction.

    Raises:
        PlanError: ``shapes`` do not fit the structure.
        NonFiniteError: An activation is NaN or infinite.
    """
    check_shapes(structure, shapes)
    settings = replace(settings, metric="data")
    target, middle, stream = store(), store(), store()
    for batch in embedded:
        target.append(batch)
        middle.append(batch)
        stream.append(batch)
    plans = []
    with evaluating(dense), evaluating(model):
        for i, block in enumerate(structure.blocks):
            ranking = None if scores is None else scores[i]
            kept = support.blocks[i] if support else None
            work = _Block(dense, model, block, settings, precision, ranking, kept)
            plans.append(
                work.reconstruct(shapes[i], weights[i] if weights else TokenWeights(None, None), target, middle, stream)
            )
            advance()
    return Plan(tuple(plans))


class _Block:
    """One block of the model and its dense original."""

    def __init__(
        self,
        dense: nn.Module,
        model: nn.Module,
        block: BlockStructure,
        settings: ProjectionSettings,
        precision: torch.dtype,
        scores: Sequence[float] | None,
        support: BlockPlan | None,
    ) -> None:
        self.dense, self.model, self.block = dense, model, block
        self.settings, self.precision = settings, precision
        self.device = next(model.parameters()).device
        self.ranking = None if scores is None else torch.tensor(scores, device=self.device)
        self.support = support
        self.attention, self.ffn = block.attention_readout, block.ffn_readout

    def reconstruct(
        self,
        shape: BlockShape,
        weights: TokenWeights,
        target: MutableSequence[Tensor],
        middle: MutableSequence[Tensor],
        stream: MutableSequence[Tensor],
    ) -> BlockPlan:
        """Cut and repair the block; the streams enter as before it and leave as after it."""
        have, dim = self.block.shape, self.attention.size
        inputs = InputFitter(dim, self.device)
        for b in range(len(stream)):
            before = target[b].to(self.device)
            z, h = self.inputs(self.dense, before, self.attention, self.ffn)
            for readout, read in ((self.attention, z), (self.ffn, h)):  # squares, since moments will hold these
                require_finite(f"the input of module '{readout.module}'", read.float().square().sum())
            between = before + branch(self.dense, self.attention, z)
            middle[b], target[b] = between, between + branch(self.dense, self.ffn, h)
            (x,) = self.inputs(self.model, stream[b].to(self.device), self.block.attention)
            inputs.update(x)
        require_finite(f"the input of module '{self.block.attention}'", inputs.moment, cut=True)
        moments = BlockMoments(
            inputs.moment, inputs.within, self.unmeasured(have.heads * have.vo), self.unmeasured(have.ffn)
        )
        if shape.qk < have.qk and self.support is None:
            rotate_queries_keys(self.model, self.block, moments)
        by_query = self.selected(moments, replace(have, qk=shape.qk), "qk", self.settings.ridge)
        self.project(moments, by_query, self.settings.ridge)

        fit = RegressionFitter(have.heads * have.vo, dim, self.device, weights.attention)
        for b in range(len(stream)):
            before = stream[b].to(self.device)
            (z,) = self.inputs(self.model, before, self.attention)
            fit.update(z, middle[b].to(self.device) - before)
        self.repair(self.attention, fit)
        moments = replace(moments, head_outputs=fit.total.gram)
        if shape.vo < have.vo and self.support is None:
            moments = rotate_values(self.model, self.block, moments)
        by_value = self.selected(moments, replace(have, heads=shape.heads, vo=shape.vo), "vo", self.settings.ridge)
        self.project(moments, by_value, self.settings.ridge)

        fit = RegressionFitter(have.ffn, dim, self.device, weights.ffn)
        for b in range(len(stream)):
            before = stream[b].to(self.device)
            z, h = self.inputs(self.model, before, self.attention, self.ffn)
            stream[b] = between = before + branch(self.model, self.attention, z)
            middle[b] = h  # needed once more below, when the readout is known
            fit.update(h, target[b].to(self.device) - between)
        total = fit.total
        moments = replace(moments, hidden=total.gram)
        ridge = self.repair(self.ffn, fit, self.kept_units(shape.ffn, total))
        by_unit = self.selected(moments, replace(have, ffn=shape.ffn), "ffn", ridge)
        self.project(moments, by_unit, ridge)
        for b in range(len(stream)):
            stream[b] = after = stream[b].to(self.device) + branch(self.model, self.ffn, middle[b].to(self.device))
            require_finite(f"the output of module '{self.block.name}'", after, cut=True)
        if self.support is not None:
            return self.support
        queries = dict(zip(by_query.heads, by_query.qk, strict=True))
        return BlockPlan(
            heads=by_value.heads, qk=tuple(queries[h] for h in by_value.heads), vo=by_value.vo, ffn=by_unit.ffn
        )

    def unmeasured(self, width: int) -> Tensor:
        """Stands for a moment that is measured further on and not read before."""
        return torch.zeros((), dtype=torch.float64, device=self.device).expand(width + 1, width + 1)

    def inputs(self, model: nn.Module, x: Tensor, *of: Readout | str) -> tuple[Tensor, ...]:
        """What the named modules read when the block is given ``x``; nothing behind the last of them is computed."""
        names = [o if isinstance(o, str) else o.module for o in of]
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return inputs_of(model, self.block.name, x, names)

    def selected(
        self, moments: BlockMoments, shape: BlockShape, kind: Literal["qk", "vo", "ffn"], ridge: float
    ) -> BlockPlan:
        """What stays of the block where ``shape``, which differs from the present one in ``kind`` alone, is allowed."""
        if self.support is not None:
            return only(self.support, kind, self.block.shape)
        settings = replace(self.settings, ridge=ridge)
        values = constrained(self.model, self.block, settings.metric)
        gains = (readout_gain(self.model, self.attention), readout_gain(self.model, self.ffn))
        return select(self.block, values, moments, shape, settings, ranking=self.ranking, gains=gains)

    def kept_units(self, count: int, total: Regression) -> Tensor:
        """Mask of the FFN's hidden units that would stay at the settings' ridge, for choosing a better one."""
        if self.support is not None:
            kept = torch.zeros(self.block.shape.ffn, dtype=torch.bool, device=total.gram.device)
            kept[list(self.support.ffn)] = True
            return kept
        require_finite(f"the input of module '{self.ffn.module}'", total.gram, cut=True)
        present, total = self.present_map(self.ffn, total)
        bonus = torch.ones(self.block.shape.ffn, dtype=torch.float64, device=present.device)
        fitted = residual_refit(total, present, self.settings.ridge)
        return select_units(total.gram, fitted, bonus, count, ridge=self.settings.ridge)[: len(bonus)]

    def project(self, moments: BlockMoments, kept: BlockPlan, ridge: float) -> None:
        """Put the block on the support ``kept``, in place."""
        settings = replace(self.settings, ridge=ridge)
        values = constrained(self.model, self.block, settings.metric)
        for entry, value in project(on_support(self.block, values, moments, kept, settings), values).items():
            values[entry].copy_(value)

    def present_map(self, readout: Readout, fit: Regression) -> tuple[Tensor, Regression]:
        """A readout's present map with its LayerScale, and the regression on what that map reads."""
        weight = readout_map(constrained(self.model, self.block, self.settings.metric), readout)
        gain = readout_gain(self.model, readout)
        return weight if gain is None else weight * gain[:, None], fit.first(weight.shape[1])

    def repair(self, readout: Readout, fit: RegressionFitter, kept: Tensor | None = None) -> float:
        """Fit a readout to its target, nothing cut yet, in place; LayerScale stays.

        Args:
            readout: The readout.
            fit: Its inputs and target.
            kept: Mask of the units that will stay; None if that is not known yet.

        Returns:
            The ridge that held up best on folds, for the map on the inputs that stay where that is known.
        """
        total = fit.total
        require_finite(f"the input of module '{readout.module}'", total.gram, cut=True)
        present, total = self.present_map(readout, total)
        n = present.shape[1]
        keep = None if kept is None else torch.cat([kept, kept.new_ones(n - len(kept))])

        # A fit to sums of targets is that sum of the fits: their errors tell ridges apart at a fraction of the cost.
        sums = signed_sums(PROBES, len(present)).to(present)
        before = sums @ present

        def cut(part: Regression, ridge: float) -> Tensor:
            whole = residual_refit(part, before, ridge)
            return whole if keep is None else refit(part.gram, whole, keep, ridge)

        splits = [(rest.first(n).of_sums(sums), held_out.first(n).of_sums(sums)) for rest, held_out in fit.splits()]
        ridge = cross_validated_ridge(splits, cut, self.settings.ridge)
        self.write(readout, residual_refit(total, present, ridge).float())
        logger.info("%s: ridge %.2g", readout.module, ridge)
        return ridge

    def write(self, readout: Readout, fitted: Tensor) -> None:
        """Make ``fitted`` the readout's map, LayerScale included; a channel that LayerScale shuts off stays."""
        values: Values = constrained(self.model, self.block, self.settings.metric)
        columns, gain = values[readout.columns], readout_gain(self.model, readout)
        if gain is not None:
            fitted = torch.where(gain[:, None] != 0, fitted / gain[:, None], readout_map(values, readout))
        columns.copy_(fitted[:, : columns.shape[1]])
        if readout.bias:
            self.model.get_parameter(readout.bias).copy_(fitted[:, -1])


def only(plan: BlockPlan, kind: Literal["qk", "vo", "ffn"], shape: BlockShape) -> BlockPlan:
    """A plan that cuts what ``plan`` cuts of ``kind`` and keeps everything else of a block of ``shape``."""
    everything = dense_block_plan(shape)
    if kind == "ffn":
        return replace(everything, ffn=plan.ffn)
    if kind == "vo":
        return replace(everything, heads=plan.heads, qk=everything.qk[: len(plan.heads)], vo=plan.vo)
    kept = dict(zip(plan.heads, plan.qk, strict=True))
    # A head that goes loses its queries with its values; until then any of them will do.
    return replace(everything, qk=tuple(kept.get(h, plan.qk[0]) for h in everything.heads))


def branch(model: nn.Module, readout: Readout, inputs: Tensor) -> Tensor:
    """What a readout adds to the residual stream ``[B, tokens, D]``, in float32."""
    weight = units(model, readout.columns, inputs.shape[-1]).float()
    bias = model.get_parameter(readout.bias).detach().float() if readout.bias else None
    written = F.linear(inputs.float(), weight, bias)
    gain = readout_gain(model, readout)
    return written if gain is None else written * gain
