"""Healing of a cut without labels: blocks are tuned, a few at a time, to the dense model's residual stream.

The closed-form repair (:mod:`gohsp.core.reconstruction`) fits readouts alone. Here all weights of a block follow by
gradient. A window slides from the first block to the last: its blocks are given what the blocks before it now send, and
trained together for a few steps to send on what the dense model has at their depths, so that a block learns what the
next ones make of its errors; then it moves on by one. The targets of a block are numbers by the thousand for every
image, so that a thousand unlabelled images are not learnt by heart as they soon are by the predictions' divergence
alone (``docs/oneshot.md``). BRECQ (arXiv 2102.05426) tunes quantised networks block by block, CBQ (arXiv 2312.07950) in
such windows.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from gohsp.core.capture import Trunk, device_of, passed
from gohsp.settings import POSITIVE, require_settings, whole

logger = logging.getLogger(__name__)

WARM_UP = 0.1
"""Share of a window's steps in which the rate rises."""

WINDOW = 3
"""Neighbouring blocks tuned together, of which the next window leaves the first as it is."""

BATCH = 32
"""Images a step."""

FISHER = 0.5
"""Share of a token's weight in the error that follows the Fisher information of the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealSettings:
    """How the blocks of a one-shot cut are tuned, without labels.

    Attributes:
        epochs: Passes of every window over the calibration images and their mirror images; 0 leaves healing out.
        learning_rate: Peak rate of Adam; it falls along a cosine.
    """

    epochs: int = 0
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        require_settings(self, "heal", epochs=whole(0), learning_rate=POSITIVE)


@dataclass(frozen=True)
class HealStep:
    """One window of healing.

    Attributes:
        blocks: Windows done so far, which is how many blocks are final; those of the last window behind its first
            are tuned, too.
        error: Mean squared error in the last window's last epoch, with token weights, over the variance of the
            target's first batch, averaged over the window's blocks; None before the first.
        distance: Distance of the outputs on held-out images.
    """

    blocks: int
    error: float | None
    distance: float


def heal(
    student: Trunk,
    teacher: Trunk,
    entered: Iterable[Tensor],
    weights: Mapping[int, Tensor],
    settings: HealSettings,
    *,
    distance: Callable[[], float],
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    store: Callable[[], MutableSequence[Tensor]] = list,
    advance: Callable[[], None] = lambda: None,
) -> tuple[HealStep, ...]:
    """Tune the blocks of ``student`` in place, and undo what held-out images do not gain by.

    Args:
        student: The cut model's blocks, in evaluation mode, with weights that require gradients.
        teacher: The dense model's; left as they are.
        entered: What enters the first block of either, in batches ``[B, tokens, D]``.
        weights: How much each token ``[tokens]`` of a block's output counts, by the block's index; all alike where it
            is missing.
        settings: Length and rate.
        distance: How far the student's output is now from the teacher's on held-out images.
        seed: Of the order of images; global generators are left as they are.
        precision: Data type of the forward passes; below float32 by autocast.
        store: Makes an empty place for a residual stream; ``list`` keeps it in memory.
        advance: Called once per block.

    Returns:
        The state before, and after each window. The student ends in the one of least distance.
    """
    stream = dense_stream = _stored(entered, store())
    targets: deque[Sequence[Tensor]] = deque()
    generator = torch.Generator().manual_seed(seed)
    count = len(student.blocks)
    curve, best = [HealStep(0, None, distance())], _states(student)
    for first in range(count):
        window = range(first, min(first + WINDOW, count))
        for index in window[len(targets) :]:
            dense_stream = _stored(_sent(teacher, index, dense_stream, precision), store())
            targets.append(dense_stream)
        error = _tune(student, window, stream, targets, weights, settings, generator, precision)
        now = distance()
        if not math.isfinite(error + now):
            logger.warning("healing: the window at block %d ended in NaN or infinite values; try a lower rate", first)
            break
        if now < min(step.distance for step in curve):
            best = _states(student)
        curve.append(HealStep(first + 1, error, now))
        logger.info("healing: %s", curve[-1])
        advance()
        targets.popleft()
        if first + 1 < count:
            stream = _stored(_sent(student, first, stream, precision), store())
    for index, state in enumerate(best):
        student.block(index).load_state_dict(state)
    return tuple(curve)


def _states(trunk: Trunk) -> list[dict[str, Tensor]]:
    """Copies of the weights of all blocks."""
    return [copy.deepcopy(trunk.block(index).state_dict()) for index in range(len(trunk.blocks))]


def _stored(batches: Iterable[Tensor], store: MutableSequence[Tensor]) -> MutableSequence[Tensor]:
    """``store``, filled."""
    store.extend(batches)
    return store


@torch.no_grad()
def _sent(trunk: Trunk, index: int, stream: Iterable[Tensor], precision: torch.dtype) -> Iterator[Tensor]:
    """What a block makes of a stream."""
    device = device_of(trunk.model)
    for x in stream:
        yield passed(lambda x: trunk.run(index, trunk.onto(index, x)), x.to(device), precision)


def _tune(
    trunk: Trunk,
    window: Sequence[int],
    stream: Sequence[Tensor],
    targets: Sequence[Sequence[Tensor]],
    weights: Mapping[int, Tensor],
    settings: HealSettings,
    generator: torch.Generator,
    precision: torch.dtype,
) -> float:
    """Train successive blocks, given ``stream``, to send ``targets`` on; returns their error in the last epoch."""
    parameters = [weight for index in window for weight in trunk.block(index).parameters()]
    device = parameters[0].device
    steps = max(settings.epochs * sum(-(-len(batch) // BATCH) for batch in stream), 3)  # of fewer there is no schedule
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=(0.9, 0.99))
    schedule = OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=steps,
        pct_start=max(WARM_UP, 2 / steps),
        cycle_momentum=False,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    scales = [
        target[0].to(device).flatten(0, -2).var(dim=0, correction=0).mean().clamp_min(1e-12) for target in targets
    ]
    importance = [weights[index].to(device)[:, None] if index in weights else 1.0 for index in window]
    total, count = 0.0, 1
    for _ in range(settings.epochs):
        total, count = 0.0, 0
        for x, *wanted in _shuffled([stream, *targets], BATCH, generator):
            x, loss = x.to(device), torch.zeros((), device=device)
            for index, y, scale, weight in zip(window, wanted, scales, importance, strict=True):
                x = passed(lambda x, index=index: trunk.run(index, trunk.onto(index, x)), x, precision)
                error = (x - y.to(device)).square().flatten(1, -2)
                loss = loss + (error / scale * weight).mean() / len(window)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            total, count = total + float(loss.detach()) * len(x), count + len(x)
    return total / count


def _shuffled(streams: Sequence[Sequence[Tensor]], size: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """The same images of every stream in a new order: stored batches are shuffled, and images within each."""
    for b in torch.randperm(len(streams[0]), generator=generator).tolist():
        batches = [stream[b] for stream in streams]
        for few in torch.randperm(len(batches[0]), generator=generator).split(size):
            yield [batch[few] for batch in batches]
