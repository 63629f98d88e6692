"""What a model is made of: its blocks, found by walking its modules wherever they are, and what stands outside them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp.core.capture import evaluating
from gohsp.errors import NonFiniteError, UnsupportedModelError
from gohsp.models.checks import require_plain
from gohsp.models.families import Family, family_of, supported
from gohsp.structure import PARAMS, Network, Widths

WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
"""Classes whose forward is not that of the module inside, so that hooks in it may not be called."""

DEFAULT_SIZE = (224, 224)
"""Height and width of the image that a model which takes any size is described with."""


def blocks_of(model: nn.Module) -> dict[str, tuple[nn.Module, Family]]:
    """Every block that can be pruned, by its name, and its family.

    Raises:
        UnsupportedModelError: No module, a wrapper around one, or a module without such a block.
    """
    what = f"a {type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{what} cannot be pruned; give a torch.nn.Module. Supported: {supported()}")
    found = _known_blocks(model)
    _require_unwrapped(model, found)
    _require_all_known(model, found)
    if not found:
        raise UnsupportedModelError(
            f"{what} has no block that can be pruned{_repeated(model)}; supported: {supported()}"
        )
    return found


def _known_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, Family]]:
    known = ((name, module, family_of(module)) for name, module in model.named_modules())
    return {name: (module, family) for name, module, family in known if family is not None}


def _require_unwrapped(model: nn.Module, found: Iterable[str]) -> None:
    """Check that no wrapper stands around the model, or around a part of it that holds blocks."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if type(module).__name__ not in WRAPPERS or not any(block.startswith(prefix) for block in found):
            continue
        what, inside = f"a {type(module).__module__}.{type(module).__qualname__}", next(iter(module._modules))
        if not name:
            raise UnsupportedModelError(f"{what} is not pruned itself; pass the model inside it, model.{inside}")
        raise UnsupportedModelError(
            f"module '{name}' is {what}, which is not pruned itself; put what is inside it in its place: "
            f"model.{name} = model.{name}.{inside}"
        )


def _require_all_known(model: nn.Module, found: Mapping[str, object]) -> None:
    """Check that blocks which stand beside one that is known are known, too."""
    containers = {name.rpartition(".")[0] for name in found}
    for container in containers:
        for label, module in model.get_submodule(container).named_children():
            name = f"{container}.{label}" if container else label
            if name not in found and (hasattr(module, "attn") or hasattr(module, "mlp")):
                raise _unknown(name, module)


def _repeated(model: nn.Module) -> str:
    """The class of the modules that a model repeats most often, for a message."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    longest = max(lists, key=len, default=None)
    if longest is None or len({type(m) for m in longest}) > 1:
        return ""
    cls = type(longest[0])
    return f" ({len(longest)} of its modules are {cls.__module__}.{cls.__qualname__})"


def _unknown(name: str, module: nn.Module) -> UnsupportedModelError:
    cls = type(module)
    return UnsupportedModelError(
        f"module '{name}' is a {cls.__module__}.{cls.__qualname__}, which cannot be pruned; supported: {supported()}"
    )


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of an image, as the first convolution and the patch embedding tell them.

    Where no module tells the size, timm's configuration does, and else it is 224 px.
    """
    modules = list(model.modules())
    channels = next((m.in_channels for m in modules if isinstance(m, nn.Conv2d)), 3)
    known = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, *DEFAULT_SIZE))[1:]
    sizes = (getattr(m, "img_size", None) for m in modules)
    height, width = next((s for s in sizes if isinstance(s, tuple) and len(s) == 2), known)
    return channels, height, width


def example_image(model: nn.Module, count: int = 1) -> Tensor:
    """Images of noise ``[count, C, H, W]`` of the size that a model takes, of its type, where it is."""
    weight = next(model.parameters())
    noise = torch.randn(count, *input_size(model), generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)


def describe(model: nn.Module, images: Tensor | None = None) -> Network:
    """Describe a model, dense or already pruned: its sub-layers in the order in which they run.

    The model's own forward runs once, with its blocks passed over; how to make the model need not be known.

    Args:
        model: A model with blocks of a supported family, wherever they are in it.
        images: An image or more ``[B, C, H, W]`` that it takes, of any type; None for noise of the size that it seems
            to take.

    Raises:
        UnsupportedModelError: It has no block that can be pruned; a module is of a class that cannot be, or is not what
            it seems (parametrised, adapted, quantised, tied); or an image cannot pass through it.
    """
    known = blocks_of(model)
    require_plain(model)
    weight = next(model.parameters())
    image = example_image(model) if images is None else images[:1].to(weight.device, weight.dtype)
    seen = _passed_over(model, known, image)
    sublayers = tuple(
        sub for name, tokens in seen.tokens.items() for sub in known[name][1].describe(name, known[name][0], tokens)
    )
    if not sublayers:
        raise UnsupportedModelError(
            "none of the model's blocks takes part in its forward pass, so nothing can be pruned"
        )
    pruned = sum(PARAMS.sublayer(sub, sub.widths) for sub in sublayers)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Network(sublayers=sublayers, fixed_params=total - pruned, fixed_macs=seen.macs)


@dataclass
class _Outside:
    """What a pass that leaves the blocks out tells: tokens that each is given, in order, and the MACs of the rest."""

    tokens: dict[str, int] = field(default_factory=dict)
    macs: int = 0
    sent: Tensor | None = None


def _passed_over(model: nn.Module, blocks: Mapping[str, tuple[nn.Module, Family]], image: Tensor) -> _Outside:
    seen, counter = _Outside(), FlopCounterMode(display=False)

    def pass_over(name: str, stream: Tensor) -> Tensor:
        if name in seen.tokens:
            raise UnsupportedModelError(f"block '{name}' runs more than once for an image, which cannot be pruned")
        if seen.sent is not None and stream is not seen.sent:
            raise UnsupportedModelError(
                f"what block '{name}' reads is not what the block before it returns; models with something between "
                "their blocks cannot be pruned yet"
            )
        if stream.ndim != 3:
            raise UnsupportedModelError(f"block '{name}' is given {list(stream.shape)}, not [images, tokens, channels]")
        seen.tokens[name], seen.sent = stream.shape[1], stream
        return stream

    try:
        with ExitStack() as stack, torch.no_grad(), evaluating(model), _frozen(model):
            for name, (block, _) in blocks.items():
                stack.enter_context(_replaced_forward(block, lambda x, *_, name=name, **__: pass_over(name, x)))
            with counter:
                model(image)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UnsupportedModelError(
            f"the model cannot compute an image of {list(image.shape[1:])}: {error}; give images of the size that it "
            "takes"
        ) from error
    seen.macs = counter.get_total_flops() // 2 // len(image)
    return seen


@contextmanager
def _replaced_forward(block: nn.Module, forward: Any) -> Iterator[None]:
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires gradients; PyTorch's counter trips over those that enter a module as its input."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def resize(model: nn.Module, widths: Widths) -> None:
    """Rebuild blocks at other widths, in place; what is rebuilt has weights that are not initialised.

    A block that is not named stays: it is in the model and takes no part in its forward pass.
    """
    for name, (block, family) in blocks_of(model).items():
        if any(sub.startswith(f"{name}.") for sub in widths):
            family.resize(name, block, widths)


def resized(model: nn.Module, widths: Widths) -> nn.Module:
    """A copy with other widths, whose cut weights are newly drawn: what its shape costs, not what it computes."""
    copied = copy.deepcopy(model)
    resize(copied, widths)
    return copied


@contextmanager
def plain_attention(*models: nn.Module) -> Iterator[None]:
    """Plain matrix products in place of PyTorch's fused attention kernel in known blocks, while the context is open."""
    with ExitStack() as after:
        for model in models:
            for block, family in _known_blocks(model).values():
                after.callback(family.set_fused_attention, block, family.set_fused_attention(block, False))
        yield


def working_copy(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """A copy to prune: float32, in evaluation mode, no weight frozen, one output for all heads of a distilled model.

    Raises:
        UnsupportedModelError: The model cannot be described, and so neither be pruned.
    """
    describe(model, images)  # refused before the copy: not everything that is refused can be copied
    copied = copy.deepcopy(model).float().requires_grad_().eval()
    for module in copied.modules():
        if getattr(module, "distilled_training", False):  # in training it would return the logits of both heads apart
            module.set_distilled_training(False)  # type: ignore[operator]
    return copied


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
