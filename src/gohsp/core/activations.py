"""What flows through a model's blocks, by module name alone: the one way that `core` looks into a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.errors import NonFiniteError, UnsupportedModelError
from gohsp.structure import BlockStructure, Readout, UnitSlice

GRADIENT_IMAGES = 32
"""Images of one backward pass of an analysis. What it needs of the forward pass is kept for all of them."""


SHUT = torch.finfo(torch.float32).eps
"""Gain of LayerScale up to which a channel counts as shut off: to write through it, weights would have to be huge."""


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
    """Look-ups by the names of a model's structure."""
    try:
        yield
    except AttributeError as error:
        raise UnsupportedModelError(
            f"the structure is not that of the model ({error}); give the very model that was described, not one that "
            "wraps it (model.module of DataParallel, model._orig_mod of torch.compile)"
        ) from error


def rows(model: nn.Module, slices: Sequence[UnitSlice], count: int) -> tuple[Tensor, Tensor | None]:
    """Weight ``[count, size]`` and bias ``[count]`` (or None) that make ``count`` units from their input."""
    weight = units(model, slices[0], count)
    return weight, units(model, slices[1], count) if len(slices) > 1 else None


def queries_keys(
    model: nn.Module, block: BlockStructure, x: Tensor, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[images, heads, tokens, qk]`` of an attention whose input is ``x``; norms applied.

    Queries are those of ``tokens`` (indices) where they are given.
    """
    heads, width = block.shape.heads, block.shape.qk

    def heads_of(x: Tensor, slices: Sequence[UnitSlice], norm: str | None) -> Tensor:
        flat = F.linear(x, *rows(model, slices, heads * width))
        split = flat.unflatten(-1, (heads, width))
        return (model.get_submodule(norm)(split) if norm else split).transpose(1, 2)

    asking = x if tokens is None else x[:, tokens]
    return heads_of(asking, block.query, block.query_norm), heads_of(x, block.key, block.key_norm)


def attention_rows(model: nn.Module, block: BlockStructure, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Attention probabilities ``[images, heads, queries, keys]``, float32, of an attention whose input is ``x``.

    Rows are those of ``tokens`` (indices) where they are given.
    """
    q, k = queries_keys(model, block, x, tokens)
    return (q * block.scale @ k.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)


def readout_gain(model: nn.Module, readout: Readout) -> Tensor | None:
    """LayerScale vector ``[size]`` behind a readout, or None; up to :data:`SHUT` it is 0."""
    if readout.gain is None:
        return None
    gain = model.get_parameter(readout.gain).detach()
    return gain.where(gain.abs() > SHUT, 0.0)


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
            'Set training.precision = "no"; if that does not help, please report the architecture'
        )
    raise NonFiniteError(
        f"{what} holds NaN, infinite or huge values in the model as given; check its weights for huge ones and the "
        'images\' normalisation, or set training.precision = "no"'
    )


@contextmanager
def observe_inputs(model: nn.Module, watch: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call ``watch[name]`` with the input of module ``name`` at every forward pass, while the context is open.

    The module's own computation is left alone.

    Raises:
        UnsupportedModelError: The model has no such module, so it is not the one that was described.
    """
    with ExitStack() as stack:
        for name, call in watch.items():

            def hook(_module: nn.Module, args: tuple[Tensor, ...], call: Callable[[Tensor], None] = call) -> None:
                call(args[0])

            with _described():
                module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


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


class _LastInputSeenError(Exception):
    """Ends a forward pass early; never leaves this module."""


def inputs_of(model: nn.Module, block: str, x: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Inputs of the modules ``names``, in the order they run, when the module ``block`` is given ``x``.

    The pass ends at the last of them.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str, value: Tensor) -> None:
        seen[name] = value
        if name == names[-1]:
            raise _LastInputSeenError

    with observe_inputs(model, {name: partial(watch, name) for name in names}), suppress(_LastInputSeenError):
        model.get_submodule(block)(x)
    return tuple(seen[name] for name in names)


@dataclass(frozen=True, slots=True)
class Stages:
    """A network as what is before its blocks, the blocks, and what is behind them.

    Attributes:
        embed: Images ``[B, C, H, W]`` to the residual stream ``[B, tokens, D]``.
        blocks: Each takes the stream to the stream.
        head: The stream to logits ``[B, classes]``.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: tuple[nn.Module, ...]
    head: Callable[[Tensor], Tensor]

    def logits(self, x: Tensor, first: int = 0) -> Tensor:
        """Logits of a stream ``x`` that enters block ``first``."""
        for block in self.blocks[first:]:
            x = block(x)
        return self.head(x)


def forward_all(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Run every batch through the model in evaluation mode, without gradients."""
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        for images in batches:
            model(images.to(device, non_blocking=True))
