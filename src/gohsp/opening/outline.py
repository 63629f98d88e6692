"""A model without memory, by which what cannot work is refused before anything large is made or read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gohsp import models
from gohsp.errors import CheckpointError, UnsupportedModelError

MAX_PARAMETERS = 10**10
"""More than any ViT that is public has: a slip in a size is seen before memory is asked for."""


def outline_of(make: Callable[[], nn.Module], label: str) -> nn.Module:
    """The model on the meta device: names and shapes of everything, and no memory.

    Args:
        make: Makes the model.
        label: What to call it in a message.

    Raises:
        CheckpointError: It has more than :data:`MAX_PARAMETERS`.
        UnsupportedModelError: It cannot be pruned.
    """
    with torch.device("meta"):
        outline = make()
    count = sum(parameter.numel() for parameter in outline.parameters())
    if count > MAX_PARAMETERS:
        raise CheckpointError(
            f"{label} has {count / 1e9:.0f} billion parameters, allowed are up to {MAX_PARAMETERS / 1e9:.0f}; check "
            "the sizes"
        )
    try:
        models.describe(outline)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{label}: {error}") from error
    return outline
