"""What flows through a network: the one way that `core` looks into one.

The model's own ``forward`` always runs; nothing of it is re-enacted. Modules are found by name, hooks watch what they
read, and a block can be run alone on a stream that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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
    """Factors ``[size]`` on the channels behind a readout, or None; up to :data:`SHUT` they are 0."""
    if readout.gain is None:
        return None
    gain = model.get_parameter(readout.gain).detach()
    return gain.where(gain.abs() > SHUT, 0.0)


def behind(model: nn.Module, sub: Sublayer, stream: Tensor, read: Tensor | None) -> Tensor:
    """The residual stream behind a sub-layer, in float32.

    Args:
        model: The model.
        sub: The sub-layer.
        stream: The stream before it ``[B, ..., D]``.
        read: What its readout reads ``[B, tokens, units]``; None of an absent one, which adds a vector.
    """
    readout, written = sub.readout, _written(model, sub, read)
    if read is not None:
        written = written.view_as(stream)
    if readout.norm is not None:
        norm = model.get_submodule(readout.norm)
        return norm(stream + written) if readout.norm_of_sum else stream + norm(written)
    gain = readout_gain(model, readout)
    return stream + (written if gain is None else written * gain)


def wanted(model: nn.Module, sub: Sublayer, stream: Tensor, read: Tensor, goal: Tensor) -> Tensor:
    """What a readout with its gain should write for the stream behind its sub-layer to be ``goal``, in float32.

    A norm behind the readout is undone by the mean and the deviation that each token has there now. That is exact for
    a norm of the sum. What a norm of the branch sends on has a size of its own, so that it cannot make up for any error
    of the stream: a channel is moved by one deviation at most, or the others would shrink by it.

    Args:
        model: The model.
        sub: The sub-layer.
        stream: The stream before it ``[B, ..., D]``.
        read: What its readout reads ``[B, tokens, units]``.
        goal: The stream to have behind it ``[B, ..., D]``.
    """
    readout = sub.readout
    if readout.norm is None:
        return goal - stream
    norm: Any = model.get_submodule(readout.norm)
    written, missing = _written(model, sub, read).view_as(stream), goal - behind(model, sub, stream, read)
    normed = stream + written if readout.norm_of_sum else written
    deviation = (normed.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    gain = readout_gain(model, readout)
    gain = torch.ones_like(written[0, 0]) if gain is None else gain
    if not readout.norm_of_sum:
        missing = missing.clamp(-gain.abs(), gain.abs())
    return gain * written + deviation * missing


def _written(model: nn.Module, sub: Sublayer, read: Tensor | None) -> Tensor:
    """What a readout writes ``[B, tokens, D]``, without its gain; of an absent sub-layer its vector ``[D]``."""
    readout = sub.readout
    bias = None if readout.bias is None else model.get_parameter(readout.bias).detach().float()
    if read is None:
        assert bias is not None
        return bias
    return F.linear(read.float(), units(model, readout.columns, read.shape[-1]).float(), bias)


# Attention


def in_stream(sub: Sublayer, rows: Tensor, images: int) -> Tensor:
    """Rows that a sub-layer reads or writes, as the stream's tokens ``[images, tokens, width]``, without padding."""
    rows = rows.reshape(images, -1, rows.shape[-1])
    order = sub.order if isinstance(sub, Attention) else None
    return rows if order is None else rows[:, _places(order, rows.device)]


def rows_of_input(model: nn.Module, sub: Attention, x: Tensor) -> Tensor:
    """What queries, keys and values are made of when an attention is given ``x`` ``[B, ..., D]``.

    The norm that may stand inside it is passed, and a stream that it cuts into windows itself is cut: tokens that
    attend to each other stand together.
    """
    if sub.inner_norm is not None:
        x = named_module(model, sub.inner_norm)(x)
    if sub.cuts and sub.order is not None:
        padded = F.pad(x.flatten(1, -2), (0, 0, 0, 1))  # place -1 is padding
        x = padded[:, torch.tensor(sub.order, device=x.device)].reshape(-1, sub.keys, x.shape[-1])
    return x


@lru_cache(maxsize=256)
def _places(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Where among the rows each token of the stream is."""
    at = torch.tensor(order)
    return at.argsort(stable=True)[int((at < 0).sum()) :].to(device)


def attention_rows(
    model: nn.Module, sub: Attention, x: Tensor, call: Call | None = None, tokens: Tensor | None = None
) -> Tensor:
    """Attention probabilities ``[B, heads, queries, keys]``, float32, of an attention whose input is ``x``.

    Of one that cuts its input into windows they are ``[B windows, heads, queries, keys]``.

    The attention's own forward runs as far as its softmax, whatever it does to queries, keys and their products.

    Args:
        model: The model.
        sub: The attention.
        x: Its input ``[B, ..., D]``.
        call: What it is called with besides.
        tokens: Indices of the queries to look at; None for all.

    Raises:
        UnsupportedModelError: It takes neither PyTorch's attention nor a softmax.
    """
    call = call or Call((), {})
    probe = _SoftmaxProbe(tokens)
    attention = named_module(model, sub.name)
    with probe, suppress(_SeenError):
        attention(x, *call.args, **call.kwargs)
    if probe.rows is None:
        raise UnsupportedModelError(
            f"module '{sub.name}' computes no softmax that can be seen; heads cannot be compared"
        )
    return probe.rows.reshape(-1, sub.widths.heads, *probe.rows.shape[-2:])  # some put heads behind images


class _SoftmaxProbe(TorchFunctionMode):
    """Ends a forward pass at the first attention in it, and keeps its probabilities."""

    def __init__(self, tokens: Tensor | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.rows: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._seen(self._logits(*args, **given))
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            self._seen(args[0] if self.tokens is None else args[0][..., self.tokens, :])
        return func(*args, **given)

    def _seen(self, logits: Tensor) -> None:
        self.rows = logits.softmax(dim=-1, dtype=torch.float32)
        raise _SeenError

    def _logits(
        self,
        query: Tensor,
        key: Tensor,
        _value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002 (in evaluation there is none)
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        queries = query if self.tokens is None else query[..., self.tokens, :]
        logits = queries * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
        if is_causal:
            shut = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
            logits = logits.masked_fill(shut if self.tokens is None else shut[self.tokens], -torch.inf)
        if attn_mask is not None:
            mask = attn_mask if self.tokens is None or attn_mask.shape[-2] == 1 else attn_mask[..., self.tokens, :]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits


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

            def hook(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: Mapping[str, Any],
                call: Callable[[Tensor], None] = call,
            ) -> None:
                call(taken(args, kwargs)[0])

            stack.callback(named_module(model, name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def taken(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """What a module reads, its first argument or its first by name, and what it is called with besides."""
    if args:
        return args[0], Call(args[1:], kwargs)
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return kwargs[name], Call((), {other: value for other, value in kwargs.items() if other != name})


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
        blocks: Their names in forward order.
        calls: What they are called with besides the stream.
        rests: What they return behind the stream, of those that return a tuple; None of the others.
        crossings: Blocks before which something stands that changes the stream, such as Swin's merging of patches.
        blank: Images ``[1, C, H, W]`` of nothing, of the size that the model was given.
        branches: Of blocks that nothing calls as a whole, by their index: their modules in turn, each of which returns
            what is to be added to the stream.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    calls: tuple[Call, ...]
    rests: tuple[tuple[Any, ...] | None, ...]
    crossings: frozenset[int]
    blank: Tensor
    branches: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def of(self, model: nn.Module) -> Trunk:
        """The same blocks of another model: a copy, or what was cut from this one."""
        return replace(self, model=model)

    def block(self, index: int) -> nn.Module:
        """A block."""
        return self.model.get_submodule(self.blocks[index])

    def enter(self, images: Tensor, index: int = 0) -> Tensor:
        """What images ``[B, C, H, W]`` send into a block, by default the first; nothing behind is computed."""
        first = ".".join((self.blocks[index], *self.branches.get(index, ())[:1]))
        seen: list[Tensor] = []

        def watch(stream: Tensor) -> None:
            seen.append(stream)
            raise _SeenError

        with observe_inputs(self.model, {first: watch}), suppress(_SeenError):
            self.model(images.to(device_of(self.model)))
        return seen[0]

    def onto(self, index: int, stream: Tensor) -> Tensor:
        """What enters a block when the one before it returns ``stream``; for the first, ``stream`` itself.

        Where something stands between them, the model's own forward runs with the blocks before passed over.
        """
        if index not in self.crossings:
            return stream
        with ExitStack() as stack:
            for i in range(index):
                stack.enter_context(
                    replaced_forward(self.block(i), self._passing(i, stream if i == index - 1 else None))
                )
            return self.enter(self.blank.to(stream).expand(len(stream), -1, -1, -1), index)

    def _passing(self, index: int, stream: Tensor | None) -> Callable[..., Any]:
        """A forward that returns ``stream`` as a block would, or what it is given."""
        rest = self.rests[index]

        def forward(given: Tensor, *_: Any, **__: Any) -> Any:
            sent = given if stream is None else stream
            return sent if rest is None else (sent, *rest)

        return forward

    def run(self, index: int, stream: Tensor) -> Tensor:
        """What a block makes of a stream that enters it."""
        return self.sent(index, self.block(index), stream)

    def sent(self, index: int, block: nn.Module, stream: Tensor) -> Tensor:
        """What a block makes of a stream, be it this one or another that is called as it is."""
        if index not in self.branches:
            call = self.calls[index]
            return stream_of(block(stream, *call.args, **call.kwargs))
        for name in self.branches[index]:
            stream = block.get_submodule(name)(stream) + stream
        return stream

    def inputs(self, index: int, stream: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """What the modules ``names`` read, in the order they run, when ``stream`` enters a block.

        The pass ends at the last of them.
        """
        return _inputs_of(self.model, names, lambda: self.run(index, stream))


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of one module while the context is open."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def read_by(model: nn.Module, sub: Attention, x: Tensor, call: Call) -> Tensor:
    """What an attention's readout reads, row by row, when the attention is given ``x``."""
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
        UnsupportedModelError: A block is called with tensors that depend on the image, or are one for each image,
            besides the stream; or what it reads depends on more than what the block before it returns.
    """
    names = tuple(network.blocks)
    branches = {
        index: tuple(sub.name.removeprefix(f"{name}.") for sub in subs)
        for index, (name, subs) in enumerate(network.blocks.items())
        if name in network.apart
    }
    images = images.to(device_of(model))
    passes = _recorded(model, names, branches, images)
    blank = images.new_zeros(len(images) + 1, *images.shape[1:])
    # One more image, so that what there is for each image shows by its shape.
    others = _recorded(model, names, branches, blank) if any(_tensors(of.call) for of in passes.values()) else passes
    for name in names:
        if not _same(passes[name].call, others[name].call):
            raise UnsupportedModelError(
                f"block '{name}' is called with tensors besides the stream that differ from image to image"
            )
    crossings = [i for i in range(1, len(names)) if not _joined(passes[names[i - 1]].left, passes[names[i]].entered)]
    if crossings and branches:
        raise UnsupportedModelError(
            f"something stands before block '{names[crossings[0]]}' in a model whose sub-layers are called one by one, "
            "so it cannot be pruned block by block"
        )
    trunk = Trunk(
        model,
        names,
        tuple(passes[name].call for name in names),
        tuple(passes[name].rest for name in names),
        frozenset(crossings),
        blank[:1],
        branches,
    )
    with evaluating(model):
        for index in crossings:
            if not torch.equal(trunk.onto(index, passes[names[index - 1]].left), passes[names[index]].entered):
                raise UnsupportedModelError(
                    f"what block '{names[index]}' reads does not follow from what the block before it returns, "
                    "so its model cannot be pruned block by block"
                )
    return trunk


@dataclass(frozen=True, slots=True)
class _Pass:
    """How a block was called, and the stream before and after it."""

    call: Call
    entered: Tensor
    left: Tensor
    rest: tuple[Any, ...] | None


def _recorded(
    model: nn.Module, names: Sequence[str], branches: Mapping[int, Sequence[str]], images: Tensor
) -> dict[str, _Pass]:
    passes: dict[str, _Pass] = {}

    def hook(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        rest = tuple(returned[1:]) if isinstance(returned, tuple) else None
        entered, call = taken(args, kwargs)
        passes[name] = _Pass(call, entered, stream_of(returned), rest)

    def hook_of_branch(
        name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Tensor
    ) -> None:
        stream, call = taken(args, kwargs)
        first = passes[name].entered if name in passes else stream
        passes[name] = _Pass(call, first, returned + stream, None)

    with ExitStack() as stack, evaluating(model):
        for index, name in enumerate(names):
            called = [f"{name}.{branch}" for branch in branches.get(index, ())]
            for module in called or [name]:
                watch = partial(hook_of_branch if called else hook, name)
                stack.callback(named_module(model, module).register_forward_hook(watch, with_kwargs=True).remove)
        model(images)
    return passes


def _joined(left: Tensor, entered: Tensor) -> bool:
    return entered is left or (entered.shape == left.shape and torch.equal(entered, left))


def _same(a: Call, b: Call) -> bool:
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _tensors(call: Call) -> list[Tensor]:
    """Tensors in what a block is called with, those in tuples and mappings too."""
    return [value for value in tree_leaves((call.args, dict(call.kwargs))) if isinstance(value, Tensor)]
