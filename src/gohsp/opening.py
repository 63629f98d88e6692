"""How a model gets in: what the command line calls MODEL, and other people's weights files."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv, get_arch_pretrained_cfgs, load_model_config_from_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from gohsp import checkpoint, models
from gohsp.errors import CheckpointError, UnsupportedModelError
from gohsp.models.libraries.arguments import check_arguments

logger = logging.getLogger(__name__)

MAX_PARAMETERS = 10**10
"""More than any ViT of timm's has: a slip in a size is seen before memory is asked for."""

_HUB = ("hf-hub:", "hf_hub:")
_PATCHES = "patch_embed.proj.weight"
"""A tensor of every ViT, and so the place where a prefix of its names is seen."""


def is_folder(name: object) -> bool:
    """Whether a model's name is that of a local folder; such a model brings its weights and arguments with it."""
    return isinstance(name, str | os.PathLike) and os.path.isdir(name)


def open_model(
    name: str | os.PathLike[str],
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    arguments: Mapping[str, Any] | None = None,
    new_classifier: bool = False,
) -> nn.Module:
    """Open what the command line calls MODEL: a folder that gohsp wrote, or a timm name.

    A model of timm's is first made without memory, so that a name, an argument or a weights file that does not fit is
    refused before anything large is.

    Args:
        name: A folder, the name of a timm ViT (``deit_tiny_patch16_224``, or with a tag of pretrained weights
            ``vit_tiny_patch16_224.augreg_in21k``), or ``hf-hub:OWNER/NAME``, what timm reads from the Hugging Face hub.
        weights: A safetensors file for a timm name. Its names may have a prefix (``module.``, ``backbone.``), position
            embeddings are resampled, and weights for RGB images are adapted to other channels; the log says so.
        pretrained: Whether to fetch the weights that timm or the hub has.
        arguments: Arguments of the architecture, such as ``img_size``.
        new_classifier: Whether the classifier may be new, where its shape differs from that of the weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: Nothing fits ``name``; an argument that is not allowed; weights that are given twice, cannot be
            fetched or read, or do not fit.
        UnsupportedModelError: The architecture cannot be pruned.
        NonFiniteError: A weight is NaN or infinite.
    """
    if is_folder(name):
        if weights or pretrained or arguments:
            raise CheckpointError(
                f"'{name}' is a model folder and brings its own weights and arguments; give no others"
            )
        model = checkpoint.load(os.fspath(name))
    else:
        model = _from_timm(str(name), weights, pretrained, arguments or {}, new_classifier)
    models.check_finite(model)
    return model.eval()


def _from_timm(
    name: str, weights: str | Path | None, pretrained: bool, arguments: Mapping[str, Any], new_classifier: bool
) -> nn.Module:
    if weights and pretrained:
        raise CheckpointError("give either a weights file or pretrained weights, not both")
    arguments = check_arguments(arguments, f"arguments of '{name}'")
    if name.lower().startswith(_HUB):
        _check_hub(name, pretrained)
    else:
        _check_name(name, pretrained)
    outline = _outline(name, arguments)
    if pretrained and not new_classifier:
        _require_pretrained_classes(name, outline)
    state = _read_weights(outline, Path(weights), new_classifier) if weights else {}
    model = _created(name, arguments, pretrained)
    if weights:
        model.load_state_dict({**model.state_dict(), **state})
    return model


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
        return "it is a file: give the folder that holds it or, for weights, a timm name and this as its weights file"
    if name.startswith("local-dir:"):
        return "of a folder that timm wrote give a timm name, and its model.safetensors as weights file"
    owner, _, rest = name.partition("/")
    if owner == "timm" and timm.is_model(rest):
        return f"write '{rest}' and ask for pretrained weights"
    if "/" in name or "\\" in name:
        return "there is no such folder; a timm model on the hub is 'hf-hub:OWNER/NAME'"
    close = difflib.get_close_matches(name, timm.list_models(), n=5)
    return f"close timm names: {close}" if close else "timm.list_models('vit*') lists its names"


def _check_hub(name: str, pretrained: bool) -> None:
    """Refuse a hub's model whose own arguments are not allowed, before timm makes anything of them."""
    if not pretrained:
        raise CheckpointError(f"'{name}' names weights on the hub; ask for pretrained weights to fetch them")
    try:
        arguments = load_model_config_from_hf(name.partition(":")[2])[2] or {}
    except Exception as error:  # see _created
        raise CheckpointError(f"'{name}' cannot be read from the hub: {_line(error)}") from error
    check_arguments(arguments, f"model_args of '{name}'")


def _outline(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device: names and shapes of everything, and no memory."""
    with torch.device("meta"):
        outline = _created(name, arguments, pretrained=False)
    count = sum(parameter.numel() for parameter in outline.parameters())
    if count > MAX_PARAMETERS:
        raise CheckpointError(
            f"{_label(name, arguments)} has {count / 1e9:.0f} billion parameters, allowed are up to "
            f"{MAX_PARAMETERS / 1e9:.0f}; check the sizes"
        )
    try:
        models.describe(outline)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{_label(name, arguments)}: {error}") from error
    return outline


def _created(name: str, arguments: Mapping[str, Any], pretrained: bool) -> nn.Module:
    try:
        return models.create(name, arguments, pretrained=pretrained)
    except Exception as error:  # errors of timm, the hub's client and its HTTP library have no base class in common
        if pretrained:
            raise CheckpointError(
                f"the pretrained weights of '{name}' cannot be fetched or do not fit: {_line(error)}. Without a "
                "network give a timm name and a weights file"
            ) from error
        raise CheckpointError(f"timm cannot make {_label(name, arguments)}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


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


def _read_weights(outline: nn.Module, path: Path, new_classifier: bool) -> dict[str, Tensor]:
    """Read a weights file as what belongs into a model; without the classifier where that may be and is another."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"weights '{path}': only .safetensors files are read, since other formats can run code. Convert it once: "
            "state = torch.load(FILE, weights_only=True), of that its entry 'model' or 'state_dict' if it has one, "
            "then safetensors.torch.save_file(state, NEW_FILE)"
        )
    given = checkpoint.read_tensors(path)
    integers = [f"'{name}' is {tensor.dtype}" for name, tensor in given.items() if not tensor.is_floating_point()]
    if integers:
        raise CheckpointError(f"weights '{path}': {integers[0]}; weights are floating-point, and not quantised")
    state = _adapted(given, outline, path)
    expected = outline.state_dict()
    classifier = {name for name in expected if name.startswith(("head.", "head_dist."))}
    fits = all(name in state and state[name].shape == expected[name].shape for name in classifier)
    if fits or not new_classifier:
        classifier = set()
    state = {name: tensor for name, tensor in state.items() if name not in classifier}
    expected = {name: tensor for name, tensor in expected.items() if name not in classifier}
    if problems := models.fit_problems(expected, state):
        raise CheckpointError(f"weights '{path}' do not fit the model: {models.listed(problems)}")
    return state


def _adapted(given: Mapping[str, Tensor], outline: nn.Module, path: Path) -> dict[str, Tensor]:
    """Weights under the model's names and for its input; what does not fit in other ways stays as it is."""
    state = _filtered(given, outline, path)
    prefixes = sorted({name.removesuffix(_PATCHES) for name in state if name.endswith("." + _PATCHES)})
    if len(prefixes) > 1:
        raise CheckpointError(f"weights '{path}' hold several models, under {prefixes}; keep the tensors of one")
    if prefixes and _PATCHES not in state:
        logger.warning("weights '%s': the prefix '%s' of their names is left out", path, prefixes[0])
        state = _filtered({name.removeprefix(prefixes[0]): tensor for name, tensor in given.items()}, outline, path)
    patches, channels = state.get(_PATCHES), models.input_size(outline)[0]
    if patches is not None and patches.ndim == 4 and patches.shape[1] == 3 != channels:
        logger.warning("weights '%s' are for 3 channels; they are adapted to %d as timm does", path, channels)
        state[_PATCHES] = adapt_input_conv(channels, patches)
    return state


def _filtered(given: Mapping[str, Tensor], outline: nn.Module, path: Path) -> dict[str, Tensor]:
    """What timm makes of weights of several origins, resampled to the model's input."""
    try:
        return dict(checkpoint_filter_fn(dict(given), outline))  # type: ignore[arg-type]
    except Exception as error:  # timm converts before anything is checked, and each conversion fails in its own way
        raise CheckpointError(f"weights '{path}' are not those of a timm ViT: {_line(error)}") from error
