"""A classifier's classes: how many there are, and what they are called."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from gohsp.core.capture import evaluating
from gohsp.core.objective import tensor_in
from gohsp.errors import DataError, UnsupportedModelError
from gohsp.models.description import example_image, pretrained_cfg

CLASSIFIERS = ("head", "head.fc", "classifier", "heads.head", "mlp_head", "linear_head.1")
"""Where timm (of Swin and SAM, behind a pooling), transformers, torchvision and ``vit_pytorch`` have theirs."""


def num_classes(model: nn.Module) -> int:
    """Classes that the model's classifier tells apart; 0 without a classifier."""
    named = dict(model.named_modules())
    heads = (named.get(name) for name in CLASSIFIERS)
    return next((head.out_features for head in heads if isinstance(head, nn.Linear)), 0)


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's classes in the order of its outputs; None where it has none, or not one for each.

    They stand in ``model.pretrained_cfg["label_names"]``, timm's place for them.
    """
    names = pretrained_cfg(model).get("label_names")
    return tuple(names) if _are_names(names, num_classes(model)) else None


def set_class_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Name a model's classes in the order of its outputs, or forget their names, as after a new classifier.

    Raises:
        UnsupportedModelError: The model has no timm configuration to hold them.
        DataError: There is not one name, different from all others, for each output.
    """
    config = pretrained_cfg(model)
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


def require_classifier(model: nn.Module) -> None:
    """Check, by one image, that a model returns logits ``[images, classes]`` of a linear classifier.

    Raises:
        UnsupportedModelError: Features, a single logit, one output a token, or anything else.
    """
    with torch.no_grad(), evaluating(model):
        output = tensor_in(model(example_image(model)))
    shape = list(output.shape)
    needed = f"the model's output for an image is {shape}, where class logits [1, classes] are needed"
    if len(shape) != 2:
        raise UnsupportedModelError(f"{needed}: pool its tokens, by global_pool='token' or 'avg' in timm.create_model")
    if num_classes(model) == 0:
        raise UnsupportedModelError(
            f"{needed}, from a linear classifier. This model has none: these are features, or come from a head of its "
            "own; give it one by model.reset_classifier(classes), and train that on your classes. Method 'oneshot' "
            "takes any model"
        )
    if shape[1] < 2:
        raise UnsupportedModelError(
            f"{needed}, of two classes or more. Give a single logit a second class of logit 0: a head of two rows, "
            "zeros and the present weight and bias, gives the same probabilities by softmax"
        )
