"""How a model that takes more than images is called with images alone: what else it takes is set beforehand.

Everything else in gohsp calls a model with images. A hook on the model, which PyTorch has for that, completes the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.errors import DataError

IMAGE_KEYS = ("pixel_values", "images", "image", "img", "inputs")
"""Where the images of a mapping are looked for, in this order."""

Example = Tensor | Mapping[str, Any]
"""Images ``[B, C, H, W]`` or one ``[C, H, W]``, or a mapping that holds them beside what else a model takes by name."""


def image_key(example: Mapping[str, Any]) -> str:
    """Where the images of a mapping are.

    Raises:
        DataError: Nowhere.
    """
    for key in IMAGE_KEYS:
        if key in example:
            return key
    raise DataError(f"a mapping of images must have one of the keys {list(IMAGE_KEYS)}, got {list(example)[:8]}")


def images_in(example: Example) -> Tensor:
    """The images ``[B, C, H, W]`` of an example."""
    images = example[image_key(example)] if isinstance(example, Mapping) else example
    return images[None] if images.ndim == 3 else images


@dataclass(frozen=True)
class Feed:
    """A hook that completes a call with images alone, and leaves every other one as it is.

    Attributes:
        key: The argument that takes the images; None for the first.
        rest: The other arguments.
        repeated: Those of ``rest`` that hold what is for one image, which is repeated for every image.
    """

    key: str | None
    rest: Mapping[str, Any]
    repeated: frozenset[str]

    def __call__(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments to call the model with; None for those that were given."""
        if kwargs or len(args) != 1:
            return None
        rest = {name: self._for(name, args[0]) for name in self.rest}
        return (args, rest) if self.key is None else ((), {self.key: args[0], **rest})

    def _for(self, name: str, images: Tensor) -> Any:
        value = self.rest[name]
        if not isinstance(value, Tensor):
            return value
        value = value.to(images) if value.is_floating_point() else value.to(images.device)
        return value.expand(len(images), *value.shape[1:]) if name in self.repeated else value


def takes_more(model: nn.Module) -> bool:
    """Whether a model has to be given more than images, or takes these by another argument than its first."""
    names = _arguments(model)
    needed = [name for name, parameter in names.items() if parameter.default is parameter.empty]
    first, *others = names or ("",)
    return len(needed) > 1 or (first not in IMAGE_KEYS and any(name in IMAGE_KEYS for name in others))


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    """What a model can be called with by name."""
    others = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    found = inspect.signature(model.forward).parameters
    return {name: parameter for name, parameter in found.items() if parameter.kind not in others}


def _feed_of(model: nn.Module, example: Example | None) -> Feed | None:
    """What completes a call with images alone; None where nothing has to, or nothing is known that could."""
    names = _arguments(model)
    given = dict(example) if isinstance(example, Mapping) else {}
    with_text = {"input_ids", "pixel_values"} <= names.keys()  # the words of transformers
    if not takes_more(model) or not (given or with_text):
        return None
    images = given.pop(image_key(given)) if given else torch.empty(0)
    key = next((name for name in IMAGE_KEYS if name in names), None)
    rest = {name: value for name, value in given.items() if name in names}
    for_images = {name for name, value in rest.items() if _is_for_images(value, images)}
    rest |= {name: _first(rest[name], images) for name in for_images}
    if with_text and "input_ids" not in rest:  # a text of one token, since the images' tower does not see it
        rest["input_ids"] = torch.zeros(1, 1, dtype=torch.int64)
        for_images.add("input_ids")
    return Feed(key, rest, frozenset(for_images))


def _is_for_images(value: Any, images: Tensor) -> bool:
    """Whether a tensor has an entry for each image, or is what there is for a single one ``[C, H, W]``."""
    return isinstance(value, Tensor) and (images.ndim == 3 or (value.ndim > 0 and len(value) == len(images)))


def _first(value: Tensor, images: Tensor) -> Tensor:
    return (value[None] if images.ndim == 3 else value[:1]).detach()


def feed(model: nn.Module, example: Example | None) -> None:
    """Let a model be called with images alone, until :func:`unfeed`, where that takes anything.

    Args:
        model: The model.
        example: As the user calls it. What it takes besides images is what stands here, for all images; of what has an
            entry for each image, the first. Models of transformers that take a text do with images alone.
    """
    found = None if is_fed(model) else _feed_of(model, example)
    if found is not None:
        model.register_forward_pre_hook(found, prepend=True, with_kwargs=True)


def unfeed(model: nn.Module) -> None:
    """Take back what :func:`feed` did to this model, or to the one that it is a copy of."""
    for key in _feeds(model):
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)


def is_fed(model: nn.Module) -> bool:
    """Whether a model can be called with images alone because of :func:`feed`."""
    return bool(_feeds(model))


def _feeds(model: nn.Module) -> list[int]:
    return [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, Feed)]


@contextmanager
def fed(model: nn.Module, example: Example | None) -> Iterator[None]:
    """Let a model be called with images alone while the context is open."""
    if is_fed(model):
        yield
        return
    feed(model, example)
    try:
        yield
    finally:
        unfeed(model)
