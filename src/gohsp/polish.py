"""Optional polish of a one-shot cut: its blocks are tuned one by one to the dense model's residual stream.

The closed-form repair (:mod:`gohsp.core.reconstruction`) fits readouts alone. Here all weights of a block follow by
gradient: first block to last, each is given what the blocks before it now send, and trained for a few steps to send on
what the dense model has at that depth. The targets of a block are numbers by the thousand for every image, so that a
thousand unlabelled images are not learnt by heart as they soon are by the predictions' divergence alone (design,
section 6: naive distillation on them loses accuracy). BRECQ (arXiv 2102.05426) tunes quantised networks likewise.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from gohsp.core.activations import Stages
from gohsp.core.sensitivity import passed
from gohsp.errors import RecipeError

logger = logging.getLogger(__name__)

WARM_UP = 0.1
"""Share of a block's steps in which the rate rises."""


@dataclass(frozen=True, kw_only=True)
class PolishSettings:
    """How the blocks of the one-shot route's result are tuned, without labels.

    Attributes:
        epochs: Passes of every block over the calibration images and their mirror images; 0 leaves polishing out.
        learning_rate: Peak rate of Adam; it falls along a cosine.
        batch_size: Images a step; no more than lie in a stored batch, of which a run has 64.
        fisher: Share of a token's weight in the error that follows the Fisher information of the predictions, 0 to 1;
            the rest is spread evenly.
    """

    epochs: int = 0
    learning_rate: float = 5e-4
    batch_size: int = 32
    fisher: float = 0.5

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not 0 < self.learning_rate < math.inf:
            raise RecipeError(
                "polish needs epochs >= 0, batch_size >= 1 and learning_rate > 0; got "
                f"epochs={self.epochs}, batch_size={self.batch_size}, learning_rate={self.learning_rate}"
            )
        if not 0 <= self.fisher <= 1:
            raise RecipeError(f"polish.fisher is a share, 0 to 1; got {self.fisher}")


@dataclass(frozen=True)
class PolishStep:
    """One line of the polish.

    Attributes:
        blocks: Blocks tuned so far.
        error: Mean squared error of the last of them in its last epoch, with token weights, over the variance of its
            target's first batch; None before the first.
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
        The state before, and after each block. Blocks behind the state of least divergence are as they were before.
    """
    target, stream = store(), store()
    for batch in embedded:
        target.append(batch)
        stream.append(batch)
    generator = torch.Generator().manual_seed(seed)
    curve, before = [PolishStep(0, None, divergence())], []
    for i, (dense, block) in enumerate(zip(teacher.blocks, student.blocks, strict=True)):
        _pass_on(dense, target, precision)
        before.append(copy.deepcopy(block.state_dict()))
        error = _tune(block, stream, target, weights[i], settings, generator, precision)
        kl = divergence()
        if not math.isfinite(error + kl):
            logger.warning("polish: block %d ended in NaN or infinite values; a lower rate may help", i)
            break
        curve.append(PolishStep(i + 1, error, kl))
        logger.info("polish: %s", curve[-1])
        advance()
        if block is not student.blocks[-1]:
            _pass_on(block, stream, precision)
    kept = min(curve, key=lambda step: step.kl).blocks
    for block, state in list(zip(student.blocks, before, strict=False))[kept:]:
        block.load_state_dict(state)
    return curve


@torch.no_grad()
def _pass_on(block: nn.Module, stream: MutableSequence[Tensor], precision: torch.dtype) -> None:
    device = next(block.parameters()).device
    for b in range(len(stream)):
        stream[b] = passed(block, stream[b].to(device), precision)


def _tune(
    block: nn.Module,
    stream: Sequence[Tensor],
    target: Sequence[Tensor],
    weights: Tensor | None,
    settings: PolishSettings,
    generator: torch.Generator,
    precision: torch.dtype,
) -> float:
    """Train a block to make ``target`` of ``stream``; returns its relative error in the last epoch."""
    parameters = list(block.parameters())
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
    scale = target[0].to(device).var(dim=(0, 1), correction=0).mean().clamp_min(1e-12)
    importance = None if weights is None else weights.to(device)[:, None]
    total, count = 0.0, 1
    for _ in range(settings.epochs):
        total, count = 0.0, 0
        for x, y in _shuffled(stream, target, settings.batch_size, generator):
            y = y.to(device)
            error = (passed(block, x.to(device), precision) - y).square() / scale
            loss = (error if importance is None else error * importance).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            total, count = total + float(loss.detach()) * len(x), count + len(x)
    return total / count


def _shuffled(
    stream: Sequence[Tensor], target: Sequence[Tensor], size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets in a new order: stored batches are shuffled, and images within each."""
    for b in torch.randperm(len(stream), generator=generator).tolist():
        x, y = stream[b], target[b]
        for few in torch.randperm(len(x), generator=generator).split(size):
            yield x[few], y[few]
