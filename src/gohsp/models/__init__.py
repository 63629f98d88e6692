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
from gohsp.core.activations import Stages
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
    supported = "; ".join(a.SUPPORTED for a in ADAPTERS)
    raise UnsupportedModelError(
        f"a {type(model).__module__}.{type(model).__qualname__} cannot be pruned; supported: {supported}"
    )


def describe(model: nn.Module) -> ModelStructure:
    """Structure of a model, dense or already pruned.

    Raises:
        UnsupportedModelError: The model, or a module in it, is of a class that cannot be pruned.
    """
    return adapter_for(model).describe(model)


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


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's classes in the order of its outputs; None where it has none, or not one for each.

    They stand in timm's place for them, ``model.pretrained_cfg["label_names"]``.
    """
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return tuple(names) if _are_names(names, getattr(model, "num_classes", None)) else None


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
    if names is not None and not _are_names(names, getattr(model, "num_classes", None)):
        raise DataError(
            f"{reprlib.repr(names)} cannot name the classes of a model with {getattr(model, 'num_classes', None)} "
            "outputs: give a list of texts, one for each and all different"
        )
    model.pretrained_cfg = {**config, "label_names": None if names is None else tuple(names)}  # type: ignore[assignment]


def _are_names(names: Any, count: Any) -> TypeGuard[Sequence[str]]:
    return (
        isinstance(names, (list, tuple))
        # Text that cannot be encoded could be shown in no report.
        and all(isinstance(name, str) and name.encode(errors="replace").decode() == name for name in names)
        and len(set(names)) == len(names) == count
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
