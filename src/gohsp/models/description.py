"""What a model is made of: its blocks, found by walking its modules wherever they are, and what stands outside them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gohsp.core.capture import evaluating, observe_inputs, replaced_forward, taken
from gohsp.errors import NonFiniteError, PlanError, UnsupportedModelError, nearest, one_line
from gohsp.models import families
from gohsp.models.checks import require_plain
from gohsp.models.families import SUPPORTED, Family, Reading, class_name
from gohsp.models.feeding import Example, fed, feed, images_in, is_fed, takes_more, unfeed
from gohsp.structure import PARAMS, Attention, Network, Sublayer, Widths, count_macs, is_in

logger = logging.getLogger(__name__)

INSIDE = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Wrappers that a model is taken out of, and where it is in them."""

WRAPPERS = (*INSIDE, "FullyShardedDataParallel")
"""Classes whose forward is not that of the module inside, so that hooks in it may not be called."""

DEFAULT_SIZE = (224, 224)
"""Height and width of the image that a model which takes any size is described with."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DDP's wrapper; a warning says that it is taken out."""
    inside = INSIDE.get(type(model).__name__)
    if inside is None or not isinstance(model, nn.Module):
        return model
    logger.warning("a %s stands around the model; the model inside it, model.%s, is taken", class_name(model), inside)
    return unwrapped(model.get_submodule(inside))


def blocks_of(model: nn.Module, at: str = "") -> dict[str, tuple[nn.Module, Family]]:
    """Every block that can be pruned, by its name, and its family.

    Args:
        model: The model.
        at: Name of the module to look into; empty for all of the model.

    Raises:
        PlanError: The model has no module of that name.
        UnsupportedModelError: No module, a wrapper around one, or a module without such a block.
    """
    what = f"a {type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{what} cannot be pruned; give a torch.nn.Module. Supported: {SUPPORTED}")
    part = _part(model, at)
    found = _known_blocks(model, lambda name: is_in(name, at))
    _require_unwrapped(model, found)
    _require_all_known(model, found, at)
    if not found:
        what = f"module '{at}', a {class_name(part)}," if at else what
        raise UnsupportedModelError(f"{what} has no block that can be pruned{_repeated(part)}; supported: {SUPPORTED}")
    return found


def _part(model: nn.Module, at: str) -> nn.Module:
    named = dict(model.named_modules(remove_duplicate=False))
    if at not in named:
        parts = [name for name, module in named.items() if name and list(module.children()) and not _is_numbered(name)]
        raise PlanError(f"at names {at!r}, which is no module of this {class_name(model)}; {nearest(str(at), parts)}")
    return named[at]


def _is_numbered(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def _known_blocks(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, tuple[nn.Module, Family]]:
    known = ((name, module, families.family_of(name, module)) for name, module in model.named_modules() if wanted(name))
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


def _require_all_known(model: nn.Module, found: Mapping[str, object], at: str) -> None:
    """Check that blocks which stand beside one that is known are known, too."""
    containers = {name.rpartition(".")[0] for name in found}
    for container in containers:
        for label, module in model.get_submodule(container).named_children():
            name = f"{container}.{label}" if container else label
            if is_in(name, at) and name not in found and (hasattr(module, "attn") or hasattr(module, "mlp")):
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
    return UnsupportedModelError(
        f"module '{name}' is a {class_name(module)}, which cannot be pruned; supported: {SUPPORTED}"
    )


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """What a model tells of itself and of its images, in timm's place for it and in timm's words; empty without."""
    told: Any = getattr(model, "pretrained_cfg", None)
    return dict(told or {})


def told_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of an image; None if nothing tells them.

    ``pretrained_cfg["image_size"]`` goes first, where a model takes any size and its image processor names one. Then
    a module tells it, and last timm's configuration.
    """
    known = pretrained_cfg(model)
    if chosen := known.get("image_size"):
        return chosen[0], chosen[1]
    given = (getattr(m, name, None) for m in model.modules() for name in ("img_size", "image_size"))
    sizes = ((s, s) if type(s) is int else s for s in given)
    configured = known.get("input_size")
    last = None if configured is None else (configured[1], configured[2])
    return next(((s[0], s[1]) for s in sizes if isinstance(s, tuple | list) and len(s) == 2), last)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of an image: those of the first convolution, and what the model tells, or 224 px."""
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    height, width = told_size(model) or DEFAULT_SIZE
    return channels, height, width


def example_image(model: nn.Module, count: int = 1) -> Tensor:
    """Images of noise ``[count, C, H, W]`` of the size that a model takes, of its type, where it is."""
    weight = next(model.parameters())
    noise = torch.randn(count, *input_size(model), generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)


def describe(model: nn.Module, images: Example | None = None, at: str = "") -> Network:
    """Describe a model, dense or already pruned: its sub-layers in the order in which they run.

    The model's own forward runs once, with its blocks passed over; how to make the model need not be known. Blocks that
    no image passes through, as those of a text tower, are no sub-layers.

    Args:
        model: A model with blocks of a supported family, wherever they are in it.
        images: An image or more ``[B, C, H, W]`` that it takes, of any type; or a mapping that holds them beside what
            else it takes by name. None for noise of the size that it seems to take.
        at: Name of the module whose blocks are described, such as ``vision_model``; empty for those of all of the
            model. Costs are always those of the whole model.

    Raises:
        PlanError: The model has no module of that name.
        UnsupportedModelError: It has no block that can be pruned; a module is of a class that cannot be, or is not what
            it seems (parametrised, adapted, quantised, tied); or an image cannot pass through it.
    """
    model = unwrapped(model)
    known = blocks_of(model, at)
    require_plain(model, known, at)
    weight = next(model.parameters())
    image = example_image(model) if images is None else images_in(images)[:1].to(weight.device, weight.dtype)
    with fed(model, images):
        if is_fed(model):
            known = _seeing(model, known, image)
        seen = _seen(model, known, image)
    sublayers: list[Sublayer] = []
    for name, reading in seen.readings.items():
        block, family = known[name]
        found = families.describe(family, name, block, reading)
        shape, channels = seen.shapes[name], found[0].readout.size
        if len(shape) not in (3, 4) or shape[-1] != channels:
            raise UnsupportedModelError(
                f"block '{name}' is given {shape}, not [images, tokens, channels] or [images, height, width, channels] "
                f"of {channels} channels"
            )
        sublayers += (_held(sub, seen.by_head[name]) for sub in found)
    if not sublayers:
        raise _unseen(at)
    apart = frozenset(name for name in seen.readings if known[name][1].layout.apart)
    return replace(_network(model, sublayers, seen.macs), apart=apart)


def described_still(model: nn.Module, at: str = "") -> Network:
    """Describe a model without a pass: its blocks whether they run or not, and no multiply-accumulates.

    Raises:
        PlanError, UnsupportedModelError: As of :func:`describe`.
    """
    known, reading = blocks_of(model, at), Reading(tokens=1, keys=1)  # of which widths and parameters know nothing
    require_plain(model, known, at)
    found = [sub for name, (block, family) in known.items() for sub in families.describe(family, name, block, reading)]
    return _network(model, found, 0)


def _network(model: nn.Module, sublayers: Sequence[Sublayer], fixed_macs: int) -> Network:
    pruned = sum(PARAMS.sublayer(sub, sub.widths) for sub in sublayers)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Network(sublayers=tuple(sublayers), fixed_params=total - pruned, fixed_macs=fixed_macs)


def _unseen(at: str) -> UnsupportedModelError:
    if at:
        return UnsupportedModelError(
            f"no image passes through the blocks of module '{at}', which may be a text tower: that cannot be pruned; "
            "name a module that images pass through"
        )
    return UnsupportedModelError("none of the model's blocks takes part in its forward pass, so nothing can be pruned")


def _seeing(
    model: nn.Module, blocks: Mapping[str, tuple[nn.Module, Family]], image: Tensor
) -> dict[str, tuple[nn.Module, Family]]:
    """The blocks whose input depends on the image, which gradients tell; those of a text tower's does not."""
    depend: set[str] = set()

    def watching(name: str) -> Callable[[Any], None]:
        return lambda stream: depend.add(name) if isinstance(stream, Tensor) and stream.requires_grad else None

    entries = {name: ".".join(filter(None, (name, family.layout.called[0]))) for name, (_, family) in blocks.items()}
    watch = {entry: watching(name) for name, entry in entries.items()}
    with torch.enable_grad(), evaluating(model), trainable(model, False), observe_inputs(model, watch):
        _pass(model, image.detach().requires_grad_().clone())
    return {name: block for name, block in blocks.items() if name in depend}


def _held(sub: Sublayer, by_head: frozenset[int]) -> Sublayer:
    """An attention keeps all of its heads where what it is called with has an entry for each."""
    if isinstance(sub, Attention) and sub.widths.heads in by_head:
        return replace(sub, prunable=sub.prunable - {"head"}, removable=False)
    return sub


@dataclass
class _Outside:
    """What a pass that leaves the blocks out tells.

    Attributes:
        readings: How each block that runs reads the stream, in the order in which they run.
        shapes: Of the stream that each block is given.
        by_head: Sizes that what it is called with has where a tensor has an entry for each head.
        macs: Multiply-accumulates of the rest.
    """

    readings: dict[str, Reading] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    by_head: dict[str, frozenset[int]] = field(default_factory=dict)
    macs: int = 0


def _seen(model: nn.Module, blocks: Mapping[str, tuple[nn.Module, Family]], image: Tensor) -> _Outside:
    """What the blocks are given, whether the model expects tensors of them or, as earlier transformers, tuples."""
    try:
        seen = _passed_over(model, blocks, image, tuples=False)
    except UnsupportedModelError as error:
        with suppress(UnsupportedModelError):
            return _passed_over(model, blocks, image, tuples=True)
        raise error from None
    if any(len(shape) < 3 for shape in seen.shapes.values()):  # one of a tuple was taken to be one of the images
        with suppress(UnsupportedModelError):
            return _passed_over(model, blocks, image, tuples=True)
    return seen


def _passed_over(
    model: nn.Module, blocks: Mapping[str, tuple[nn.Module, Family]], image: Tensor, *, tuples: bool
) -> _Outside:
    seen, counter = _Outside(), FlopCounterMode(display=False)

    def pass_over(name: str, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block, family = blocks[name]
        stream, call = taken(args, kwargs)
        if name in seen.readings:
            raise UnsupportedModelError(f"block '{name}' runs more than once for an image, which cannot be pruned")
        if not isinstance(stream, Tensor):
            raise UnsupportedModelError(
                f"block '{name}' is given a {type(stream).__name__}, not a tensor of the stream"
            )
        seen.shapes[name] = list(stream.shape)
        tokens = stream.shape[1:-1].numel()
        reading = Reading(tokens=tokens, keys=tokens)
        if family.layout.windowed and family.attention is not None:
            reading = _windows(family, block, stream, lambda x: own_forward(x, *call.args, **call.kwargs))
        others = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor) and x.ndim > 2]
        seen.readings[name], seen.by_head[name] = reading, frozenset(x.shape[-3] for x in others) - {1}
        if family.layout.apart:
            return torch.zeros_like(stream)
        return (stream, None) if tuples or family.layout.returns_tuple else stream

    def passing(name: str, own_forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: pass_over(name, own_forward, args, kwargs)

    # PyTorch's counter trips over parameters that require gradients and enter a module as its input.
    with ExitStack() as stack, torch.no_grad(), evaluating(model), trainable(model, False):
        for name, (block, family) in blocks.items():
            first, *others = (block.get_submodule(path) for path in family.layout.called)
            stack.enter_context(replaced_forward(first, passing(name, first.forward)))
            for module in others:
                stack.enter_context(replaced_forward(module, torch.zeros_like))
        with counter:
            _pass(model, image)
    seen.macs = counter.get_total_flops() // 2 // len(image)
    return seen


def _pass(model: nn.Module, image: Tensor) -> None:
    try:
        with _uncompiled(model):
            model(image)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise UnsupportedModelError(
            f"the model cannot compute an image of {list(image.shape[1:])}: {one_line(error)}; {_how(model, image)}"
        ) from error


def _how(model: nn.Module, image: Tensor) -> str:
    """What to do where a model cannot compute an image."""
    if takes_more(model):
        return "give mappings of all that it takes by name, such as {'images': ..., 'sizes': ...}"
    if told_size(model) is None:
        return "give images of the size that it takes, or set model.image_size where none are asked for"
    if (size := list(input_size(model))) == list(image.shape[1:]):
        return "the model itself tells this size; mend its sizes or its parts"
    return f"give images of the size that it takes, {size}"


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Modules run as they are written, though they were compiled in place: no hook is passed by, and none compiled."""
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


class _ReadError(BaseException):
    """Ends a block's forward at its attention; never leaves this module."""


def _windows(family: Family, block: nn.Module, stream: Tensor, run: Callable[[Tensor], Any]) -> Reading:
    """How a block cuts the stream into windows, found by sending the tokens' own numbers through it."""
    branch, read = family.layout.attention, []
    attention = block.get_submodule(branch.module or "")
    cut = None if family.attention is None else family.attention.windows
    tokens = stream.shape[1:-1].numel()
    numbers = torch.zeros(1, *stream.shape[1:])  # on the CPU: a model may have no memory at all
    numbers.view(tokens, -1)[:, 0] = torch.arange(1, tokens + 1)  # 0 is what windows are padded with

    def end(*args: Any, **kwargs: Any) -> Any:
        given = taken(args, kwargs)[0]
        read.append((given if cut is None else cut(attention, given).rows)[..., 0])
        raise _ReadError

    with ExitStack() as stack, suppress(_ReadError):
        stack.enter_context(replaced_forward(attention, end))
        if branch.norm is not None:
            stack.enter_context(replaced_forward(block.get_submodule(branch.norm), lambda x: x))
        run(numbers)
    order = tuple((read[0].flatten().long() - 1).tolist())
    if sorted(place for place in order if place >= 0) != list(range(tokens)):
        raise UnsupportedModelError("windows that leave tokens out, or hold some twice, cannot be pruned")
    return Reading(tokens=tokens, keys=read[0].shape[1:].numel(), order=order)


@contextmanager
def trainable(model: nn.Module, trains: bool = True) -> Iterator[None]:
    """All parameters require gradients, or none, while the context is open; then each does or not as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(trains and parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def resize(model: nn.Module, widths: Widths) -> None:
    """Rebuild blocks at other widths, in place; what is rebuilt has new weights, which mean nothing yet.

    A block that is not named stays: it is no part of what is pruned, or takes no part in the forward pass.
    """
    named = _known_blocks(model, lambda name: any(is_in(sub, name) for sub in widths))
    for name, (block, family) in named.items():
        families.resize(family, name, block, widths)


def resized(model: nn.Module, widths: Widths) -> nn.Module:
    """A copy with other widths, whose cut weights are newly drawn: what its shape costs, not what it computes."""
    copied = copy.deepcopy(model)
    resize(copied, widths)
    return copied


@contextmanager
def plain_attention(*models: nn.Module) -> Iterator[None]:
    """Plain matrix products in place of PyTorch's fused attention kernel, while the context is open.

    It is so for timm's attentions and ours, which have a switch (``fused_attn``).
    """
    fused: list[Any] = [
        module for model in models for module in model.modules() if getattr(module, "fused_attn", False)
    ]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def working_copy(model: nn.Module, images: Example | None = None, at: str = "") -> nn.Module:
    """A copy to prune: float32, in evaluation mode, no weight frozen, one output for all heads of a distilled model.

    It can be called with images alone, until it is :func:`finished`. Attention whose inside cannot be watched
    (``nn.MultiheadAttention``) becomes our own, with the same weights.

    Args:
        model: The model.
        images: As of :func:`describe`.
        at: As of :func:`describe`.

    Raises:
        PlanError: The model has no module ``at``.
        UnsupportedModelError: The model cannot be described, and so neither be pruned.
    """
    model = unwrapped(model)
    describe(model, images, at)  # refused before the copy: not everything that is refused can be copied
    copied = copy.deepcopy(model).float().requires_grad_().eval()
    feed(copied, images)
    for block, family in blocks_of(copied, at).values():
        families.opened(family, block)
    for module in copied.modules():
        if getattr(module, "distilled_training", False):  # in training it would return the logits of both heads apart
            module.set_distilled_training(False)  # type: ignore[operator]
    return copied


def finished(made: nn.Module, given: nn.Module) -> nn.Module:
    """What was made of a working copy, as the model that was given is: of its data types, frozen where that is.

    Args:
        made: What was made, changed in place.
        given: The model that the working copy is of.
    """
    unfeed(made)
    before = dict(given.named_parameters())
    for name, parameter in made.named_parameters():
        like = before.get(name)
        if like is None:  # the vector that is left of a sub-layer
            inside = name.rpartition(".")[0]
            like = next((of for old, of in before.items() if is_in(old, inside)), parameter)
        parameter.data = parameter.data.to(like.dtype)
        parameter.requires_grad_(like.requires_grad)
    types = {name: buffer.dtype for name, buffer in given.named_buffers()}
    for name, buffer in made.named_buffers():
        buffer.data = buffer.data.to(types.get(name, buffer.dtype))
    return made


def known_macs(model: nn.Module, images: Tensor) -> int | None:
    """Multiply-accumulates of an image, where the model can be described.

    Args:
        model: Any module.
        images: An image or more ``[B, C, H, W]``.
    """
    try:
        return count_macs(describe(model, images))
    except UnsupportedModelError:
        return None


def check_finite(model: nn.Module) -> None:
    """Check every weight.

    Raises:
        UnsupportedModelError: A tensor is made of others, as quantised and sharded ones are.
        NonFiniteError: A tensor holds NaN or infinite values; the message names the first.
    """
    for name, tensor in model.state_dict().items():
        if is_traceable_wrapper_subclass(tensor):
            raise UnsupportedModelError(
                f"tensor '{name}' is a {type(tensor).__name__}, made of other tensors; give ordinary weights: prune, "
                "save and export a model first, and quantise or shard it afterwards"
            )
        if tensor.is_meta:
            raise NonFiniteError(f"tensor '{name}' is on the meta device and holds no values; load the weights first")
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise NonFiniteError(
                f"tensor '{name}' holds {bad} NaN or infinite values of {tensor.numel()}; mend the weights"
            )
