"""Models of timm: by its names, from the hub as timm does it, and from folders that timm wrote."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv, get_arch_pretrained_cfgs, load_model_config_from_hf
from timm.models import vision_transformer as plain
from torch import Tensor, nn

from gohsp import checkpoint, models
from gohsp.errors import CheckpointError, one_line
from gohsp.models.libraries import timm as library
from gohsp.models.libraries.arguments import check_arguments
from gohsp.opening import HUB, weights
from gohsp.opening.outline import outline_of

logger = logging.getLogger(__name__)

_PATCHES = "patch_embed.proj.weight"
"""A tensor of every ViT, and so the place where a prefix of its names is seen."""

_CLASSIFIER = ("head.", "head_dist.")


def from_name(
    name: str, file: Path | None, pretrained: bool, arguments: Mapping[str, Any], new_classifier: bool
) -> nn.Module:
    """A model by its name in timm, or by ``hf-hub:OWNER/NAME``; see :func:`gohsp.open_model`."""
    arguments = check_arguments(arguments, f"arguments of '{name}'")
    if name.lower().startswith(HUB):
        _check_hub(name, pretrained)
    else:
        _check_name(name, pretrained)
    outline = outline_of(lambda: _created(name, arguments), _label(name, arguments))
    if pretrained and not new_classifier:
        _require_pretrained_classes(name, outline)
    state: dict[str, Tensor] = {}
    if file:
        state = _named(weights.read(file), outline, file)
        classifier = outline.pretrained_cfg.get("classifier")  # type: ignore[operator]
        asked = new_classifier or "num_classes" in arguments
        if not asked and (told := weights.classes_in(state, outline, classifier, file)):
            arguments |= told
            outline = outline_of(lambda: _created(name, arguments), _label(name, arguments))
        state = weights.fitting(state, outline, file, classifier=_CLASSIFIER, new_classifier=new_classifier)
    model = _created(name, arguments, pretrained)
    if file:
        model.load_state_dict({**model.state_dict(), **state})
    return model


def from_folder(folder: Path, content: Mapping[str, Any], file: Path | None) -> nn.Module:
    """A model from what timm's ``save_for_hf`` wrote.

    Args:
        folder: The folder.
        content: Of its ``config.json``: ``architecture``, ``model_args``, ``num_classes`` and ``pretrained_cfg``, of
            which names of classes, sizes and preprocessing are taken.
        file: A weights file in place of the folder's own.

    Raises:
        CheckpointError: What stands there is not allowed, or the weights do not fit.
        UnsupportedModelError: The architecture cannot be pruned.
    """
    where, name = f"'{folder / checkpoint.CONFIG}'", content.get("architecture")
    # Older versions of timm wrote one table.
    told = content.get("pretrained_cfg", content)
    if not isinstance(name, str) or not isinstance(told, dict):
        raise CheckpointError(f"{where}: 'architecture' must be a name, and 'pretrained_cfg' a table")
    arguments = {
        **_sizes({**told, **content}),
        **check_arguments(content.get("model_args") or {}, f"{where}: model_args"),
    }
    models.check_specification({"library": "timm", "architecture": name, "arguments": arguments}, where)
    kept = checkpoint.preprocessing_in(told, where)
    outline = outline_of(lambda: _created(name, arguments), _label(name, arguments))
    given, path = (weights.read(file), file) if file else (weights.read_folder(folder), folder)
    state = weights.fitting(_named(given, outline, path), outline, path, classifier=_CLASSIFIER, new_classifier=False)
    model = _created(name, arguments)
    model.load_state_dict(state)
    labels = content.get("label_names", told.get("label_names"))
    model.pretrained_cfg = {**outline.pretrained_cfg, **kept, "label_names": labels}  # type: ignore[dict-item]
    return model


def _sizes(told: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that timm takes from a configuration of weights, where it has them."""
    size = told.get("input_size")
    whole = isinstance(size, list) and len(size) == 3
    sizes = {
        "num_classes": told.get("num_classes"),
        "global_pool": told.get("global_pool"),
        "in_chans": size[0] if whole else None,
        "img_size": size[1:] if whole and told.get("fixed_input_size") else None,
    }
    return {key: value for key, value in sizes.items() if value is not None}


def _check_name(name: str, pretrained: bool) -> None:
    """Refuse what is no name in timm's registry, and weights that timm does not have."""
    if any(mark in name for mark in "/\\:") or not timm.is_model(name):
        raise CheckpointError(f"'{name}' is neither a model folder nor a timm model; {_hint(name)}")
    known = list(get_arch_pretrained_cfgs(name))
    if "." in name and name not in known:
        raise CheckpointError(f"timm has no '{name}'; with weights it has {known}")
    if pretrained and not timm.is_model_pretrained(name):
        raise CheckpointError(f"timm has no pretrained weights of '{name}'; give a weights file")


def _hint(name: str) -> str:
    if os.path.isfile(name):
        return "it is a file: give the folder that holds it or, for weights, a name and this as its weights file"
    if name.startswith("local-dir:"):
        return "give the folder's own name"
    if "/" in name or "\\" in name:
        return "there is no such folder; OWNER/NAME on the hub is opened if its pretrained weights are asked for"
    close = difflib.get_close_matches(name, timm.list_models(), n=5)
    return f"close timm names: {close}" if close else "timm.list_models('vit*') lists its names"


def _check_hub(name: str, pretrained: bool) -> None:
    """Refuse a hub's model whose own arguments are not allowed, before timm makes anything of them."""
    if not pretrained:
        raise CheckpointError(f"'{name}' names weights on the hub; ask for pretrained weights to fetch them")
    try:
        arguments = load_model_config_from_hf(name.partition(":")[2])[2] or {}
    except Exception as error:  # see _created
        raise CheckpointError(f"'{name}' cannot be read from the hub: {one_line(error)}") from error
    check_arguments(arguments, f"model_args of '{name}'")


def _created(name: str, arguments: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    try:
        return library.make(name, arguments, pretrained=pretrained)
    except Exception as error:  # errors of timm, the hub's client and its HTTP library have no base class in common
        if pretrained:
            raise CheckpointError(
                f"the pretrained weights of '{name}' cannot be fetched or do not fit: {one_line(error)}. Without a "
                "network give a timm name and a weights file"
            ) from error
        raise CheckpointError(f"timm cannot make {_label(name, arguments)}: {one_line(error)}") from error


def _label(name: str, arguments: Mapping[str, Any]) -> str:
    return f"'{name}' with {dict(arguments)}" if arguments else f"'{name}'"


def _require_pretrained_classes(name: str, outline: nn.Module) -> None:
    """Refuse pretrained weights whose classifier timm would silently replace by a random one."""
    here, there = models.num_classes(outline), outline.pretrained_cfg["num_classes"]  # type: ignore[index]
    if here not in (0, there):
        raise CheckpointError(
            f"the pretrained weights of '{name}' tell {there} classes apart, the model asked for {here}: its "
            "classifier would be random. Leave num_classes out, or train the dense model first (dense.epochs)"
        )


def _named(given: Mapping[str, Tensor], outline: nn.Module, path: Path) -> dict[str, Tensor]:
    """Weights under the model's names and for its input."""
    state = _filtered(given, outline, path)
    if prefix := weights.prefix_in(state, _PATCHES, path):
        state = _filtered(weights.without(prefix, given), outline, path)
    patches, channels = state.get(_PATCHES), models.input_size(outline)[0]
    if patches is not None and patches.ndim == 4 and patches.shape[1] == 3 != channels:
        logger.warning("weights '%s' are for 3 channels; they are adapted to %d as timm does", path, channels)
        state[_PATCHES] = adapt_input_conv(channels, patches)
    return state


def _filtered(given: Mapping[str, Tensor], outline: nn.Module, path: Path) -> dict[str, Tensor]:
    """What timm makes of weights of several origins, resampled to the model's input."""
    module = importlib.import_module(type(outline).__module__)
    convert: Any = getattr(module, "checkpoint_filter_fn", plain.checkpoint_filter_fn)
    try:
        return dict(convert(dict(given), outline))
    except Exception as error:  # timm converts before anything is checked, and each conversion fails in its own way
        raise CheckpointError(f"weights '{path}' are not those of a timm ViT: {one_line(error)}") from error
