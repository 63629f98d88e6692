"""A file in int8 of one in float32: the images that it is made on, and how far it is from the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.core.objective import resolve_objective
from gohsp.data.calibration import CalibrationSet, calibration_set, divided
from gohsp.errors import ExportError, one_line

INT8_IMAGES = 320
"""Images that are read, at most; a fifth of them is held out."""

LARGEST = 0.5
"""Difference from the model beyond which a file is refused: by then half of what it gives out is error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8:
    """How a file in int8 was made of one in float32, and how far it is from the model.

    Attributes:
        how: What made it.
        images: Images that the ranges of activations were found on.
        held_out: Further images, on which it was compared with the model; a lone image is both.
        difference: Root mean square of the outputs' difference, over that of the model's output.
        agreement: Share of the images held out with the same first prediction, in percent; None but of class logits.
        size: Bytes of the file.
        float_size: Bytes of the one in float32.
    """

    how: str
    images: int
    held_out: int
    difference: float
    agreement: float | None
    size: int
    float_size: int


def calibration_of(images: Iterable[Any]) -> CalibrationSet:
    """Images to make a file on, and others to compare it on.

    Raises:
        DataError: No iterable, no images, or images of another kind or of several sizes.
    """
    batches = calibration_set(images, count=INT8_IMAGES, holdout=0, mirror=False).images
    sizes = [len(batch) for batch in batches]
    return divided(batches, sizes, -(-sum(sizes) // 5), mirror=False)


@torch.no_grad()
def quantised(reference: nn.Module, source: Path, path: Path, target: ModuleType, on: CalibrationSet) -> Int8:
    """Make a file in int8, and run it beside the model.

    Args:
        reference: The model, which returns what counts alone.
        source: Its file in float32, which was found to compute the same.
        path: The file in int8.
        target: What both are for.
        on: Images.

    Raises:
        ExportError: The file cannot be made or run, or has little to do with the model.
    """
    try:
        target.quantise(source, path, on.images)
        run = target.opened(path)
        pairs = [(reference(images).double(), run(images).double()) for images in on.holdout]
    except Exception as error:  # runtimes have no class of errors in common
        raise ExportError(f"{target.RUNTIME} cannot make or run the file in int8: {one_line(error)}") from error
    ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    difference = _size(theirs - ours) / max(_size(ours), 1e-30)
    if not difference <= LARGEST:
        raise ExportError(
            f"the file in int8 has little to do with the model: its outputs differ by {difference:.2f} of the model's "
            f"(root mean squares on {len(ours)} images; allowed {LARGEST}), and it was not kept. Calibrate on images "
            "as the model will see them, preprocessed, or leave int8 out"
        )
    return Int8(
        how=target.INT8,
        images=on.count,
        held_out=len(ours),
        difference=difference,
        agreement=_agreement(reference, on.holdout[0], ours, theirs),
        size=path.stat().st_size,
        float_size=source.stat().st_size,
    )


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _agreement(reference: nn.Module, images: Tensor, ours: Tensor, theirs: Tensor) -> float | None:
    """Share of same first predictions in percent, where the model's output is known to be class logits."""
    if resolve_objective(None, reference, images).name != "classification":
        return None
    return 100 * float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
