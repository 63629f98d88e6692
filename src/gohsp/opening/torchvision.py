"""Models of torchvision by its names, with a mark before them, since timm has names of the same kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gohsp import models
from gohsp.errors import CheckpointError, one_line, require_packages
from gohsp.models.libraries import torchvision as library
from gohsp.opening import weights
from gohsp.opening.outline import outline_of

MARK = "torchvision:"
_PATCHES = "conv_proj.weight"


def from_name(
    name: str, file: Path | None, pretrained: bool, arguments: Mapping[str, Any], new_classifier: bool
) -> nn.Module:
    """A model by ``torchvision:NAME``; see :func:`gohsp.open_model`."""
    require_packages(f"'{name}'", "torchvision", "torchvision")
    inner = name.removeprefix(MARK)
    sizes = library.arguments_of(inner, f"'{name}'", with_weights=pretrained)
    spec = {"library": "torchvision", "architecture": "VisionTransformer", "arguments": {**sizes, **arguments}}
    models.check_specification(spec, f"arguments of '{name}'")
    outline = outline_of(lambda: models.build(spec), f"'{name}'")
    state: dict[str, Tensor] = {}
    if file or pretrained:
        given, path = (weights.read(file), file) if file else (_fetched(inner), Path(inner))
        given = _renamed(weights.without(weights.prefix_in(given, _PATCHES, path), given))
        state = weights.fitting(given, outline, path, classifier=("heads.head.",), new_classifier=new_classifier)
    model = models.build(spec, device="cpu")
    model.load_state_dict({**model.state_dict(), **state})
    model.pretrained_cfg = library.preprocessing(inner)  # type: ignore[assignment]
    return model


def _fetched(name: str) -> Mapping[str, Tensor]:
    try:
        return library.fetch(name)
    except Exception as error:  # of its HTTP library, of the system, or of a damaged file
        raise CheckpointError(
            f"the pretrained weights of torchvision's '{name}' cannot be fetched: {one_line(error)}. Without a network "
            "give a weights file"
        ) from error


def _renamed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of today's FFNs for those of torchvision's first releases, which its own files have."""
    today = {"linear_1": "0", "linear_2": "3"}
    return {re.sub(r"\bmlp\.(linear_[12])\.", lambda m: f"mlp.{today[m[1]]}.", n): t for n, t in given.items()}
