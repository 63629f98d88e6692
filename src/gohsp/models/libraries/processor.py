"""What an image processor of transformers does, as plain data: ``preprocessor_config.json``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Interpolation by the numbers that Pillow gives it."""

SHORTEST = ("CLIP", "Bit")
"""Processors for which one number is the length of the shorter side; to others it is that of a square's."""

Side = Annotated[int, Field(ge=1, le=4096)]
Sides = Annotated[
    dict[Literal["height", "width", "shortest_edge", "longest_edge"], Side | None], Field(min_length=1, max_length=4)
]
Channels = Annotated[list[float], Field(min_length=1, max_length=4)]


class ImageProcessor(BaseModel):
    """The entries of the file that say what becomes of an image: numbers, truth values and the name of a class.

    Everything else that a file holds is left out, and so is what names code (``auto_map``).
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, extra="ignore")

    image_processor_type: Annotated[str, Field(pattern=r"^\w{1,64}ImageProcessor(Fast)?$")] | None = None
    feature_extractor_type: Annotated[str, Field(pattern=r"^\w{1,64}FeatureExtractor$")] | None = None
    do_resize: bool | None = None
    size: Side | Sides | None = None
    resample: Annotated[int, Field(ge=0, lt=len(FILTERS))] | None = None
    do_center_crop: bool | None = None
    crop_size: Side | Sides | None = None
    do_rescale: bool | None = None
    rescale_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    do_normalize: bool | None = None
    image_mean: Channels | None = None
    image_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=4)] | None = None
    keep_aspect_ratio: bool | None = None
    do_pad: bool | None = None

    def preprocessing(self) -> dict[str, Any]:
        """The same in the words of timm's ``pretrained_cfg``, and ``image_size``, height and width of what comes out.

        Raises:
            ValueError: It does more or less than to resize, crop, scale and normalise, or to no one size.
        """
        if self.do_resize is False or self.do_pad or self.keep_aspect_ratio:
            raise ValueError("images must be resized to one size; 'do_pad' and 'keep_aspect_ratio' are not known here")
        if self.keeps_shape and not self.do_center_crop:
            raise ValueError("images that are resized by their shorter side must be cropped: 'do_center_crop'")
        before = _height_and_width(self.size, "size")
        after = _height_and_width(self.crop_size, "crop_size") if self.do_center_crop else before
        if after[0] > before[0] or after[0] * before[1] != after[1] * before[0]:
            raise ValueError(f"'crop_size' {after} must be of the shape of 'size' {before}, and no larger")
        share = after[0] / before[0]
        if math.floor(after[0] / share) < before[0]:  # as timm finds the size before the crop again
            share = math.nextafter(share, 0)
        return {
            "image_size": list(after),
            "crop_pct": share,
            "crop_mode": "center" if self.keeps_shape else "squash",
            "interpolation": FILTERS[2 if self.resample is None else self.resample],
            **self._scale(),
        }

    @property
    def keeps_shape(self) -> bool:
        """Whether ``size`` is the length of an image's shorter side."""
        if isinstance(self.size, dict):
            return "shortest_edge" in self.size
        return (self.image_processor_type or self.feature_extractor_type or "").startswith(SHORTEST)

    def _scale(self) -> dict[str, Any]:
        """Mean and standard deviation of pixels of 0 to 1."""
        factor = 1.0 if self.do_rescale is False else self.rescale_factor or 1 / 255
        mean, std = ([0.0] * 3, [1.0] * 3) if self.do_normalize is False else (self.image_mean, self.image_std)
        if mean is None or std is None or len(mean) != len(std):
            raise ValueError("'image_mean' and 'image_std' must be there, and as long as each other")
        return {"mean": tuple(x / (255 * factor) for x in mean), "std": tuple(x / (255 * factor) for x in std)}


def _height_and_width(given: int | dict[Any, Any] | None, name: str) -> tuple[int, int]:
    sides = {"height": given, "width": given} if isinstance(given, int) else given or {}
    height, width = (sides.get(side) or sides.get("shortest_edge") for side in ("height", "width"))
    if height is None or width is None:
        raise ValueError(f"'{name}' must be a number, or have height and width or shortest_edge")
    return height, width
