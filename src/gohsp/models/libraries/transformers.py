"""Models of Hugging Face transformers, made again by their class and configuration."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.errors import CheckpointError, nearest, require_packages
from gohsp.models.libraries.shape import Shape

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
    "sam",
    "sam_hq",
    "siglip",
    "siglip2",
    "swin",
    "swinv2",
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
        CheckpointError: transformers has no such class in :data:`FOLDERS`, or its configuration has no such setting, or
            none of that kind.
        MissingPackageError: transformers is not installed.
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
    require_packages(f"{where}: '{name}'", "transformers", "transformers")
    library: Any = importlib.import_module("transformers")
    found = getattr(library, name, None) if re.fullmatch(r"\w+", name) else None
    of_models = isinstance(found, type) and issubclass(found, library.PreTrainedModel)
    if not of_models or _folder(found.__module__) not in FOLDERS:  # type: ignore[union-attr]
        raise CheckpointError(f"{where}: architecture '{name}' is none of transformers' that can be made here")
    return found


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model, with new weights."""
    cls = _class(name, "the specification")
    return cls(_configuration(cls, arguments))


def _configuration(cls: Any, arguments: Mapping[str, Any]) -> Any:
    given = dict(arguments)
    if "id2label" in given:
        given["id2label"] = {int(number): label for number, label in given["id2label"].items()}
    return cls.config_class(**given)


def settings_in(content: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The class and the settings that a ``config.json`` of this library tells, where they are not the class's own.

    What no configuration of the class has is left out, as the library does.

    Raises:
        CheckpointError: Not one class, or what :func:`check` refuses.
    """
    names = content.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{where}: 'architectures' must be a list with the name of one class")
    usual = _class(names[0], where).config_class().to_dict()
    given = {k: v for k, v in content.items() if k in usual and k not in LEFT_OUT and v != usual[k]}
    check(names[0], given, where)
    return names[0], given


def with_weights(
    name: str, arguments: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[nn.Module, list[str], list[str]]:
    """The model with weights under the names that this or an earlier version of the library writes.

    Args:
        name: The class.
        arguments: Of its configuration.
        state: Tensors. Whole numbers are left out: earlier versions kept those of positions.

    Returns:
        The model, of the weights' data type; what is missing or of another shape, a sentence each; names of tensors
        that are no part of it.
    """
    cls = _class(name, "the specification")
    floating = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    types = [tensor.dtype for tensor in floating.values()] or [torch.float32]
    with _silenced():
        model, report = cls.from_pretrained(
            None,
            config=_configuration(cls, arguments),
            state_dict=floating,
            dtype=functools.reduce(torch.promote_types, types),
            ignore_mismatched_sizes=True,  # the report has them
            output_loading_info=True,
        )
    others = {found[0] if isinstance(found, tuple) else found for found in report["mismatched_keys"]}
    problems = [f"'{key}' is missing" for key in sorted(report["missing_keys"])]
    problems += [f"'{key}' is of another shape" for key in sorted(others)]
    return model, problems, sorted(report["unexpected_keys"])


@contextmanager
def _silenced() -> Iterator[None]:
    """The library's own report and progress bar are left out: what is wrong is said once, by an error."""
    logs: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


# Without gohsp


def units_step(model: nn.Module) -> int | None:
    """Hidden units that settings can say are multiples of this; None where these lie unevenly.

    DINOv2 takes whole ratios alone, since version 5, and rounds the hidden units of a gated FFN to multiples of 8.
    """
    config = _of_blocks(model.config)
    rounded = 1 if _rows_per_unit(config) == 1 else 8
    if not _takes_whole_ratios(config):
        return rounded
    step = config.hidden_size / _rows_per_unit(config)
    return int(step) if step % rounded == 0 else None


def _takes_whole_ratios(config: Any) -> bool:
    types = {field.name: field.type for field in fields(config)} if is_dataclass(config) else {}
    return types.get("mlp_ratio") in (int, "int")


def plain_settings(model: nn.Module, shape: Shape) -> Any:
    """A configuration for a model like this one, with blocks of a shape.

    ``head_dim`` is no declared setting, but ViT and its kin look for it since version 5; all other heads have the
    stream's width. Where whole ratios alone are taken it is the nearest one.
    """
    config: Any = copy.deepcopy(model.config)
    of = _of_blocks(config)
    if hasattr(of, "mlp_ratio"):
        ratio = shape.mlp_ratio(_rows_per_unit(of))
        said = {"mlp_ratio": round(ratio) if ratio is not None and _takes_whole_ratios(of) else ratio}
    else:
        said = {"intermediate_size": shape.units}
    if isinstance(of.num_attention_heads, int):  # elsewhere each stage has a number of its own
        said["num_attention_heads"] = shape.heads
        if shape.heads is not None and shape.heads * (shape.head_dim or 0) != shape.dim:
            said["head_dim"] = shape.head_dim
    for name, value in said.items():
        if value is not None:
            setattr(of, name, value)
    return config


def _of_blocks(config: Any) -> Any:
    """The part of a configuration that is of the blocks: CLIP's has one for each tower."""
    return getattr(config, "vision_config", config)


def _rows_per_unit(config: Any) -> Fraction:
    """What a ratio counts for each hidden unit: DINOv2's gated FFN has two thirds of it."""
    return Fraction(3, 2) if getattr(config, "use_swiglu_ffn", False) else Fraction(1)


def make_plain(model: nn.Module, settings: Any) -> nn.Module:
    """A model like this one, of its class and a configuration, with new weights."""
    return type(model)(settings)


def save_plain(made: nn.Module, _settings: Any, folder: Path) -> None:
    """Write a model for ``from_pretrained(FOLDER)``."""
    of: Any = made
    of.save_pretrained(folder)
