"""Models of Hugging Face transformers, made again by their class and configuration."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from gohsp.errors import CheckpointError, nearest

FOLDERS = (
    "beit",
    "clip",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "dpt",
    "ijepa",
    "metaclip_2",
    "siglip",
    "siglip2",
    "swin",
    "vit",
    "vit_msn",
)
"""Where the classes are that can be made; nothing else is by a name that comes from a file."""

TEXTS = re.compile(r"(hidden|pooler|projection)_act|problem_type")
"""Settings that are texts; all others are numbers, truth values, lists of these, or names of classes."""

LEFT_OUT = (
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "stage_names",
    "torch_dtype",
    "transformers_version",
)
"""What a configuration says of a file or a library, and not of a model."""


def recognises(model: nn.Module) -> bool:
    """Whether a model is of one of the classes that can be made."""
    return _folder(type(model).__module__) in FOLDERS and hasattr(model, "config")


def _folder(module: str) -> str | None:
    found = re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\w+", module)
    return None if found is None else found[1]


def architecture_name(model: nn.Module) -> str:
    """Name of its class."""
    return type(model).__name__


def architecture_arguments(model: nn.Module) -> dict[str, Any]:
    """What its configuration has other than by default."""
    config: Any = model.config
    known = set(type(config)().to_dict()) - set(LEFT_OUT)
    changed = {key: value for key, value in config.to_diff_dict().items() if key in known and _is_plain(value)}
    return {key: _as_text(value) if key == "id2label" else value for key, value in changed.items()}


def _as_text(labels: Mapping[Any, Any]) -> dict[str, str]:
    return {str(number): str(label) for number, label in labels.items()}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict)


def check(name: str, arguments: Mapping[str, Any], where: str) -> None:
    """Check a class's name and a configuration that come from a file; nothing is made of them.

    Raises:
        CheckpointError: transformers is not installed, has no such class in :data:`FOLDERS`, or its configuration has
            no such setting, or none of that kind.
    """
    known = _class(name, where).config_class().to_dict()
    for key, value in arguments.items():
        if key not in known or key in LEFT_OUT:
            raise CheckpointError(f"{where}: '{key}' is no setting of a '{name}'; {nearest(str(key), known)}")
        if not _is_allowed(key, value):
            raise CheckpointError(f"{where}: '{key}' is {value!r:.80}, which is no setting that a model is made by")


def _is_allowed(key: str, value: Any) -> bool:
    if key in ("id2label", "label2id"):
        return isinstance(value, Mapping) and all(isinstance(x, str | int) for pair in value.items() for x in pair)
    if isinstance(value, str):
        return TEXTS.fullmatch(key) is not None and value.isidentifier()
    if key == "out_features":
        return value is None or (isinstance(value, list) and all(str(x).isidentifier() for x in value))
    if isinstance(value, list | tuple):
        return all(type(x) in (bool, int, float) for x in value)
    return value is None or type(value) in (bool, int, float)


def _class(name: str, where: str) -> Any:
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(f"{where}: '{name}' is a model of transformers: pip install transformers") from error
    found = getattr(library, name, None) if re.fullmatch(r"\w+", name) else None
    of_models = isinstance(found, type) and issubclass(found, library.PreTrainedModel)
    if not of_models or _folder(found.__module__) not in FOLDERS:  # type: ignore[union-attr]
        raise CheckpointError(f"{where}: architecture '{name}' is none of transformers' that can be made here")
    return found


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model, with new weights."""
    cls = _class(name, "the specification")
    given = dict(arguments)
    if "id2label" in given:
        given["id2label"] = {int(number): label for number, label in given["id2label"].items()}
    return cls(cls.config_class(**given))
