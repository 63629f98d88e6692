"""What every stage of a run works with: images, device, precision, progress and the time spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gohsp import data, models, resident, run, training
from gohsp.core import sensitivity
from gohsp.core.activations import Stages
from gohsp.measure import Metrics, evaluate
from gohsp.recipe import Recipe

logger = logging.getLogger(__name__)

PROBE_IMAGES = 8
"""Images on which a compacted model is compared with the masked one."""

CALIBRATION_BATCH = 64
"""Calibration images a batch. Folds of cross-validation are drawn within one, so it does not follow the user's."""


@dataclass(frozen=True)
class Labelled:
    """Labelled images, which only the training route reads.

    Attributes:
        train: Batches to train on.
        validation: Batches to score on.
        sample: Makes training images anew, as in evaluation.
        train_split: Where the training images are from.
        validation_split: Where the others are.
    """

    train: DataLoader[Any] | resident.ResidentLoader
    validation: Iterable[Any]
    sample: Callable[[], Iterable[Any]]
    train_split: data.Split
    validation_split: data.Split


@dataclass(frozen=True)
class Bench:
    """What every stage works with.

    Attributes:
        recipe: All settings.
        folder: Where results and unfinished work are kept.
        accelerator: Device and precision.
        calibration: Images, in batches; no label is read.
        holdout: Further ones, on which the result is compared with the dense model, and a polish chooses what to keep.
        mirror: Whether mirror images are as good.
        num_classes: Of the model.
        loaders: Labelled images, on the training route.
        quiet: Whether to draw no progress.
        timings: Seconds by stage, so far; of an interrupted stage, those of its last attempt.
    """

    recipe: Recipe
    folder: run.RunFolder
    accelerator: Accelerator
    calibration: Sequence[Tensor]
    holdout: Sequence[Tensor]
    mirror: bool
    num_classes: int
    loaders: Labelled | None
    quiet: bool
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def labelled(self) -> Labelled:
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

    def fast_attention(self, *of: nn.Module) -> AbstractContextManager[None]:
        """The faster attention kernel for passes through these models in the run's precision."""
        return training.fast_attention(self.precision, *of)

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
        with self.fast_attention(model):
            return evaluate(
                model,
                self.labelled.validation if batches is None else batches,
                device=self.accelerator.device,
                precision=self.precision,
            )

    @property
    def probe(self) -> Tensor:
        """A few images ``[B, C, H, W]``, to see that two models compute the same."""
        return self.images(PROBE_IMAGES)[0]

    def predictions(self, model: nn.Module, images: Iterable[Tensor]) -> list[Tensor]:
        """Log-probabilities ``[B, classes]`` of batches."""
        stages = models.stages(model)
        with self.fast_attention(model):
            return sensitivity.predictions(stages, list(self.embedded(stages, images)), self.precision)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of ``total`` pieces of work; call what it yields after each."""
        with training.progress_bar(disable=self.quiet) as bar:
            task = bar.add_task(what, total=total, rate="")
            yield lambda: bar.advance(task)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent to the stage's, for later attempts at the run, too."""
        began = time.perf_counter()
        logger.info("%s: begins", stage)
        yield
        self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - began, 3)
        self.folder.record_timings(self.timings)
        logger.info("%s: %.1f s", stage, self.timings[stage])


def open_bench(
    model: nn.Module,
    recipe: Recipe,
    folder: run.RunFolder,
    source: data.DataSource,
    splits: Sequence[data.Split],
    quiet: bool,
) -> Bench:
    """Draw the calibration images and set everything up.

    Args:
        model: The dense model.
        recipe: All settings.
        folder: The run's folder.
        source: Where the images are.
        splits: The training split and, on the training route, the validation split.
        quiet: Whether to draw no progress.
    """
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
        store=folder.spool,
    )
    calibrating, held_out = _divided(images, holdout, folder.spool)
    accelerator = training.make_accelerator(recipe.training.precision, "cpu" if recipe.device == "cpu" else None)
    return Bench(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        calibration=calibrating,
        holdout=held_out,
        mirror=settings.mirror and splits[0].mirrored_alike,
        num_classes=models.num_classes(model),
        loaders=_loaders(model, recipe, splits[0], splits[1], accelerator) if recipe.route == "train" else None,
        quiet=quiet,
        timings=folder.timings(),
    )


def class_names(model: nn.Module, train_split: data.Split) -> tuple[str, ...] | None:
    """The classes that number the labels of a run: the model's or, where it has no names, the training images'."""
    return models.class_names(model) or train_split.class_names


def _divided(images: Sequence[Tensor], holdout: int, spool: Callable[[], data.Spool]) -> tuple[data.Spool, data.Spool]:
    """All batches but the last ``holdout`` images, and those; a lone image is both."""
    count = sum(len(batch) for batch in images)
    first, last, left = spool(), spool(), max(1, count - holdout)
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
) -> Labelled:
    settings, preprocessing = recipe.training, data.Preprocessing.from_model(model)
    mirror, seed = train_split.mirrored_alike, recipe.seed
    checks: dict[str, Any] = {
        "strict": recipe.data.strict,
        "num_classes": models.num_classes(model),
        "class_names": class_names(model, train_split),
    }
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
        return Labelled(augmented, loader(validation, shuffle=False), sample, train_split, validation_split)
    loader = partial(data.loader, batch_size=settings.batch_size, workers=settings.workers, **checks)
    plain = data.eval_transform(preprocessing)
    transform = data.train_transform(preprocessing, augment=settings.augment, mirror=mirror)
    augmented = loader(train_split, transform=transform, shuffle=True, seed=seed, drop_last=drop_last)
    sample = partial(loader, train_split, transform=plain, shuffle=True, seed=seed)
    validation = loader(validation_split, transform=plain, shuffle=False)
    return Labelled(augmented, validation, sample, train_split, validation_split)
