"""Batches of a split: reproducible loaders, and draws for calibration that touch no label."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from gohsp.data.preprocessing import Transform
from gohsp.data.sources import DataSource, Split, UnreadableImageError, open_split
from gohsp.errors import DataError

logger = logging.getLogger(__name__)

CACHE_LIMIT = 2**30  # bytes of decoded pixels up to which `loader` keeps a split in memory by default


def loader(
    split: Split,
    *,
    transform: Transform,
    batch_size: int,
    shuffle: bool,
    workers: int = 0,
    seed: int = 0,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    strict: bool = False,
    drop_last: bool = False,
    cache: bool | None = None,
) -> DataLoader[Any]:
    """Make a reproducible loader of (images float32 [B, C, H, W], labels int64 [B]).

    Order and augmentation depend on ``seed``, the epoch and the batch, and on nothing else: the number of
    workers does not change a single pixel, and the global random generators are left as they were. Each
    ``iter()`` is one more epoch; ``loader.sampler.set_epoch(k)`` sets the next one, to resume a run.

    An image that cannot be decoded is left out of its batch, logged once, and listed in `Split.unreadable`. A batch
    may be empty for that reason: whoever iterates skips it.

    Args:
        split: The images and labels.
        transform: What makes a tensor [C, H, W] of an image.
        batch_size: Images a batch; a batch with unreadable images, and the last one, have fewer.
        shuffle: Whether each epoch has an order of its own.
        workers: Number of worker processes; 0 reads in this process.
        seed: A non-negative integer.
        num_classes: The model's number of classes, for the check of the labels. Default: the source's.
        class_names: The model's classes, in whose order labels are numbered by name; see `Split.labels`.
        strict: Whether an unreadable image raises.
        drop_last: Whether an incomplete last batch is left out.
        cache: Whether to decode all images now and keep them (`Split.preload`). Default: up to `CACHE_LIMIT`.

    Raises:
        DataError: A label does not fit; ``batch_size`` or ``workers`` is out of range; ``drop_last`` leaves no
            batch. While iterating: all images of the split turn out to be unreadable, or one is and ``strict`` is set.
    """
    if batch_size < 1 or workers < 0:
        raise DataError(f"batch_size={batch_size}, workers={workers}: allowed are at least 1 and at least 0")
    labels = split.labels(num_classes, class_names)
    if drop_last and len(split) < batch_size:
        raise DataError(f"{split.name} has {len(split)} images, less than one batch of {batch_size} (drop_last)")
    if split.decoded_bytes() <= CACHE_LIMIT if cache is None else cache:
        split.preload()
    return DataLoader(
        _Batches(split, labels, transform, strict),
        batch_size=batch_size,
        sampler=_SeededSampler(len(split), shuffle, seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(seed),  # else each epoch draws from the global generator
    )


class _SeededSampler(Sampler[tuple[int, int]]):
    """Yields (image index, seed) pairs that depend on the seed and the epoch only."""

    def __init__(self, size: int, shuffle: bool, seed: int) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        self.epoch += 1
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        seeds = torch.randint(2**32, (self.size,), generator=generator)
        return zip(order.tolist(), seeds.tolist(), strict=True)


class _Batches(Dataset[Any]):
    """Reads a whole batch at once, so that the generators are seeded once a batch, in whichever process."""

    def __init__(self, split: Split, labels: np.ndarray, transform: Transform, strict: bool) -> None:
        self.split = split
        self.labels = labels
        self.transform = transform
        self.strict = strict

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        samples = []
        with _seeded(keys[0][1]):
            for index, _ in keys:
                try:
                    image = self.split.image(index)
                except UnreadableImageError:
                    if self.strict:
                        raise
                    continue
                samples.append((self.transform(image), int(self.labels[index])))
        if not samples and len(self.split.unreadable) == len(self.split):
            raise DataError(
                f"all {len(keys)} images of a batch of {self.split.name} are unreadable, like all others of it, the "
                f"first being image {keys[0][0]} ({self.split.filename(keys[0][0])}); mend them"
            )
        return samples


def _collate(samples: Sequence[tuple[Tensor, int]]) -> Any:
    """Stack a batch; torch's own function refuses the empty list that a batch of unreadable images leaves."""
    return default_collate(list(samples)) if samples else (torch.empty(0), torch.empty(0, dtype=torch.int64))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that timm's transforms draw from, and restore them afterwards.

    Restoring keeps a model's dropout independent of how the images were read.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm draws from it)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def calibration_images(
    source: DataSource,
    split: str,
    count: int,
    *,
    transform: Transform,
    seed: int = 0,
    batch_size: int = 64,
    skip: int = 0,
    strict: bool = False,
    store: Callable[[], MutableSequence[Tensor]] = list,
) -> MutableSequence[Tensor]:
    """Draw a fixed random subset of a split's images; no label is read, so the source needs none.

    Args:
        source: Where the images are.
        split: The split to draw from.
        count: The number of images; unreadable ones are replaced by further draws. If the split has fewer,
            all are used and a warning is logged.
        transform: What makes a tensor [C, H, W] of an image, usually `eval_transform`.
        seed: A non-negative integer; the same seed draws the same images.
        batch_size: Images a batch.
        skip: How many images of the draw to pass over first: another subset than that of the first ``skip``.
        strict: Whether an unreadable image raises.
        store: Makes an empty place for the batches: ``list`` for memory, :class:`Spool` for disk.

    Returns:
        Batches, float32 [B, C, H, W]; the last may be smaller.

    Raises:
        DataError: ``count`` or ``batch_size`` is not positive; the source cannot be opened; no image can be
            read, or one cannot and ``strict`` is set.
    """
    return drawn(
        open_split(source, split),
        count,
        transform=transform,
        seed=seed,
        batch_size=batch_size,
        skip=skip,
        strict=strict,
        store=store,
    )


def drawn(
    images: Split,
    count: int,
    *,
    transform: Transform,
    seed: int = 0,
    batch_size: int = 64,
    skip: int = 0,
    strict: bool = False,
    store: Callable[[], MutableSequence[Tensor]] = list,
    advance: Callable[[], None] = lambda: None,
) -> MutableSequence[Tensor]:
    """As :func:`calibration_images`, of a split that is open: what there is to be warned of is said once.

    ``advance`` is called after each image, for progress.
    """
    if count < 1 or batch_size < 1:
        raise DataError(f"count={count}, batch_size={batch_size}: both must be at least 1")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches, pending, found = store(), [], 0
    with _seeded(seed % 2**32):
        for index in order[skip:].tolist():
            if found == count:
                break
            try:
                pending.append(transform(images.image(index)))
            except UnreadableImageError:
                if strict:
                    raise
                continue  # logged by the split
            found += 1
            advance()
            if len(pending) == batch_size:
                batches.append(torch.stack(pending))
                pending = []
    if pending:
        batches.append(torch.stack(pending))
    if not found:
        raise DataError(f"none of the {len(images)} images of {images.name} can be read; mend the source")
    if found < count:
        logger.warning("%s has %d readable images, %d were asked for", images.name, found, count)
    return batches
