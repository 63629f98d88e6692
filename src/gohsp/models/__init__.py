"""The only place that knows foreign model classes; everyone else asks here.

A library's adapter is a module with ``accepts``, ``describe``, ``resize``, ``build`` and the other functions
used below; a new one is added to :data:`ADAPTERS` and so joins every contract test.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from gohsp.core import surgery
from gohsp.core.activations import Stages, evaluating, require_finite
from gohsp.errors import CheckpointError, DataError, EqualityError, NonFiniteError, UnsupportedModelError
from gohsp.models import timm as _timm
from gohsp.structure import BlockShape, ModelStructure, Plan


class Adapter(Protocol):
    """What a library's adapter module offers."""

    LIBRARY: str
    SUPPORTED: str

    def accepts(self, model: nn.Module) -> bool: ...  # noqa: D102
    def describe(self, model: nn.Module) -> ModelStructure: ...  # noqa: D102
    def resize(self, model: nn.Module, shapes: Sequence[BlockShape]) -> None: ...  # noqa: D102
    def build(self, spec: Mapping[str, Any]) -> nn.Module: ...  # noqa: D102
    def architecture_name(self, model: nn.Module) -> str: ...  # noqa: D102
    def architecture_arguments(self, model: nn.Module) -> dict[str, Any]: ...  # noqa: D102
    def set_fused_attention(self, model: nn.Module, fused: bool | Sequence[bool]) -> list[bool]: ...  # noqa: D102
    def stages(self, model: nn.Module) -> Stages: ...  # noqa: D102
    def input_size(self, model: nn.Module) -> tuple[int, int, int]: ...  # noqa: D102
    def num_classes(self, model: nn.Module) -> int: ...  # noqa: D102


ADAPTERS: tuple[Adapter, ...] = (cast(Adapter, _timm),)

EQUALITY_TOLERANCE = 1e-5
"""Largest difference of compacted and masked model, relative to the logits' scale, in float32 (design, section 2)."""


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of ``model``.

    Raises:
        UnsupportedModelError: No adapter knows this class.
    """
    for adapter in ADAPTERS:
        if adapter.accepts(model):
            return adapter
    what = f"a {type(model).__module__}.{type(model).__qualname__}"
    if inside := _supported_inside(model):
        raise UnsupportedModelError(f"{what} is not pruned itself; pass the model inside it, model.{inside}")
    supported = "; ".join(a.SUPPORTED for a in ADAPTERS)
    raise UnsupportedModelError(f"{what} cannot be pruned; supported: {supported}")


def _supported_inside(model: nn.Module) -> str | None:
    """Name of the outermost module that could be pruned: what ``torch.compile``, DataParallel and others wrap."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((name for name, module in modules if any(a.accepts(module) for a in ADAPTERS)), None)


def describe(model: nn.Module) -> ModelStructure:
    """Structure of a model, dense or already pruned.

    Raises:
        UnsupportedModelError: The model, or a module in it, is of a class that cannot be pruned, or is not what it
            seems (parametrised, adapted, quantised, tied); or an image of the model's size cannot pass through it.
    """
    adapter = adapter_for(model)
    try:
        return adapter.describe(model)
    except RuntimeError as error:
        size = list(adapter.input_size(model))
        raise UnsupportedModelError(f"the model cannot compute an image of {size}: {error}") from error


def set_fused_attention(model: nn.Module, fused: bool | Sequence[bool]) -> list[bool]:
    """Choose between PyTorch's fused attention kernel and plain matrix products, for all blocks alike or for each.

    Returns:
        What was chosen before, by block.
    """
    return adapter_for(model).set_fused_attention(model, fused)


def stages(model: nn.Module) -> Stages:
    """The network as embedding, blocks and head."""
    return adapter_for(model).stages(model)


def resized(model: nn.Module, shapes: Sequence[BlockShape]) -> nn.Module:
    """A copy with other widths, whose cut weights are newly drawn: what its shape costs, not what it computes."""
    copied = copy.deepcopy(model)
    adapter_for(model).resize(copied, shapes)
    return copied


def num_classes(model: nn.Module) -> int:
    """Classes that the model's classifier tells apart; 0 without a classifier."""
    return adapter_for(model).num_classes(model)


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's classes in the order of its outputs; None where it has none, or not one for each.

    They stand in timm's place for them, ``model.pretrained_cfg["label_names"]``.
    """
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return tuple(names) if _are_names(names, num_classes(model)) else None


def set_class_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Name a model's classes in the order of its outputs, or forget their names, as after a new classifier.

    Raises:
        UnsupportedModelError: The model has no timm configuration to hold them.
        DataError: There is not one name, different from all others, for each output.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        raise UnsupportedModelError(
            f"a {type(model).__name__} without pretrained_cfg cannot hold class names; make it with timm.create_model"
        )
    if names is not None and not _are_names(names, num_classes(model)):
        raise DataError(
            f"{reprlib.repr(names)} cannot name the classes of a model with {getattr(model, 'num_classes', None)} "
            "outputs: give a list of texts, one for each and all different"
        )
    model.pretrained_cfg = {**config, "label_names": None if names is None else tuple(names)}  # type: ignore[assignment]


def _are_names(names: Any, count: int) -> TypeGuard[Sequence[str]]:
    return (
        isinstance(names, (list, tuple))
        # Text that cannot be encoded could be shown in no report.
        and all(isinstance(name, str) and name.encode(errors="replace").decode() == name for name in names)
        and len(set(names)) == len(names) == count
    )


def working_copy(model: nn.Module) -> nn.Module:
    """A copy to prune: float32, in evaluation mode, no weight frozen, one output for all heads of a distilled model.

    Raises:
        UnsupportedModelError: The model cannot be described, and so neither be pruned.
    """
    describe(model)  # refused before the copy: not everything that is refused can be copied
    copied = copy.deepcopy(model).float().requires_grad_().eval()
    if getattr(copied, "distilled_training", False):  # in training it would return the logits of both heads apart
        copied.set_distilled_training(False)  # type: ignore[operator]
    return copied


def require_classifier(model: nn.Module) -> None:
    """Check, by one image, that a model returns class logits ``[images, classes]``; measures of predictions need them.

    Raises:
        UnsupportedModelError: Features, a single logit, one output a token, or anything else.
    """
    adapter = adapter_for(model)
    weight = next(model.parameters())
    image = torch.zeros(1, *adapter.input_size(model), device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad(), evaluating(model):
            output = model(image)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"the model cannot compute an image of {list(image.shape)}: {error}") from error
    shape = list(getattr(output, "shape", ()))
    needed = f"the model's output for an image is {shape or type(output)}, where class logits [1, classes] are needed"
    if len(shape) != 2:
        raise UnsupportedModelError(f"{needed}: pool its tokens, by global_pool='token' or 'avg' in timm.create_model")
    if adapter.num_classes(model) == 0:
        raise UnsupportedModelError(
            f"{needed}, from a linear classifier. This model has none: these are features, or come from a head of its "
            "own; give it one by model.reset_classifier(classes), and train that on your classes"
        )
    if shape[1] < 2:
        raise UnsupportedModelError(
            f"{needed}, of two classes or more. Give a single logit a second class of logit 0: a head of two rows, "
            "zeros and the present weight and bias, gives the same probabilities by softmax"
        )


def specification(model: nn.Module) -> dict[str, Any]:
    """What is needed to make the dense architecture again: ``library``, ``architecture``, ``arguments``."""
    adapter = adapter_for(model)
    return {
        "library": adapter.LIBRARY,
        "architecture": adapter.architecture_name(model),
        "arguments": adapter.architecture_arguments(model),
    }


def build(spec: Mapping[str, Any], shapes: Sequence[BlockShape]) -> nn.Module:
    """Make an architecture on the meta device and resize its blocks.

    Args:
        spec: As :func:`specification` returns it.
        shapes: Widths of its blocks.

    Raises:
        CheckpointError: An unknown library, or an architecture that the installed library cannot make.
    """
    for adapter in ADAPTERS:
        if spec.get("library") == adapter.LIBRARY:
            model = adapter.build(spec)
            adapter.resize(model, shapes)
            return model
    raise CheckpointError(
        f"library {spec.get('library')!r} is unknown; this version reads {[a.LIBRARY for a in ADAPTERS]}"
    )


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
    spec, structure = specification(model), describe(model)
    try:
        again = build(spec, structure.shapes)
    except CheckpointError as error:
        raise UnsupportedModelError(f"this model could not be made again on loading: {error}") from error
    state = model.state_dict()
    differences = _type_problems(state) + fit_problems(again.state_dict(), state)
    if not differences:
        again.load_state_dict(state, strict=True, assign=True)
        difference = _difference_in_evaluation(model, again.requires_grad_(False))
        # What is computed in half precision differs by the order of its sums.
        tolerance = EQUALITY_TOLERANCE if _dtype(model) in (torch.float32, torch.float64) else 1e-2
        if not difference <= tolerance:
            differences = [f"its outputs differ by {difference:.1e} of their scale (allowed {tolerance:.0e})"]
            differences += _other_modules(again, model)
    if differences:
        raise UnsupportedModelError(
            f"a '{spec['architecture']}' made again with {spec['arguments']} is another model than this one: "
            f"{listed(differences)}. Only what timm.create_model can make can be saved; make the change by one of its "
            "arguments"
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
        f"'{name}' is a {_class_name(module)}, not a {_class_name(ours[name])}"
        for name, module in model.named_modules()
        if name in ours and type(module) is not type(ours[name])
    ]


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _difference_in_evaluation(model: nn.Module, again: nn.Module) -> float:
    """Relative difference of the outputs on one image of noise."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *adapter_for(model).input_size(model), generator=generator).to(_dtype(model))
    with torch.no_grad(), evaluating(model):
        require_finite("the model's output", model(image.to(next(model.parameters()).device)))
        return relative_difference(model, again.eval(), image)


def check_finite(model: nn.Module) -> None:
    """Check every weight.

    Raises:
        NonFiniteError: A tensor holds NaN or infinite values; the message names the first.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise NonFiniteError(f"tensor '{name}' is on the meta device and holds no values; load the weights first")
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise NonFiniteError(
                f"tensor '{name}' holds {bad} NaN or infinite values of {tensor.numel()}; mend the weights"
            )


@dataclass(frozen=True, slots=True)
class Compaction:
    """A compacted model and how close it is to the masked dense one.

    Attributes:
        model: The small dense model.
        max_relative_difference: Largest logit difference over the logits' largest magnitude, on the probe batch.
        images: Images in the probe batch.
    """

    model: nn.Module
    max_relative_difference: float
    images: int


def compact(model: nn.Module, plan: Plan, probe: Tensor) -> Compaction:
    """Cut ``model`` down to ``plan`` and check that the result computes what the masked model computes.

    Args:
        model: The model, which is left as it is.
        plan: What stays of it.
        probe: A few images ``[B, C, H, W]`` to compare the two models on.

    Raises:
        PlanError: The plan does not fit the model.
        EqualityError: The two models differ by more than :data:`EQUALITY_TOLERANCE`.
    """
    adapter = adapter_for(model)
    structure = adapter.describe(model)
    state = surgery.cut_state(model, structure, plan)
    masked = copy.deepcopy(model).eval()
    small = copy.deepcopy(model).eval()
    surgery.mask(masked, structure, plan)
    adapter.resize(small, plan.shapes)
    small.load_state_dict(state, strict=True)
    difference = relative_difference(masked, small, probe)
    if not difference <= EQUALITY_TOLERANCE:
        raise EqualityError(
            f"the compacted model differs from the masked one by {difference:.1e} of the logits' scale "
            f"(allowed {EQUALITY_TOLERANCE:.0e}); this is a defect of gohsp, please report the architecture"
        )
    return Compaction(small.train(model.training), difference, len(probe))


def relative_difference(reference: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Largest absolute logit difference of two models, over the reference logits' largest magnitude."""
    device = next(reference.parameters()).device
    with torch.no_grad():
        a = reference(images.to(device)).double()
        b = other(images.to(device)).double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
