"""Models of Hugging Face transformers, from folders that its ``save_pretrained`` wrote."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gohsp import checkpoint, models
from gohsp.errors import CheckpointError, UnsupportedModelError, one_line
from gohsp.models.libraries import transformers as library
from gohsp.models.libraries.processor import ImageProcessor
from gohsp.opening import weights
from gohsp.opening.outline import outline_of

logger = logging.getLogger(__name__)


def from_folder(folder: Path, content: Mapping[str, Any], file: Path | None) -> nn.Module:
    """A model with its weights, its classes' names and what its image processor does.

    The class is the one that the configuration names, if it is one of transformers' own; no code of a folder runs.

    Args:
        folder: The folder.
        content: Of its ``config.json``.
        file: A weights file in place of the folder's own, with the names that transformers gives its tensors.

    Raises:
        CheckpointError: A class or a setting that is not allowed, or weights that do not fit.
        UnsupportedModelError: The model cannot be pruned.
    """
    where = f"'{folder / checkpoint.CONFIG}'"
    name, settings = library.settings_in(content, where)
    processor = checkpoint.read_processor(folder)
    outline = outline_of(lambda: _made(name, settings, where), where)
    given, path = (weights.read(file), file) if file else (weights.read_folder(folder), folder)
    patches = next(key for key, tensor in outline.state_dict().items() if tensor.ndim == 4)
    state = weights.without(weights.prefix_in(given, patches, path), given)
    model, problems, left_over = library.with_weights(name, settings, state)
    if problems and (resampled := library.resampled(model, state)) is not None:
        model, problems, left_over = library.with_weights(name, settings, resampled)
        logger.warning("weights '%s': position embeddings are resampled to the model's image size", path)
    if problems:
        raise CheckpointError(f"weights '{path}' do not fit the model: {models.listed(problems)}")
    if left_over:
        logger.warning("weights '%s' hold more than a %s, which is left out: %s", path, name, models.listed(left_over))
    try:
        model.pretrained_cfg = _told(model, processor)  # type: ignore[assignment]
        models.describe(model)  # at the size that the processor gives it
    except (ValueError, UnsupportedModelError) as error:
        raise CheckpointError(
            f"'{folder / checkpoint.PROCESSOR}' cannot be followed: {one_line(error)}; mend it, or take it away and "
            "set model.pretrained_cfg"
        ) from error
    return model


def _made(name: str, settings: Mapping[str, Any], where: str) -> nn.Module:
    try:
        return library.make(name, settings)
    except Exception as error:  # each class checks its configuration in its own way
        raise CheckpointError(f"{where}: transformers cannot make a '{name}' of it: {one_line(error)}") from error


def _told(model: nn.Module, processor: ImageProcessor | None) -> dict[str, Any]:
    """What a model and its processor say of images and classes, where gohsp looks for it."""
    told: dict[str, Any] = {}
    labels = getattr(model.config, "id2label", None) or {}
    names = [labels.get(number) for number in range(len(labels))]
    if names != [f"LABEL_{number}" for number in range(len(labels))]:  # which are nobody's names
        told["label_names"] = names
    if processor is not None:
        told |= {"image_processor": processor.model_dump(exclude_none=True), **processor.preprocessing()}
        if told["image_size"] == list(models.told_size(model) or ()):
            del told["image_size"]
    return told
