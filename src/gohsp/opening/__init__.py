"""How a model gets in: what the command line calls MODEL, and other people's weights files."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gohsp import checkpoint, models
from gohsp.checkpoint import Token
from gohsp.errors import CheckpointError, require_packages
from gohsp.opening import torchvision, transformers, weights

FILES = (checkpoint.CONFIG, checkpoint.PROCESSOR, weights.INDEX, "model*.safetensors")
"""What is fetched of a repository on the hub."""

HUB = ("hf-hub:", "hf_hub:")
"""Marks of what timm reads from the hub itself."""


def brings_arguments(name: object) -> bool:
    """Whether a model's name is that of a folder or of a repository on the hub, which hold its arguments."""
    return _is_folder(name) or _is_hub_id(name)


def _is_folder(name: object) -> bool:
    return isinstance(name, str | os.PathLike) and os.path.isdir(name)


def _is_hub_id(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a repository on the hub, which is opened with its weights or not at all."""
    return not _is_folder(name) and (_is_hub_id(name) or name.lower().startswith(HUB))


def require_weights(name: object, weights: object, pretrained: bool) -> None:
    """Refuse a name alone: what is made by it has weights that are drawn at random, and nothing to keep.

    Raises:
        CheckpointError: No folder, no weights file, and none to fetch.
    """
    if not (weights or pretrained or _is_folder(name)):
        raise CheckpointError(
            f"'{name}' is a name and no folder, so its weights would be random; give --weights FILE or --pretrained "
            "(in Python weights= or pretrained=True)"
        )


def open_model(
    name: str | os.PathLike[str],
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    arguments: Mapping[str, Any] | None = None,
    new_classifier: bool = False,
    revision: str | None = None,
    token: Token = None,
) -> nn.Module:
    """Open what the command line calls MODEL: a folder of gohsp, timm or transformers, or a name.

    A model that is not of a folder of ours is first made without memory, so that a name, an argument or a weights file
    that does not fit is refused before anything large is.

    Args:
        name: A folder with a ``config.json`` and a ``model.safetensors`` that gohsp, timm or transformers wrote;
            ``OWNER/NAME``, a repository of the Hugging Face hub with the same files; the name of a timm ViT
            (``deit_tiny_patch16_224``, or with a tag of pretrained weights ``vit_tiny_patch16_224.augreg_in21k``);
            ``hf-hub:OWNER/NAME``, what timm reads from the hub; or ``torchvision:vit_b_16``.
        weights: A ``.safetensors`` file, or one that ``torch.save`` wrote (``.pth``, ``.pt``, ``.bin``), of which
            tensors and plain values alone are read. Its table of tensors may lie deeper in it (``state_dict``,
            ``model``), its names may have a prefix (``module.``, ``backbone.``). Position embeddings for another image
            size are resampled as the model's library does, and for timm's models weights for RGB images are adapted to
            other channels. A model by its name gets as many classes as the file's classifier tells apart, unless
            ``arguments`` say how many. The log says so.
        pretrained: Whether to fetch the weights that timm, torchvision or the hub has.
        arguments: Arguments of the architecture, such as ``img_size``, for a name of timm's or torchvision's.
        new_classifier: Whether the classifier may be new, where its shape differs from that of the weights.
        revision: Branch, tag or hash of a commit, of ``OWNER/NAME`` on the hub; None is its main branch.
        token: For a private ``OWNER/NAME``; None is that of ``hf auth login`` or ``HF_TOKEN``, if any, and False none.

    Returns:
        The model, in evaluation mode. Where its library tells, ``pretrained_cfg`` holds what it does with an image.

    Raises:
        CheckpointError: Nothing fits ``name``; an argument that is not allowed; weights that are given twice, cannot be
            fetched or read, or do not fit; a revision or a token of what is not on the hub.
        MissingPackageError: The model's library is not installed.
        UnsupportedModelError: The architecture cannot be pruned.
        NonFiniteError: A weight is NaN or infinite.
    """
    if weights and pretrained:
        raise CheckpointError("give either a weights file or pretrained weights, not both")
    file, given = None if weights is None else Path(weights), arguments or {}
    on_hub = pretrained and _is_hub_id(name) and not _is_folder(name)
    if not on_hub and (revision, token) != (None, None):
        raise CheckpointError(
            "revision and token are for OWNER/NAME on the hub with its pretrained weights, and not for "
            f"'{name}'; leave them out"
        )
    if _is_folder(name):
        model = _from_folder(Path(name), file, pretrained, given)
    elif on_hub:
        folder = checkpoint.local_folder(str(name), FILES, revision=revision, token=token)
        model = _from_folder(folder, None, False, given)
    elif str(name).startswith(torchvision.MARK):
        model = torchvision.from_name(str(name), file, pretrained, given, new_classifier)
    else:
        model = _timm(f"'{name}', which is no folder,").from_name(str(name), file, pretrained, given, new_classifier)
    models.check_finite(model)
    return model.eval()


def _timm(what: str) -> ModuleType:
    """How timm's models are opened, for which alone timm is needed."""
    require_packages(what, "timm", "timm")
    return importlib.import_module("gohsp.opening.timm")


def _from_folder(folder: Path, file: Path | None, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """A model from a folder, by what its ``config.json`` is."""
    content = checkpoint.read_json(folder / checkpoint.CONFIG)
    keys = set(content) if isinstance(content, dict) else set()
    ours = "format_version" in keys
    if pretrained or arguments or (file and ours):
        raise CheckpointError(f"'{folder}' is a model folder and brings its own weights and arguments; give no others")
    if ours:
        return checkpoint.load(folder)
    if "architectures" in keys:
        return transformers.from_folder(folder, content, file)
    if "architecture" in keys:
        return _timm(f"'{folder}'").from_folder(folder, content, file)
    raise CheckpointError(
        f"'{folder / checkpoint.CONFIG}' has no 'format_version', as gohsp writes it, no 'architectures', as "
        "transformers does, and no 'architecture', as timm does; give a folder that one of these wrote"
    )
