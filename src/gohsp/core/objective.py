"""What a model's output is for: how far two outputs are apart, and what to differentiate.

Nothing else in the algorithm looks at an output, so nothing else takes it for class logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core.capture import autocast, device_of, evaluating, require_finite
from gohsp.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a cut has to keep.

    Attributes:
        name: What the report calls it.
        output: Takes what the model returns to the tensor that counts, ``[B, ...]``.
        distance: Takes two such tensors, the dense model's first, to how far each image's are apart ``[B]``: at least
            0, and 0 for equal ones.
        draw: Takes one such tensor and a generator to a random scalar. For a small change of the output, half the mean
            square of the scalar's change is the distance: its gradients are draws of the Fisher information.
        confidence: Takes such a tensor, and the dense model's, to the scalar whose fall is a loss to first order, too;
            None where a change of the output is a loss to second order alone.
    """

    name: str
    output: Callable[[Any], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[Tensor, torch.Generator], Tensor]
    confidence: Callable[[Tensor, Tensor], Tensor] | None = None


def classification(output: Callable[[Any], Tensor] | None = None) -> Objective:
    """Keep the predictions: ``KL(dense || pruned)`` of the classes, in nats.

    Gradients are those of random signed sums of the logits whose covariance is the Fisher information of the model's
    own predictions, so that no label is read; the confidence is that in the class that the dense model predicts.

    Args:
        output: Takes what the model returns to logits ``[B, classes]``; None finds them (:func:`tensor_in`).
    """
    return Objective("classification", output or tensor_in, _divergence, _fisher_sum, _confidence)


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    a, b = reference.log_softmax(-1), other.log_softmax(-1)
    return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)


def _fisher_sum(logits: Tensor, generator: torch.Generator) -> Tensor:
    # Its gradient has the covariance diag(p) - p p^T of a drawn class's log-likelihood, the Fisher information of the
    # logits, with less variance: every class has its part in every draw, a rare one too.
    p = logits.detach().softmax(-1)
    centred = logits - (p * logits).sum(-1, keepdim=True)
    return (p.sqrt() * _signs(logits, generator) * centred).sum()


def _confidence(logits: Tensor, dense: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(-1, dense.argmax(dim=-1, keepdim=True)).sum()


def features(output: Callable[[Any], Tensor] | None = None, *, scale: float = 1.0) -> Objective:
    """Keep the numbers that the model returns: half their mean squared error over ``scale``.

    Gradients are those of random sums of the outputs (Hutchinson 1990).

    Args:
        output: Takes what the model returns to the numbers that matter ``[B, ...]``; None finds them.
        scale: The variance of these numbers, so that a distance of 0.5 is as bad as a constant output.
            :func:`resolve_objective` measures it.
    """
    return Objective("features", output or tensor_in, partial(_error, scale), partial(_random_sum, scale))


def _error(scale: float, reference: Tensor, other: Tensor) -> Tensor:
    return (other - reference).square().reshape(len(reference), -1).mean(1) / (2 * scale)


def _random_sum(scale: float, output: Tensor, generator: torch.Generator) -> Tensor:
    return (output * _signs(output, generator)).sum() / (output[0].numel() * scale) ** 0.5


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, like.shape, generator=generator, device=like.device).to(like) * 2 - 1


def tensor_in(returned: Any) -> Tensor:
    """The tensor in what a model returns: itself; the ``logits``, pooled or last state of a model output; or the first.

    Raises:
        UnsupportedModelError: There is none.
    """
    if isinstance(returned, Tensor):
        return returned
    for field in ("logits", "pooler_output", "image_embeds", "image_features", "last_hidden_state"):
        found = returned.get(field) if isinstance(returned, dict) else getattr(returned, field, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(returned, tuple | list) and returned and isinstance(returned[0], Tensor):
        return returned[0]
    raise UnsupportedModelError(
        f"the model returns a {type(returned).__name__}, in which no tensor is found; give an objective that takes it "
        "to one: objective=lambda returned: returned['...']"
    )


@torch.no_grad()
def outputs(
    model: nn.Module, objective: Objective, batches: Iterable[Tensor], precision: torch.dtype = torch.float32
) -> list[Tensor]:
    """What counts of a model's outputs for batches of images, float32, in evaluation mode.

    Raises:
        NonFiniteError: It is NaN or infinite.
    """
    device, found = device_of(model), []
    with evaluating(model):
        for images in batches:
            with autocast(device, precision):
                found.append(objective.output(model(images.to(device))).float())
            require_finite("the model's output", found[-1])
    return found


def mean_distance(objective: Objective, reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean distance of two models' outputs per image; rounding does not make it negative."""
    total = sum(float(objective.distance(a, b).double().sum()) for a, b in zip(reference, other, strict=True))
    return max(total / sum(len(a) for a in reference), 0.0)


def require_objective(given: object) -> None:
    """Check that something can be an objective; whether it fits a model takes images to see.

    Raises:
        UnsupportedModelError: No objective of that name, no function, and no objective.
    """
    known = given is None or isinstance(given, Objective) or callable(given)
    if not known and not (isinstance(given, str) and given in ("classification", "features")):
        raise UnsupportedModelError(
            f"objective {given!r:.80} is unknown; give 'classification', 'features', or a function of what the model "
            "returns"
        )


def resolve_objective(
    given: Objective | str | Callable[[Any], Tensor] | None, model: nn.Module, images: Tensor
) -> Objective:
    """The objective of a model, as given or inferred from what it returns.

    Class logits are told by a module of the model that returned them and says how many classes it tells apart
    (``num_classes``, or ``num_labels`` of its configuration). Everything else counts as features.

    Args:
        given: An objective; ``"classification"`` or ``"features"``; a function that takes what the model returns to the
            features that matter; None infers.
        model: The model; left as it is.
        images: A few images ``[B, C, H, W]``.

    Raises:
        UnsupportedModelError: No objective of that name; no tensor in what the model returns; logits of one class, or
            of another shape than ``[B, classes]``, where classification was asked for.
        NonFiniteError: The outputs are NaN or infinite.
    """
    require_objective(given)
    if isinstance(given, Objective):
        return given
    take = given if callable(given) else tensor_in
    found, returned_by = _observed(model, take, images)
    _warn_of_one_output(found)
    if given == "classification":
        if found.ndim != 2 or found.shape[1] < 2:
            raise UnsupportedModelError(
                f"classification needs logits [images, classes] of two classes or more, the model returns "
                f"{list(found.shape)}; give objective='features', or a function that takes what it returns to logits"
            )
        return classification()
    if given is None and found.ndim == 2 and found.shape[1] >= 2 and _tells_apart(model, returned_by, found.shape[1]):
        return classification()
    if found.ndim < 1 or found.shape[0] != len(images) or not found.is_floating_point():
        raise UnsupportedModelError(
            f"the output that counts is {list(found.shape)} of {found.dtype} for {len(images)} images; it must be "
            "floating-point, with one entry an image first"
        )
    # One image does not tell how outputs differ from image to image, but how large they are.
    variance = found.float().var(dim=0, correction=0).mean() if len(found) > 1 else found.float().square().mean()
    return features(take, scale=float(variance.clamp_min(torch.finfo(torch.float32).tiny)))


def _warn_of_one_output(found: Tensor) -> None:
    """Say so where images make no difference: widths would be chosen by nothing."""
    if found.ndim == 0 or len(found) < 2:
        return
    if not ((found - found[:1]).abs() > 1e-6 * found.abs()).any():
        logger.warning(
            "the model's output is the same for each of %d images, so nothing tells which of its parts matter; check "
            "the images, their preprocessing and the objective",
            len(found),
        )


@torch.no_grad()
def _observed(model: nn.Module, take: Callable[[Any], Tensor], images: Tensor) -> tuple[Tensor, list[nn.Module]]:
    """What counts of the output, and the modules that returned that very tensor."""
    returned: list[tuple[nn.Module, Any]] = []
    handles = [
        module.register_forward_hook(lambda m, _args, value: returned.append((m, value))) for module in model.modules()
    ]
    try:
        with evaluating(model):
            found = take(model(images.to(device_of(model))))
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(f"the objective's function returns a {type(found).__name__}, not a tensor")
    require_finite("the model's output", found)
    return found, [module for module, value in returned if _holds(value, found)]


def _holds(value: Any, tensor: Tensor) -> bool:
    if isinstance(value, dict):
        return any(inner is tensor for inner in value.values())
    return value is tensor or (isinstance(value, tuple | list) and any(inner is tensor for inner in value))


def _tells_apart(model: nn.Module, returned_by: Sequence[nn.Module], classes: int) -> bool:
    """Whether a module that returned the output says that it tells so many classes apart."""
    for module in (model, *returned_by):
        config = getattr(module, "config", None)
        if classes in (getattr(module, "num_classes", None), getattr(config, "num_labels", None)):
            return True
    return False
