"""What flows through a network: the one way that `core` looks into one.

The model's own ``forward`` always runs; nothing of it is re-enacted. Modules are found by name, hooks watch what they
read, and a block can be run alone on a stream that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gohsp.errors import NonFiniteError, UnsupportedModelError
from gohsp.structure import Attention, Network, Readout, Rows, Sublayer, UnitSlice

SHUT = torch.finfo(torch.float32).eps
"""Gain of LayerScale up to which a channel counts as shut off: to write through it, weights would have to be huge."""


# Parameters


def units(model: nn.Module, entry: UnitSlice, count: int) -> Tensor:
    """View of the parameter entries that units ``0..count-1`` hold (shares memory, no autograd).

    Raises:
        UnsupportedModelError: The model has no such parameter, so it is not the one that was described.
    """
    with _described():
        parameter = model.get_parameter(entry.parameter)
    return parameter.detach().narrow(entry.axis, entry.start, count)


@contextmanager
def _described() -> Iterator[None]:
    """Look-ups by the names of a network."""
    try:
        yield
    except AttributeError as error:
        raise UnsupportedModelError(
            f"the description is not that of the model ({error}); give the very model that was described, not one that "
            "wraps it (model.module of DataParallel, model._orig_mod of torch.compile)"
        ) from error


def named_module(model: nn.Module, name: str) -> nn.Module:
    """A module by its name in a network.

    Raises:
        UnsupportedModelError: The model has no such module, so it is not the one that was described.
    """
    with _described():
        return model.get_submodule(name)


def rows_of(model: nn.Module, rows: Rows, count: int) -> tuple[Tensor, Tensor | None]:
    """Weight ``[count, size]`` and bias ``[count]`` (or None) that make ``count`` units from their input."""
    bias = None if rows.bias is None else units(model, rows.bias, count)
    return units(model, rows.weight, count), bias


def readout_gain(model: nn.Module, readout: Readout) -> Tensor | None:
    """LayerScale vector ``[size]`` behind a readout, or None; up to :data:`SHUT` it is 0."""
    if readout.gain is None:
        return None
    gain = model.get_parameter(readout.gain).detach()
    return gain.where(gain.abs() > SHUT, 0.0)


def branch(model: nn.Module, sub: Sublayer, read: Tensor | None) -> Tensor:
    """What a sub-layer adds to the residual stream, in float32.

    Args:
        model: The model.
        sub: The sub-layer.
        read: What its readout reads ``[B, tokens, units]``; None of an absent one, which adds a vector ``[D]``.
    """
    readout = sub.readout
    bias = None if readout.bias is None else model.get_parameter(readout.bias).detach().float()
    if read is None:
        assert bias is not None
        return bias
    written = F.linear(read.float(), units(model, readout.columns, read.shape[-1]).float(), bias)
    gain = readout_gain(model, readout)
    return written if gain is None else written * gain


# Attention


def queries_keys(model: nn.Module, sub: Attention, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[images, heads, tokens, qk]`` of an attention whose input is ``x``; norms applied.

    Queries are those of ``tokens`` (indices) where they are given.
    """
    heads, qk = sub.widths.heads, sub.widths.qk

    def heads_of(x: Tensor, rows: Rows, norm: str | None) -> Tensor:
        split = F.linear(x, *rows_of(model, rows, heads * qk)).unflatten(-1, (heads, qk))
        return (model.get_submodule(norm)(split) if norm else split).transpose(1, 2)

    asking = x if tokens is None else x[:, tokens]
    return heads_of(asking, sub.query, sub.query_norm), heads_of(x, sub.key, sub.key_norm)


def attention_rows(model: nn.Module, sub: Attention, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Attention probabilities ``[images, heads, queries, keys]``, float32, of an attention whose input is ``x``.

    Rows are those of ``tokens`` (indices) where they are given.
    """
    q, k = queries_keys(model, sub, x, tokens)
    return (q * sub.scale @ k.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)


# Passes


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Forward passes in ``precision``; float32 is left as it is."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def passed(function: Callable[[Tensor], Tensor], x: Tensor, precision: torch.dtype) -> Tensor:
    """``function(x)`` in float32, computed in ``precision``."""
    # Autocast keeps casts of weights until it is left; left after every pass, it never sees stale ones.
    with autocast(x.device, precision):
        return function(x).float()


def require_finite(what: str, values: Tensor, *, cut: bool = False) -> None:
    """Check what flows through a model, or sums of its squares.

    Args:
        what: What the values are, such as ``the input of module 'blocks.0.attn'``.
        values: The values.
        cut: Whether gohsp has changed the model's weights, while the model as given was found finite there.

    Raises:
        NonFiniteError: They hold NaN or infinity; the message tells the given model's fault from one of the cut's.
    """
    if torch.stack(values.aminmax()).isfinite().all():  # NaN goes through aminmax
        return
    if cut:
        raise NonFiniteError(
            f"{what} holds NaN, infinite or huge values after a cut, though not in the model as given: gohsp's doing. "
            'Set precision = "no"; if that does not help, please report the architecture'
        )
    raise NonFiniteError(
        f"{what} holds NaN, infinite or huge values in the model as given; check its weights for huge ones and the "
        'images\' normalisation, or set precision = "no"'
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context is open; each module's own mode is put back, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def observe_inputs(model: nn.Module, watch: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call ``watch[name]`` with the input of module ``name`` at every forward pass, while the context is open.

    The module's own computation is left alone.

    Raises:
        UnsupportedModelError: The model has no such module, so it is not the one that was described.
    """
    with ExitStack() as stack:
        for name, call in watch.items():

            def hook(_module: nn.Module, args: tuple[Tensor, ...], call: Callable[[Tensor], None] = call) -> None:
                call(args[0])

            stack.callback(named_module(model, name).register_forward_pre_hook(hook).remove)
        yield


class _SeenError(BaseException):
    """Ends a forward pass early; never leaves this module. No ``except Exception`` of a model's own code stops it."""


def forward_all(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Run every batch through the model in evaluation mode, without gradients."""
    device = device_of(model)
    with torch.no_grad(), evaluating(model):
        for images in batches:
            model(images.to(device, non_blocking=True))


# Blocks alone


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with besides the residual stream, whatever the images: masks, rotary tables."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trunk:
    """A network's blocks, each of which can be run alone.

    Attributes:
        model: The model that holds them.
        blocks: Their names in forward order; what one returns is what the next reads.
        calls: What they are called with besides the stream.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    calls: tuple[Call, ...]

    def of(self, model: nn.Module) -> Trunk:
        """The same blocks of another model: a copy, or what was cut from this one."""
        return replace(self, model=model)

    def block(self, index: int) -> nn.Module:
        """A block."""
        return self.model.get_submodule(self.blocks[index])

    def enter(self, images: Tensor) -> Tensor:
        """What images ``[B, C, H, W]`` send into the first block, ``[B, tokens, D]``; nothing behind it is computed."""
        seen: list[Tensor] = []

        def watch(stream: Tensor) -> None:
            seen.append(stream)
            raise _SeenError

        with observe_inputs(self.model, {self.blocks[0]: watch}), suppress(_SeenError):
            self.model(images.to(device_of(self.model)))
        return seen[0]

    def run(self, index: int, stream: Tensor) -> Tensor:
        """What a block makes of a stream."""
        call = self.calls[index]
        return stream_of(self.block(index)(stream, *call.args, **call.kwargs))

    def inputs(self, index: int, stream: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """What the modules ``names`` read, in the order they run, when a block is given ``stream``.

        The pass ends at the last of them.
        """
        return _inputs_of(self.model, names, lambda: self.run(index, stream))


def read_by(model: nn.Module, sub: Attention, x: Tensor, call: Call) -> Tensor:
    """What an attention's readout reads ``[B, tokens, units]`` when the attention is given ``x``."""
    attention = model.get_submodule(sub.name)
    (read,) = _inputs_of(model, [sub.readout.module], lambda: attention(x, *call.args, **call.kwargs))
    return read


def _inputs_of(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> tuple[Tensor, ...]:
    """What the modules ``names`` read, in the order they run, in a pass that ends at the last of them."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, value: Tensor) -> None:
        seen[name] = value
        if name == names[-1]:
            raise _SeenError

    with observe_inputs(model, {name: partial(watch, name) for name in names}), suppress(_SeenError):
        run()
    return tuple(seen[name] for name in names)


def stream_of(returned: Any) -> Tensor:
    """The residual stream in what a block returns: itself, or the first of several."""
    return returned[0] if isinstance(returned, tuple) else returned


@torch.no_grad()
def open_trunk(model: nn.Module, network: Network, images: Tensor) -> Trunk:
    """Record how a model calls its blocks.

    Args:
        model: The model; left as it is.
        network: Its description.
        images: An image or more ``[B, C, H, W]``.

    Raises:
        UnsupportedModelError: Something stands between two blocks, or a block is called with tensors that depend on the
            image, or are one for each image, besides the stream.
    """
    names = tuple(network.blocks)
    calls, passes = _recorded(model, names, images.to(device_of(model)))
    sent = None
    for name in names:
        entered, left = passes[name]
        if sent is not None and entered is not sent and not torch.equal(entered, sent):
            raise UnsupportedModelError(
                f"what block '{name}' reads is not what the block before it returns; models with something between "
                "their blocks cannot be pruned yet"
            )
        sent = left
    if any(_tensors(call) for call in calls):
        # One more image, so that what there is for each image shows by its shape.
        blank = images.new_zeros(len(images) + 1, *images.shape[1:])
        others, _ = _recorded(model, names, blank.to(device_of(model)))
        for name, call, other in zip(names, calls, others, strict=True):
            if not _same(call, other):
                raise UnsupportedModelError(
                    f"block '{name}' is called with tensors besides the stream that differ from image to image"
                )
    return Trunk(model, names, tuple(calls))


def _recorded(
    model: nn.Module, names: Sequence[str], images: Tensor
) -> tuple[list[Call], dict[str, tuple[Tensor, Tensor]]]:
    """How each block is called, and the stream before and after it."""
    calls: dict[str, Call] = {}
    passes: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        calls[name] = Call(args[1:], kwargs)
        passes[name] = (args[0], stream_of(returned))

    with ExitStack() as stack, evaluating(model):
        for name in names:
            block = named_module(model, name)
            stack.callback(block.register_forward_hook(partial(hook, name), with_kwargs=True).remove)
        model(images)
    return [calls[name] for name in names], passes


def _same(a: Call, b: Call) -> bool:
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _tensors(call: Call) -> list[Tensor]:
    """Tensors in what a block is called with, those in tuples and mappings too."""
    return [value for value in tree_leaves((call.args, dict(call.kwargs))) if isinstance(value, Tensor)]
