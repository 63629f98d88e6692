"""The steps of a pruning: rank, choose widths, cut and repair, heal, compare. Each takes a session."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gohsp import latency, models
from gohsp.core import allocation, curves, healing, moments, projection, reconstruction, rotation, surgery
from gohsp.core.allocation import Curves
from gohsp.core.capture import open_trunk
from gohsp.core.fisher import TokenWeightFitter, blended
from gohsp.core.gradients import Gradients, differentiated
from gohsp.core.moments import SublayerMoments
from gohsp.core.objective import mean_distance
from gohsp.core.ranking import HeadRanking, HeadStatistics, HeadStatisticsFitter, count_rankings, rank_in_steps
from gohsp.errors import BudgetError, NonFiniteError, PlanError
from gohsp.runtime import fast_attention, staged, telling
from gohsp.session import Session
from gohsp.structure import (
    PARAMS,
    Absent,
    Attention,
    Bound,
    Budget,
    Cost,
    Ffn,
    Kept,
    Network,
    SublayerKept,
    SublayerWidths,
    Widths,
    amount,
    bound_for,
    cost_of,
)

logger = logging.getLogger(__name__)

ANALYSIS_IMAGES = 256
"""Images on which heads are ranked and tokens weighed."""

CURVE_IMAGES = 128
"""Images on which damage curves are measured (``docs/oneshot.md``: twice as many choose widths 0.5 to 1 % better)."""

ATTENTION_SHARE = 0.3
"""Share of tokens' weight, in what attention writes, that follows the Fisher information (``docs/oneshot.md``)."""

STAGE = 0.73
"""Share of its parameters that one stage of allocation leaves a network, where their number is left open."""

LATENCY_TRIALS = 6
"""Plans that are timed before a latency budget is given up."""

LATENCY_REPEATS = 3
"""Comparisons of such a plan, of which the worst counts: it has to hold once more at the end of the run."""

LATENCY_ROOM = 0.97
"""Share of a latency budget that a plan has to use; time cannot be measured more finely on a busy machine."""


# Rank


@dataclass(frozen=True)
class Analysis:
    """What one pass of images and its gradients tell.

    Attributes:
        ranking: The heads' ranking.
        fisher: For each sub-layer, weights of tokens, of mean 1, by the Fisher information of what it writes.
    """

    ranking: HeadRanking
    fisher: Mapping[str, tuple[float, ...]]

    def token_weights(self, network: Network) -> dict[str, Tensor]:
        """How much tokens count in the repair of what sub-layers write."""
        share = {sub.name: ATTENTION_SHARE for sub in network.attentions}
        return blended({name: torch.tensor(of) for name, of in self.fisher.items()}, share)


def analyse(session: Session, model: nn.Module, network: Network, ranking: HeadRanking | None = None) -> Analysis:
    """Rank heads, unless a ranking is given, and weigh tokens; the first ranking's pass serves both."""
    if ranking is not None:
        return _token_analysis(session, model, network, ranking)
    settings, tokens = session.config.ranking, TokenWeightFitter()
    # A later ranking asks how sure a silenced model is of what the dense one predicts.
    outputs: list[Tensor] = []
    repeated = settings.rankings > 1 and settings.needs_gradients and session.objective.confidence is not None

    def gather(silenced: nn.Module) -> HeadStatistics:
        fitter = HeadStatisticsFitter(
            silenced,
            network,
            scope=settings.scope,
            edge=settings.edge,
            wanted=settings.wanted,
            precision=session.precision,
        )
        whole, gradients_wanted = silenced is model, settings.needs_gradients
        # Tokens are weighed by draws; heads where the objective has no confidence.
        draws = whole or (gradients_wanted and session.objective.confidence is None)
        dense = outputs if repeated and not whole else None
        for gradients in _passes(session, silenced, network, int(draws), confidence=gradients_wanted, dense=dense):
            fitter.update(gradients)
            if whole:
                tokens.update(gradients)
            if whole and repeated:
                outputs.append(gradients.output)
        advance()
        return fitter.statistics

    with telling(session.progress, "ranking of heads", count_rankings(network, settings)) as advance:
        ranking = rank_in_steps(model, network, gather, settings, seed=session.config.seed)
    return Analysis(ranking, {name: tuple(of.tolist()) for name, of in tokens.weights.items()})


def _passes(
    session: Session,
    model: nn.Module,
    network: Network,
    draws: int = 1,
    *,
    confidence: bool = False,
    dense: Iterable[Tensor] | None = None,
) -> Iterator[Gradients]:
    """The passes that heads are ranked and tokens weighed by."""
    with fast_attention(session.precision, model):
        yield from differentiated(
            model,
            network,
            session.objective,
            session.calibration.first(ANALYSIS_IMAGES),
            draws=draws,
            confidence=confidence,
            dense=dense,
            seed=session.config.seed,
            precision=session.precision,
        )


def _token_analysis(session: Session, model: nn.Module, network: Network, ranking: HeadRanking) -> Analysis:
    """Tokens weighed alone, for heads that have their scores already."""
    tokens = TokenWeightFitter()
    for gradients in _passes(session, model, network):
        tokens.update(gradients)
    return Analysis(ranking, {name: tuple(of.tolist()) for name, of in tokens.weights.items()})


# Choose widths


def collect_moments(
    session: Session, model: nn.Module, network: Network, analysis: Analysis
) -> dict[str, SublayerMoments]:
    """Second moments on all calibration images."""
    weights = _on_device(analysis.token_weights(network), model)
    with fast_attention(session.precision, model):
        return moments.collect_moments(model, network, session.calibration.images, weights, session.precision)


def _on_device(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: of.to(device) for name, of in weights.items()}


def measure_curves(session: Session, model: nn.Module, network: Network, analysis: Analysis) -> Curves:
    """Damage curves of a model, which is left as it is."""
    # On a copy, in the basis that cuts are made in.
    work, images = copy.deepcopy(model), session.calibration.first(CURVE_IMAGES)
    rotated = rotation.rotate(work, network, collect_moments(session, work, network, analysis))
    steps = curves.count_steps(network, session.config.widths, [len(batch) for batch in images])
    with fast_attention(session.precision, work), telling(session.progress, "damage curves", steps) as advance:
        return curves.measure_curves(
            work,
            network,
            session.objective,
            images,
            rotated,
            analysis.ranking.scores,
            session.config.widths,
            session.config.repair,
            seed=session.config.seed,
            precision=session.precision,
            advance=advance,
        )


@dataclass(frozen=True)
class Allocation:
    """Chosen widths.

    Attributes:
        widths: Widths of every sub-layer.
        limit: The bound that they keep; None of a latency budget, which a measurement decides.
        predicted: The distance that damage curves foresee; None where none were measured.
        stages: How often curves were measured on the way; None where none were.
    """

    widths: Mapping[str, SublayerWidths]
    limit: float | None
    predicted: float | None = None
    stages: int | None = None


@dataclass(frozen=True)
class _Choice:
    """How widths follow from a bound on their cost."""

    least: float
    widths: Callable[[Bound], dict[str, SublayerWidths]]
    predicted: Callable[[Widths], float | None]
    stages: int | None


def choose_widths(
    session: Session,
    dense: nn.Module,
    network: Network,
    analysis: Analysis,
    budget: Budget,
    *,
    given: Widths | None = None,
    measured: Curves | None = None,
) -> Allocation:
    """Widths that meet a budget.

    Args:
        session: The session.
        dense: The dense model.
        network: Its description.
        analysis: Its ranking and token weights.
        budget: What was asked for.
        given: Widths to use instead of choosing them, which are checked.
        measured: Damage curves that were measured already.
    """
    if budget.kind == "latency":
        return _within_time(session, dense, network, analysis, budget, given, measured)
    bound = bound_for(network, budget)
    if given is not None:
        return Allocation(dict(given), bound.limit)
    choice = _choice(session, dense, network, analysis, bound, measured)
    widths = choice.widths(bound)
    return Allocation(widths, bound.limit, choice.predicted(widths), choice.stages)


def _choice(
    session: Session,
    dense: nn.Module,
    network: Network,
    analysis: Analysis,
    bound: Bound,
    measured: Curves | None,
) -> _Choice:
    """Widths by damage curves, which are measured anew on the way to a deep cut."""
    settings = session.config.widths
    measured = measured or measure_curves(session, dense, network, analysis)
    choice = _by_curves(session, network, measured, bound.cost, 0.0)
    whole = cost_of(network, network.widths, bound.cost)
    stages = settings.stages or _stages_to(network, choice.widths(bound))
    for stage in range(1, stages):
        here, behind = (replace(session, progress=staged(session.progress, at, stages)) for at in (stage, stage + 1))
        widths = choice.widths(replace(bound, limit=whole * (bound.limit / whole) ** (stage / stages)))
        small, left, so_far = _cut_so_far(here, dense, network, analysis, widths)
        images = session.calibration.first(CURVE_IMAGES)
        distance = session.distance(dense, small, images)
        logger.info("allocation, stage %d of %d: distance %.4f so far", stage, stages, distance)
        choice = _by_curves(session, left, measure_curves(behind, small, left, so_far), bound.cost, distance)
    return replace(choice, stages=stages)


def _stages_to(network: Network, widths: Widths) -> int:
    """Stages of allocation for a cut as deep as the one to ``widths``."""
    left, whole = (cost_of(network, of, PARAMS) for of in (widths, network.widths))
    return max(1, round(math.log(left / whole) / math.log(STAGE)))


def _by_curves(session: Session, network: Network, measured: Curves, cost: Cost, so_far: float) -> _Choice:
    settings, uniform = session.config.widths, session.config.uniform
    return _Choice(
        cost_of(network, allocation.smallest(network, settings, uniform=uniform), cost),
        lambda bound: allocation.allocate(network, measured, bound, settings, uniform=uniform),
        lambda widths: so_far + allocation.predicted_damage(network, measured, widths),
        1,
    )


def _cut_so_far(
    session: Session, dense: nn.Module, network: Network, analysis: Analysis, widths: Widths
) -> tuple[nn.Module, Network, Analysis]:
    """The network cut to ``widths`` and repaired, its description and its analysis."""
    trial = copy.deepcopy(dense)
    kept = cut(session, dense, trial, network, analysis, widths)
    small = compact(session, trial, kept).model
    left = _with_limits(models.describe(small, session.probe, session.config.at), network, session)
    ranking = replace(analysis.ranking, scores=_scores_left(analysis.ranking, kept))
    return small, left, analyse(session, small, left, ranking)


def _with_limits(left: Network, before: Network, session: Session) -> Network:
    """A cut network that may be cut no further, and no other parts of it, than the network that it was cut from."""
    of = {sub.name: sub for sub in before.sublayers}

    def limited(sub: Attention | Ffn | Absent) -> Attention | Ffn | Absent:
        origin = of[sub.name]
        if isinstance(sub, Absent) or isinstance(origin, Absent):
            return sub
        sub = replace(sub, prunable=origin.prunable, removable=origin.removable)
        if isinstance(sub, Ffn) and isinstance(origin, Ffn):
            floor = math.ceil(session.config.widths.min_ffn * origin.widths.units)
            return replace(sub, floor=floor, step=origin.step)
        return sub

    return replace(left, sublayers=tuple(limited(sub) for sub in left.sublayers))


def _scores_left(ranking: HeadRanking, kept: Kept) -> dict[str, tuple[float, ...]]:
    return {name: tuple(scores[h] for h in kept[name].heads) for name, scores in ranking.scores.items()}  # type: ignore[union-attr]


# Latency


def _within_time(
    session: Session,
    dense: nn.Module,
    network: Network,
    analysis: Analysis,
    budget: Budget,
    given: Widths | None,
    measured: Curves | None,
) -> Allocation:
    """Widths that meet a latency budget, by measurement."""
    if given is not None:
        _require_fast(session, dense, budget, given)
        return Allocation(dict(given), None)
    bound = bound_for(network, budget, _times(session, dense, network))
    allocation.require_feasible(network, bound, session.config.widths, uniform=session.config.uniform)
    choice = _choice(session, dense, network, analysis, bound, measured)
    widths = _within_latency(session, dense, budget, choice, bound)
    return Allocation(widths, None, choice.predicted(widths), choice.stages)


def _times(session: Session, dense: nn.Module, network: Network) -> Cost:
    """Times of the network's sub-layers by width, measured on its device."""
    config = session.config
    with telling(session.progress, "sub-layer times", 1 + latency.distinct(network)) as advance:
        return latency.measure_times(dense, network, session.probe[:1], config.widths, config.latency, advance)


def _within_latency(
    session: Session, dense: nn.Module, budget: Budget, choice: _Choice, bound: Bound
) -> dict[str, SublayerWidths]:
    """Widths whose measured time meets the budget: a table proposes, a measurement decides, the bound is corrected."""
    met: list[tuple[float, dict[str, SublayerWidths]]] = []
    for _ in range(LATENCY_TRIALS):
        widths = choice.widths(bound)
        before, after = _slowest_pair(session, dense, budget, widths)
        spent = after / budget.bound(before)
        logger.info("latency: bound %.3f ms, measured %.3f ms, %.1f %% of the budget", bound.limit, after, 100 * spent)
        if spent <= 1:
            met.append((spent, widths))
        if LATENCY_ROOM <= spent <= 1:
            break
        # Not below what there is, by a hair, since sums of times round.
        corrected = max(bound.limit * (1 + LATENCY_ROOM) / 2 / spent, choice.least * (1 + 1e-9))
        if corrected == bound.limit:
            break  # too slow at its smallest
        bound = replace(bound, limit=corrected)
    if not met:
        raise BudgetError(
            f"no plan was measured to meet {budget.requested} in {LATENCY_TRIALS} trials; measure on a quieter "
            "machine, with more latency.rounds, or raise the budget"
        )
    return max(met, key=lambda trial: trial[0])[1]


def _slowest_pair(session: Session, dense: nn.Module, budget: Budget, widths: Widths) -> tuple[float, float]:
    """Times in ms of the dense model and of one with these widths, in the comparison that uses most of the budget."""
    pair, images = [dense, models.resized(dense, widths)], session.probe[:1]
    times = [latency.compare(pair, images, session.config.latency) for _ in range(LATENCY_REPEATS)]
    before, after = max(times, key=lambda time: time[1] / budget.bound(time[0]))
    return before, after


def _require_fast(session: Session, dense: nn.Module, budget: Budget, widths: Widths) -> None:
    """Check by measurement that given widths meet a latency budget."""
    before, after = _slowest_pair(session, dense, budget, widths)
    if after > budget.bound(before):
        raise PlanError(
            f"the given plan takes {amount('latency', after)}, the budget allows "
            f"{amount('latency', budget.bound(before))} (dense: {amount('latency', before)}); cut more, or measure on "
            "a quieter machine with more latency.rounds"
        )


# Cut


def cut(
    session: Session,
    dense: nn.Module,
    work: nn.Module,
    network: Network,
    analysis: Analysis,
    widths: Widths,
    *,
    support: Kept | None = None,
) -> dict[str, SublayerKept]:
    """Cut ``work``, a copy of ``dense``, to ``widths`` in place and repair it; its shapes stay.

    Args:
        session: The session.
        dense: The model to stay close to.
        work: The copy, or what ADMM made of it.
        network: Description of both.
        analysis: Ranking and token weights.
        widths: Widths to reach.
        support: The units to keep, where ADMM has chosen them; None selects them.

    Returns:
        What stays, ready for compaction.
    """
    # After ADMM the network is another than the dense one, and it is its own function that must survive the cut.
    target = dense if support is None else copy.deepcopy(work)
    trunk = open_trunk(target, network, session.probe)
    images, mirror = session.calibration.images, session.calibration.mirror
    with (
        fast_attention(session.precision, target, work),
        telling(session.progress, "cut and repair", len(trunk.blocks)) as advance,
    ):
        return reconstruction.reconstruct(
            trunk,
            work,
            network,
            widths,
            session.entered(trunk, images, mirror=mirror),
            analysis.ranking.scores,
            session.config.repair,
            support=support,
            weights=_on_device(analysis.token_weights(network), work),
            precision=session.precision,
            store=session.store,
            advance=advance,
        )


def masked(
    session: Session,
    work: nn.Module,
    network: Network,
    analysis: Analysis,
    widths: Widths,
    metric: projection.Metric,
    *,
    support: Kept | None = None,
) -> dict[str, SublayerKept]:
    """Cut ``work`` to ``widths`` in place in a metric of its weights, in which the projection is the mask.

    Args:
        session: The session.
        work: The model that is cut.
        network: Its description.
        analysis: Ranking and token weights.
        widths: Widths to reach.
        metric: The metric, which is not the data's.
        support: The units to keep, where they are chosen already.
    """
    kept = dict(support) if support is not None else None
    if kept is None:
        values = {sub.name: projection.constrained(work, sub, metric) for sub in network.present}
        kept = projection.select_all(
            work,
            network,
            values,
            collect_moments(session, work, network, analysis),
            widths,
            session.config.repair,
            metric=metric,
            scores=analysis.ranking.scores,
        )
    surgery.mask(work, network, kept)
    return kept


def compact(session: Session, work: nn.Module, kept: Kept) -> models.Compaction:
    """The small model, checked to compute what the masked one computes."""
    return models.compact(work, kept, session.probe, at=session.config.at, output=session.objective.output)


# Heal


@dataclass(frozen=True)
class Healing:
    """Tuning of blocks after a cut.

    Attributes:
        kept: Windows that stayed, first to last.
        curve: The state before, and after each window.
    """

    kept: int
    curve: tuple[healing.HealStep, ...]


def heal(session: Session, dense: nn.Module, small: nn.Module, network: Network, analysis: Analysis) -> Healing:
    """Tune a cut model's blocks in place, as far as it helps on held-out images."""
    teacher = open_trunk(dense, network, session.probe)
    student = teacher.of(small)
    reference = session.outputs(dense, session.calibration.holdout)
    last = {subs[-1].name: index for index, subs in enumerate(network.blocks.values())}
    fisher = {name: torch.tensor(of) for name, of in analysis.fisher.items() if name in last}
    weights = blended(fisher, dict.fromkeys(fisher, healing.FISHER))

    def distance() -> float:
        try:
            return mean_distance(session.objective, reference, session.outputs(small, session.calibration.holdout))
        except NonFiniteError:
            return math.inf  # too high a rate: what it made of the blocks is undone

    with (
        fast_attention(session.precision, dense, small),
        telling(session.progress, "heal", len(student.blocks)) as advance,
    ):
        curve = healing.heal(
            student,
            teacher,
            session.entered(teacher, session.calibration.images, mirror=session.calibration.mirror),
            {last[name]: of for name, of in weights.items()},
            session.config.heal,
            distance=distance,
            seed=session.config.seed,
            precision=session.precision,
            store=session.store,
            advance=advance,
        )
    return Healing(min(curve, key=lambda past: past.distance).blocks, curve)


# Compare


@dataclass(frozen=True)
class Fidelity:
    """How close a cut model is to the dense one on held-out images, before any fine-tuning.

    Attributes:
        objective: What outputs were compared by.
        images: Images.
        distance: Mean distance of the outputs: of a classifier, nats.
        agreement: Share of images with the same first prediction, in percent; None but for a classifier.
    """

    objective: str
    images: int
    distance: float
    agreement: float | None


def compare(session: Session, dense: nn.Module, small: nn.Module) -> Fidelity:
    """Compare a cut model with the dense one on images that nothing was measured on."""
    sides = [session.outputs(model, session.calibration.holdout) for model in (dense, small)]
    images = sum(len(batch) for batch in sides[0])
    agreement = None
    if session.objective.name == "classification":
        agreement = 100 * sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(*sides, strict=True)) / images
    return Fidelity(session.objective.name, images, mean_distance(session.objective, *sides), agreement)
