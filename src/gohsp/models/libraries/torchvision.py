"""torchvision's VisionTransformer, made again by its constructor."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gohsp import files
from gohsp.errors import CheckpointError, nearest
from gohsp.models.libraries.arguments import Allowed, count_from, epsilon, rejected
from gohsp.models.libraries.shape import Shape

CLASS = "torchvision.models.vision_transformer.VisionTransformer"

NAMES = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
"""What torchvision calls those of this class that it has weights of."""

ARGUMENTS: Mapping[str, Allowed] = {
    "image_size": count_from(1, 4096),
    "patch_size": count_from(1, 4096),
    "num_layers": count_from(1, 512),
    "num_heads": count_from(1, 16384),
    "hidden_dim": count_from(1, 16384),
    "num_classes": count_from(1, 1_000_000),
    "norm_eps": epsilon(),
}


def recognises(model: nn.Module) -> bool:
    """Whether a model is of this class."""
    return f"{type(model).__module__}.{type(model).__qualname__}" == CLASS


def architecture_name(_model: nn.Module) -> str:
    """The class's name, since its sizes are arguments."""
    return "VisionTransformer"


def architecture_arguments(model: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, read off a model."""
    of: Any = model
    layers = of.encoder.layers
    return {
        "image_size": of.image_size,
        "patch_size": of.patch_size,
        "num_layers": len(layers),
        "num_heads": layers[0].num_heads,
        "hidden_dim": of.hidden_dim,
        "num_classes": of.num_classes,
        "norm_eps": of.encoder.ln.eps,
    }


def check(name: str, arguments: Mapping[str, Any], where: str) -> None:
    """Check a name and arguments that come from a file; nothing is made of them.

    Raises:
        CheckpointError: Another name, an argument that is missing or unknown, or a value that is not allowed.
    """
    if name != "VisionTransformer":
        raise CheckpointError(f"{where}: architecture '{name}' of torchvision is unknown; it is 'VisionTransformer'")
    for key in arguments:
        if key not in ARGUMENTS:
            raise CheckpointError(f"{where}: '{key}' is no argument of it; {nearest(str(key), ARGUMENTS)}")
    for key, allowed in ARGUMENTS.items():
        if key not in arguments:
            raise CheckpointError(f"{where}: '{key}' is missing")
        if not allowed.accepts(arguments[key]):
            raise rejected(where, key, arguments[key], allowed)


def make(_name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model, with new weights; its FFNs are as wide as usual."""
    given = dict(arguments)
    norm = partial(nn.LayerNorm, eps=given.pop("norm_eps"))
    made: Any = importlib.import_module("torchvision.models.vision_transformer")
    return made.VisionTransformer(**given, mlp_dim=4 * given["hidden_dim"], norm_layer=norm)


def arguments_of(name: str, where: str, *, with_weights: bool) -> dict[str, Any]:
    """The arguments that make a model which torchvision has a name for, or the one that its own weights fit.

    Raises:
        CheckpointError: None of :data:`NAMES`.
    """
    if name not in NAMES:
        raise CheckpointError(f"{where}: torchvision has no '{name}' that is made here; {nearest(name, NAMES)}")
    with torch.device("meta"):
        arguments = architecture_arguments(_models().get_model(name))
    if with_weights:
        meta = _weights(name).meta
        arguments |= {"image_size": meta["min_size"][0], "num_classes": len(meta["categories"])}
    return arguments


def fetch(name: str) -> Mapping[str, Tensor]:
    """The tensors of torchvision's own weights, fetched or from its cache; nothing else of the file is read."""
    return _weights(name).get_state_dict(check_hash=True, map_location="cpu", weights_only=True)


def preprocessing(name: str) -> dict[str, Any]:
    """What torchvision does with an image for its own weights, in the words of timm's ``pretrained_cfg``."""
    does = _weights(name).transforms()
    return {
        "mean": tuple(does.mean),
        "std": tuple(does.std),
        "crop_pct": does.crop_size[0] / does.resize_size[0],
        "interpolation": does.interpolation.value,
    }


def _weights(name: str) -> Any:
    return _models().get_model_weights(name).DEFAULT


def _models() -> Any:
    return importlib.import_module("torchvision.models")


# Without gohsp

PLAIN_EPS = 1e-6
"""Of the norms, where the constructor is not given a norm."""


def units_step(_model: nn.Module) -> int:
    """Hidden units that settings can say are multiples of this."""
    return 1


def plain_settings(model: nn.Module, shape: Shape) -> dict[str, Any]:
    """Arguments of the constructor for a model like this one, with blocks of a shape; heads have the stream's width.

    Raises:
        ValueError: No plain argument says an epsilon.
    """
    settings = architecture_arguments(model)
    if (eps := settings.pop("norm_eps")) != PLAIN_EPS:
        raise ValueError(f"no plain argument of torchvision's says the norms' eps of {eps}")
    said = {"num_heads": shape.heads, "mlp_dim": shape.units}
    return settings | {name: value for name, value in said.items() if value is not None}


def make_plain(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """A model like this one, by its constructor, with new weights."""
    return type(model)(**settings)


def save_plain(made: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Write the constructor's arguments and the weights; torchvision has no folder of its own."""
    files.save_tensors(folder / "model.safetensors", made.state_dict())
    table = {"architecture": CLASS, "arguments": dict(settings)}
    files.write_atomic(folder / "config.json", json.dumps(table, indent=2) + "\n")
