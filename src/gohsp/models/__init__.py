"""The only place that knows foreign model classes; everyone else asks here.

A library's adapter is a module with ``accepts``, ``describe``, ``resize``, ``build`` and the other functions
used below; a new one is added to :data:`ADAPTERS` and so joins every contract test.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from gohsp.core import surgery
from gohsp.core.activations import Stages, evaluating
from gohsp.errors import CheckpointError, EqualityError, NonFiniteError, UnsupportedModelError
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
            model.gohsp_arguments = dict(spec["arguments"])  # type: ignore[assignment]
            return model
    raise CheckpointError(
        f"library {spec.get('library')!r} is unknown; this version reads {[a.LIBRARY for a in ADAPTERS]}"
    )


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
    arguments = adapter.architecture_arguments(model)
    masked = copy.deepcopy(model).eval()
    small = copy.deepcopy(model).eval()
    surgery.mask(masked, structure, plan)
    adapter.resize(small, plan.shapes)
    small.load_state_dict(state, strict=True)
    small.gohsp_arguments = arguments  # type: ignore[assignment]
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
