"""Other people's weights files, as tensors by name; whatever is in a file, nothing of it runs."""

from __future__ import annotations

import argparse
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gohsp import checkpoint, models
from gohsp.errors import CheckpointError, one_line

logger = logging.getLogger(__name__)

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Ends of the names of files that ``torch.save`` wrote; ``.tar`` is that of ``.pth.tar``."""

INDEX = "model.safetensors.index.json"
"""What names the files of weights that lie in several."""

_SET_CLASSES = (
    '. The number of classes is set by num_classes: arguments={"num_classes": 10} of gohsp.open_model, '
    "model_arguments.num_classes of a run. By default it is that of the file's classifier, where there is one; for a "
    "timm model 0 leaves the classifier out"
)

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by the names that it has for them, on the CPU.

    Of a file that holds more, the tensors are taken of its one table of names and tensors that has a ``.weight``,
    however deep it lies: ``state_dict``, ``model``. Optimisers' and losses' states are no such tables.

    Raises:
        CheckpointError: No such file, another kind of file, a damaged one, one that holds anything but numbers, texts
            and tensors, no such table or several, or a tensor that is quantised, sparse or without values.
    """
    if path.suffix == ".safetensors":
        state = checkpoint.read_tensors(path)
    elif path.suffix in PICKLED:
        state = _only_table(_unpickled(path), path)
    else:
        raise CheckpointError(f"weights '{path}': files that are read end in .safetensors or in one of {PICKLED}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(f"weights '{path}': '{name}' is quantised, sparse or without values")
        if tensor.is_floating_point() and tensor.dtype not in _TYPES:
            raise CheckpointError(f"weights '{path}': '{name}' is {tensor.dtype}; weights are not quantised")
    return state


def _unpickled(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is made of tensors and plain values."""
    try:
        if not path.is_file():
            raise CheckpointError(f"weights '{path}' is missing, or no file")
        # Training scripts keep their settings beside the weights; a Namespace is a table, and no more.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except Exception as error:  # damage ends in whatever the part of the reader raises that meets it first
        raise CheckpointError(
            f"weights '{path}' cannot be read as tensors and plain values alone, and nothing else is: "
            f"{one_line(error)}. It is damaged, or it holds objects; of a file that you trust keep the tensors "
            "in another: torch.save(model.state_dict(), NEW_FILE)"
        ) from error


def _only_table(content: Any, path: Path) -> dict[str, Tensor]:
    found = _tables(content)
    if not found:
        raise CheckpointError(f"weights '{path}' hold no table of names and tensors with a '.weight' among its names")
    if len(found) > 1:
        raise CheckpointError(
            f"weights '{path}' hold several models, under {list(found)}; keep one in a file of its own: "
            "torch.save(torch.load(FILE, weights_only=True)[ENTRY], NEW_FILE)"
        )
    (entry, state), *_ = found.items()
    if entry:
        logger.warning("weights '%s': its entry '%s' is taken", path, entry)
    return state


def _tables(content: Any) -> dict[str, dict[str, Tensor]]:
    """Every table of weights in what a file holds, by where it is; nothing is looked at twice."""
    found: dict[str, dict[str, Tensor]] = {}
    left, seen = [("", content)], set[int]()
    while left:
        entry, value = left.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        tensors = {k: v.detach() for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if any(name.endswith(".weight") for name in tensors):
            found[entry] = tensors
        else:
            left += [(f"{entry}.{key}" if entry else str(key), inner) for key, inner in value.items()]
    return found


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of timm's or of transformers: ``model.safetensors``, or the files that its index names.

    Raises:
        CheckpointError: Neither is there; a damaged file, or an index that names anything but files beside it.
    """
    if (folder / checkpoint.WEIGHTS).is_file():
        return read(folder / checkpoint.WEIGHTS)
    if not (folder / INDEX).is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        instead = f"give weights=, such as '{folder / others[0]}'" if others else "save it again with its weights"
        raise CheckpointError(f"'{folder}' holds neither {checkpoint.WEIGHTS} nor {INDEX}; {instead}")
    content = checkpoint.read_json(folder / INDEX)
    places = content.get("weight_map") if isinstance(content, dict) else None
    files = set(places.values()) if isinstance(places, dict) else {None}
    if not all(isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file for file in files):
        raise CheckpointError(f"'{folder / INDEX}' must name .safetensors files beside it; it is damaged")
    return {name: tensor for file in sorted(files) for name, tensor in read(folder / file).items()}


def prefix_in(state: Mapping[str, Tensor], anchor: str, path: Path) -> str:
    """What the names in a file have before the model's own (``module.``, ``backbone.``); the log says so.

    Args:
        state: The file's tensors.
        anchor: A tensor that every model of its kind has, by which a prefix is seen.
        path: The file, for messages.

    Raises:
        CheckpointError: The anchor stands under several prefixes.
    """
    prefixes = sorted({name.removesuffix(anchor) for name in state if name.endswith("." + anchor)})
    if len(prefixes) > 1:
        raise CheckpointError(f"weights '{path}' hold several models, under {prefixes}; keep the tensors of one")
    if not prefixes or anchor in state:
        return ""
    logger.warning("weights '%s': the prefix '%s' of their names is left out", path, prefixes[0])
    return prefixes[0]


def without(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, their names without a prefix where they have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def classes_in(state: Mapping[str, Tensor], outline: nn.Module, classifier: object, path: Path) -> dict[str, int]:
    """The argument ``num_classes`` by which a model gets the classifier in a file, which the log tells.

    Args:
        state: The file's tensors, under the model's names.
        outline: The model as it would be without that argument.
        classifier: The module that the model's library calls its classifier, or several, of which the first counts.
        path: The file, for the log.

    Returns:
        The argument alone; nothing where the model has as many classes already, or the file has no such classifier, or
        one that is not linear.
    """
    name = classifier[0] if isinstance(classifier, tuple | list) and classifier else classifier
    weight, own = state.get(f"{name}.weight"), outline.state_dict().get(f"{name}.weight")
    if weight is None or weight.ndim != 2 or (own is not None and len(own) == len(weight)):
        return {}
    logger.info(
        "weights '%s': their classifier '%s' tells %d classes apart, and so does the model", path, name, len(weight)
    )
    return {"num_classes": len(weight)}


def fitting(
    state: Mapping[str, Tensor], outline: nn.Module, path: Path, *, classifier: tuple[str, ...], new_classifier: bool
) -> dict[str, Tensor]:
    """The tensors that belong into a model, all of them; without the classifier's where that may be and is another.

    Whole numbers are left out where the model has them, too: it counts positions itself.

    Args:
        state: Tensors under the model's names.
        outline: The model, without memory.
        path: The file, for messages.
        classifier: What the names of the classifier's tensors begin with.
        new_classifier: Whether it may be new.

    Raises:
        CheckpointError: Names or shapes differ, or a tensor is not floating-point.
    """
    whole = outline.state_dict()
    expected = {name: tensor for name, tensor in whole.items() if tensor.is_floating_point()}
    state = {name: tensor for name, tensor in state.items() if name in expected or name not in whole}
    integers = [n for n, tensor in state.items() if not tensor.is_floating_point() and n in expected]
    if integers:
        raise CheckpointError(
            f"weights '{path}': '{integers[0]}' is {state[integers[0]].dtype}; weights are floating-point, and not "
            "quantised"
        )
    left_out = {name for name in expected if name.startswith(classifier)}
    fits = all(name in state and state[name].shape == expected[name].shape for name in left_out)
    if fits or not new_classifier:
        left_out = set()
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    needed = {name: tensor for name, tensor in expected.items() if name not in left_out}
    if problems := models.fit_problems(needed, kept):
        of_classes = all(problem.startswith(tuple(f"'{start}" for start in classifier)) for problem in problems)
        raise CheckpointError(
            f"weights '{path}' do not fit the model: {models.listed(problems)}{_SET_CLASSES if of_classes else ''}"
        )
    return kept
