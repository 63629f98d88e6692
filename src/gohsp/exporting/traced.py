"""A module as a program of ``torch.export``: what every target is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gohsp import models
from gohsp.core.capture import require_finite
from gohsp.errors import ExportError, UnsupportedModelError, one_line

INPUT, OUTPUT = "images", "output"
"""What a program's input and output are called, in every target."""


class Counted(nn.Module):
    """A model that returns what counts of its output, and nothing else."""

    def __init__(self, model: nn.Module, output: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, images: Tensor) -> Tensor:
        """What counts ``[B, ...]`` of the output for images ``[B, C, H, W]``."""
        return self.output(self.model(images))


@dataclass(frozen=True, slots=True)
class Taken:
    """What counts of a model's output.

    Attributes:
        value: The tensor.
        returned: The class of what the model returns.
        part: Which part of that the tensor is; None if it is all of it.
    """

    value: Tensor
    returned: str
    part: str | None


def counted(model: nn.Module, output: Callable[[Any], Tensor]) -> Counted:
    """A copy of a model on the CPU, in evaluation mode, that returns what counts alone."""
    return Counted(copy.deepcopy(model).cpu().eval().requires_grad_(False), output)


@torch.no_grad()
def taken(model: Counted, images: Tensor) -> Taken:
    """What counts of the output for a few images, found by a pass.

    Raises:
        UnsupportedModelError: The images cannot be computed, or what counts has not one entry an image first.
        NonFiniteError: It is NaN or infinite.
    """
    try:
        returned = model.model(images)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise UnsupportedModelError(
            f"the model cannot compute images of {list(images.shape)}: {one_line(error)}; give images= of the size "
            "that it takes, and of a model that takes more than images the part that does not"
        ) from error
    try:
        value = model.output(returned)
    except UnsupportedModelError as error:  # of tensor_in, which speaks of objectives
        raise UnsupportedModelError(
            f"the model returns a {type(returned).__name__}, in which no tensor is found; give output=, a function "
            "that takes it to one: output=lambda returned: returned['...']"
        ) from error
    if not isinstance(value, Tensor) or value.shape[:1] != images.shape[:1]:
        what = list(value.shape) if isinstance(value, Tensor) else f"of type {type(value).__name__}"
        raise UnsupportedModelError(
            f"what counts of the output is {what} for {len(images)} images; it must be one tensor with one entry an "
            "image first: give output=, a function of what the model returns"
        )
    require_finite("the model's output", value)
    return Taken(value, type(returned).__name__, None if value is returned else _part(returned, value))


def _part(returned: Any, value: Tensor) -> str:
    """The name or place of a tensor in what a model returns."""
    if isinstance(returned, Mapping):
        named = dict(returned)
    else:
        named = dict(enumerate(returned)) if isinstance(returned, tuple | list) else getattr(returned, "__dict__", {})
    return next((str(name) for name, part in named.items() if part is value), "a function of it")


def trace(model: Counted, images: Tensor, *, fused: bool) -> ExportedProgram:
    """The program of a model for any number of images of this size.

    Args:
        model: The model.
        images: Two or more: PyTorch takes a single one for a constant.
        fused: Whether attention stays one operator. It wants one width of queries, keys and values, to which the
            narrower are padded; taken apart again by a converter, that padding is work for nothing.

    Raises:
        ExportError: ``torch.export`` cannot follow the model, or only at this number of images.
    """
    try:
        with models.plain_attention(*([] if fused else [model])):
            program = torch.export.export(model, (images,), dynamic_shapes={INPUT: {0: Dim("batch")}})
    except Exception as error:  # whatever PyTorch's tracer and the code that it follows raise
        raise ExportError(
            f"torch.export cannot follow this {type(model.model).__name__} for any number of images: {one_line(error)}"
            ". Its forward may make a number of the batch (len(x), where x.shape[0] stays open), branch on values, or "
            "leave PyTorch"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # files and folders of the machine that exports
    return program
