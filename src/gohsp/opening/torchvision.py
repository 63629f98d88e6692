"""Models of torchvision by its names, with a mark before them, since timm has names of the same kind."""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)

MARK = "torchvision:"
_POSITIONS = "encoder.pos_embedding"


def from_name(
    name: str, file: Path | None, pretrained: bool, arguments: Mapping[str, Any], new_classifier: bool
) -> nn.Module:
    """A model by ``torchvision:NAME``; see :func:`gohsp.open_model`."""
    require_packages(f"'{name}'", "torchvision", "torchvision")
    inner = name.removeprefix(MARK)
    sizes = library.arguments_of(inner, f"'{name}'", with_weights=pretrained)
    architecture = library.NAMES[inner]
    spec: dict[str, Any] = {"library": "torchvision", "architecture": architecture, "arguments": {**sizes, **arguments}}
    models.check_specification(spec, f"arguments of '{name}'")
    outline = outline_of(lambda: models.build(spec), f"'{name}'")
    state: dict[str, Tensor] = {}
    if file or pretrained:
        given, path = (weights.read(file), file) if file else (_fetched(inner), Path(inner))
        known = library.ARCHITECTURES[architecture]
        given = _renamed(weights.without(weights.prefix_in(given, known.patches, path), given))
        given = _resampled(given, outline, spec["arguments"], path)
        asked = not file or new_classifier or "num_classes" in arguments
        if not asked and (told := weights.classes_in(given, outline, known.classifier.removesuffix("."), path)):
            spec["arguments"] |= told
            outline = outline_of(lambda: models.build(spec), f"'{name}'")
        state = weights.fitting(given, outline, path, classifier=(known.classifier,), new_classifier=new_classifier)
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


def _resampled(
    given: Mapping[str, Tensor], outline: nn.Module, arguments: Mapping[str, Any], path: Path
) -> Mapping[str, Tensor]:
    """The weights, with position embeddings for the model's own image size."""
    theirs, ours = given.get(_POSITIONS), outline.state_dict().get(_POSITIONS)
    if theirs is None or ours is None or theirs.ndim != 3 or theirs.shape[1] == ours.shape[1]:
        return given
    try:
        resampled = library.resampled(arguments, given)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"weights '{path}': position embeddings cannot be resampled: {one_line(error)}"
        ) from error
    logger.warning("weights '%s': position embeddings are resampled to %d px", path, arguments["image_size"])
    return resampled
