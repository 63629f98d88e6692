"""The training route, end to end: rank, allocate, ADMM, cut, fine-tune, compare, report (design, section 1)."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gohsp import checkpoint, data, models, report, run, training
from gohsp import recipe as recipes
from gohsp.core import admm, allocation, compensation, ranking, rotation, sensitivity
from gohsp.errors import DataError, PlanError
from gohsp.measure import Metrics, evaluate
from gohsp.recipe import Recipe
from gohsp.structure import (
    BlockShape,
    Budget,
    ModelStructure,
    Plan,
    check_shapes,
    model_cost,
    parse_budget,
    shapes_from_json,
    shapes_to_json,
)

logger = logging.getLogger(__name__)

PROBE_IMAGES = 8
LOSS_IMAGES = 1024
"""Training images on which the loss before and after the cut is compared."""


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
class _Bench:
    """What every stage works with."""

    recipe: Recipe
    folder: run.RunFolder
    accelerator: Accelerator
    train_split: data.Split
    validation_split: data.Split
    train_loader: DataLoader[Any]
    validation_loader: DataLoader[Any]
    sample_loader: DataLoader[Any]
    calibration: Sequence[Tensor]
    num_classes: int
    quiet: bool
    timings: dict[str, float] = field(default_factory=dict)

    def autocast(self) -> torch.autocast:
        """Mixed precision for forward passes outside training."""
        dtype = training.autocast_dtype(self.accelerator)
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype != torch.float32)

    def images(self, count: int) -> list[Tensor]:
        """The first ``count`` calibration images, in batches."""
        return list(torch.cat(list(self.calibration))[:count].split(self.calibration[0].shape[0]))

    def score(self, model: nn.Module, batches: Any = None) -> Metrics:
        """Score on the validation split, or on other batches."""
        return evaluate(
            model,
            self.validation_loader if batches is None else batches,
            device=self.accelerator.device,
            precision=training.autocast_dtype(self.accelerator),
        )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent to the stage's."""
        began = time.perf_counter()
        logger.info("%s: begins", stage)
        yield
        self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - began, 3)
        logger.info("%s: %.1f s", stage, self.timings[stage])


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
    """Prune a Vision Transformer by the GOHSP training route and write a run folder.

    Args:
        model: A timm model, a timm name, or a folder that gohsp wrote. A given module is left as it is.
        source: Where the images are.
        budget: Such as ``params=-40%`` or ``macs=0.8G``; an upper bound that is met within 1 %.
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
    validation_split = data.open_split(source, recipe.data.validation_split)
    if train_split.name == validation_split.name:
        raise DataError(
            f"training and validation images are the same, {train_split.name}: scores would mean nothing; set "
            "data.train_split and data.validation_split to different splits. A folder needs a sub-folder for each, "
            "such as train/ and validation/; 'hfds/...' takes slices, such as train[:90%] and train[90%:]"
        )
    dense = _open(model, weights, pretrained, recipe, train_split)
    structure = models.describe(dense)
    models.check_finite(dense)
    goal = parse_budget(budget, structure)
    if shapes is None:
        allocation.require_feasible(structure, goal.kind, goal.limit, recipe.widths)
    else:
        _check_given(structure, shapes, goal)
    for split in (train_split, validation_split):
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
        bench = _bench(dense, recipe, folder, source, train_split, validation_split, quiet)
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
        return copy.deepcopy(model)
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


def _check_given(structure: ModelStructure, shapes: Sequence[BlockShape], goal: Budget) -> None:
    check_shapes(structure, shapes)
    cost = model_cost(structure, shapes, goal.kind)
    if cost > goal.limit:
        raise PlanError(f"the given plan costs {cost:,} {goal.kind}, the budget allows {goal.limit:,}; cut more")


def _bench(
    model: nn.Module,
    recipe: Recipe,
    folder: run.RunFolder,
    source: data.DataSource,
    train_split: data.Split,
    validation_split: data.Split,
    quiet: bool,
) -> _Bench:
    settings = recipe.training
    preprocessing = data.Preprocessing.from_model(model)
    plain = data.eval_transform(preprocessing)
    augmented = data.train_transform(preprocessing, augment=settings.augment, mirror=train_split.mirrored_alike)
    common: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "strict": recipe.data.strict,
        "num_classes": _num_classes(model),
    }
    return _Bench(
        recipe=recipe,
        folder=folder,
        accelerator=training.make_accelerator(settings.precision, "cpu" if recipe.device == "cpu" else None),
        train_split=train_split,
        validation_split=validation_split,
        train_loader=data.loader(
            train_split,
            transform=augmented,
            shuffle=True,
            seed=recipe.seed,
            drop_last=len(train_split) > settings.batch_size,
            **common,
        ),
        validation_loader=data.loader(validation_split, transform=plain, shuffle=False, **common),
        sample_loader=data.loader(train_split, transform=plain, shuffle=True, seed=recipe.seed, **common),
        calibration=data.calibration_images(
            source,
            recipe.data.train_split,
            min(recipe.data.calibration_images, len(train_split)),
            transform=plain,
            seed=recipe.seed,
            batch_size=settings.batch_size,
        ),
        num_classes=_num_classes(model),
        quiet=quiet,
    )


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
    curves: dict[str, Any] = {}
    if recipe.dense.epochs > 0:
        curves["dense"] = _trained(bench, "dense", dense, recipe.dense, teacher=None)["curve"]
        checkpoint.save(dense, folder.path / "dense")
    dense_metrics = _scored(bench, "dense_score", dense)
    heads = _ranked(bench, dense, structure)
    work, moments, scores = _based(bench, dense, structure, heads)
    shapes = tuple(given) if given else _allocated(bench, work, structure, moments, scores, goal)
    checkpoint.write_atomic(folder.path / "plan.json", json.dumps(shapes_to_json(shapes), indent=2) + "\n")
    plan, soft = _soft_pruned(bench, work, dense, structure, shapes, moments, scores)
    if soft["curve"]:
        curves["admm"] = soft["curve"]
    with bench.timed("compact"):
        compaction = models.compact(work, plan, bench.calibration[0][:PROBE_IMAGES])
    small = compaction.model
    if recipe.finetune.epochs > 0:
        curves["finetune"] = _trained(bench, "finetune", small, recipe.finetune, teacher=dense)["curve"]
    pruned_metrics = _scored(bench, "pruned_score", small)
    small_structure = models.describe(small)
    content = {
        "schema_version": 1,
        **_provenance(command, recipe),
        "model": models.specification(dense),
        "data": _data_record(bench, source),
        "budget": {
            "kind": goal.kind,
            "requested": goal.requested,
            "limit": goal.limit,
            "achieved": model_cost(small_structure, small_structure.shapes, goal.kind),
        },
        "dense": _metrics_record(structure, dense_metrics),
        "pruned": _metrics_record(small_structure, pruned_metrics),
        "plan": {
            "dense": shapes_to_json(structure.shapes),
            "pruned": shapes_to_json(plan.shapes),
            "kept": plan.to_json(),
        },
        "ranking": heads,
        "admm": {k: v for k, v in soft.items() if k not in ("plan", "curve")},
        "equality": {
            "max_relative_difference": compaction.max_relative_difference,
            "tolerance": models.EQUALITY_TOLERANCE,
            "images": compaction.images,
        },
    }
    checkpoint.save(
        small,
        folder.path,
        plan=plan,
        made_by={"gohsp": content["gohsp"], "versions": content["versions"], "budget": goal.requested},
        metrics=pruned_metrics,
    )
    epochs = recipe.admm_stage.epochs + recipe.finetune.epochs
    if recipe.retrain_dense and epochs > 0:
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
            bench.train_loader,
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


def _based(
    bench: _Bench, dense: nn.Module, structure: ModelStructure, heads: dict[str, Any]
) -> tuple[nn.Module, tuple[compensation.BlockMoments, ...], list[list[float]]]:
    """A working copy in the basis that pruning uses, with its second moments."""
    work = copy.deepcopy(dense)
    with bench.timed("moments"):
        with bench.autocast():
            moments = compensation.collect_moments(work, structure, bench.calibration)
        if bench.recipe.admm.projection.metric == "data":
            moments = rotation.rotate(work, structure, moments)
    return work, moments, heads["scores"]


def _allocated(
    bench: _Bench,
    work: nn.Module,
    structure: ModelStructure,
    moments: Sequence[compensation.BlockMoments],
    scores: list[list[float]],
    goal: Budget,
) -> tuple[BlockShape, ...]:
    recipe = bench.recipe
    if record := bench.folder.done("allocation"):
        return shapes_from_json(record["shapes"])
    with bench.timed("allocate"):
        if recipe.allocation == "uniform":
            shapes = allocation.uniform(structure, goal.kind, goal.limit, recipe.widths)
        else:
            points = sensitivity.count_points(structure, recipe.widths)
            with training.progress_bar(disable=bench.quiet) as bar:
                task = bar.add_task("damage curves", total=points, rate="")
                curves = sensitivity.measure_curves(
                    work,
                    structure,
                    moments,
                    bench.images(recipe.data.allocation_images),
                    scores,
                    recipe.widths,
                    recipe.admm.projection,
                    precision=training.autocast_dtype(bench.accelerator),
                    advance=lambda: bar.advance(task),
                )
            shapes = allocation.allocate(structure, curves, goal.kind, goal.limit, recipe.widths)
    bench.folder.record("allocation", {"shapes": shapes_to_json(shapes)})
    return shapes


def _soft_pruned(
    bench: _Bench,
    work: nn.Module,
    dense: nn.Module,
    structure: ModelStructure,
    shapes: Sequence[BlockShape],
    moments: Sequence[compensation.BlockMoments],
    scores: list[list[float]],
) -> tuple[Plan, dict[str, Any]]:
    """ADMM stage and final projection: ``work`` ends on the plan's sparsity set."""
    recipe = bench.recipe
    if record := bench.folder.done("admm"):
        bench.folder.restore("admm", work)
        return Plan.from_json(record["plan"]), record
    state = admm.start(work, structure, shapes, moments, scores, recipe.admm)
    curve: list[dict[str, Any]] = []
    status = "projected once"
    if recipe.admm_stage.epochs > 0:
        with bench.timed("admm"):
            result = training.train(
                work,
                bench.train_loader,
                recipe.admm_stage,
                dataclasses.replace(recipe.training, ema=0.0),
                name="admm",
                accelerator=bench.accelerator,
                seed=recipe.seed + 1,
                num_classes=bench.num_classes,
                evaluate=bench.score,
                teacher=dense,
                state=state,
                refresh=lambda s: _refreshed(bench, work, structure, s),
                checkpoint=bench.folder.epochs_file("admm"),
                show_progress=not bench.quiet,
            )
        assert result.admm is not None
        state, status = result.admm, result.admm.status
        curve = [e.to_json() for e in result.curve]
    before = _training_loss(bench, work)
    plan = admm.finish(state)
    after = _training_loss(bench, work)
    record = {
        "status": status,
        "metric": recipe.admm.projection.metric,
        "penalty": recipe.admm.penalty,
        "trace": _trace(state, len(bench.train_loader)),
        "loss_before_cut": before,
        "loss_after_cut": after,
        "curve": curve,
        "plan": plan.to_json(),
    }
    bench.folder.record("admm", record, work)
    return plan, record


def _refreshed(bench: _Bench, work: nn.Module, structure: ModelStructure, state: admm.AdmmState) -> admm.AdmmState:
    with bench.autocast():
        return admm.refresh(state, compensation.collect_moments(work, structure, bench.calibration))


def _trace(state: admm.AdmmState, updates: int) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(r), "epoch": r.step / updates} for r in state.trace]


def _training_loss(bench: _Bench, model: nn.Module) -> float:
    """Cross entropy on a fixed sample of training images, as in evaluation."""
    bench.sample_loader.sampler.set_epoch(0)  # type: ignore[attr-defined]
    batches = max(1, LOSS_IMAGES // bench.recipe.training.batch_size)
    return bench.score(model, itertools.islice(bench.sample_loader, batches)).loss


def _metrics_record(structure: ModelStructure, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: model_cost(structure, structure.shapes, kind) for kind in ("params", "macs")} | dict(metrics)


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
    return {
        "source": source.source,
        "train_split": settings.train_split,
        "validation_split": settings.validation_split,
        "image_size": bench.calibration[0].shape[-1],
        "classes": bench.num_classes,
        "train_images": len(bench.train_split),
        "validation_images": len(bench.validation_split),
        "unreadable_images": len(bench.train_split.unreadable) + len(bench.validation_split.unreadable),
    }
