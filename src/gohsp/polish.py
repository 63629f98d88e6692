"""Optional distillation on the calibration images, kept only as far as it helps images that it does not see.

A thousand images are soon learnt by heart (design, section 6: naive distillation on them loses accuracy). Three things
hold that off: teacher and student are given the same crops and mixtures of images, new ones each time ("A good teacher
is patient and consistent", arXiv 2106.05237); every block's output is compared, not the predictions alone; and held-out
images decide which epoch counts, the state before the first included.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from gohsp.core.activations import Stages
from gohsp.errors import RecipeError

logger = logging.getLogger(__name__)

WARM_UP = 0.1
"""Share of the steps in which the rate rises."""


@dataclass(frozen=True, kw_only=True)
class PolishSettings:
    """How the one-shot route's result is distilled from the dense model, without labels.

    Attributes:
        epochs: Passes over the calibration images, at most; 0 leaves polishing out.
        learning_rate: Peak rate of AdamW; it falls along a cosine.
        batch_size: Images a step.
        features: Weight of the blocks' outputs' mean relative squared error, beside the predictions' divergence.
        mixup: Alpha of the mixtures that half of the steps are given; 0 for none.
    """

    epochs: int = 0
    learning_rate: float = 5e-5
    batch_size: int = 32
    features: float = 1.0
    mixup: float = 0.8

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not 0 < self.learning_rate < math.inf:
            raise RecipeError(
                "polish needs epochs >= 0, batch_size >= 1 and learning_rate > 0; got "
                f"epochs={self.epochs}, batch_size={self.batch_size}, learning_rate={self.learning_rate}"
            )
        if not (0 <= self.features < math.inf and 0 <= self.mixup < math.inf):
            raise RecipeError(
                f"polish.features and polish.mixup must be 0 or more, got {self.features} and {self.mixup}"
            )


@dataclass(frozen=True)
class PolishEpoch:
    """One line of the polish: mean loss on its images (None before the first epoch), divergence on held-out ones."""

    epoch: int
    train_loss: float | None
    kl: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def polish(
    model: nn.Module,
    student: Stages,
    teacher: Stages,
    views: DataLoader[Any],
    settings: PolishSettings,
    *,
    divergence: Callable[[], float],
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    advance: Callable[[], None] = lambda: None,
) -> list[PolishEpoch]:
    """Distil ``model`` from ``teacher`` in place and leave it as it was after the best epoch.

    Args:
        model: The cut model, in evaluation mode.
        student: The same as stages.
        teacher: The dense model as stages; left as it is.
        views: Augmented images ``[B, C, H, W]``, others each time it is iterated, and labels, which are not read.
        settings: Length, rate and losses.
        divergence: How far ``model`` is now from the dense one on held-out images.
        seed: Of the mixtures; global generators are left as they are.
        precision: Data type of the forward passes; below float32 by autocast.
        advance: Called once per epoch.

    Returns:
        The state before, and after each epoch; the one with the least divergence is what ``model`` is left in.
    """
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    steps = max(settings.epochs * len(views), 3)  # of fewer there is no schedule
    # It cycles beta1 as well, from 0.95 to 0.85 and back. Its warm-up divides by its length less one.
    schedule = OneCycleLR(optimizer, settings.learning_rate, total_steps=steps, pct_start=max(WARM_UP, 2 / steps))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    curve = [PolishEpoch(0, None, divergence())]
    best = copy.deepcopy(model.state_dict())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(1, settings.epochs + 1):
            total, seen = 0.0, 0
            for images, _ in views:
                if not len(images):  # none of them could be read
                    continue
                images = _mixed(images.to(device), settings.mixup)
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    loss = _distance(student, teacher, images, settings.features)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(weights, 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
                total, seen = total + float(loss.detach()) * len(images), seen + len(images)
            kl = divergence()
            if not math.isfinite(total + kl):
                logger.warning("polish: epoch %d ended in NaN or infinite values; a lower rate may help", epoch)
                break
            now = PolishEpoch(epoch, total / seen, kl)
            logger.info("polish: %s", now)
            if now.kl < min(past.kl for past in curve):
                best = copy.deepcopy(model.state_dict())
            curve.append(now)
            advance()
    model.load_state_dict(best)
    return curve


def _mixed(images: Tensor, alpha: float) -> Tensor:
    """In half of the calls, each image mixed with the one before it."""
    if alpha == 0 or torch.rand(()) < 0.5:
        return images
    share = float(Beta(alpha, alpha).sample())
    return share * images + (1 - share) * images.roll(1, 0)


def _distance(student: Stages, teacher: Stages, images: Tensor, features: float) -> Tensor:
    """Divergence of the predictions, and the mean relative squared error of the blocks' outputs."""
    with torch.no_grad():
        expected, targets = _outputs(teacher, images)
    predicted, outputs = _outputs(student, images)
    loss = F.kl_div(
        predicted.float().log_softmax(-1), expected.float().log_softmax(-1), reduction="batchmean", log_target=True
    )
    errors = [
        (a.float() - b.float()).square().mean() / b.float().var(dim=(0, 1), correction=0).mean().clamp_min(1e-12)
        for a, b in zip(outputs, targets, strict=True)
    ]
    return loss + features * torch.stack(errors).mean()


def _outputs(network: Stages, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the residual stream ``[B, tokens, D]`` after each block."""
    x, outputs = network.embed(images), []
    for block in network.blocks:
        x = block(x)
        outputs.append(x)
    return network.head(x), outputs
