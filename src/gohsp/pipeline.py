"""Both routes, end to end: rank, allocate, [ADMM,] cut and repair, [fine-tune, compare,] report (design, section 1)."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gohsp import cache, checkpoint, data, latency, models, polish, report, resident, run, training
from gohsp import recipe as recipes
from gohsp.core import admm, allocation, compensation, fisher, ranking, reconstruction, rotation, sensitivity, surgery
from gohsp.core.activations import Stages
from gohsp.errors import BudgetError, DataError, PlanError
from gohsp.measure import Metrics, evaluate
from gohsp.recipe import Recipe
from gohsp.structure import (
    BlockShape,
    Budget,
    CostModel,
    LatencyTable,
    ModelStructure,
    Plan,
    amount,
    check_shapes,
    model_cost,
    parse_budget,
    shapes_from_json,
    shapes_to_json,
)

logger = logging.getLogger(__name__)

PROBE_IMAGES = 8
CALIBRATION_BATCH = 64
"""Calibration images a batch. Folds of cross-validation are drawn within one, so it does not follow the user's."""

LOSS_IMAGES = 1024
"""Training images on which the loss before and after the cut is compared."""

STAGE = 0.73
"""Share of its parameters that one stage of allocation leaves a network, where the recipe leaves their number open."""

LATENCY_TRIALS = 6
"""Plans that are timed before a latency budget is given up."""

LATENCY_REPEATS = 3
"""Comparisons of such a plan, of which the worst counts: it has to hold once more at the end of the run."""

LATENCY_ROOM = 0.97
"""Share of a latency budget that a plan has to use; time cannot be measured more finely on a busy machine."""


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        model: The pruned model, in evaluation mode.
        report: What ``report.json`` holds.
        folder: Where everything was written.
    """

    model: nn.Module
    report: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class _Loaders:
    """Labelled images, which only the training route reads."""

    train: DataLoader[Any] | resident.ResidentLoader
    validation: Iterable[Any]
    sample: Callable[[], Iterable[Any]]
    train_split: data.Split
    validation_split: data.Split


@dataclass(frozen=True)
class _Bench:
    """What every stage works with."""

    recipe: Recipe
    folder: run.RunFolder
    accelerator: Accelerator
    calibration: Sequence[Tensor]
    holdout: Sequence[Tensor]
    mirror: bool
    num_classes: int
    loaders: _Loaders | None
    quiet: bool
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def labelled(self) -> _Loaders:
        """The labelled images, where the route has them."""
        if self.loaders is None:
            raise RuntimeError("the one-shot route reads no labels")
        return self.loaders

    @property
    def precision(self) -> torch.dtype:
        """Data type of forward passes."""
        return training.autocast_dtype(self.accelerator)

    def autocast(self) -> torch.autocast:
        """Mixed precision for forward passes outside training."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.accelerator.device.type, self.precision, enabled=enabled)

    def images(self, count: int) -> list[Tensor]:
        """The first ``count`` calibration images, in batches."""
        batches: list[Tensor] = []
        for batch in self.calibration:
            if count <= 0:
                break
            batches.append(batch[:count])
            count -= len(batch)
        return batches

    def embedded(self, stages: Stages, images: Iterable[Tensor], *, mirror: bool = False) -> Iterator[Tensor]:
        """What enters the first block, in batches, in float32; with ``mirror`` that of the mirror images follows."""
        device = self.accelerator.device
        for batch in images:
            with torch.no_grad():
                yield stages.embed(batch.to(device)).float()
                if mirror:
                    yield stages.embed(batch.flip(-1).to(device)).float()

    def score(self, model: nn.Module, batches: Any = None) -> Metrics:
        """Score on the validation split, or on other batches."""
        return evaluate(
            model,
            self.labelled.validation if batches is None else batches,
            device=self.accelerator.device,
            precision=self.precision,
        )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent to the stage's."""
        began = time.perf_counter()
        logger.info("%s: begins", stage)
        yield
        self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - began, 3)
        logger.info("%s: %.1f s", stage, self.timings[stage])


@dataclass(frozen=True)
class _Basis:
    """The dense model's copy that is going to be cut, rotated, and what was measured on it."""

    model: nn.Module
    structure: ModelStructure
    scores: list[list[float]]
    weights: tuple[fisher.TokenWeights, ...]
    moments: tuple[compensation.BlockMoments, ...]


def prune(
    model: nn.Module | str | Path,
    source: data.DataSource | str,
    budget: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    shapes: Sequence[BlockShape] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    quiet: bool = False,
) -> Result:
    """Prune a Vision Transformer and write a run folder.

    Args:
        model: A timm model, a timm name, or a folder that gohsp wrote. A given module is left as it is; what is made of
            it is float32 and has no frozen weights.
        source: Where the images are.
        budget: Such as ``params=-40%`` or ``macs=0.8G``, an upper bound that is met within 1 %; or ``latency=-25%``
            of the time that the dense model takes on this device.
        out: The run's folder; it will hold the model, the plan, the report and the recipe.
        recipe: Everything else; None for the defaults.
        weights: A safetensors file, for a model given by name.
        pretrained: Whether to fetch timm's pretrained weights, for a model given by name.
        shapes: Widths to use instead of allocating them (an edited ``plan.json``).
        resume: Go on with an interrupted run in ``out``.
        overwrite: Replace the run in ``out``.
        command: The command line, for the record.
        quiet: Whether to draw no progress.

    Returns:
        The pruned model and the report.

    Raises:
        GohspError: One of its kinds, for bad input; before any work is begun wherever that can be known.
    """
    recipe = recipe or Recipe()
    source = data.DataSource(source=source) if isinstance(source, str) else source
    if recipe.data.image_key or recipe.data.label_key:
        source = dataclasses.replace(source, image_key=recipe.data.image_key, label_key=recipe.data.label_key)
    train_split = data.open_split(source, recipe.data.train_split)
    splits = [train_split]
    if recipe.route == "train":
        splits.append(data.open_split(source, recipe.data.validation_split))
    if train_split.name == splits[-1].name and len(splits) == 2:
        raise DataError(
            f"training and validation images are the same, {train_split.name}: scores would mean nothing; set "
            "data.train_split and data.validation_split to different splits. A folder needs a sub-folder for each, "
            "such as train/ and validation/; 'hfds/...' takes slices, such as train[:90%] and train[90%:]"
        )
    dense = _open(model, weights, pretrained, recipe, train_split)
    structure = models.describe(dense)
    models.check_finite(dense)
    goal = parse_budget(budget)
    if shapes is not None:
        check_shapes(structure, shapes)
    if goal.kind != "latency":
        limit = goal.limit(model_cost(structure, structure.shapes, goal.kind))
        if shapes is None:
            allocation.require_feasible(structure, goal.kind, limit, recipe.widths)
        else:
            _require_met(goal, model_cost(structure, shapes, goal.kind), limit)
    if recipe.route == "train":
        for split in splits:
            split.labels(_num_classes(dense))
    request = {
        "model": type(model).__name__ if isinstance(model, nn.Module) else str(model),
        "weights": str(weights) if weights else None,
        "data": source.source,
        "budget": budget,
        "plan": shapes_to_json(shapes) if shapes else None,
        "recipe": recipes.to_mapping(recipe),
    }
    folder = run.begin(Path(out), request, resume=resume, overwrite=overwrite)
    with run.log_to(folder.path / "run.log"):
        checkpoint.write_atomic(folder.path / "recipe.toml", recipes.to_toml(recipe))
        bench = _bench(dense, recipe, folder, source, splits, quiet)
        dense.to(bench.accelerator.device)
        return _prune(bench, dense, structure, goal, shapes, source, command)


def _open(
    model: nn.Module | str | Path,
    weights: str | Path | None,
    pretrained: bool,
    recipe: Recipe,
    split: data.Split,
) -> nn.Module:
    if isinstance(model, nn.Module):
        return copy.deepcopy(model).float().requires_grad_().eval()
    arguments = dict(recipe.model_arguments)
    if checkpoint.is_model_folder(model):
        return checkpoint.open_model(model, weights=weights, pretrained=pretrained, arguments=arguments)
    trains = recipe.dense.epochs > 0
    if trains and "num_classes" not in arguments:
        arguments["num_classes"] = split.num_classes or int(split.labels().max()) + 1
    torch.manual_seed(recipe.seed)
    return checkpoint.open_model(
        model, weights=weights, pretrained=pretrained, arguments=arguments, new_classifier=trains
    )


def _num_classes(model: nn.Module) -> int:
    return int(model.num_classes)  # type: ignore[arg-type]


def _require_met(goal: Budget, cost: float, limit: float) -> None:
    if cost > limit:
        raise PlanError(
            f"the given plan costs {amount(goal.kind, cost)}, the budget allows {amount(goal.kind, limit)}; cut more"
        )


def _bench(
    model: nn.Module,
    recipe: Recipe,
    folder: run.RunFolder,
    source: data.DataSource,
    splits: Sequence[data.Split],
    quiet: bool,
) -> _Bench:
    size, settings = len(splits[0]), recipe.data
    holdout = min(settings.holdout_images, -(-size // 20))  # a small set gives a twentieth of its images
    calibration = max(1, min(settings.calibration_images, size - holdout))
    images = data.calibration_images(
        source,
        settings.train_split,
        min(calibration + holdout, size),
        transform=data.eval_transform(data.Preprocessing.from_model(model)),
        seed=recipe.seed,
        batch_size=CALIBRATION_BATCH,
        strict=settings.strict,
        store=data.Spool,
    )
    calibrating, held_out = _divided(images, holdout)
    accelerator = training.make_accelerator(recipe.training.precision, "cpu" if recipe.device == "cpu" else None)
    return _Bench(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        calibration=calibrating,
        holdout=held_out,
        mirror=settings.mirror and splits[0].mirrored_alike,
        num_classes=_num_classes(model),
        loaders=_loaders(model, recipe, splits[0], splits[1], accelerator) if recipe.route == "train" else None,
        quiet=quiet,
    )


def _divided(images: Sequence[Tensor], holdout: int) -> tuple[data.Spool, data.Spool]:
    """All batches but the last ``holdout`` images, and those; a lone image is both."""
    count = sum(len(batch) for batch in images)
    first, last, left = data.Spool(), data.Spool(), max(1, count - holdout)
    for batch in images:
        for part, store in ((batch[:left], first), (batch[left:], last)):
            if len(part):
                store.append(part)
        left = max(0, left - len(batch))
    if not last:
        last.append(first[-1][-1:])
    return first, last


def _loaders(
    model: nn.Module, recipe: Recipe, train_split: data.Split, validation_split: data.Split, accelerator: Accelerator
) -> _Loaders:
    settings, preprocessing = recipe.training, data.Preprocessing.from_model(model)
    mirror, seed = train_split.mirrored_alike, recipe.seed
    checks: dict[str, Any] = {"strict": recipe.data.strict, "num_classes": _num_classes(model)}
    drop_last = len(train_split) > settings.batch_size
    if recipe.data.resident:
        train, validation = (
            resident.resident_images(split, preprocessing, accelerator.device, **checks)
            for split in (train_split, validation_split)
        )
        loader = partial(resident.ResidentLoader, batch_size=settings.batch_size)
        augmented = loader(
            train,
            shuffle=True,
            augment=settings.augment == "light",
            mirror=mirror,
            seed=seed,
            drop_last=drop_last,
            share=(accelerator.process_index, accelerator.num_processes),
        )
        sample = partial(loader, train, shuffle=True, seed=seed)
        return _Loaders(augmented, loader(validation, shuffle=False), sample, train_split, validation_split)
    loader = partial(data.loader, batch_size=settings.batch_size, workers=settings.workers, **checks)
    plain = data.eval_transform(preprocessing)
    transform = data.train_transform(preprocessing, augment=settings.augment, mirror=mirror)
    augmented = loader(train_split, transform=transform, shuffle=True, seed=seed, drop_last=drop_last)
    sample = partial(loader, train_split, transform=plain, shuffle=True, seed=seed)
    validation = loader(validation_split, transform=plain, shuffle=False)
    return _Loaders(augmented, validation, sample, train_split, validation_split)


def _prune(
    bench: _Bench,
    dense: nn.Module,
    structure: ModelStructure,
    goal: Budget,
    given: Sequence[BlockShape] | None,
    source: data.DataSource,
    command: Sequence[str],
) -> Result:
    recipe, folder = bench.recipe, bench.folder
    trains = recipe.route == "train"
    curves: dict[str, Any] = {}
    if recipe.dense.epochs > 0:
        curves["dense"] = _trained(bench, "dense", dense, recipe.dense, teacher=None)["curve"]
        checkpoint.save(dense, folder.path / "dense")
    dense_metrics = _scored(bench, "dense_score", dense) if trains else {}
    heads = _ranked(bench, dense, structure)
    basis = _based(bench, dense, structure, heads["scores"])
    allocated = _allocated(bench, basis, dense, goal, given)
    shapes = shapes_from_json(allocated["shapes"])
    checkpoint.write_atomic(folder.path / "plan.json", json.dumps(shapes_to_json(shapes), indent=2) + "\n")
    soft = _soft_pruned(bench, basis, dense, shapes)
    if soft["curve"]:
        curves["admm"] = soft["curve"]
    cut = _cut(bench, basis, dense, shapes, soft["support"])
    with bench.timed("compact"):
        compaction = models.compact(basis.model, Plan.from_json(cut["plan"]), bench.images(PROBE_IMAGES)[0])
    small = compaction.model
    polished = _polished(bench, dense, small, source)
    fidelity = _compared(bench, dense, small) | {"predicted_kl": allocated["predicted"]}
    if trains and recipe.finetune.epochs > 0:
        curves["finetune"] = _trained(bench, "finetune", small, recipe.finetune, teacher=dense)["curve"]
    pruned_metrics = _scored(bench, "pruned_score", small) if trains else {}
    small_structure = models.describe(small)
    speed = _timed_models(bench, dense, small)
    if goal.kind == "latency":
        achieved, limit = speed["pruned_ms"], goal.bound(speed["dense_ms"])  # unchecked: the work is done
    else:
        achieved = model_cost(small_structure, small_structure.shapes, goal.kind)
        limit = goal.limit(model_cost(structure, structure.shapes, goal.kind))
    content = {
        "schema_version": report.SCHEMA_VERSION,
        **_provenance(command, recipe),
        "model": models.specification(dense),
        "data": _data_record(bench, source),
        "dense": _metrics_record(structure, dense_metrics),
        "pruned": _metrics_record(small_structure, pruned_metrics),
        "fidelity": fidelity,
        "ranking": heads,
        "speed": speed,
        "budget": {"kind": goal.kind, "requested": goal.requested, "limit": limit, "achieved": achieved},
        **_cut_record(structure, small_structure, cut["plan"], compaction, allocated["stages"]),
    }
    if polished is not None:
        content["polish"] = polished
    if trains:
        content["admm"] = {
            **{k: soft[k] for k in ("status", "metric", "penalty", "trace")},
            "loss_before_cut": cut["loss_before"],
            "loss_after_cut": cut["loss_after"],
        }
    checkpoint.save(
        small,
        folder.path,
        plan=Plan.from_json(cut["plan"]),
        made_by={"gohsp": content["gohsp"], "versions": content["versions"], "budget": goal.requested},
        metrics=pruned_metrics or fidelity,
    )
    epochs = recipe.admm_stage.epochs + recipe.finetune.epochs
    if trains and recipe.retrain_dense and epochs > 0:
        stage = dataclasses.replace(recipe.finetune, epochs=epochs)
        again = copy.deepcopy(dense)
        curves["dense_retrained"] = _trained(bench, "dense_retrained", again, stage, teacher=dense)["curve"]
        content["dense_retrained"] = _metrics_record(structure, _scored(bench, "dense_retrained_score", again))
    content |= {"curves": curves, "timings": bench.timings, "recipe": recipes.to_mapping(recipe)}
    report.write(content, folder.path)
    folder.clear_state()
    return Result(small.eval(), content, folder.path)


def _trained(
    bench: _Bench, name: str, model: nn.Module, stage: training.StageSettings, *, teacher: nn.Module | None
) -> dict[str, Any]:
    """Train in place, or take up the result of an earlier attempt."""
    if record := bench.folder.done(name):
        bench.folder.restore(name, model)
        bench.timings[name] = record["seconds"]
        return record
    with bench.timed(name):
        result = training.train(
            model,
            bench.labelled.train,
            stage,
            bench.recipe.training,
            name=name,
            accelerator=bench.accelerator,
            seed=bench.recipe.seed,
            num_classes=bench.num_classes,
            evaluate=bench.score,
            teacher=teacher,
            checkpoint=bench.folder.epochs_file(name),
            show_progress=not bench.quiet,
        )
    record = {"curve": [e.to_json() for e in result.curve], "seconds": bench.timings[name]}
    bench.folder.record(name, record, model)
    return record


def _scored(bench: _Bench, name: str, model: nn.Module) -> dict[str, Any]:
    record = bench.folder.done(name)
    if record is None:
        with bench.timed("evaluate"):
            record = bench.score(model).to_json()
        bench.folder.record(name, record)
    logger.info("%s: %s", name, record)
    return record


def _ranked(bench: _Bench, dense: nn.Module, structure: ModelStructure) -> dict[str, Any]:
    record = bench.folder.done("ranking")
    if record is None:
        with bench.timed("rank"):
            heads = ranking.rank_heads(
                dense,
                structure,
                bench.images(bench.recipe.data.ranking_images),
                bench.recipe.ranking,
                seed=bench.recipe.seed,
            )
        record = heads.to_json()
        bench.folder.record("ranking", record)
    checkpoint.write_atomic(bench.folder.path / "ranking.json", json.dumps(record, indent=2) + "\n")
    return record


def _based(bench: _Bench, dense: nn.Module, structure: ModelStructure, scores: list[list[float]]) -> _Basis:
    """A working copy in the basis that pruning uses, with its second moments."""
    images = sum(len(batch) for batch in bench.calibration)
    if images < structure.embed_dim:
        logger.warning(
            "%d calibration images are fewer than the model's %d channels: at any one token, such as the class token, "
            "second moments are singular, and only the ridge makes repairs possible; give %d images or more",
            images,
            structure.embed_dim,
            4 * structure.embed_dim,
        )
    with bench.timed("moments"):
        return _basis_of(bench, dense, structure, scores)


def _basis_of(bench: _Bench, model: nn.Module, structure: ModelStructure, scores: list[list[float]]) -> _Basis:
    """A rotated copy of ``model`` with token weights and second moments."""
    work, projection = copy.deepcopy(model), bench.recipe.admm.projection
    with bench.autocast():
        weights = fisher.token_weights(
            work,
            structure,
            bench.images(bench.recipe.data.ranking_images),
            attention=projection.attention_fisher,
            ffn=projection.ffn_fisher,
            seed=bench.recipe.seed,
        )
        moments = compensation.collect_moments(work, structure, bench.calibration, weights)
    if projection.metric == "data":
        moments = rotation.rotate(work, structure, moments)
    return _Basis(work, structure, scores, weights, moments)


@dataclass(frozen=True)
class _Choice:
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


def _allocated(
    bench: _Bench, basis: _Basis, dense: nn.Module, goal: Budget, given: Sequence[BlockShape] | None
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


def _choice(bench: _Bench, basis: _Basis, dense: nn.Module, cost: CostModel, limit: float) -> _Choice:
    """Uniform widths, or those by damage curves, which are measured anew on the way to a deep cut."""
    recipe, widths, structure = bench.recipe, bench.recipe.widths, basis.structure
    if recipe.allocation == "uniform":
        narrowest = allocation.smallest(structure, widths)
        all_heads = [dataclasses.replace(n, heads=s.heads) for n, s in zip(narrowest, structure.shapes, strict=True)]
        least = model_cost(structure, all_heads, cost)
        return _Choice(least, lambda bound: allocation.uniform(structure, cost, bound, widths), lambda _: None, None)
    choice = _by_curves(cost, structure, _curves(bench, basis, dense), widths, 0.0)
    whole = model_cost(structure, structure.shapes, cost)
    stages = recipe.allocation_stages or _stages_to(structure, choice.shapes(limit))
    for stage in range(1, stages):
        shapes = choice.shapes(whole * (limit / whole) ** (stage / stages))
        model, at = _cut_so_far(bench, basis, dense, shapes)
        images = bench.images(recipe.data.allocation_images)
        so_far = sensitivity.divergence(*(_predictions(bench, m, images) for m in (dense, model)))
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
) -> _Choice:
    return _Choice(
        model_cost(structure, allocation.smallest(structure, widths), cost),
        lambda bound: allocation.allocate(structure, curves, cost, bound, widths),
        lambda shapes: so_far + allocation.predicted_damage(structure, curves, shapes),
        1,
    )


def _cost_of_cut(cost: CostModel, structure: ModelStructure, cut: _Basis) -> CostModel:
    """The cost of what is left of a network: a block's times stay those of the block that it was cut from."""
    if not isinstance(cost, LatencyTable):
        return cost
    pairs = zip(structure.shapes, cut.structure.shapes, strict=True)
    return dataclasses.replace(cost, blocks={now: cost.blocks[before] for before, now in pairs})


def _cut_so_far(
    bench: _Bench, basis: _Basis, dense: nn.Module, shapes: Sequence[BlockShape]
) -> tuple[nn.Module, _Basis]:
    """The network cut to ``shapes`` and repaired, as it is and as a basis for further cuts."""
    trial = dataclasses.replace(basis, model=copy.deepcopy(basis.model))
    plan = _on_set(bench, trial, dense, shapes, None)
    small = models.compact(trial.model, plan, bench.images(PROBE_IMAGES)[0]).model
    floors = [math.ceil(bench.recipe.widths.min_ffn * block.shape.ffn) for block in basis.structure.blocks]
    structure = models.describe(small)
    blocks = [dataclasses.replace(b, ffn_floor=floor) for b, floor in zip(structure.blocks, floors, strict=True)]
    scores = [[of[h] for h in kept.heads] for of, kept in zip(basis.scores, plan.blocks, strict=True)]
    return small, _basis_of(bench, small, dataclasses.replace(structure, blocks=tuple(blocks)), scores)


def _curves(bench: _Bench, basis: _Basis, model: nn.Module) -> allocation.Curves:
    """Damage curves of ``model``, which ``basis`` was made of; measured or from the cache."""
    recipe, structure, stages = bench.recipe, basis.structure, models.stages(basis.model)
    images = bench.images(recipe.data.allocation_images)
    embedded = list(bench.embedded(stages, images))
    # What moments and scores follow from, not themselves: their last bits differ with the number of threads.
    settings = [dataclasses.asdict(s) for s in (recipe.widths, recipe.admm.projection, recipe.ranking)]
    counts = [recipe.data.allocation_images, recipe.data.ranking_images, recipe.seed]
    provenance = [models.specification(model), str(bench.precision), importlib.metadata.version("gohsp")]
    key = cache.key_of(
        itertools.chain(model.state_dict().values(), bench.calibration),
        [*provenance, *settings, *counts, sensitivity.GRID, sensitivity.EDITION],
    )
    if found := cache.load("curves", key):
        return allocation.curves_from_json(found)
    points = sensitivity.count_points(structure, recipe.widths)
    with training.progress_bar(disable=bench.quiet) as bar:
        task = bar.add_task("damage curves", total=points, rate="")
        curves = sensitivity.measure_curves(
            basis.model,
            stages,
            structure,
            basis.moments,
            embedded,
            basis.scores,
            recipe.widths,
            recipe.admm.projection,
            precision=bench.precision,
            advance=lambda: bar.advance(task),
        )
    cache.store("curves", key, allocation.curves_to_json(curves))
    return curves


def _latency_table(bench: _Bench, basis: _Basis) -> LatencyTable:
    """Times of the network's blocks by width, measured on its device."""
    recipe, structure = bench.recipe, basis.structure
    with training.progress_bar(disable=bench.quiet) as bar:
        task = bar.add_task("block times", total=1 + latency.distinct_blocks(structure), rate="")
        return latency.measure_table(
            basis.model, structure, bench.images(1)[0], recipe.widths, recipe.latency, lambda: bar.advance(task)
        )


def _within_latency(
    bench: _Bench, basis: _Basis, goal: Budget, choice: _Choice, bound: float
) -> tuple[BlockShape, ...]:
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


def _slowest_pair(bench: _Bench, basis: _Basis, goal: Budget, shapes: Sequence[BlockShape]) -> tuple[float, float]:
    """Times in ms of the dense model and of one with these widths, in the comparison that uses most of the budget."""
    pair, images = [basis.model, models.resized(basis.model, shapes)], bench.images(1)[0]
    times = [latency.compare(pair, images, bench.recipe.latency) for _ in range(LATENCY_REPEATS)]
    dense, small = max(times, key=lambda time: time[1] / goal.bound(time[0]))
    return dense, small


def _require_fast(bench: _Bench, basis: _Basis, goal: Budget, shapes: Sequence[BlockShape]) -> None:
    """Check by measurement that given widths meet a latency budget."""
    dense, small = _slowest_pair(bench, basis, goal, shapes)
    if small > goal.bound(dense):
        raise PlanError(
            f"the given plan takes {amount('latency', small)}, the budget allows "
            f"{amount('latency', goal.bound(dense))} (dense: {amount('latency', dense)}); cut more, or measure on a "
            "quieter machine with more latency.rounds"
        )


def _soft_pruned(bench: _Bench, basis: _Basis, dense: nn.Module, shapes: Sequence[BlockShape]) -> dict[str, Any]:
    """ADMM stage, where the route has one: the basis' model is trained towards the sparsity set."""
    recipe, work = bench.recipe, basis.model
    record: dict[str, Any] = {
        "status": "projected once",
        "metric": recipe.admm.projection.metric,
        "penalty": recipe.admm.penalty,
        "trace": [],
        "curve": [],
        "support": None,
    }
    if recipe.route == "oneshot" or recipe.admm_stage.epochs == 0:
        return record
    if done := bench.folder.done("admm"):
        bench.folder.restore("admm", work)
        bench.timings["admm"] = done["seconds"]
        return done
    with bench.timed("admm"):
        result = training.train(
            work,
            bench.labelled.train,
            recipe.admm_stage,
            dataclasses.replace(recipe.training, ema=0.0),
            name="admm",
            accelerator=bench.accelerator,
            seed=recipe.seed + 1,
            num_classes=bench.num_classes,
            evaluate=bench.score,
            teacher=dense,
            state=admm.start(work, basis.structure, shapes, basis.moments, basis.scores, recipe.admm),
            refresh=lambda s: _refreshed(bench, basis, s),
            checkpoint=bench.folder.epochs_file("admm"),
            show_progress=not bench.quiet,
        )
    state = result.admm
    assert state is not None
    record |= {
        "status": state.status,
        "trace": _trace(state, len(bench.labelled.train)),
        "curve": [e.to_json() for e in result.curve],
        "support": state.plan.to_json(),
        "seconds": bench.timings["admm"],
    }
    bench.folder.record("admm", record, work)
    return record


def _cut(
    bench: _Bench,
    basis: _Basis,
    dense: nn.Module,
    shapes: Sequence[BlockShape],
    support: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """Put the basis' model on the sparsity set of ``shapes``, repaired; returns the plan and the loss around it."""
    work = basis.model
    if record := bench.folder.done("cut"):
        bench.folder.restore("cut", work)
        return record
    before = _training_loss(bench, work)
    plan = Plan.from_json(support) if support else None
    with bench.timed("reconstruct"):
        plan = _on_set(bench, basis, dense, shapes, plan)
    record = {"plan": plan.to_json(), "loss_before": before, "loss_after": _training_loss(bench, work)}
    bench.folder.record("cut", record, work)
    return record


def _on_set(bench: _Bench, basis: _Basis, dense: nn.Module, shapes: Sequence[BlockShape], support: Plan | None) -> Plan:
    """Put the basis' model on the sparsity set, with repairs where the metric is the data's."""
    if bench.recipe.admm.projection.metric == "data":
        return _reconstructed(bench, basis, dense, shapes, support)
    # In the Euclidean metric the projection is the mask, and nothing takes over.
    state = admm.start(basis.model, basis.structure, shapes, basis.moments, basis.scores, bench.recipe.admm)
    plan = support or state.plan
    surgery.mask(basis.model, basis.structure, plan)
    return plan


def _reconstructed(
    bench: _Bench, basis: _Basis, dense: nn.Module, shapes: Sequence[BlockShape], support: Plan | None
) -> Plan:
    # After ADMM the network is another than the dense one, and it is its own function that must survive the cut.
    target = dense if support is None else copy.deepcopy(basis.model)
    embedded = bench.embedded(models.stages(target), bench.calibration, mirror=bench.mirror)
    with training.progress_bar(disable=bench.quiet) as bar:
        task = bar.add_task("cut and repair", total=len(basis.structure.blocks), rate="")
        return reconstruction.reconstruct(
            target,
            basis.model,
            basis.structure,
            shapes,
            basis.moments,
            embedded,
            basis.scores,
            bench.recipe.admm.projection,
            support=support,
            weights=basis.weights,
            precision=bench.precision,
            store=data.Spool,
            advance=lambda: bar.advance(task),
        )


def _polished(bench: _Bench, dense: nn.Module, small: nn.Module, source: data.DataSource) -> dict[str, Any] | None:
    """Distil the cut model in place, where that was asked for and helps; returns its curve."""
    settings = bench.recipe.polish
    if settings.epochs == 0:
        return None
    if record := bench.folder.done("polish"):
        bench.folder.restore("polish", small)
        return record
    images = sum(len(batch) for batch in bench.calibration)
    views = data.loader(
        data.drawn(source, bench.recipe.data.train_split, images, seed=bench.recipe.seed),
        transform=data.train_transform(data.Preprocessing.from_model(dense), mirror=bench.mirror),
        batch_size=settings.batch_size,
        shuffle=True,
        workers=bench.recipe.training.workers,
        seed=bench.recipe.seed,
        cache=False,
    )
    with (
        bench.timed("polish"),
        training.plain_attention(dense, bench.accelerator.device),
        training.plain_attention(small, bench.accelerator.device),
        training.progress_bar(disable=bench.quiet) as bar,
    ):
        task = bar.add_task("polish", total=settings.epochs, rate="")
        curve = polish.polish(
            small,
            models.stages(small),
            models.stages(dense),
            views,
            settings,
            divergence=lambda: _compared(bench, dense, small)["kl"],
            seed=bench.recipe.seed,
            precision=bench.precision,
            advance=lambda: bar.advance(task),
        )
    kept = min(curve, key=lambda past: past.kl).epoch
    record = {"kept": kept, "curve": [epoch.to_json() for epoch in curve]}
    bench.folder.record("polish", record, small)
    return record


def _compared(bench: _Bench, dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """How close the cut model is to the dense one on held-out images; at most the polish's epoch was chosen by them."""
    sides = [_predictions(bench, model, bench.holdout) for model in (dense, small)]
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(*sides, strict=True))
    images = sum(len(batch) for batch in sides[0])
    return {
        "images": images,
        "kl": max(sensitivity.divergence(*sides), 0.0),
        "agreement": 100 * same / images,
    }


def _predictions(bench: _Bench, model: nn.Module, images: Iterable[Tensor]) -> list[Tensor]:
    """Log-probabilities ``[B, classes]`` of batches."""
    stages = models.stages(model)
    return sensitivity.predictions(stages, list(bench.embedded(stages, images)), bench.precision)


def _refreshed(bench: _Bench, basis: _Basis, state: admm.AdmmState) -> admm.AdmmState:
    with bench.autocast():
        moments = compensation.collect_moments(basis.model, basis.structure, bench.calibration, basis.weights)
    return admm.refresh(state, moments)


def _trace(state: admm.AdmmState, updates: int) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(r), "epoch": r.step / updates} for r in state.trace]


def _training_loss(bench: _Bench, model: nn.Module) -> float | None:
    """Cross entropy on a fixed sample of training images, as in evaluation; None on the route without labels."""
    if bench.loaders is None:
        return None
    batches = max(1, LOSS_IMAGES // bench.recipe.training.batch_size)
    return bench.score(model, itertools.islice(bench.loaders.sample(), batches)).loss


def _metrics_record(structure: ModelStructure, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: model_cost(structure, structure.shapes, kind) for kind in ("params", "macs")} | dict(metrics)


def _timed_models(bench: _Bench, dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Time of a batch before and after, interleaved."""
    settings = bench.recipe.latency
    with bench.timed("latency"):
        before, after = latency.compare([dense, small], bench.images(1)[0], settings)
    return {"batch_size": settings.batch_size, "dtype": settings.dtype, "dense_ms": before, "pruned_ms": after}


def _cut_record(
    before: ModelStructure,
    after: ModelStructure,
    kept: list[dict[str, Any]],
    compaction: models.Compaction,
    stages: int | None,
) -> dict[str, Any]:
    return {
        "plan": {
            "dense": shapes_to_json(before.shapes),
            "pruned": shapes_to_json(after.shapes),
            "kept": kept,
            "allocation_stages": stages,
        },
        "equality": {
            "max_relative_difference": compaction.max_relative_difference,
            "tolerance": models.EQUALITY_TOLERANCE,
            "images": compaction.images,
        },
    }


def _provenance(command: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    packages = ("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy")
    accelerated = torch.cuda.is_available() and recipe.device != "cpu"
    return {
        "gohsp": importlib.metadata.version("gohsp"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seed": recipe.seed,
        "machine": {
            "device": torch.cuda.get_device_name() if accelerated else "cpu",
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count() or 1,
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _data_record(bench: _Bench, source: data.DataSource) -> dict[str, Any]:
    settings = bench.recipe.data
    loaders = bench.loaders
    record: dict[str, Any] = {
        "source": source.source,
        "train_split": settings.train_split,
        "image_size": bench.calibration[0].shape[-1],
        "classes": bench.num_classes,
        "calibration_images": sum(len(batch) for batch in bench.calibration),
    }
    if loaders is not None:
        record |= {
            "validation_split": settings.validation_split,
            "train_images": len(loaders.train_split),
            "validation_images": len(loaders.validation_split),
            "unreadable_images": len(loaders.train_split.unreadable) + len(loaders.validation_split.unreadable),
        }
    return record
