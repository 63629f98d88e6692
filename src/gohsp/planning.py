"""Which widths meet a budget: damage curves, stages of allocation, and a search by the clock (design, section 4)."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gohsp import cache, latency, models
from gohsp.bench import Bench
from gohsp.core import allocation, rotation, sensitivity
from gohsp.cutting import Basis, basis_of, measured, put_on_set
from gohsp.errors import BudgetError, PlanError
from gohsp.structure import (
    BlockShape,
    Budget,
    CostModel,
    LatencyTable,
    ModelStructure,
    amount,
    model_cost,
    shapes_to_json,
)

logger = logging.getLogger(__name__)

STAGE = 0.73
"""Share of its parameters that one stage of allocation leaves a network, where the recipe leaves their number open."""

LATENCY_TRIALS = 6
"""Plans that are timed before a latency budget is given up."""

LATENCY_REPEATS = 3
"""Comparisons of such a plan, of which the worst counts: it has to hold once more at the end of the run."""

LATENCY_ROOM = 0.97
"""Share of a latency budget that a plan has to use; time cannot be measured more finely on a busy machine."""


@dataclass(frozen=True)
class Choice:
    """How widths follow from a bound on their cost.

    Attributes:
        least: Cost of the smallest allowed widths.
        shapes: Widths within a bound.
        predicted: The divergence foreseen for widths; None where no curves were measured.
        stages: How often damage curves were measured on the way; None where none were.
    """

    least: float
    shapes: Callable[[float], tuple[BlockShape, ...]]
    predicted: Callable[[Sequence[BlockShape]], float | None]
    stages: int | None


def choose_widths(
    bench: Bench, basis: Basis, dense: nn.Module, goal: Budget, given: Sequence[BlockShape] | None
) -> dict[str, Any]:
    """Widths, the damage that the curves predict for them and the number of stages (None where none were measured)."""
    if record := bench.folder.done("allocation"):
        return record
    if given is not None:
        if goal.kind == "latency":
            _require_fast(bench, basis, goal, given)
        record = {"shapes": shapes_to_json(given), "predicted": None, "stages": None}
        bench.folder.record("allocation", record)
        return record
    with bench.timed("allocate"):
        cost: CostModel = _latency_table(bench, basis) if goal.kind == "latency" else goal.kind
        limit = goal.limit(model_cost(basis.structure, basis.structure.shapes, cost))
        allocation.require_feasible(basis.structure, cost, limit, bench.recipe.widths)
        choice = _choice(bench, basis, dense, cost, limit)
        shapes = _within_latency(bench, basis, goal, choice, limit) if goal.kind == "latency" else choice.shapes(limit)
    record = {"shapes": shapes_to_json(shapes), "predicted": choice.predicted(shapes), "stages": choice.stages}
    bench.folder.record("allocation", record)
    return record


def _choice(bench: Bench, basis: Basis, dense: nn.Module, cost: CostModel, limit: float) -> Choice:
    """Uniform widths, or those by damage curves, which are measured anew on the way to a deep cut."""
    recipe, widths, structure = bench.recipe, bench.recipe.widths, basis.structure
    if recipe.allocation == "uniform":
        narrowest = allocation.smallest(structure, widths)
        all_heads = [dataclasses.replace(n, heads=s.heads) for n, s in zip(narrowest, structure.shapes, strict=True)]
        least = model_cost(structure, all_heads, cost)
        return Choice(least, lambda bound: allocation.uniform(structure, cost, bound, widths), lambda _: None, None)
    choice = _by_curves(cost, structure, _curves(bench, basis, dense), widths, 0.0)
    whole = model_cost(structure, structure.shapes, cost)
    stages = recipe.allocation_stages or _stages_to(structure, choice.shapes(limit))
    for stage in range(1, stages):
        shapes = choice.shapes(whole * (limit / whole) ** (stage / stages))
        model, at = _cut_so_far(bench, basis, dense, shapes)
        images = bench.images(recipe.data.allocation_images)
        so_far = sensitivity.divergence(*(bench.predictions(m, images) for m in (dense, model)))
        logger.info("allocation, stage %d of %d: divergence %.4f so far", stage, stages, so_far)
        choice = _by_curves(_cost_of_cut(cost, structure, at), at.structure, _curves(bench, at, model), widths, so_far)
    return dataclasses.replace(choice, stages=stages)


def _stages_to(structure: ModelStructure, shapes: Sequence[BlockShape]) -> int:
    """Stages of allocation for a cut as deep as the one to ``shapes``."""
    left, whole = (model_cost(structure, widths, "params") for widths in (shapes, structure.shapes))
    return max(1, round(math.log(left / whole) / math.log(STAGE)))


def _by_curves(
    cost: CostModel,
    structure: ModelStructure,
    curves: allocation.Curves,
    widths: allocation.WidthSettings,
    so_far: float,
) -> Choice:
    return Choice(
        model_cost(structure, allocation.smallest(structure, widths), cost),
        lambda bound: allocation.allocate(structure, curves, cost, bound, widths),
        lambda shapes: so_far + allocation.predicted_damage(structure, curves, shapes),
        1,
    )


def _cost_of_cut(cost: CostModel, structure: ModelStructure, cut: Basis) -> CostModel:
    """The cost of what is left of a network: a block's times stay those of the block that it was cut from."""
    if not isinstance(cost, LatencyTable):
        return cost
    pairs = zip(structure.shapes, cut.structure.shapes, strict=True)
    return dataclasses.replace(cost, blocks={now: cost.blocks[before] for before, now in pairs})


def _cut_so_far(bench: Bench, basis: Basis, dense: nn.Module, shapes: Sequence[BlockShape]) -> tuple[nn.Module, Basis]:
    """The network cut to ``shapes`` and repaired, as it is and as a basis for further cuts."""
    trial = dataclasses.replace(basis, model=copy.deepcopy(basis.model))
    plan = put_on_set(bench, trial, dense, shapes)
    small = models.compact(trial.model, plan, bench.probe).model
    floors = [math.ceil(bench.recipe.widths.min_ffn * block.shape.ffn) for block in basis.structure.blocks]
    structure = models.describe(small)
    blocks = [dataclasses.replace(b, ffn_floor=floor) for b, floor in zip(structure.blocks, floors, strict=True)]
    scores = [[of[h] for h in kept.heads] for of, kept in zip(basis.scores, plan.blocks, strict=True)]
    return small, basis_of(bench, small, dataclasses.replace(structure, blocks=tuple(blocks)), scores)


def _curves(bench: Bench, basis: Basis, model: nn.Module) -> allocation.Curves:
    """Damage curves of ``model``, which ``basis`` was made of; measured or from the cache."""
    recipe, structure = bench.recipe, basis.structure
    images = bench.images(recipe.data.allocation_images)
    # What moments and scores follow from, not themselves: their last bits differ with the number of threads.
    settings = [dataclasses.asdict(s) for s in (recipe.widths, recipe.admm.projection, recipe.ranking)]
    counts = [recipe.data.allocation_images, recipe.data.ranking_images, recipe.seed]
    provenance = [
        models.specification(model),
        shapes_to_json(structure.shapes),
        str(bench.precision),
        importlib.metadata.version("gohsp"),
    ]
    key = cache.key_of(
        itertools.chain(model.state_dict().values(), bench.calibration),
        [*provenance, *settings, *counts, sensitivity.GRID, sensitivity.EDITION],
    )
    if (found := _cached(key, structure, recipe.widths)) is not None:
        return found
    points = sensitivity.count_points(structure, recipe.widths)
    # On a copy, in the basis that cuts are made in: what is cut later does not depend on where its curves came from.
    work = dataclasses.replace(basis, model=copy.deepcopy(basis.model))
    moments = measured(bench, work)
    if recipe.admm.projection.metric == "data":
        moments = rotation.rotate(work.model, structure, moments)
    stages = models.stages(work.model)
    with bench.fast_attention(work.model), bench.progress("damage curves", points) as advance:
        curves = sensitivity.measure_curves(
            work.model,
            stages,
            structure,
            moments,
            list(bench.embedded(stages, images)),
            basis.scores,
            recipe.widths,
            recipe.admm.projection,
            precision=bench.precision,
            advance=advance,
        )
    cache.store("curves", key, allocation.curves_to_json(curves))
    return curves


def _cached(key: str, structure: ModelStructure, widths: allocation.WidthSettings) -> allocation.Curves | None:
    """Curves from the cache, if they are there and fit; what does not fit is logged."""
    if (found := cache.load("curves", key)) is None:
        return None
    try:
        curves = allocation.curves_from_json(found)
        if sensitivity.fits(curves, structure, widths):
            return curves
    except (TypeError, KeyError, AttributeError):
        pass
    logger.warning("the cached damage curves do not fit the model; they are measured anew")
    return None


def _latency_table(bench: Bench, basis: Basis) -> LatencyTable:
    """Times of the network's blocks by width, measured on its device."""
    recipe, structure = bench.recipe, basis.structure
    with bench.progress("block times", 1 + latency.distinct_blocks(structure)) as advance:
        return latency.measure_table(basis.model, structure, bench.images(1)[0], recipe.widths, recipe.latency, advance)


def _within_latency(bench: Bench, basis: Basis, goal: Budget, choice: Choice, bound: float) -> tuple[BlockShape, ...]:
    """Widths whose measured time meets the budget: a table proposes, a measurement decides, the bound is corrected."""
    met: list[tuple[float, tuple[BlockShape, ...]]] = []
    for _ in range(LATENCY_TRIALS):
        shapes = choice.shapes(bound)
        dense, small = _slowest_pair(bench, basis, goal, shapes)
        spent = small / goal.bound(dense)
        logger.info("latency: bound %.3f ms, measured %.3f ms, %.1f %% of the budget", bound, small, 100 * spent)
        if spent <= 1:
            met.append((spent, shapes))
        if LATENCY_ROOM <= spent <= 1:
            break
        # Not below what there is, by a hair, since sums of times round.
        corrected = max(bound * (1 + LATENCY_ROOM) / 2 / spent, choice.least * (1 + 1e-9))
        if corrected == bound:
            break  # too slow at its smallest
        bound = corrected
    if not met:
        raise BudgetError(
            f"no plan was measured to meet {goal.requested} in {LATENCY_TRIALS} trials; measure on a quieter machine, "
            "with more latency.rounds, or raise the budget"
        )
    return max(met, key=lambda trial: trial[0])[1]


def _slowest_pair(bench: Bench, basis: Basis, goal: Budget, shapes: Sequence[BlockShape]) -> tuple[float, float]:
    """Times in ms of the dense model and of one with these widths, in the comparison that uses most of the budget."""
    pair, images = [basis.model, models.resized(basis.model, shapes)], bench.images(1)[0]
    times = [latency.compare(pair, images, bench.recipe.latency) for _ in range(LATENCY_REPEATS)]
    dense, small = max(times, key=lambda time: time[1] / goal.bound(time[0]))
    return dense, small


def _require_fast(bench: Bench, basis: Basis, goal: Budget, shapes: Sequence[BlockShape]) -> None:
    """Check by measurement that given widths meet a latency budget."""
    dense, small = _slowest_pair(bench, basis, goal, shapes)
    if small > goal.bound(dense):
        raise PlanError(
            f"the given plan takes {amount('latency', small)}, the budget allows "
            f"{amount('latency', goal.bound(dense))} (dense: {amount('latency', dense)}); cut more, or measure on a "
            "quieter machine with more latency.rounds"
        )
