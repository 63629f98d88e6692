"""Images that stay on the training device and are augmented there: for small images that nothing feeds fast enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gohsp.data.preprocessing import Preprocessing, eval_transform
from gohsp.data.sources import Split, UnreadableImageError
from gohsp.errors import DataError

CROP_AREA = (0.35, 1.0)
"""Smallest and largest share of the image's area that a crop keeps, as in `data.train_transform`."""

CROP_RATIO = (3 / 4, 4 / 3)
"""Least and greatest ratio of a crop's width to its height."""


@dataclass(frozen=True)
class ResidentImages:
    """A split's images as evaluation crops them.

    Attributes:
        pixels: uint8 ``[N, C, H, W]``, on the device.
        labels: int64 ``[N]``, there too.
        preprocessing: What they were cropped for.
    """

    pixels: Tensor
    labels: Tensor
    preprocessing: Preprocessing


def resident_images(
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    strict: bool = False,
) -> ResidentImages:
    """Decode a split once, crop it as for evaluation and move it to ``device``.

    Args:
        split: The images and labels.
        preprocessing: What the model expects.
        device: Where they are to stay.
        num_classes: The model's number of classes, for the check of the labels.
        class_names: The model's classes, in whose order labels are numbered by name; see `Split.labels`.
        strict: Whether an unreadable image raises; otherwise it is left out and listed in `Split.unreadable`.

    Raises:
        DataError: A label does not fit; no image can be read, or one cannot and ``strict`` is set.
    """
    labels = torch.from_numpy(split.labels(num_classes, class_names))
    transform = eval_transform(preprocessing, normalize=False)

    def pixels(index: int) -> Tensor | None:
        try:
            return transform(split.image(index))
        except UnreadableImageError:
            if strict:
                raise
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(pixels, range(len(split))))
    kept = [i for i, image in enumerate(found) if image is not None]
    if not kept:
        raise DataError(f"none of the {len(split)} images of {split.name} can be read; mend the source")
    return ResidentImages(
        torch.stack([image for image in found if image is not None]).to(device), labels[kept].to(device), preprocessing
    )


class ResidentLoader:
    """Batches of resident images, normalised, and labels; each iteration is one more epoch.

    Order and augmentation depend on ``seed`` and the epoch alone.

    Args:
        images: The images.
        batch_size: Images a batch; the last one may have fewer.
        shuffle: Whether each epoch has an order of its own.
        augment: Whether to take a random crop of 35 to 100 % of the area, resized.
        mirror: Whether to mirror these at random.
        seed: A non-negative integer.
        drop_last: Whether an incomplete last batch is left out.
        share: Number of this process and of all, which take turns with the images of an epoch.
    """

    def __init__(
        self,
        images: ResidentImages,
        *,
        batch_size: int,
        shuffle: bool,
        augment: bool = False,
        mirror: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.images, self.batch_size, self.shuffle = images, batch_size, shuffle
        self.augment, self.mirror, self.seed, self.drop_last = augment, mirror, seed, drop_last
        self.share, self.epoch = share, 0
        normal = images.preprocessing
        shape = (1, normal.channels, 1, 1)
        self._mean = torch.tensor(normal.mean, device=images.pixels.device).view(shape) * 255
        self._std = torch.tensor(normal.std, device=images.pixels.device).view(shape) * 255

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is."""
        self.epoch = epoch

    @property
    def size(self) -> int:
        """Images of one epoch on this process, the same on all."""
        return len(self.images.labels) // self.share[1]

    def __len__(self) -> int:
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.pixels.device
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        count = len(self.images.labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        mine = order[self.share[0] :: self.share[1]][: self.size].to(device)
        for batch in mine.split(self.batch_size)[: len(self)]:
            pixels = (self.images.pixels[batch].float() - self._mean) / self._std
            if self.augment:
                pixels = random_views(pixels, generator, mirror=self.mirror)
            yield pixels, self.images.labels[batch]


def random_views(images: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """A random crop of each image, bilinearly resized to its full size, mirrored at random.

    Args:
        images: ``[B, C, H, W]``.
        generator: Of the crops, on the CPU.
        mirror: Whether to mirror.
    """
    count, height, width = len(images), *images.shape[-2:]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    side = uniform(*CROP_AREA).sqrt()  # of a square of the image's own ratio
    skew = uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])).div(2).exp()
    across, down = (side * skew).clamp(max=1), (side / skew).clamp(max=1)
    left, top = (1 - across) * uniform(-1, 1), (1 - down) * uniform(-1, 1)
    if mirror:
        across = torch.where(torch.rand(count, generator=generator) < 0.5, -across, across)
    zero = torch.zeros(count)
    maps = torch.stack([across, zero, left, zero, down, top], 1).view(count, 2, 3).to(images.device)
    grid = F.affine_grid(maps, [count, images.shape[1], height, width], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
