"""One forward pass of a few images, differentiated: what ranking, token weights and damage curves are read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.core.capture import (
    Call,
    autocast,
    device_of,
    evaluating,
    in_stream,
    named_module,
    require_finite,
    taken,
)
from gohsp.core.objective import Objective
from gohsp.structure import Attention, Network

IMAGES = 32
"""Most images of one backward pass."""

ROOM = 1 << 25
"""Most numbers that sub-layers write in one backward pass, which keeps some thirty times as many.

So memory hardly depends on the model: DeiT-Tiny's 32 images, 18 of DeiT-Small's and 9 of a ViT-Base's need as much.
"""


def images_at_once(network: Network) -> int:
    """Images of one backward pass: what it needs of the forward pass is kept for all of them."""
    written = sum(sub.tokens * sub.readout.size for sub in network.present)
    return max(1, min(IMAGES, ROOM // max(1, written)))


@dataclass(frozen=True, slots=True)
class Gradients:
    """What one pass of a few images tells, by the names of present sub-layers.

    Attributes:
        images: How many.
        output: What counts of the model's output ``[B, ...]``, float32.
        inputs: What attentions read, row by row.
        calls: What attentions are called with besides.
        read: What readouts read ``[B, tokens, units]``.
        drawn: For each draw of the objective, its gradients at what readouts write ``[B, tokens, D]``.
        confidence: The same of the objective's confidence; None where it has none, or nobody asked.
    """

    images: int
    output: Tensor
    inputs: Mapping[str, Tensor]
    calls: Mapping[str, Call]
    read: Mapping[str, Tensor]
    drawn: tuple[Mapping[str, Tensor], ...]
    confidence: Mapping[str, Tensor] | None


def differentiated(
    model: nn.Module,
    network: Network,
    objective: Objective,
    batches: Iterable[Tensor],
    *,
    draws: int = 1,
    confidence: bool = False,
    dense: Iterable[Tensor] | None = None,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
) -> Iterator[Gradients]:
    """Run images through a model, a few at a time, and differentiate its output at what every sub-layer writes.

    Args:
        model: The model; left as it is.
        network: Its description.
        objective: What to differentiate.
        batches: Images ``[B, C, H, W]``.
        draws: Backward passes of the objective's draws. With none, and no confidence, there is no backward pass.
        confidence: Whether to differentiate the objective's confidence, too, where it has one.
        dense: The dense model's outputs, as an earlier call of this function with the same images gave them one by one;
            None where ``model`` is the dense model.
        seed: Of the draws.
        precision: Data type of the passes; below float32 by autocast.

    Raises:
        NonFiniteError: NaN or infinity in what flows through a sub-layer, or in the output.
    """
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    count = images_at_once(network)
    few = (few for batch in batches for few in batch.split(count))
    for images, expected in ((images, None) for images in few) if dense is None else zip(few, dense, strict=True):
        yield _pass(model, network, objective, images.to(device), draws, confidence, expected, generator, precision)


def _pass(
    model: nn.Module,
    network: Network,
    objective: Objective,
    images: Tensor,
    draws: int,
    confidence: bool,
    dense: Tensor | None,
    generator: torch.Generator,
    precision: torch.dtype,
) -> Gradients:
    inputs: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    subs = {sub.name: sub for sub in network.present}
    backward = draws > 0 or confidence

    def keep(name: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A leaf is only needed where nothing before it asks for gradients; parameters may be frozen.
        output = output if output.requires_grad or not backward else output.detach().requires_grad_()
        if name not in written:  # gradient checkpointing comes here again on the way back
            written[name], read[name] = output, in_stream(subs[name], args[0].detach(), len(images))
        return output

    def note(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, calls[name] = taken(args, kwargs)
        inputs[name] = x.detach()

    with torch.set_grad_enabled(backward), evaluating(model), ExitStack() as stack:
        for sub in network.present:
            attention, readout = (named_module(model, name) for name in (sub.name, sub.readout.module))
            stack.callback(readout.register_forward_hook(partial(keep, sub.name)).remove)
            if isinstance(sub, Attention):
                hook = attention.register_forward_pre_hook(partial(note, sub.name), with_kwargs=True)
                stack.callback(hook.remove)
        with autocast(images.device, precision):
            output = objective.output(model(images)).float()
        for sub in network.present:
            if sub.name in inputs:
                require_finite(f"the input of module '{sub.name}'", inputs[sub.name])
            require_finite(f"the input of module '{sub.readout.module}'", read[sub.name])
        require_finite("the model's output", output)
        scalars = [objective.draw(output, generator) for _ in range(draws)]
        expected = output.detach() if dense is None else dense
        sure = objective.confidence(output, expected) if confidence and objective.confidence else None
        wanted = scalars if sure is None else [*scalars, sure]
        found = [
            {name: in_stream(subs[name], g, len(images)) for name, g in _differentiate(scalar, written, last).items()}
            for scalar, last in ((scalar, scalar is wanted[-1]) for scalar in wanted)
        ]
    sides = tuple(found[:draws]), None if sure is None else found[-1]
    return Gradients(len(images), output.detach(), inputs, calls, read, *sides)


def _differentiate(scalar: Tensor, written: Mapping[str, Tensor], last: bool) -> dict[str, Tensor]:
    values = torch.autograd.grad(scalar, list(written.values()), retain_graph=not last, materialize_grads=True)
    return dict(zip(written, values, strict=True))
