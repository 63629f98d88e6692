"""What a model expects of an image, and the transforms that give it that, made with timm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image
from torch import Tensor, nn

from gohsp import models
from gohsp.errors import DataError, nearest, require_packages

Augment = Literal["none", "light", "strong"]
Transform: TypeAlias = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model expects of an image.

    Attributes:
        image_size: Side of the square input in pixels, or (height, width).
        channels: 3 (RGB) or 1 (grey).
        mean: Per channel, of pixels scaled to 0..1.
        std: Per channel, likewise.
        crop_pct: Share of the resized image's side that evaluation's centre crop keeps, in (0, 1].
        interpolation: ``nearest``, ``bilinear``, ``bicubic``, ``box``, ``hamming`` or ``lanczos``.
        crop_mode: timm's evaluation crop: ``center``, ``squash`` or ``border``.

    Raises:
        DataError: A value is out of its range, or the lengths of ``mean`` and ``std`` are not ``channels``.
    """

    image_size: int | tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"channels={self.channels}: images are read as grey (1) or RGB (3)")
        if not len(self.mean) == len(self.std) == self.channels:
            raise DataError(f"mean={self.mean} and std={self.std} must each have {self.channels} values, one a channel")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct={self.crop_pct}: allowed is a share in (0, 1]")
        for name, value, allowed in (
            (
                "interpolation",
                self.interpolation,
                ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
            ),
            ("crop_mode", self.crop_mode, ("center", "squash", "border")),
        ):
            if value not in allowed:
                raise DataError(f"{name}='{value}'; {nearest(value, allowed)}")

    @classmethod
    def from_model(cls, model: nn.Module) -> Preprocessing:
        """Read the preprocessing off a model, where timm or :func:`gohsp.open_model` put it: its ``pretrained_cfg``.

        The size and the channels are those of the model as built, not those of its pretrained weights: a
        ``deit_tiny_patch16_224`` created with ``img_size=112`` evaluates at 112 px. A one-channel model gets
        the averages of the pretrained mean and std.

        Args:
            model: A model with a ``pretrained_cfg`` that has ``mean`` and ``std`` at least.

        Raises:
            DataError: It has none.
        """
        if not models.pretrained_cfg(model).get("mean"):
            raise DataError(
                f"{type(model).__name__} does not say what it does with an image; give a model of transformers by its "
                "folder, with its preprocessor_config.json, or set model.pretrained_cfg = {'mean': (0.5, 0.5, 0.5), "
                "'std': (0.5, 0.5, 0.5), 'crop_pct': 0.9, 'interpolation': 'bicubic'}, or prune in memory, on images "
                "that are preprocessed: gohsp.prune(model, images, budget)"
            )
        require_packages("a model's preprocessing", "timm", "timm")
        from timm.data import resolve_model_data_config

        config: dict[str, Any] = resolve_model_data_config(model)
        channels, height, width = models.input_size(model)
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if channels == 1 and len(mean) > 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        return cls(
            image_size=height if height == width else (height, width),
            channels=channels,
            mean=mean,
            std=std,
            crop_pct=config["crop_pct"],
            interpolation=config["interpolation"],
            crop_mode=config["crop_mode"],
        )


def eval_transform(preprocessing: Preprocessing, *, normalize: bool = True) -> Transform:
    """Build the deterministic transform: resize, centre crop, scale to 0..1, normalise.

    Args:
        preprocessing: What the model expects.
        normalize: Whether to do the last two steps.

    Returns:
        A function from a PIL image of any mode to a float32 tensor [channels, height, width], uint8 without
        ``normalize``.
    """
    return _created(
        preprocessing, crop_pct=preprocessing.crop_pct, crop_mode=preprocessing.crop_mode, normalize=normalize
    )


def train_transform(preprocessing: Preprocessing, *, augment: Augment = "light", mirror: bool = True) -> Transform:
    """Build the training transform.

    Args:
        preprocessing: What the model expects.
        augment: ``none``: as in evaluation. ``light``: a random crop of 35 to 100 % of the area, resized, and
            a random mirroring. ``strong``: ``light``, RandAugment and random erasing.
        mirror: Whether an image may be mirrored; pass `Split.mirrored_alike`.

    Returns:
        A function from a PIL image of any mode to a float32 tensor [channels, height, width]. It draws from
        the global generators of ``random``, numpy and torch, which `loader` seeds.

    Raises:
        DataError: ``augment`` is none of these.
    """
    if augment not in get_args(Augment):
        raise DataError(f"augment='{augment}'; {nearest(augment, get_args(Augment))}")
    if augment == "none":
        return eval_transform(preprocessing)
    strong = augment == "strong"
    return _created(
        preprocessing,
        is_training=True,
        scale=(0.35, 1.0),
        hflip=0.5 if mirror else 0.0,
        color_jitter=None,
        # DeiT's setting, its noisy magnitude capped at 9: at 10, posterising keeps no bit, which makes a
        # black image in older versions of Pillow and raises in newer ones.
        auto_augment="rand-m9-mstd0.5-mmax9-inc1" if strong else None,
        re_prob=0.25 if strong else 0.0,
        re_mode="pixel",
    )


def _created(preprocessing: Preprocessing, **options: Any) -> Transform:
    """Timm's transform, behind what makes an image grey or RGB."""
    require_packages("the preprocessing of images", "timm", "timm")
    from timm.data import create_transform  # it takes seconds to import, and images that are tensors need none

    transform: Any = create_transform(
        preprocessing.image_size,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        **options,
    )
    mode = "L" if preprocessing.channels == 1 else "RGB"
    transform.transforms.insert(0, functools.partial(_convert, mode=mode))
    return transform


def _convert(image: Image.Image, *, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # PIL would copy an image that has the mode
