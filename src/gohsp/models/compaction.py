"""Cutting a model down for good, and the check that the result computes what the masked model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.core import surgery
from gohsp.core.capture import device_of
from gohsp.core.objective import tensor_in
from gohsp.errors import EqualityError
from gohsp.models.description import describe, resize, unwrapped
from gohsp.models.feeding import Example, fed, images_in
from gohsp.structure import Kept, kept_widths

EQUALITY_TOLERANCE = 1e-5
"""Largest difference of compacted and masked model, relative to the output's scale, in float32."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """A compacted model and how close it is to the masked dense one.

    Attributes:
        model: The small dense model.
        max_relative_difference: Largest difference of outputs over their largest magnitude, on the probe batch.
        images: Images in the probe batch.
    """

    model: nn.Module
    max_relative_difference: float
    images: int


def compact(
    model: nn.Module, kept: Kept, images: Example, *, at: str = "", output: Callable[[Any], Tensor] = tensor_in
) -> Compaction:
    """Cut a model down to what is ``kept`` and check that the result computes what the masked model computes.

    Args:
        model: The model, which is left as it is.
        kept: What stays of each sub-layer.
        images: A few images ``[B, C, H, W]`` to compare the two models on, or a mapping that holds them.
        at: Name of the module that is cut, as of :func:`gohsp.describe`.
        output: Takes what the model returns to the tensor that is compared.

    Raises:
        PlanError: The cut does not fit the model.
        EqualityError: The two models differ by more than :data:`EQUALITY_TOLERANCE`.
    """
    model = unwrapped(model)
    network = describe(model, images, at)
    state = surgery.cut_state(model, network, kept)
    masked = copy.deepcopy(model).eval()
    small = copy.deepcopy(model).eval()
    surgery.mask(masked, network, kept)
    resize(small, kept_widths(kept))
    small.load_state_dict(state, strict=True)
    with fed(masked, images), fed(small, images):
        difference = relative_difference(masked, small, images_in(images), output=output)
    if not difference <= EQUALITY_TOLERANCE:
        raise EqualityError(
            f"the compacted model differs from the masked one by {difference:.1e} of the output's scale "
            f"(allowed {EQUALITY_TOLERANCE:.0e}); this is a defect of gohsp, please report the architecture"
        )
    return Compaction(small.train(model.training), difference, len(images_in(images)))


def relative_difference(
    reference: nn.Module, other: nn.Module, images: Tensor, *, output: Callable[[Any], Tensor] = tensor_in
) -> float:
    """Largest absolute difference of two models' outputs, over the reference's largest magnitude."""
    with torch.no_grad():
        a, b = (output(model(images.to(device_of(reference)))).double() for model in (reference, other))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
