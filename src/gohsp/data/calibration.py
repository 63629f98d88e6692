"""Calibration images out of anything that yields images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gohsp.errors import DataError
from gohsp.models.feeding import Example, image_key

BATCH = 64
"""Calibration images a batch. Folds of cross-validation are drawn within one, so it does not follow the user's."""

NO_IMAGES = "there are no images; give an iterable that yields at least one, better a thousand"

Store = Callable[[], MutableSequence[Tensor]]
"""Makes an empty place for batches: ``list`` for memory, :class:`gohsp.data.Spool` for disk."""


@dataclass(frozen=True, slots=True)
class Part(Sequence[Tensor]):
    """Some of the images that lie in batches, in order: batches again, cut where the part begins or ends.

    Attributes:
        batches: The batches, wherever they are kept.
        pieces: For each batch of the part, the index of the batch that it is cut from, and where it begins and ends
            there.
    """

    batches: Sequence[Tensor]
    pieces: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, first, last = self.pieces[index]
        return self.batches[batch][first:last]


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Images that a model is pruned on, and others that it is compared on.

    Attributes:
        images: Batches ``[B, C, H, W]``.
        holdout: The same of further images.
        mirror: Whether mirror images are as good.
    """

    images: Sequence[Tensor]
    holdout: Sequence[Tensor]
    mirror: bool

    @property
    def count(self) -> int:
        """Calibration images, those held out not counted."""
        return sum(len(batch) for batch in self.images)

    def first(self, count: int) -> list[Tensor]:
        """The first ``count`` images, in batches."""
        batches: list[Tensor] = []
        for batch in self.images:
            if count <= 0:
                break
            batches.append(batch[:count])
            count -= len(batch)
        return batches


def calibration_set(
    images: Iterable[Any], *, count: int, holdout: int, mirror: bool, store: Store = list
) -> CalibrationSet:
    """Take the first images of an iterable.

    Args:
        images: Tensors ``[C, H, W]`` or ``[B, C, H, W]``, preprocessed; or pairs that begin with one; or mappings that
            hold one (:data:`gohsp.models.feeding.IMAGE_KEYS`). Labels are not read.
        count: Images to calibrate on, at most.
        holdout: Further images, at most; of fewer than both see :func:`held_out`. A lone image is both.
        mirror: Whether mirror images are as good.
        store: Where they are kept.

    Raises:
        DataError: No iterable, no images, or images of another kind or of several sizes.
    """
    taken, sizes = store(), []
    for batch in _rebatched((batch for _, batch in _checked(images)), count + holdout):
        taken.append(batch)
        sizes.append(len(batch))
    total = sum(sizes)
    if total == 0:
        raise DataError(NO_IMAGES)
    return divided(taken, sizes, held_out(total, count, holdout), mirror=mirror)


def held_out(total: int, count: int, holdout: int) -> int:
    """How many of ``total`` images are held out: what ``count`` leaves, up to ``holdout``, but a twentieth at least."""
    return min(holdout, max(-(-total // 20), total - count))


def peeked(images: Iterable[Any]) -> tuple[Example, Iterable[Any]]:
    """The first images ``[B, C, H, W]``, or the mapping that holds them, and all images again: nothing is lost.

    Raises:
        DataError: No iterable, no images, or images of another kind.
    """
    if isinstance(images, Iterator):
        begun = list(itertools.islice(images, 1))
        return _first(begun), itertools.chain(begun, images)
    return _first(images), images


def _first(images: Iterable[Any]) -> Example:
    for given, batch in _checked(images):
        if len(batch):
            return given if isinstance(given, Mapping) else batch[:1]
    raise DataError(NO_IMAGES)


def divided(batches: Sequence[Tensor], sizes: Sequence[int], holdout: int, *, mirror: bool) -> CalibrationSet:
    """All images but the last ``holdout`` to calibrate on, and those; a lone image is both.

    Args:
        batches: Batches of images.
        sizes: Images in each.
        holdout: Images to hold out.
        mirror: Whether mirror images are as good.
    """
    count = max(1, sum(sizes) - holdout)
    first: list[tuple[int, int, int]] = []
    last: list[tuple[int, int, int]] = []
    left = count
    for index, size in enumerate(sizes):
        if left > 0:
            first.append((index, 0, min(left, size)))
        if left < size:
            last.append((index, max(left, 0), size))
        left -= size
    if not last:
        last = [(len(sizes) - 1, sizes[-1] - 1, sizes[-1])]
    return CalibrationSet(Part(batches, tuple(first)), Part(batches, tuple(last)), mirror)


def _checked(images: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """What is given, as it comes, and the images ``[B, C, H, W]`` in it."""
    if isinstance(images, Dataset) and not isinstance(images, Iterable):
        raise DataError(
            f"images are a {type(images).__name__}, a data set that gives them one by one; wrap it in a DataLoader: "
            "DataLoader(dataset, batch_size=64, shuffle=True)"
        )
    if isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable):
        raise DataError(
            f"images must be an iterable of tensors, pairs or mappings, such as a DataLoader, got a "
            f"{type(images).__name__}; of a folder or a data set's name, make one with torchvision or datasets, or use "
            "gohsp.run"
        )
    size = None
    for given in [images] if isinstance(images, Tensor) else images:
        image = _image_in(given)
        if image.ndim not in (3, 4) or not image.is_floating_point():
            raise DataError(
                f"an image is a floating-point tensor [C, H, W] or [B, C, H, W], preprocessed as the model expects it; "
                f"got {list(image.shape)} of {image.dtype}"
            )
        batch = image[None] if image.ndim == 3 else image
        if size is not None and batch.shape[1:] != size:
            raise DataError(f"images differ in size: {list(size)} and {list(batch.shape[1:])}; resize them to one")
        size = batch.shape[1:]
        yield given, batch.detach().cpu()


def _image_in(given: Any) -> Tensor:
    found = given
    if isinstance(given, Mapping):
        found = given[image_key(given)]
    elif isinstance(given, tuple | list) and given:
        found = given[0]
    if not isinstance(found, Tensor):
        raise DataError(
            f"images must come as tensors, as pairs (images, labels) or as mappings, got a {type(given).__name__} with "
            f"a {type(found).__name__}; turn images into tensors with the model's transform"
        )
    return found


def _rebatched(batches: Iterator[Tensor], most: int) -> Iterator[Tensor]:
    """The first ``most`` images in batches of :data:`BATCH`."""
    pending: list[Tensor] = []
    waiting = taken = 0
    for batch in batches:
        few = batch[: most - taken]
        taken += len(few)
        pending.append(few)
        waiting += len(few)
        while waiting >= BATCH:
            joined = torch.cat(pending)
            yield joined[:BATCH]
            pending, waiting = [joined[BATCH:]], waiting - BATCH
        if taken == most:
            break
    if waiting:
        yield torch.cat(pending)
