"""Making a dense model again: what a library calls it, and the arguments that tell it from others of that name.

Only saving, loading and uniform pruning ask this; describing, cutting and checking a model do not. A library is an
extra of gohsp's of its name, and a module here, imported when one of its models is met, with ``recognises``,
``architecture_name``, ``architecture_arguments``, ``check`` and ``make``; and for models whose blocks are all alike,
which it makes and loads without gohsp, with ``units_step``, ``plain_settings``, ``make_plain`` and ``save_plain``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.core.capture import evaluating, require_finite
from gohsp.core.objective import tensor_in
from gohsp.errors import CheckpointError, UnsupportedModelError, require_packages
from gohsp.models.compaction import EQUALITY_TOLERANCE, relative_difference
from gohsp.models.description import describe, example_image, resize
from gohsp.models.families import class_name
from gohsp.structure import Widths

LIBRARIES = ("timm", "torchvision", "transformers")
"""Those whose models are made again on loading."""

OWN: Mapping[str, Any] = {"library": None, "architecture": None, "arguments": {}}
"""The specification of a module of the user's own."""


def library(name: str) -> ModuleType:
    """What makes a library's models again.

    Raises:
        MissingPackageError: The library is not installed.
    """
    require_packages(f"a model of {name}", name, name)
    return importlib.import_module(f"{__name__}.{name}")


def library_of(model: nn.Module) -> str | None:
    """The library that made a model; None of a module of the user's own."""
    name = type(model).__module__.partition(".")[0]
    return name if name in LIBRARIES and library(name).recognises(model) else None


def is_library_model(model: nn.Module) -> bool:
    """Whether a model is a library's, which can be made again by its name there."""
    return library_of(model) is not None


def specification(model: nn.Module) -> dict[str, Any]:
    """What is needed to make the dense architecture again: ``library``, ``architecture``, ``arguments``.

    Raises:
        UnsupportedModelError: The model is none of a library's, by a name that the library would make it by.
    """
    name = library_of(model)
    if name is None:
        raise UnsupportedModelError(
            f"a {class_name(model)} can be pruned, but not made again on loading: that takes a model that timm made by "
            "its name, torchvision's VisionTransformer or one of transformers. Save what is pruned with gohsp.save, "
            "and load it into a module of your own by gohsp.load(folder, into=module)"
        )
    maker = library(name)
    return {
        "library": name,
        "architecture": maker.architecture_name(model),
        "arguments": maker.architecture_arguments(model),
    }


def check_specification(spec: Mapping[str, Any], where: str) -> None:
    """Check what a file says of a model; nothing is made of it.

    Args:
        spec: ``library``, ``architecture`` and ``arguments``.
        where: What holds it, for a message.

    Raises:
        CheckpointError: An unknown library or architecture, or arguments that are not allowed.
        MissingPackageError: The library is not installed.
    """
    if spec["library"] not in LIBRARIES:
        raise CheckpointError(f"{where}: library {spec['library']!r} is unknown; this version reads {list(LIBRARIES)}")
    library(spec["library"]).check(spec["architecture"], spec["arguments"], where)


def build(spec: Mapping[str, Any], widths: Widths | None = None, device: str = "meta") -> nn.Module:
    """Make an architecture, and resize its blocks.

    Args:
        spec: As of :func:`specification`.
        widths: Widths of its sub-layers; None for the dense ones.
        device: Where; by default on the meta device, without memory.

    Raises:
        CheckpointError: What :func:`check_specification` refuses, or the library does.
    """
    check_specification(spec, "the specification")
    name, arguments = spec["architecture"], dict(spec["arguments"])
    try:
        with torch.device(device):
            model = library(spec["library"]).make(name, arguments)
            if widths is not None:
                resize(model, widths)
            return model
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise CheckpointError(f"{spec['library']} cannot make '{name}' with {arguments}: {error}") from error


def fill_buffers(model: nn.Module, spec: Mapping[str, Any], widths: Widths) -> None:
    """Give a model that was built without memory the buffers that no weights file holds, such as position indices."""
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        real = build(spec, widths, device="cpu")
        for name in left:
            parent, _, buffer = name.rpartition(".")
            model.get_submodule(parent)._buffers[buffer] = real.get_buffer(name)


def require_remakeable(model: nn.Module) -> dict[str, Any]:
    """Check that a model can be made again from what a folder would hold of it, and computes the same.

    It is built anew from its specification and widths, given the same weights, and compared by its outputs on an image
    of noise. This costs two forward passes of one image.

    Returns:
        The model's :func:`specification`.

    Raises:
        UnsupportedModelError: The model cannot be described, or the one made again is another; the message names the
            modules, tensors or outputs that differ.
        NonFiniteError: It computes NaN or infinite values.
    """
    spec, network = specification(model), describe(model)
    try:
        again = build(spec, network.widths)
    except CheckpointError as error:
        raise UnsupportedModelError(f"this model could not be made again on loading: {error}") from error
    state = model.state_dict()
    differences = _type_problems(state) + fit_problems(again.state_dict(), state)
    if not differences:
        again.load_state_dict(state, strict=True, assign=True)
        fill_buffers(again, spec, network.widths)
        differences = output_problems(model, again.requires_grad_(False))
    if differences:
        raise UnsupportedModelError(
            f"a '{spec['architecture']}' made again with {spec['arguments']} is another model than this one: "
            f"{listed(differences)}. Only what its library can make by name and arguments can be saved so; make the "
            "change by an argument, or save it as a module of your own: gohsp.save(model, folder, own=True)"
        )
    return spec


def listed(problems: Sequence[str], count: int = 5) -> str:
    """The first few problems in one line, and how many more there are."""
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more


def _type_problems(state: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being numbers of one kind, as a weights file is to hold them."""
    types = {tensor.dtype: name for name, tensor in reversed(list(state.items()))}
    if problems := [f"'{name}' is {dtype}" for dtype, name in types.items() if not dtype.is_floating_point]:
        return problems
    if len(types) > 1:
        return ["its tensors are of several types: " + ", ".join(f"'{n}' is {t}" for t, n in types.items())]
    return []


def fit_problems(expected: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """What keeps tensors from being a model's: the names and shapes that differ, a sentence each.

    Args:
        expected: The model's tensors.
        given: Tensors, or anything with a ``shape``.
    """
    problems = [f"'{k}' is missing" for k in expected if k not in given]
    problems += [f"'{k[:200]}' is not part of the model" for k in given if k not in expected]
    problems += [
        f"'{k}' is {list(given[k].shape)}, the model has {list(expected[k].shape)}"
        for k in expected
        if k in given and list(given[k].shape) != list(expected[k].shape)
    ]
    return problems


def _other_modules(again: nn.Module, model: nn.Module) -> list[str]:
    """Modules that are of another class than in the model made again."""
    ours = dict(again.named_modules())
    return [
        f"'{name}' is a {class_name(module)}, not a {class_name(ours[name])}"
        for name, module in model.named_modules()
        if name in ours and type(module) is not type(ours[name])
    ]


def output_problems(model: nn.Module, again: nn.Module) -> list[str]:
    """How the outputs of a model made again, with the same weights, differ from the model's on an image of noise."""
    image, dtype = example_image(model), next(model.parameters()).dtype
    with torch.no_grad(), evaluating(model):
        require_finite("the model's output", tensor_in(model(image)))
        difference = relative_difference(model, again.eval(), image, output=tensor_in)
    # What is computed in half precision differs by the order of its sums.
    tolerance = EQUALITY_TOLERANCE if dtype in (torch.float32, torch.float64) else 1e-2
    if difference <= tolerance:
        return []
    differs = f"its outputs differ by {difference:.1e} of their scale (allowed {tolerance:.0e})"
    return [differs, *_other_modules(again, model)]
