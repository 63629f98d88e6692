"""torchvision's VisionTransformer and SwinTransformer, made again by their constructors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gohsp import files
from gohsp.errors import CheckpointError, nearest
from gohsp.models.labels import num_classes
from gohsp.models.libraries.arguments import Allowed, count_from, counts_from, epsilon, rejected
from gohsp.models.libraries.shape import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A class of torchvision's.

    Attributes:
        module: Where the class is.
        names: What torchvision calls those of this class that it has weights of.
        arguments: What makes one.
        read: Reads them off a model.
        make: Makes the model, with new weights; its FFNs are as wide as usual.
        patches: A tensor of every model, and so the place where a prefix of its names is seen.
        classifier: What the names of the classifier's tensors begin with.
        plain_eps: Of the norms, where the constructor is not given a norm.
    """

    module: str
    names: tuple[str, ...]
    arguments: Mapping[str, Allowed]
    read: Callable[[Any], dict[str, Any]]
    make: Callable[..., nn.Module]
    patches: str
    classifier: str
    plain_eps: float


def _read_vit(model: Any) -> dict[str, Any]:
    layers = model.encoder.layers
    return {
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_layers": len(layers),
        "num_heads": layers[0].num_heads,
        "hidden_dim": model.hidden_dim,
        "num_classes": model.num_classes,
        "norm_eps": model.encoder.ln.eps,
    }


def _make_vit(made: Any, *, norm_eps: float, **given: Any) -> nn.Module:
    norm = partial(nn.LayerNorm, eps=norm_eps)
    return made.VisionTransformer(**given, mlp_dim=4 * given["hidden_dim"], norm_layer=norm)


def _read_swin(model: Any) -> dict[str, Any]:
    patches, *_ = model.features[0]
    stages = model.features[1::2]
    attentions = [block.attn for block in model.modules() if hasattr(block, "attn")]
    window = next((list(attn.window_size) for attn in attentions if hasattr(attn, "window_size")), [7, 7])
    return {
        "patch_size": list(patches.kernel_size),
        "embed_dim": patches.out_channels,
        "depths": [len(stage) for stage in stages],
        "num_heads": [next((b.attn.num_heads for b in stage if hasattr(b.attn, "num_heads")), 1) for stage in stages],
        "window_size": window,
        "num_classes": num_classes(model),
        "norm_eps": model.norm.eps,
        "version": 2 if type(stages[0][0]).__name__.endswith("V2") else 1,
    }


def _make_swin(made: Any, *, version: int, norm_eps: float, **given: Any) -> nn.Module:
    if len(given["depths"]) != len(given["num_heads"]):
        raise ValueError("depths and num_heads must have one number for each stage")
    block = made.SwinTransformerBlockV2 if version == 2 else made.SwinTransformerBlock
    merging = made.PatchMergingV2 if version == 2 else made.PatchMerging
    norm = partial(nn.LayerNorm, eps=norm_eps)
    return made.SwinTransformer(
        **given, stochastic_depth_prob=0.0, block=block, norm_layer=norm, downsample_layer=merging
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    "VisionTransformer": Architecture(
        module="torchvision.models.vision_transformer",
        names=("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
        arguments={
            "image_size": count_from(1, 4096),
            "patch_size": count_from(1, 4096),
            "num_layers": count_from(1, 512),
            "num_heads": count_from(1, 16384),
            "hidden_dim": count_from(1, 16384),
            "num_classes": count_from(1, 1_000_000),
            "norm_eps": epsilon(),
        },
        read=_read_vit,
        make=_make_vit,
        patches="conv_proj.weight",
        classifier="heads.head.",
        plain_eps=1e-6,
    ),
    "SwinTransformer": Architecture(
        module="torchvision.models.swin_transformer",
        names=("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"),
        arguments={
            "patch_size": counts_from(1, 4096, least=2, most=2),
            "embed_dim": count_from(1, 16384),
            "depths": counts_from(1, 512, least=1, most=8),
            "num_heads": counts_from(1, 16384, least=1, most=8),
            "window_size": counts_from(1, 4096, least=2, most=2),
            "num_classes": count_from(1, 1_000_000),
            "norm_eps": epsilon(),
            "version": count_from(1, 2),
        },
        read=_read_swin,
        make=_make_swin,
        patches="features.0.0.weight",
        classifier="head.",
        plain_eps=1e-5,
    ),
}
"""The classes that are made here, by their names."""

NAMES: Mapping[str, str] = {name: cls for cls, of in ARCHITECTURES.items() for name in of.names}
"""The class of each model that torchvision has a name for."""


def recognises(model: nn.Module) -> bool:
    """Whether a model is of one of these classes."""
    known = ARCHITECTURES.get(type(model).__qualname__)
    return known is not None and type(model).__module__ == known.module


def architecture_name(model: nn.Module) -> str:
    """The class's name, since its sizes are arguments."""
    return type(model).__name__


def architecture_arguments(model: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, read off a model."""
    return ARCHITECTURES[architecture_name(model)].read(model)


def check(name: str, arguments: Mapping[str, Any], where: str) -> None:
    """Check a name and arguments that come from a file; nothing is made of them.

    Raises:
        CheckpointError: Another name, an argument that is missing or unknown, or a value that is not allowed.
    """
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture '{name}' of torchvision is unknown; it is one of {list(ARCHITECTURES)}"
        )
    known = ARCHITECTURES[name].arguments
    for key in arguments:
        if key not in known:
            raise CheckpointError(f"{where}: '{key}' is no argument of it; {nearest(str(key), known)}")
    for key, allowed in known.items():
        if key not in arguments:
            raise CheckpointError(f"{where}: '{key}' is missing")
        if not allowed.accepts(arguments[key]):
            raise rejected(where, key, arguments[key], allowed)


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model, with new weights; its FFNs are as wide as usual, and nothing is dropped."""
    known = ARCHITECTURES[name]
    return known.make(importlib.import_module(known.module), **arguments)


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
        weighed = {"image_size": meta["min_size"][0], "num_classes": len(meta["categories"])}
        arguments |= {key: value for key, value in weighed.items() if key in arguments}
    return arguments


def fetch(name: str) -> Mapping[str, Tensor]:
    """The tensors of torchvision's own weights, fetched or from its cache; nothing else of the file is read."""
    return _weights(name).get_state_dict(check_hash=True, map_location="cpu", weights_only=True)


def resampled(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with their position embedding for images of the size in ``arguments``, by torchvision's own function.

    Raises:
        ValueError: That of ``state`` is of no square image.
    """
    made: Any = importlib.import_module(ARCHITECTURES["VisionTransformer"].module)
    return made.interpolate_embeddings(arguments["image_size"], arguments["patch_size"], dict(state))


def preprocessing(name: str) -> dict[str, Any]:
    """What torchvision does with an image for its own weights, in the words of timm's ``pretrained_cfg``.

    A Swin takes images of any size, and so is told theirs.
    """
    does = _weights(name).transforms()
    told = {
        "mean": tuple(does.mean),
        "std": tuple(does.std),
        "crop_pct": does.crop_size[0] / does.resize_size[0],
        "interpolation": does.interpolation.value,
    }
    return told if NAMES[name] == "VisionTransformer" else told | {"image_size": 2 * list(does.crop_size)}


def _weights(name: str) -> Any:
    return _models().get_model_weights(name).DEFAULT


def _models() -> Any:
    return importlib.import_module("torchvision.models")


# Without gohsp


def units_step(_model: nn.Module) -> int:
    """Hidden units that settings can say are multiples of this."""
    return 1


def plain_settings(model: nn.Module, shape: Shape) -> dict[str, Any]:
    """Arguments of the constructor for a model like this one, with blocks of a shape; heads have the stream's width.

    Raises:
        ValueError: No plain argument says an epsilon, or that blocks are Swin's of version 2.
    """
    settings = architecture_arguments(model)
    if (eps := settings.pop("norm_eps")) != ARCHITECTURES[architecture_name(model)].plain_eps:
        raise ValueError(f"no plain argument of torchvision's says the norms' eps of {eps}")
    if settings.pop("version", 1) != 1:
        raise ValueError("no plain argument of torchvision's says that blocks are those of Swin v2")
    if "depths" in settings:  # each stage has a number of heads of its own
        said = {"mlp_ratio": shape.mlp_ratio(Fraction(1))}
    else:
        said = {"num_heads": shape.heads, "mlp_dim": shape.units}
    return settings | {name: value for name, value in said.items() if value is not None}


def make_plain(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """A model like this one, by its constructor, with new weights."""
    return type(model)(**settings)


def save_plain(made: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Write the constructor's arguments and the weights; torchvision has no folder of its own."""
    files.save_tensors(folder / "model.safetensors", made.state_dict())
    name = f"{type(made).__module__}.{type(made).__qualname__}"
    table = {"architecture": name, "arguments": dict(settings)}
    files.write_atomic(folder / "config.json", json.dumps(table, indent=2) + "\n")
