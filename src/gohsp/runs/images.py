"""The images of a run: calibration images and, for methods that train, loaders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gohsp import data, models
from gohsp.api import Labelled
from gohsp.config import Config
from gohsp.data.calibration import BATCH, CalibrationSet, divided, held_out
from gohsp.data.loading import drawn
from gohsp.data.resident import ResidentLoader, resident_images
from gohsp.evaluation import evaluate
from gohsp.runs.folder import RunFolder
from gohsp.runtime import ProgressCallback, telling


def class_names(model: nn.Module, train_split: data.Split) -> tuple[str, ...] | None:
    """The classes that number the labels of a run: the model's or, where it has no names, the training images'."""
    return models.class_names(model) or train_split.class_names


def draw_images(
    model: nn.Module, config: Config, folder: RunFolder, split: data.Split, progress: ProgressCallback
) -> CalibrationSet:
    """Draw calibration images from the training split; no label is read."""
    size, settings = len(split), config.calibration
    holdout = held_out(size, settings.images, settings.holdout)
    count = max(1, min(settings.images, size - holdout))
    total = min(count + holdout, size)
    with telling(progress, "images", total) as advance:
        images = drawn(
            split,
            total,
            transform=data.eval_transform(data.Preprocessing.from_model(model)),
            seed=config.seed,
            batch_size=BATCH,
            strict=config.data.strict,
            store=folder.spool,
            advance=advance,
        )
    mirror = settings.mirror and split.mirrored_alike
    return divided(images, [len(batch) for batch in images], holdout, mirror=mirror)


def labelled_images(
    model: nn.Module,
    config: Config,
    folder: RunFolder,
    splits: Sequence[data.Split],
    device: torch.device,
    precision: torch.dtype,
) -> Labelled:
    """Loaders of the training and the validation split."""
    train_split, validation_split = splits
    settings, preprocessing = config.training, data.Preprocessing.from_model(model)
    mirror, seed = train_split.mirrored_alike, config.seed
    checks: dict[str, Any] = {
        "strict": config.data.strict,
        "num_classes": models.num_classes(model),
        "class_names": class_names(model, train_split),
    }
    drop_last = len(train_split) > settings.batch_size
    if config.data.resident:
        train, scored = (
            resident_images(split, preprocessing, device, **checks) for split in (train_split, validation_split)
        )
        loader = partial(ResidentLoader, batch_size=settings.batch_size)
        augment = settings.augment == "light"
        augmented = loader(train, shuffle=True, augment=augment, mirror=mirror, seed=seed, drop_last=drop_last)
        sample, validation = partial(loader, train, shuffle=True, seed=seed), loader(scored, shuffle=False)
    else:
        loader = partial(data.loader, batch_size=settings.batch_size, workers=settings.workers, **checks)
        plain = data.eval_transform(preprocessing)
        transform = data.train_transform(preprocessing, augment=settings.augment, mirror=mirror)
        augmented = loader(train_split, transform=transform, shuffle=True, seed=seed, drop_last=drop_last)
        sample = partial(loader, train_split, transform=plain, shuffle=True, seed=seed)
        validation = loader(validation_split, transform=plain, shuffle=False)
    return Labelled(
        train=augmented,
        evaluate=lambda network: evaluate(network, validation, precision=precision),
        sample=sample,
        classes=models.num_classes(model),
        checkpoint=folder.epochs_file,
    )
