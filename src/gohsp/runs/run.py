"""A run: pruning from a data source into a folder, with a report, that an interruption does not end."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
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

from gohsp import api, checkpoint, data, files, latency, models, opening, report, training
from gohsp import config as configs
from gohsp.api import Labelled, Pruned, Trained
from gohsp.config import Config
from gohsp.errors import CheckpointError, DataError
from gohsp.evaluation import Metrics
from gohsp.report import Report
from gohsp.runs import folder as folders
from gohsp.runs.folder import RunFolder
from gohsp.runs.images import class_names, draw_images, labelled_images
from gohsp.runs.samples import samples
from gohsp.runs.steps import KeptSteps
from gohsp.runtime import ProgressCallback, pick_device, require_one_process, resolve_precision, unheard
from gohsp.session import Session
from gohsp.structure import (
    COUNTED,
    Budget,
    Network,
    Widths,
    cost_of,
    count_macs,
    count_params,
    excluding,
    parse_budget,
    widths_to_json,
)


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        model: The pruned model, in evaluation mode.
        report: What ``report.json`` holds.
        folder: Where everything was written.
    """

    model: nn.Module
    report: Report
    folder: Path


@dataclass(frozen=True)
class _Task:
    """What a run was asked for, checked."""

    dense: nn.Module
    network: Network
    goal: Budget
    source: data.DataSource
    splits: Sequence[data.Split]
    widths: Widths | None
    config: Config
    command: Sequence[str]
    progress: ProgressCallback


def run(
    model: nn.Module | str | Path,
    source: data.DataSource | str,
    budget: str,
    out: str | Path,
    *,
    config: Config | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    revision: str | None = None,
    exclude: Sequence[str] = (),
    widths: Widths | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> RunResult:
    """Prune a Vision Transformer on a data source, and write a run folder.

    Args:
        model: A model that says what it does with an image (``pretrained_cfg``, as timm's do), or a folder or name as
            :func:`gohsp.open_model` takes it. A given module is left as it is; what is made of it is float32 and has
            no frozen weights.
        source: Where the images are.
        budget: Such as ``params=-40%`` or ``macs=0.8G``, an upper bound that is met within 1 %; or ``latency=-25%``
            of the time that the dense model takes on this device.
        out: The run's folder; it will hold the model, the plan, the report and the settings.
        config: All settings; None for the defaults.
        weights: A weights file, for a model given by name; see :func:`gohsp.open_model`.
        pretrained: Whether to fetch its library's or the hub's weights, for a model given by name.
        revision: Branch, tag or hash of a commit, for a model given as ``OWNER/NAME`` on the hub.
        exclude: What to leave alone: names of sub-layers or of modules that hold some, or kinds of unit.
        widths: Widths to use instead of allocating them (an edited ``plan.json``).
        resume: Go on with an interrupted run in ``out``; of a finished one the result is returned.
        overwrite: Replace the run in ``out``: the files that it wrote, and no others.
        command: The command line, for the record.
        progress: Is told how far each step is.

    Returns:
        The pruned model and the report.

    Raises:
        GohspError: One of its kinds, for bad input; before any work is begun wherever that can be known.
    """
    require_one_process()
    config, goal = configs.settled(config), parse_budget(budget)
    source = source if isinstance(source, data.DataSource) else data.DataSource(source=source)
    inputs = {
        "the model": None if isinstance(model, nn.Module) else model,
        "the weights file": weights,
        "the data": source.source.removeprefix("hfds/").removeprefix("wds/"),
    }
    path = folders.check(out, resume=resume, overwrite=overwrite, inputs=inputs)
    source = dataclasses.replace(
        source,
        image_key=config.data.image_key or source.image_key,
        label_key=config.data.label_key or source.label_key,
    )
    splits = _open_splits(source, config)
    dense = _open(model, weights, pretrained, revision, config, splits[0])
    network = api.to_cut(dense, excluding(models.describe(dense, at=config.at), exclude), config)
    models.check_finite(dense)
    data.Preprocessing.from_model(dense)  # refuses a model that does not say what it does with an image
    if models.is_library_model(dense):
        models.require_remakeable(dense, config.at)
    api.require_possible(network, goal, widths, config)
    labels = _labels(dense, splits, config) if config.trains else [None]
    request = {
        "model": type(model).__name__ if isinstance(model, nn.Module) else str(model),
        "weights": str(weights) if weights else None,
        "weights_hash": files.digest_of(dense.state_dict().values()),
        "data": _data_request(source, splits, labels),
        "budget": budget,
        "exclude": list(exclude),
        "plan": widths_to_json(widths) if widths else None,
        "config": configs.to_mapping(config),
    }
    with folders.begin(path, request, resume=resume, overwrite=overwrite) as folder:
        if folder.finished:
            folder.clear_state()  # an end between the last file and this may have left some
            return RunResult(_loaded(folder, dense), report.read(folder.path), folder.path)
        files.write_atomic(folder.path / "settings.toml", configs.to_toml(config))
        dense.to(pick_device(config.device))
        task = _Task(dense, network, goal, source, splits, widths, config, command, progress or unheard)
        return _pruned(task, folder)


def _loaded(folder: RunFolder, dense: nn.Module) -> nn.Module:
    """The model of a finished run."""
    if models.is_library_model(dense):
        return checkpoint.load(folder.path)
    return checkpoint.load(folder.path, into=copy.deepcopy(dense))


# Before the work


def _open_splits(source: data.DataSource, config: Config) -> list[data.Split]:
    splits = [data.open_split(source, config.data.train_split)]
    if config.trains:
        splits.append(data.open_split(source, config.data.validation_split))
        if splits[0].name == splits[1].name:
            raise DataError(
                f"training and validation images are the same, {splits[0].name}: scores would mean nothing; set "
                "data.train_split and data.validation_split to different splits. A folder needs a sub-folder for each, "
                "such as train/ and validation/; 'hfds/...' takes slices, such as train[:90%] and train[90%:]"
            )
    return splits


def _open(
    model: nn.Module | str | Path,
    weights: str | Path | None,
    pretrained: bool,
    revision: str | None,
    config: Config,
    split: data.Split,
) -> nn.Module:
    if isinstance(model, nn.Module):
        if weights or pretrained or revision:
            raise CheckpointError("a model that is given as a module brings its own weights; give no others")
        return models.working_copy(model, at=config.at)
    arguments, trains = dict(config.model_arguments), config.dense.epochs > 0
    given: dict[str, Any] = {"weights": weights, "pretrained": pretrained, "revision": revision}
    if not trains:
        opening.require_weights(model, weights, pretrained)
    if opening.brings_arguments(model):
        return models.working_copy(opening.open_model(model, **given, arguments=arguments), at=config.at)
    if trains and "num_classes" not in arguments:
        arguments["num_classes"] = split.num_classes or int(split.labels().max()) + 1
    torch.manual_seed(config.seed)
    opened = opening.open_model(model, **given, arguments=arguments, new_classifier=trains)
    return models.working_copy(opened, at=config.at)


def _labels(dense: nn.Module, splits: Sequence[data.Split], config: Config) -> list[np.ndarray]:
    """The labels of training and validation images, all checked; a model that is to learn them gets the classes' names.

    Raises:
        UnsupportedModelError: The model is no classifier.
        DataError: A label does not fit; the classes of the splits, or of the data and the model, differ; all training
            images are of one class.
    """
    models.require_classifier(dense)
    training.require_optimizer(config.training.optimizer)
    train, validation = splits
    trains = config.dense.epochs + config.finetune.epochs > 0 or config.method == "gohsp"
    if models.class_names(dense) is None:
        if config.dense.epochs == 0:
            train.warn_of_order()
        if trains and train.num_classes == models.num_classes(dense):
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
            record[purpose]["labels"] = files.digest_of([torch.from_numpy(numbers)])
            record[purpose]["classes"] = {str(i): name for i, name in enumerate(split.class_names or ())}
    return record


# The work


def _pruned(task: _Task, folder: RunFolder) -> RunResult:
    config, dense = task.config, task.dense
    api.tell_budget(task.network, task.goal)
    kept_steps = KeptSteps(folder.timings(), folder)
    images = draw_images(dense, config, folder, task.splits[0], task.progress)
    session = api.open_session(dense, images, config=config, progress=task.progress)
    session = dataclasses.replace(session, steps=kept_steps, store=folder.spool)
    labelled, trained, scores = None, Trained(()), None
    if config.trains:
        device = next(dense.parameters()).device
        precision = resolve_precision(config.precision, device)
        labelled = labelled_images(dense, config, folder, task.splits, device, precision)
        if config.dense.epochs > 0:
            trained = kept_steps.do(
                "dense", Trained, lambda: api.train_stage(session, "dense", dense, None, labelled), dense
            )
            checkpoint.save(dense, folder.path / "dense", at=config.at)
        scores = _scored(session, "dense_score", dense, labelled)

    def chosen(widths: Widths) -> None:
        files.write_atomic(folder.path / "plan.json", json.dumps(widths_to_json(widths), indent=2) + "\n")

    pruned = api.run_steps(session, dense, task.network, task.goal, given=task.widths, labelled=labelled, chosen=chosen)
    small_scores = _scored(session, "pruned_score", pruned.model, labelled)
    again = _retrained(session, dense, labelled) if labelled is not None and config.compare_dense else None
    made = _report(session, task, pruned, trained, scores, small_scores, again, labelled)
    ranking = made.ranking.model_dump(mode="json")
    files.write_atomic(folder.path / "ranking.json", json.dumps(ranking, indent=2) + "\n")
    measured = small_scores if small_scores is not None else pruned.fidelity
    checkpoint.save(
        pruned.model,
        folder.path,
        at=config.at,
        kept=pruned.kept,
        made_by={"gohsp": made.gohsp, "versions": made.versions, "budget": task.goal.requested},
        metrics=dataclasses.asdict(measured),
    )
    if config.uniform and models.is_library_model(pruned.model):
        models.save_plain(pruned.model, folder.path / "plain")
    report.write(made, folder.path)
    folder.clear_state()
    models.unfeed(pruned.model)
    return RunResult(pruned.model, made, folder.path)


def _scored(session: Session, name: str, model: nn.Module, labelled: Labelled | None) -> Metrics | None:
    if labelled is None or labelled.evaluate is None:
        return None
    evaluate = labelled.evaluate
    return session.steps.do(name, Metrics, lambda: evaluate(model))


def _retrained(session: Session, dense: nn.Module, labelled: Labelled) -> tuple[Trained, Metrics] | None:
    """The dense model trained for as many epochs as the pruned one, for an honest comparison."""
    config = session.config
    epochs = config.finetune.epochs + (config.admm.epochs if config.method == "gohsp" else 0)
    if epochs == 0:
        return None
    again = copy.deepcopy(dense)
    trained = session.steps.do(
        "dense_retrained",
        Trained,
        lambda: api.train_stage(session, "dense_retrained", again, dense, labelled, epochs),
        again,
    )
    metrics = _scored(session, "dense_retrained_score", again, labelled)
    assert metrics is not None
    return trained, metrics


# The report


def _report(
    session: Session,
    task: _Task,
    pruned: Pruned,
    trained: Trained,
    scores: Metrics | None,
    small_scores: Metrics | None,
    again: tuple[Trained, Metrics] | None,
    labelled: Labelled | None,
) -> Report:
    config, network = task.config, task.network
    small = models.describe(pruned.model, session.probe, config.at)
    speed = _speed(session, task.dense, pruned.model)
    return Report(
        **_provenance(task),
        method=config.method,
        model=_model_record(task.dense),
        data=_data_record(session, task, labelled),
        budget=_budget_record(task.goal, pruned, small, speed),
        dense=_metrics(network, scores),
        dense_retrained=_metrics(network, again[1]) if again else None,
        pruned=_metrics(small, small_scores),
        fidelity=report.Fidelity(**dataclasses.asdict(pruned.fidelity), predicted_distance=pruned.allocation.predicted),
        heal=report.Heal.of(pruned.heal.curve) if pruned.heal else None,
        speed=speed,
        plan=report.Plan(
            dense=network.widths,
            pruned=dict(pruned.widths),
            kept=dict(pruned.kept),
            stages=pruned.allocation.stages,
        ),
        ranking=report.Ranking.of(pruned.ranking),
        admm=_admm_record(session, pruned, labelled),
        equality=report.Equality(
            max_relative_difference=pruned.equality,
            tolerance=models.EQUALITY_TOLERANCE,
            images=len(session.probe),
        ),
        curves=report.Curves(
            dense=_epochs(trained.curve),
            admm=_epochs(pruned.soft.curve) if pruned.soft else (),
            finetune=_epochs(pruned.finetune),
            dense_retrained=_epochs(again[0].curve) if again else (),
        ),
        samples=samples(session, task.dense, pruned.model, network, pruned.ranking, pruned.kept),
        timings=dict(session.steps.seconds),
        config=configs.to_mapping(config),
    )


def _epochs(curve: Sequence[training.Epoch]) -> tuple[report.Epoch, ...]:
    return tuple(report.Epoch.model_validate(epoch) for epoch in curve)


def _provenance(task: _Task) -> dict[str, Any]:
    packages = ("torch", "torchvision", "timm", "safetensors", "numpy")
    device = next(task.dense.parameters()).device
    return {
        "gohsp": importlib.metadata.version("gohsp"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": tuple(task.command),
        "seed": task.config.seed,
        "machine": report.Machine(
            device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            processor=platform.processor() or platform.machine(),
            cores=os.cpu_count() or 1,
            python=platform.python_version(),
        ),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _model_record(dense: nn.Module) -> report.Model:
    if models.is_library_model(dense):
        return report.Model(**models.specification(dense))
    return report.Model(architecture=f"{type(dense).__module__}.{type(dense).__qualname__}")


def _metrics(network: Network, scores: Metrics | None) -> report.Metrics:
    measured: Mapping[str, Any] = dataclasses.asdict(scores) if scores else {}
    return report.Metrics(params=count_params(network), macs=count_macs(network), **measured)


def _speed(session: Session, dense: nn.Module, small: nn.Module) -> report.Speed:
    """Time of a batch before and after, interleaved."""
    settings = session.config.latency
    with session.steps.timed("latency"):
        before, after = latency.compare([dense, small], session.probe[:1], settings)
    return report.Speed(batch_size=settings.batch_size, dtype=settings.dtype, dense_ms=before, pruned_ms=after)


def _budget_record(goal: Budget, pruned: Pruned, small: Network, speed: report.Speed) -> report.Budget:
    limit: float | None = pruned.allocation.limit
    if limit is None:
        achieved, limit = speed.pruned_ms, goal.bound(speed.dense_ms)  # unchecked: the work is done
    else:
        achieved, limit = int(cost_of(small, small.widths, COUNTED[goal.kind])), int(limit)
    return report.Budget(kind=goal.kind, requested=goal.requested, limit=limit, achieved=achieved)


def _admm_record(session: Session, pruned: Pruned, labelled: Labelled | None) -> report.Admm | None:
    soft, cut = pruned.soft, pruned.cut
    if soft is None or labelled is None or cut.loss_before is None or cut.loss_after is None:
        return None
    updates = len(labelled.train)
    return report.Admm(
        status=soft.status,
        metric=session.config.admm.metric,
        penalty=session.config.admm.penalty,
        trace=tuple(
            report.TraceStep(**dataclasses.asdict(record), epoch=record.step / updates) for record in soft.trace
        ),
        loss_before_cut=cut.loss_before,
        loss_after_cut=cut.loss_after,
    )


def _data_record(session: Session, task: _Task, labelled: Labelled | None) -> report.Data:
    settings, names = task.config.data, models.class_names(task.dense)
    scored: dict[str, Any] = {}
    if labelled is not None:
        train, validation = task.splits
        scored = {
            "validation_split": settings.validation_split,
            "train_images": len(train),
            "validation_images": len(validation),
            "unreadable_images": len(train.unreadable) + len(validation.unreadable),
        }
    return report.Data(
        source=task.source.source,
        train_split=settings.train_split,
        image_size=session.probe.shape[-1],
        classes=models.num_classes(task.dense) or None,
        class_names=names,
        calibration_images=session.calibration.count,
        **scored,
    )
