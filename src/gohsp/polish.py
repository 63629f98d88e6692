"""Optional polish of a one-shot cut: its blocks are tuned, a few at a time, to the dense model's residual stream.

The closed-form repair (:mod:`gohsp.core.reconstruction`) fits readouts alone. Here all weights of a block follow by
gradient. A window slides from the first block to the last: its blocks are given what the blocks before it now send, and
trained together for a few steps to send on what the dense model has at their depths, so that a block learns what the
next ones make of its errors; then it moves on by one. The targets of a block are numbers by the thousand for every
image, so that a thousand unlabelled images are not learnt by heart as they soon are by the predictions' divergence
alone (design, section 6: naive distillation on them loses accuracy). BRECQ (arXiv 2102.05426) tunes quantised networks
block by block, CBQ (arXiv 2312.07950) in such windows.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from gohsp.core.activations import Stages
from gohsp.core.sensitivity import passed
from gohsp.settings import POSITIVE, SHARE, require_settings, whole

logger = logging.getLogger(__name__)

WARM_UP = 0.1
"""Share of a window's steps in which the rate rises."""


@dataclass(frozen=True, kw_only=True)
class PolishSettings:
    """How the blocks of the one-shot route's result are tuned, without labels.

    Attributes:
        epochs: Passes of every window over the calibration images and their mirror images; 0 leaves polishing out.
        learning_rate: Peak rate of Adam; it falls along a cosine.
        batch_size: Images a step; no more than lie in a stored batch, of which a run has 64.
        fisher: Share of a token's weight in the error that follows the Fisher information of the predictions, 0 to 1;
            the rest is spread evenly.
        window: Neighbouring blocks tuned together, of which the next window leaves the first as it is; 1 tunes them one
            by one. Windows at the end are as long as blocks are left. Up to ``window + 1`` residual streams are kept
            at a time.
    """

    epochs: int = 0
    learning_rate: float = 5e-4
    batch_size: int = 32
    fisher: float = 0.5
    window: int = 3

    def __post_init__(self) -> None:
        require_settings(
            self, "polish", epochs=whole(0), learning_rate=POSITIVE, batch_size=whole(), fisher=SHARE, window=whole()
        )


@dataclass(frozen=True)
class PolishStep:
    """One line of the polish.

    Attributes:
        blocks: Windows done so far, which is how many blocks are final; those of the last window behind its first
            are tuned, too.
        error: Mean squared error in the last window's last epoch, with token weights, over the variance of the
            target's first batch, averaged over the window's blocks; None before the first.
        kl: Divergence of the predictions on held-out images.
    """

    blocks: int
    error: float | None
    kl: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def polish(
    student: Stages,
    teacher: Stages,
    embedded: Iterable[Tensor],
    weights: Sequence[Tensor | None],
    settings: PolishSettings,
    *,
    divergence: Callable[[], float],
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    store: Callable[[], MutableSequence[Tensor]] = list,
    advance: Callable[[], None] = lambda: None,
) -> list[PolishStep]:
    """Tune the blocks of ``student`` in place, and undo what held-out images do not gain by.

    Args:
        student: The cut model as stages, in evaluation mode, with weights that require gradients.
        teacher: The dense model as stages; left as it is.
        embedded: What enters the first block of either, in batches ``[B, tokens, D]``.
        weights: How much each token ``[tokens]`` of a block's output counts, by block; None counts all alike.
        settings: Length and rate.
        divergence: How far the student's predictions are now from the teacher's on held-out images.
        seed: Of the order of images; global generators are left as they are.
        precision: Data type of the forward passes; below float32 by autocast.
        store: Makes an empty place for a residual stream; ``list`` keeps it in memory.
        advance: Called once per block.

    Returns:
        The state before, and after each window. The student ends in the one of least divergence.
    """
    stream = dense_stream = _stored(embedded, store())
    targets: deque[Sequence[Tensor]] = deque()
    generator = torch.Generator().manual_seed(seed)
    curve, best = [PolishStep(0, None, divergence())], _states(student)
    for i, first in enumerate(student.blocks):
        blocks = student.blocks[i : i + settings.window]
        for dense in teacher.blocks[i + len(targets) : i + len(blocks)]:
            dense_stream = _stored(_sent(dense, dense_stream, precision), store())
            targets.append(dense_stream)
        error = _tune(blocks, stream, targets, weights[i : i + len(blocks)], settings, generator, precision)
        kl = divergence()
        if not math.isfinite(error + kl):
            logger.warning("polish: the window at block %d ended in NaN or infinite values; try a lower rate", i)
            break
        if kl < min(step.kl for step in curve):
            best = _states(student)
        curve.append(PolishStep(i + 1, error, kl))
        logger.info("polish: %s", curve[-1])
        advance()
        targets.popleft()
        if i + 1 < len(student.blocks):
            stream = _stored(_sent(first, stream, precision), store())
    for block, state in zip(student.blocks, best, strict=True):
        block.load_state_dict(state)
    return curve


def _states(stages: Stages) -> list[dict[str, Tensor]]:
    """Copies of the weights of all blocks."""
    return [copy.deepcopy(block.state_dict()) for block in stages.blocks]


def _stored(batches: Iterable[Tensor], store: MutableSequence[Tensor]) -> MutableSequence[Tensor]:
    """``store``, filled."""
    store.extend(batches)
    return store


@torch.no_grad()
def _sent(block: nn.Module, stream: Iterable[Tensor], precision: torch.dtype) -> Iterator[Tensor]:
    """What a block makes of a stream."""
    device = next(block.parameters()).device
    for x in stream:
        yield passed(block, x.to(device), precision)


def _tune(
    blocks: Sequence[nn.Module],
    stream: Sequence[Tensor],
    targets: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor | None],
    settings: PolishSettings,
    generator: torch.Generator,
    precision: torch.dtype,
) -> float:
    """Train successive blocks, given ``stream``, to send ``targets`` on; returns their error in the last epoch."""
    parameters = [weight for block in blocks for weight in block.parameters()]
    device = parameters[0].device
    per_epoch = sum(-(-len(batch) // settings.batch_size) for batch in stream)
    steps = max(settings.epochs * per_epoch, 3)  # of fewer there is no schedule, whose warm-up is divided by
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=(0.9, 0.99))
    schedule = OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=steps,
        pct_start=max(WARM_UP, 2 / steps),
        cycle_momentum=False,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    scales = [target[0].to(device).var(dim=(0, 1), correction=0).mean().clamp_min(1e-12) for target in targets]
    importance = [None if w is None else w.to(device)[:, None] for w in weights]
    total, count = 0.0, 1
    for _ in range(settings.epochs):
        total, count = 0.0, 0
        for x, *wanted in _shuffled([stream, *targets], settings.batch_size, generator):
            x, loss = x.to(device), torch.zeros((), device=device)
            for block, y, scale, weight in zip(blocks, wanted, scales, importance, strict=True):
                x = passed(block, x, precision)
                error = (x - y.to(device)).square() / scale
                loss = loss + (error if weight is None else error * weight).mean() / len(blocks)
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
