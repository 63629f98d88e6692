"""Both routes, end to end: rank, allocate, [ADMM,] cut and repair, [fine-tune, compare,] report (design, section 1)."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gohsp import cache, checkpoint, data, files, latency, models, opening, polish, report, run, training
from gohsp import recipe as recipes
from gohsp.bench import Bench, class_names, open_bench
from gohsp.core import admm, allocation, fisher, ranking, sensitivity
from gohsp.cutting import Basis, based, measured, put_on_set
from gohsp.errors import CheckpointError, DataError, PlanError
from gohsp.planning import choose_widths
from gohsp.recipe import Recipe
from gohsp.structure import (
    BlockShape,
    Budget,
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
        model: A timm model, or a name as :func:`gohsp.open_model` takes it: a folder that gohsp wrote or a timm name.
            A given module is left as it is; what is made of it is float32 and has no frozen weights.
        source: Where the images are.
        budget: Such as ``params=-40%`` or ``macs=0.8G``, an upper bound that is met within 1 %; or ``latency=-25%``
            of the time that the dense model takes on this device.
        out: The run's folder; it will hold the model, the plan, the report and the recipe.
        recipe: Everything else; None for the defaults.
        weights: A safetensors file, for a model given by name.
        pretrained: Whether to fetch timm's pretrained weights, for a model given by name.
        shapes: Widths to use instead of allocating them (an edited ``plan.json``).
        resume: Go on with an interrupted run in ``out``; of a finished one the result is returned.
        overwrite: Replace the run in ``out``: the files that it wrote, and no others.
        command: The command line, for the record.
        quiet: Whether to draw no progress.

    Returns:
        The pruned model and the report.

    Raises:
        GohspError: One of its kinds, for bad input; before any work is begun wherever that can be known.
    """
    training.require_one_process()
    recipe, goal = recipe or Recipe(), parse_budget(budget)
    source = source if isinstance(source, data.DataSource) else data.DataSource(source=source)
    inputs = {
        "the model": None if isinstance(model, nn.Module) else model,
        "the weights file": weights,
        "the data": source.source.removeprefix("hfds/").removeprefix("wds/"),
    }
    path = run.check(out, resume=resume, overwrite=overwrite, inputs=inputs)
    source = dataclasses.replace(
        source,
        image_key=recipe.data.image_key or source.image_key,
        label_key=recipe.data.label_key or source.label_key,
    )
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
    models.require_classifier(dense)
    models.require_remakeable(dense)
    if shapes is None:
        allocation.require_fitting(structure, recipe.widths)
    else:
        check_shapes(structure, shapes)
    if goal.kind != "latency":
        limit = goal.limit(model_cost(structure, structure.shapes, goal.kind))
        if shapes is None:
            uniform = recipe.allocation == "uniform"
            meet = allocation.uniform if uniform else allocation.require_feasible
            meet(structure, goal.kind, limit, recipe.widths)
        else:
            _require_met(goal, model_cost(structure, shapes, goal.kind), limit)
    labels = _labels(dense, splits, trains=_trains(recipe)) if recipe.route == "train" else [None]
    request = {
        "model": type(model).__name__ if isinstance(model, nn.Module) else str(model),
        "weights": str(weights) if weights else None,
        "weights_hash": cache.key_of(dense.state_dict().values(), None),
        "data": _data_request(source, splits, labels),
        "budget": budget,
        "plan": shapes_to_json(shapes) if shapes else None,
        "recipe": recipes.to_mapping(recipe),
    }
    with run.begin(path, request, resume=resume, overwrite=overwrite) as folder:
        if folder.finished:
            folder.clear_state()  # an end between the last file and this may have left some
            return Result(checkpoint.load(folder.path), report.read(folder.path), folder.path)
        files.write_atomic(folder.path / "recipe.toml", recipes.to_toml(recipe))
        _warn_of_idle_settings(recipe)
        bench = open_bench(dense, recipe, folder, source, splits, quiet)
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
        if weights or pretrained:
            raise CheckpointError("a model that is given as a module brings its own weights; give no others")
        return models.working_copy(model)
    arguments = dict(recipe.model_arguments)
    if opening.is_folder(model):
        return opening.open_model(model, weights=weights, pretrained=pretrained, arguments=arguments)
    trains = recipe.dense.epochs > 0
    if trains and "num_classes" not in arguments:
        arguments["num_classes"] = split.num_classes or int(split.labels().max()) + 1
    torch.manual_seed(recipe.seed)
    return opening.open_model(model, weights=weights, pretrained=pretrained, arguments=arguments, new_classifier=trains)


def _trains(recipe: Recipe) -> bool:
    """Whether a run of the training route trains a classifier at all."""
    return recipe.dense.epochs + recipe.admm_stage.epochs + recipe.finetune.epochs > 0


def _labels(dense: nn.Module, splits: Sequence[data.Split], *, trains: bool) -> list[np.ndarray]:
    """The labels of training and validation images, all checked; a model that is to learn them gets the classes' names.

    Raises:
        DataError: A label does not fit; the classes of the splits, or of the data and the model, differ; all training
            images are of one class.
    """
    train, validation = splits
    if trains and models.class_names(dense) is None and train.num_classes == models.num_classes(dense):
        models.set_class_names(dense, train.class_names)
    names = class_names(dense, train)
    labels = [split.labels(models.num_classes(dense), names) for split in splits]
    if (train.class_names is None) != (validation.class_names is None):
        raise DataError(f"of {train.name} and {validation.name} one names its classes, one numbers them; use one kind")
    if trains and len(np.unique(labels[0])) == 1:
        raise DataError(f"all images of {train.name} are of one class; training needs images of two at least")
    return labels


def _data_request(
    source: data.DataSource, splits: Sequence[data.Split], labels: Sequence[np.ndarray | None]
) -> dict[str, Any]:
    """What the images are, by names, sizes and labels: a run is resumed with these and no others."""
    record: dict[str, Any] = {"source": source.source}
    for purpose, split, numbers in zip(("train", "validation"), splits, labels, strict=False):
        record[purpose] = {"images": len(split), "names_and_sizes": split.digest}
        if numbers is not None:
            record[purpose]["labels"] = cache.key_of([torch.from_numpy(numbers)], None)
            record[purpose]["classes"] = {str(i): name for i, name in enumerate(split.class_names or ())}
    return record


def _warn_of_idle_settings(recipe: Recipe) -> None:
    """Warn of settings of ADMM where there is no such stage; its projection governs every cut."""
    default = admm.AdmmSettings(projection=recipe.admm.projection)
    idle = [f.name for f in dataclasses.fields(default) if getattr(default, f.name) != getattr(recipe.admm, f.name)]
    if idle and (recipe.route == "oneshot" or recipe.admm_stage.epochs == 0):
        logger.warning(
            "%s has no effect without an ADMM stage; ask for one by route = 'train' and admm_stage.epochs = 2, say",
            ", ".join(f"admm.{name}" for name in idle),
        )


def _require_met(goal: Budget, cost: float, limit: float) -> None:
    if cost > limit:
        raise PlanError(
            f"the given plan costs {amount(goal.kind, cost)}, the budget allows {amount(goal.kind, limit)}; cut more"
        )


def _prune(
    bench: Bench,
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
    basis = based(bench, dense, structure, heads["scores"])
    allocated = choose_widths(bench, basis, dense, goal, given)
    shapes = shapes_from_json(allocated["shapes"])
    files.write_atomic(folder.path / "plan.json", json.dumps(shapes_to_json(shapes), indent=2) + "\n")
    soft = _soft_pruned(bench, basis, dense, shapes) if trains and recipe.admm_stage.epochs > 0 else None
    if soft:
        curves["admm"] = soft["curve"]
    cut = _cut(bench, basis, dense, shapes, soft["support"] if soft else None)
    with bench.timed("compact"):
        compaction = models.compact(basis.model, Plan.from_json(cut["plan"]), bench.probe)
    small = compaction.model
    polished = _polished(bench, dense, structure, small)
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
        "data": _data_record(bench, source, models.class_names(dense)),
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
    if soft:
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
    bench: Bench, name: str, model: nn.Module, stage: training.StageSettings, *, teacher: nn.Module | None
) -> dict[str, Any]:
    """Train in place, or take up the result of an earlier attempt."""
    if record := bench.folder.done(name, model):
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
    record = {"curve": [e.to_json() for e in result.curve]}
    bench.folder.record(name, record, model)
    return record


def _scored(bench: Bench, name: str, model: nn.Module) -> dict[str, Any]:
    record = bench.folder.done(name)
    if record is None:
        with bench.timed("evaluate"):
            record = bench.score(model).to_json()
        bench.folder.record(name, record)
    logger.info("%s: %s", name, record)
    return record


def _ranked(bench: Bench, dense: nn.Module, structure: ModelStructure) -> dict[str, Any]:
    record = bench.folder.done("ranking")
    if record is None:
        with bench.timed("rank"), bench.fast_attention(dense):
            heads = ranking.rank_heads(
                dense,
                structure,
                bench.images(bench.recipe.data.ranking_images),
                bench.recipe.ranking,
                seed=bench.recipe.seed,
                precision=bench.precision,
            )
        record = heads.to_json()
        bench.folder.record("ranking", record)
    files.write_atomic(bench.folder.path / "ranking.json", json.dumps(record, indent=2) + "\n")
    return record


def _soft_pruned(bench: Bench, basis: Basis, dense: nn.Module, shapes: Sequence[BlockShape]) -> dict[str, Any]:
    """ADMM stage: the basis' model is trained towards the sparsity set."""
    recipe, work = bench.recipe, basis.model
    support = None
    if recipe.admm.projection.metric == "data":
        # Cut and repaired first: what ADMM then pulls to is a network that works. Units outside the support are alive
        # through what they read, and may come back. (Masked in the Euclidean metric they would be dead.)
        support = _repaired(bench, basis, dense, shapes)
    if done := bench.folder.done("admm", work):
        return done
    moments = measured(bench, basis)
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
            state=admm.start(work, basis.structure, shapes, moments, basis.scores, recipe.admm, support=support),
            refresh=lambda state: admm.refresh(state, measured(bench, basis)),
            checkpoint=bench.folder.epochs_file("admm"),
            show_progress=not bench.quiet,
        )
    state = result.admm
    assert state is not None
    record = {
        "status": state.status,
        "metric": recipe.admm.projection.metric,
        "penalty": recipe.admm.penalty,
        "trace": _trace(state, len(bench.labelled.train)),
        "curve": [e.to_json() for e in result.curve],
        "support": state.plan.to_json(),
    }
    bench.folder.record("admm", record, work)
    return record


def _repaired(bench: Bench, basis: Basis, dense: nn.Module, shapes: Sequence[BlockShape]) -> Plan:
    """The basis' model cut to ``shapes`` and repaired in closed form; returns what stays."""
    if record := bench.folder.done("repaired", basis.model):
        return Plan.from_json(record["plan"])
    with bench.timed("reconstruct"):
        plan = put_on_set(bench, basis, dense, shapes)
    bench.folder.record("repaired", {"plan": plan.to_json()}, basis.model)
    return plan


def _cut(
    bench: Bench,
    basis: Basis,
    dense: nn.Module,
    shapes: Sequence[BlockShape],
    support: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """Put the basis' model on the sparsity set of ``shapes``, repaired; returns the plan, and ADMM's loss around it."""
    work = basis.model
    if record := bench.folder.done("cut", work):
        return record
    before = _training_loss(bench, work) if support else None
    plan = Plan.from_json(support) if support else None
    with bench.timed("reconstruct"):
        plan = put_on_set(bench, basis, dense, shapes, plan)
    after = _training_loss(bench, work) if support else None
    record = {"plan": plan.to_json(), "loss_before": before, "loss_after": after}
    bench.folder.record("cut", record, work)
    return record


def _polished(bench: Bench, dense: nn.Module, structure: ModelStructure, small: nn.Module) -> dict[str, Any] | None:
    """Tune the cut model's blocks in place, where that was asked for and as far as it helps; returns the curve."""
    settings = bench.recipe.polish
    if settings.epochs == 0:
        return None
    if record := bench.folder.done("polish", small):
        return record
    student, teacher, reference = models.stages(small), models.stages(dense), bench.predictions(dense, bench.holdout)
    with (
        bench.timed("polish"),
        bench.fast_attention(dense, small),
        bench.progress("polish", len(student.blocks)) as advance,
    ):
        with bench.autocast():
            weights = fisher.token_weights(
                dense,
                structure,
                bench.images(bench.recipe.data.ranking_images),
                attention=0.0,
                ffn=settings.fisher,
                seed=bench.recipe.seed,
            )
        curve = polish.polish(
            student,
            teacher,
            bench.embedded(teacher, bench.calibration, mirror=bench.mirror),
            [of_block.ffn for of_block in weights],
            settings,
            divergence=lambda: sensitivity.divergence(reference, bench.predictions(small, bench.holdout)),
            seed=bench.recipe.seed,
            precision=bench.precision,
            store=bench.folder.spool,
            advance=advance,
        )
    kept = min(curve, key=lambda past: past.kl).blocks
    record = {"kept": kept, "curve": [step.to_json() for step in curve]}
    bench.folder.record("polish", record, small)
    return record


def _compared(bench: Bench, dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """How close the cut model is to the dense one on held-out images; at most what a polish keeps is chosen by them."""
    sides = [bench.predictions(model, bench.holdout) for model in (dense, small)]
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(*sides, strict=True))
    images = sum(len(batch) for batch in sides[0])
    return {
        "images": images,
        "kl": sensitivity.divergence(*sides),
        "agreement": 100 * same / images,
    }


def _trace(state: admm.AdmmState, updates: int) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(r), "epoch": r.step / updates} for r in state.trace]


def _training_loss(bench: Bench, model: nn.Module) -> float:
    """Cross entropy on a fixed sample of training images, as in evaluation."""
    batches = max(1, LOSS_IMAGES // bench.recipe.training.batch_size)
    return bench.score(model, itertools.islice(bench.labelled.sample(), batches)).loss


def _metrics_record(structure: ModelStructure, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: model_cost(structure, structure.shapes, kind) for kind in ("params", "macs")} | dict(metrics)


def _timed_models(bench: Bench, dense: nn.Module, small: nn.Module) -> dict[str, Any]:
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


def _data_record(bench: Bench, source: data.DataSource, names: Sequence[str] | None) -> dict[str, Any]:
    settings = bench.recipe.data
    loaders = bench.loaders
    record: dict[str, Any] = {
        "source": source.source,
        "train_split": settings.train_split,
        "image_size": bench.calibration[0].shape[-1],
        "classes": bench.num_classes,
        "calibration_images": sum(len(batch) for batch in bench.calibration),
    }
    if names is not None:
        record["class_names"] = list(names)
    if loaders is not None:
        record |= {
            "validation_split": settings.validation_split,
            "train_images": len(loaders.train_split),
            "validation_images": len(loaders.validation_split),
            "unreadable_images": len(loaders.train_split.unreadable) + len(loaders.validation_split.unreadable),
        }
    return record
