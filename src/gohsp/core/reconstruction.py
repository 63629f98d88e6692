"""Cutting sub-layer by sub-layer, each repaired against the dense model's residual stream (``docs/oneshot.md``).

A sub-layer is calibrated on what the already pruned ones before it really send, and fitted to where the dense model's
residual stream is at the same depth, so that errors are repaired and not passed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gohsp.core.capture import (
    Trunk,
    autocast,
    behind,
    device_of,
    evaluating,
    in_stream,
    readout_gain,
    require_finite,
    rows_of_input,
    wanted,
)
from gohsp.core.fisher import TokenWeights
from gohsp.core.moments import (
    AttentionMoments,
    FfnMoments,
    InputFitter,
    Regression,
    RegressionFitter,
    SublayerMoments,
)
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
from gohsp.core.ridge import cross_validated_ridge, refit, residual_refit, signed_sums
from gohsp.core.rotation import rotate_queries_keys, rotate_values
from gohsp.core.surgeon import select_units
from gohsp.structure import (
    Absent,
    Attention,
    AttentionKept,
    AttentionWidths,
    Ffn,
    FfnKept,
    Kept,
    Network,
    PresentSublayer,
    Readout,
    Sublayer,
    SublayerKept,
    SublayerWidths,
    Widths,
    check_widths,
    is_absent,
    keep_all,
    keep_none,
    unit_count,
)

logger = logging.getLogger(__name__)

PROBES = 64
"""Random sums of outputs on which ridges are compared."""

Store = Callable[[], MutableSequence[Tensor]]
"""Makes an empty place for batches of a residual stream; ``list`` keeps them in memory."""


@torch.no_grad()
def reconstruct(
    dense: Trunk,
    model: nn.Module,
    network: Network,
    widths: Widths,
    entered: Iterable[Tensor],
    scores: HeadScores | None,
    settings: RepairSettings,
    *,
    support: Kept | None = None,
    weights: TokenWeights | None = None,
    precision: torch.dtype = torch.float32,
    store: Store = list,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, SublayerKept]:
    """Put ``model`` on the sparsity set of ``widths``, first sub-layer to last.

    In an attention queries and keys go first, then heads and values. Before heads, values and hidden units go, the
    readout is fitted to the dense stream, so that what is selected and refitted is the best full map.

    Args:
        dense: The blocks of the model to stay close to (after ADMM, which has moved it, the trained one); left as is.
        model: A copy of it; changed in place, its shapes stay.
        network: Description of both.
        widths: Widths to reach.
        entered: What enters the first block, in batches ``[B, tokens, D]``; the same for both models.
        scores: Graph scores of heads; None for no guidance.
        settings: Guidance, ridge.
        support: The units to keep, where they are chosen already (by ADMM); None selects them, in a basis that
            is rotated anew.
        weights: How much each token counts; None counts all alike.
        precision: Data type of the forward passes; below float32 by autocast.
        store: Where streams are kept between blocks.
        advance: Called once per block.

    Returns:
        What stays, ready for compaction.

    Raises:
        PlanError: ``widths`` do not fit the network.
        NonFiniteError: An activation is NaN or infinite.
    """
    check_widths(network, widths)
    work = _Work(dense, dense.of(model), settings, precision, scores, support, weights or {}, store, widths)
    target, stream = store(), store()
    for batch in entered:
        target.append(batch)
        stream.append(batch)
    kept: dict[str, SublayerKept] = {}
    with evaluating(dense.model), evaluating(model):
        for index, subs in enumerate(network.blocks.values()):
            kept |= work.block(index, subs, target, stream)
            advance()
    return kept


@dataclass(frozen=True)
class _Work:
    """What every sub-layer is cut and repaired with."""

    dense: Trunk
    student: Trunk
    settings: RepairSettings
    precision: torch.dtype
    scores: HeadScores | None
    support: Kept | None
    weights: TokenWeights
    store: Store
    widths: Widths

    @property
    def model(self) -> nn.Module:
        """The model that is changed."""
        return self.student.model

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return device_of(self.model)

    def block(
        self, index: int, subs: Sequence[Sublayer], target: MutableSequence[Tensor], stream: MutableSequence[Tensor]
    ) -> dict[str, SublayerKept]:
        """Cut and repair a block's sub-layers; both streams enter as before the block and leave as after it."""
        if index in self.student.crossings:
            for b in range(len(stream)):
                stream[b] = self.student.onto(index, stream[b].to(self.device))
                target[b] = self.dense.onto(index, target[b].to(self.device))
        goals = self.goals(index, subs, target)
        kept = {sub.name: keep_none(sub.widths) for sub in subs if isinstance(sub, Absent)}
        # What a cut FFN reads does not change with its readout: behind the last one, no pass is needed any more.
        hidden = self.store() if isinstance(subs[-1], Ffn) else None
        for sub in subs:
            if not isinstance(sub, Absent):
                site = _Site(self, index, tuple(subs[: subs.index(sub)]), sub, hidden if sub is subs[-1] else None)
                kept[sub.name] = site.reconstruct(goals[sub.name], stream)
        for b in range(len(stream)):
            before = stream[b].to(self.device)
            if hidden is None:
                left, read = subs, self.read(self.student, index, before, subs)
            else:
                left, read = subs[-1:], [hidden[b].to(self.device)]
            stream[b] = after = self.summed(self.model, before, left, read)
            require_finite(f"the output of block '{subs[0].block}'", after, cut=True)
        return kept

    def goals(
        self, index: int, subs: Sequence[Sublayer], target: MutableSequence[Tensor]
    ) -> dict[str, MutableSequence[Tensor]]:
        """The dense stream behind each sub-layer; ``target`` becomes that behind the last."""
        goals = {sub.name: self.store() for sub in subs[:-1]} | {subs[-1].name: target}
        for b in range(len(target)):
            goal = target[b].to(self.device)
            for sub, z in zip(subs, self.read(self.dense, index, goal, subs), strict=True):
                if z is not None:  # squares, since moments will hold these
                    require_finite(f"the input of module '{sub.readout.module}'", z.float().square().sum())
                goal = self.summed(self.dense.model, goal, [sub], [z])
                if sub is subs[-1]:
                    target[b] = goal
                else:
                    goals[sub.name].append(goal)
        return goals

    def summed(
        self, model: nn.Module, stream: Tensor, subs: Sequence[Sublayer], read: Sequence[Tensor | None]
    ) -> Tensor:
        """The stream behind sub-layers, by what their readouts read."""
        for sub, z in zip(subs, read, strict=True):
            stream = behind(model, sub, stream, z)
        return stream

    def read(self, trunk: Trunk, index: int, stream: Tensor, subs: Sequence[Sublayer]) -> list[Tensor | None]:
        """What the readouts of a block's first sub-layers read ``[B, tokens, units]`` when ``stream`` enters it.

        None of absent ones.
        """
        names = [sub.readout.module for sub in subs if not isinstance(sub, Absent)]
        found = iter(self.inputs(trunk, index, stream, names) if names else ())
        return [None if isinstance(sub, Absent) else in_stream(sub, next(found), len(stream)) for sub in subs]

    def inputs(self, trunk: Trunk, index: int, stream: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """What the named modules read; nothing behind the last of them is computed."""
        with autocast(self.device, self.precision):
            return trunk.inputs(index, stream, names)


@dataclass(frozen=True)
class _Site:
    """One sub-layer of the model, with those before it in its block.

    Where ``hidden`` is given, what the readout reads is left there, and the stream is left as it enters the sub-layer.
    """

    work: _Work
    index: int
    before: tuple[Sublayer, ...]
    sub: PresentSublayer
    hidden: MutableSequence[Tensor] | None

    def reconstruct(self, goal: Sequence[Tensor], stream: MutableSequence[Tensor]) -> SublayerKept:
        """Cut and repair the sub-layer; ``goal`` is the dense stream behind it, ``stream`` enters the block."""
        by_query, moments = self.narrow_queries(stream) if isinstance(self.sub, Attention) else (None, None)
        fit = RegressionFitter(
            unit_count(self.sub.widths, self.sub.widths.unit_kinds[-1]),
            self.sub.readout.size,
            self.work.device,
            self.work.weights.get(self.sub.name),
        )
        for b in range(len(stream)):
            entered = stream[b].to(self.work.device)
            *earlier, z = self.work.read(self.work.student, self.index, entered, (*self.before, self.sub))
            assert z is not None
            reached = self.work.summed(self.work.model, entered, self.before, earlier)
            target = wanted(self.work.model, self.sub, reached, z, goal[b].to(self.work.device))
            fit.update(z, target.flatten(1, -2))
            if self.hidden is not None:
                self.hidden.append(z)
                stream[b] = reached
        if isinstance(self.sub, Attention) and moments is not None and isinstance(by_query, AttentionKept):
            return self.cut_values(fit, moments, by_query)
        return self.cut_units(fit)

    @property
    def widths(self) -> SublayerWidths:
        """Widths to reach."""
        return self.work.widths[self.sub.name]

    def narrow_queries(self, stream: Sequence[Tensor]) -> tuple[SublayerKept, AttentionMoments]:
        """Cut queries and keys; returns what stays of them, and the moments of what they read."""
        sub, have, want = self.sub, self.sub.widths, self.widths
        assert isinstance(sub, Attention)
        assert isinstance(have, AttentionWidths)
        assert isinstance(want, AttentionWidths)
        inputs = InputFitter(sub.readout.size, self.work.device)
        for b in range(len(stream)):
            (x,) = self.work.inputs(self.work.student, self.index, stream[b].to(self.work.device), (sub.name,))
            inputs.update(rows_of_input(self.work.model, sub, x))
        require_finite(f"the input of module '{sub.name}'", inputs.moment, cut=True)
        moments = AttentionMoments(inputs.moment, inputs.within, self.unmeasured(have.heads * have.vo))
        if is_absent(want):
            return keep_all(have), moments
        if want.qk < have.qk and self.work.support is None:
            rotate_queries_keys(self.work.model, sub, moments)
        kept = self.selected(moments, replace(have, qk=want.qk), self.work.settings.ridge)
        self.project(moments, kept, self.work.settings.ridge)
        return kept, moments

    def cut_values(self, fit: RegressionFitter, moments: AttentionMoments, by_query: AttentionKept) -> SublayerKept:
        """Fit the readout, then cut heads and values."""
        sub, have, want = self.sub, self.sub.widths, self.widths
        assert isinstance(sub, Attention)
        assert isinstance(have, AttentionWidths)
        assert isinstance(want, AttentionWidths)
        self.repair(fit)
        moments = replace(moments, read=fit.total.gram)
        if want.vo < have.vo and not is_absent(want) and self.work.support is None:
            moments = rotate_values(self.work.model, sub, moments)
        cut = want if is_absent(want) else replace(have, heads=want.heads, vo=want.vo)
        kept = self.selected(moments, cut, self.work.settings.ridge)
        self.project(moments, kept, self.work.settings.ridge)
        if self.work.support is not None:
            return self.work.support[sub.name]
        assert isinstance(kept, AttentionKept)
        queries = dict(zip(by_query.heads, by_query.qk, strict=True))
        return replace(kept, qk=tuple(queries[h] for h in kept.heads))

    def cut_units(self, fit: RegressionFitter) -> SublayerKept:
        """Fit the readout, then cut hidden units."""
        total = fit.total
        ridge = self.repair(fit, self.kept_units(total))
        kept = self.selected(FfnMoments(total.gram), self.widths, ridge)
        self.project(FfnMoments(total.gram), kept, ridge)
        return kept

    def unmeasured(self, width: int) -> Tensor:
        """Stands for a moment that is measured further on and not read before."""
        return torch.zeros((), dtype=torch.float64, device=self.work.device).expand(width + 1, width + 1)

    def selected(self, moments: SublayerMoments, widths: SublayerWidths, ridge: float) -> SublayerKept:
        """What stays where ``widths`` are allowed."""
        sub, model, support = self.sub, self.work.model, self.work.support
        if support is not None:
            return only(support[sub.name], sub.widths, widths)
        values = constrained(model, sub)
        ranking = ranking_of(sub, self.work.scores, self.work.device)
        settings = replace(self.work.settings, ridge=ridge)
        return select(sub, values, moments, widths, settings, ranking=ranking, gain=readout_gain(model, sub.readout))

    def kept_units(self, total: Regression) -> Tensor:
        """Mask of the hidden units that would stay at the settings' ridge, for choosing a better one."""
        sub, support, want = self.sub, self.work.support, self.widths
        assert isinstance(sub, Ffn)
        count = sub.widths.units
        if support is not None or is_absent(want):
            kept = torch.zeros(count, dtype=torch.bool, device=total.gram.device)
            of = keep_none(want) if support is None else support[sub.name]
            assert isinstance(of, FfnKept)
            kept[list(of.units)] = True
            return kept
        require_finite(f"the input of module '{sub.readout.module}'", total.gram, cut=True)
        present, total = self.present_map(total)
        bonus = torch.ones(count, dtype=torch.float64, device=present.device)
        fitted = residual_refit(total, present, self.work.settings.ridge)
        units = unit_count(want, "ffn")
        return select_units(total.gram, fitted, bonus, units, ridge=self.work.settings.ridge)[:count]

    def project(self, moments: SublayerMoments, kept: SublayerKept, ridge: float) -> None:
        """Put the sub-layer on the support ``kept``, in place."""
        settings, values = replace(self.work.settings, ridge=ridge), constrained(self.work.model, self.sub)
        for entry, value in project(on_support(self.sub, values, moments, kept, settings), values).items():
            values[entry].copy_(value)

    def present_map(self, fit: Regression) -> tuple[Tensor, Regression]:
        """The readout's present map with its LayerScale, and the regression on what that map reads."""
        weight = readout_map(constrained(self.work.model, self.sub), self.sub.readout)
        gain = readout_gain(self.work.model, self.sub.readout)
        return weight if gain is None else weight * gain[:, None], fit.first(weight.shape[1])

    def repair(self, fit: RegressionFitter, kept: Tensor | None = None) -> float:
        """Fit the readout to its target, nothing cut yet, in place; LayerScale stays.

        Args:
            fit: Its inputs and target.
            kept: Mask of the units that will stay; None if that is not known yet.

        Returns:
            The ridge that held up best on folds, for the map on the inputs that stay where that is known.
        """
        total, start = fit.total, self.work.settings.ridge
        require_finite(f"the input of module '{self.sub.readout.module}'", total.gram, cut=True)
        present, total = self.present_map(total)
        n = present.shape[1]
        keep = None if kept is None else torch.cat([kept, kept.new_ones(n - len(kept))])

        # A fit to sums of targets is that sum of the fits: their errors tell ridges apart at a fraction of the cost.
        sums = signed_sums(PROBES, len(present)).to(present)
        before = sums @ present

        def cut(part: Regression, ridge: float) -> Tensor:
            whole = residual_refit(part, before, ridge)
            return whole if keep is None else refit(part.gram, whole, keep, ridge)

        splits = [(rest.first(n).of_sums(sums), held_out.first(n).of_sums(sums)) for rest, held_out in fit.splits()]
        ridge = cross_validated_ridge(splits, cut, start)
        self.write(self.sub.readout, residual_refit(total, present, ridge).float())
        logger.debug("%s: ridge %.2g", self.sub.readout.module, ridge)
        return ridge

    def write(self, readout: Readout, fitted: Tensor) -> None:
        """Make ``fitted`` the readout's map, LayerScale included; a channel that LayerScale shuts off stays."""
        values = constrained(self.work.model, self.sub)
        columns, gain = values[readout.columns], readout_gain(self.work.model, readout)
        if gain is not None:
            fitted = torch.where(gain[:, None] != 0, fitted / gain[:, None], readout_map(values, readout))
        columns.copy_(fitted[:, : columns.shape[1]])
        if readout.bias:
            self.work.model.get_parameter(readout.bias).copy_(fitted[:, -1])


def only(kept: SublayerKept, have: SublayerWidths, widths: SublayerWidths) -> SublayerKept:
    """A cut that carries out that part of ``kept`` by which ``widths`` are less than ``have``."""
    everything = keep_all(have)
    if widths == have:
        return everything
    if not (isinstance(kept, AttentionKept) and isinstance(everything, AttentionKept)) or is_absent(kept.widths):
        return kept
    assert isinstance(have, AttentionWidths)
    assert isinstance(widths, AttentionWidths)
    if widths.qk == have.qk:
        return replace(everything, heads=kept.heads, qk=everything.qk[: len(kept.heads)], vo=kept.vo)
    of_head = dict(zip(kept.heads, kept.qk, strict=True))
    # A head that goes loses its queries with its values; until then any of them will do.
    return replace(everything, qk=tuple(of_head.get(h, kept.qk[0]) for h in everything.heads))
